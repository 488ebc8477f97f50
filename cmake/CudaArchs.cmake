# Which architectures to compile CUDA kernels for.
#   TORCH_CUDA_ARCH_LIST  e.g. "8.0;9.0a+PTX"; default: all of the below that MTP_NVCC knows, and
#                         PTX of the newest of them for devices to come
# Sets MTP_CUDA_ARCHS (for people), MTP_CUDA_GENCODE (for nvcc) and MTP_CUDA_NEWEST.

set(_default_archs 8.0 8.6 8.9 9.0a 10.0 12.0)
set(MTP_CUDA_ARCHS "")
set(MTP_CUDA_GENCODE "")

execute_process(COMMAND ${MTP_NVCC} --list-gpu-arch OUTPUT_VARIABLE _known ERROR_QUIET)
string(REGEX MATCHALL "[0-9]+" _known "${_known}")

set(_wanted "$ENV{TORCH_CUDA_ARCH_LIST}")
set(_explicit ON)
if(_wanted STREQUAL "")
  set(_wanted ${_default_archs})
  set(_explicit OFF)
endif()
string(REPLACE " " ";" _wanted "${_wanted}")
set(MTP_CUDA_NEWEST "")
foreach(_item IN LISTS _wanted)
  if(NOT _item MATCHES "^([0-9]+)\\.([0-9])([af]?)(\\+PTX)?$")
    message(FATAL_ERROR "TORCH_CUDA_ARCH_LIST holds '${_item}'; expected entries like 8.0, 9.0a "
                        "or 12.0+PTX, separated by ';' or spaces")
  endif()
  set(_number "${CMAKE_MATCH_1}${CMAKE_MATCH_2}")
  set(_suffix "${CMAKE_MATCH_3}")
  set(_ptx "${CMAKE_MATCH_4}")
  if(NOT _number IN_LIST _known)
    if(_explicit)
      message(FATAL_ERROR "TORCH_CUDA_ARCH_LIST asks for ${_item}, which ${MTP_NVCC} does not "
                          "know; it knows ${_known}")
    endif()
    continue()
  endif()
  if(_number LESS 80)
    message(FATAL_ERROR "TORCH_CUDA_ARCH_LIST asks for ${_item}; the kernels need 8.0 or newer")
  endif()
  if(NOT MTP_PTXSIM)
    list(APPEND MTP_CUDA_GENCODE
         -gencode=arch=compute_${_number}${_suffix},code=sm_${_number}${_suffix})
  endif()
  if(_ptx OR MTP_PTXSIM)
    list(APPEND MTP_CUDA_GENCODE
         -gencode=arch=compute_${_number}${_suffix},code=compute_${_number}${_suffix})
  endif()
  list(APPEND MTP_CUDA_ARCHS ${_item})
  set(MTP_CUDA_NEWEST ${_number})
endforeach()
if(NOT _explicit)
  list(APPEND MTP_CUDA_GENCODE -gencode=arch=compute_${MTP_CUDA_NEWEST},code=compute_${MTP_CUDA_NEWEST})
  list(APPEND MTP_CUDA_ARCHS ${MTP_CUDA_NEWEST}+PTX)
endif()
string(REPLACE ";" " " MTP_CUDA_ARCHS "${MTP_CUDA_ARCHS}")
message(STATUS "mtp_ext: CUDA architectures ${MTP_CUDA_ARCHS}")
