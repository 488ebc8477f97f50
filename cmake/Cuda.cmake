# Decides whether CUDA sources are built, and for which architectures. Says so in one line.
#   MTP_CUDA              auto (default): if an nvcc is found; 1: required; 0: never
#   TORCH_CUDA_ARCH_LIST  e.g. "8.0;9.0a+PTX"; default: all of the below that this nvcc knows
# Sets MTP_WITH_CUDA, MTP_CUDA_VERSION, MTP_CUDA_ARCHS, MTP_CUDA_GENCODE.

set(MTP_WITH_CUDA OFF)
set(MTP_CUDA_VERSION "")
set(MTP_CUDA_ARCHS "")
set(MTP_CUDA_GENCODE "")
set(_default_archs 8.0 8.6 8.9 9.0a 10.0 12.0)

set(_mode "$ENV{MTP_CUDA}")
if(_mode STREQUAL "")
  set(_mode auto)
endif()
if(NOT _mode MATCHES "^(auto|0|1)$")
  message(FATAL_ERROR "MTP_CUDA must be auto, 1 or 0, got '${_mode}'")
endif()

if(_mode STREQUAL "0")
  message(STATUS "mtp_ext: building without CUDA, because MTP_CUDA=0")
  return()
endif()

# CUDA_HOME first: an nvcc on PATH may be a wrapper that says nothing of the toolkit's folder.
find_program(MTP_NVCC nvcc HINTS $ENV{CUDA_HOME}/bin $ENV{CUDA_PATH}/bin /usr/local/cuda/bin
             NO_DEFAULT_PATH)
find_program(MTP_NVCC nvcc)
if(NOT MTP_NVCC)
  if(_mode STREQUAL "1")
    message(FATAL_ERROR "MTP_CUDA=1, but there is no nvcc in $CUDA_HOME/bin, /usr/local/cuda/bin "
                        "or PATH. Install the CUDA toolkit or set CUDA_HOME to it; or build the "
                        "CPU library with MTP_CUDA=0.")
  endif()
  message(STATUS "mtp_ext: building without CUDA, because no nvcc was found (set CUDA_HOME, or "
                 "MTP_CUDA=1 to make this an error)")
  return()
endif()

execute_process(COMMAND ${MTP_NVCC} --list-gpu-arch OUTPUT_VARIABLE _known ERROR_QUIET)
string(REGEX MATCHALL "[0-9]+" _known "${_known}")

set(_wanted "$ENV{TORCH_CUDA_ARCH_LIST}")
set(_explicit ON)
if(_wanted STREQUAL "")
  set(_wanted ${_default_archs})
  set(_explicit OFF)
endif()
string(REPLACE " " ";" _wanted "${_wanted}")
set(_newest "")
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
  list(APPEND MTP_CUDA_GENCODE
       -gencode=arch=compute_${_number}${_suffix},code=sm_${_number}${_suffix})
  if(_ptx)
    list(APPEND MTP_CUDA_GENCODE
         -gencode=arch=compute_${_number}${_suffix},code=compute_${_number}${_suffix})
  endif()
  list(APPEND MTP_CUDA_ARCHS ${_item})
  set(_newest ${_number})
endforeach()
if(NOT _explicit)
  list(APPEND MTP_CUDA_GENCODE -gencode=arch=compute_${_newest},code=compute_${_newest})
  list(APPEND MTP_CUDA_ARCHS ${_newest}+PTX)
endif()
string(REPLACE ";" " " MTP_CUDA_ARCHS "${MTP_CUDA_ARCHS}")

set(CMAKE_CUDA_COMPILER ${MTP_NVCC})
set(CMAKE_CUDA_ARCHITECTURES OFF)
set(CMAKE_CUDA_RUNTIME_LIBRARY Static)
# nvcc's own device list is given by -gencode; without this CMake would test-compile for sm_52.
set(CMAKE_CUDA_FLAGS_INIT "-arch=compute_${_newest}")
enable_language(CUDA)
set(MTP_CUDA_VERSION ${CMAKE_CUDA_COMPILER_VERSION})
set(MTP_WITH_CUDA ON)
message(STATUS "mtp_ext: building CUDA kernels with nvcc ${MTP_CUDA_VERSION} for ${MTP_CUDA_ARCHS}")
