# Decides whether CUDA sources are built, and says so in one line.
#   MTP_CUDA  auto (default): if an nvcc is found; 1: required; 0: never
# Sets MTP_WITH_CUDA, MTP_CUDA_VERSION and what CudaArchs.cmake sets.

set(MTP_WITH_CUDA OFF)
set(MTP_CUDA_VERSION "")
set(MTP_CUDA_ARCHS "")

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

# A CUDA_HOME that is set decides alone: falling back to another toolkit would hide a mistake. An
# nvcc on PATH comes last, since it may be a wrapper that says nothing of the toolkit's folder.
if(NOT "$ENV{CUDA_HOME}" STREQUAL "")
  find_program(MTP_NVCC nvcc PATHS $ENV{CUDA_HOME}/bin NO_DEFAULT_PATH)
  set(_searched "CUDA_HOME=$ENV{CUDA_HOME}")
else()
  find_program(MTP_NVCC nvcc PATHS /usr/local/cuda/bin NO_DEFAULT_PATH)
  find_program(MTP_NVCC nvcc)
  set(_searched "/usr/local/cuda and PATH")
endif()
if(NOT MTP_NVCC)
  if(_mode STREQUAL "1")
    message(FATAL_ERROR "MTP_CUDA=1, but there is no nvcc in ${_searched}. Install the CUDA "
                        "toolkit or set CUDA_HOME to it; or build the CPU library with "
                        "MTP_CUDA=0.")
  endif()
  message(STATUS "mtp_ext: building without CUDA, because there is no nvcc in ${_searched} "
                 "(MTP_CUDA=1 makes this an error)")
  return()
endif()

include(CudaArchs)

set(CMAKE_CUDA_COMPILER ${MTP_NVCC})
set(CMAKE_CUDA_ARCHITECTURES OFF)
set(CMAKE_CUDA_RUNTIME_LIBRARY Static)
# Devices are given by -gencode; CMake would test-compile for one that this nvcc may have dropped.
# That is for CMake's own tests only: beside -gencode it would mean one architecture more.
set(CMAKE_CUDA_FLAGS_INIT "-arch=compute_${MTP_CUDA_NEWEST}")
enable_language(CUDA)
string(REPLACE "-arch=compute_${MTP_CUDA_NEWEST}" "" CMAKE_CUDA_FLAGS "${CMAKE_CUDA_FLAGS}")
set(MTP_CUDA_VERSION ${CMAKE_CUDA_COMPILER_VERSION})
set(MTP_WITH_CUDA ON)
message(STATUS "mtp_ext: building CUDA kernels with nvcc ${MTP_CUDA_VERSION}")
