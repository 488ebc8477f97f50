# Asks the torch that Python imports for its headers, libraries and version. find_package(Torch)
# would drag in torch's own CUDA configuration, which needs more of the toolkit than we do.

set(_probe [=[
import glob, os, sys
try:
    import torch
except ImportError as error:
    sys.exit(f"cannot import torch: {error}")
from torch.utils import cpp_extension
lib = os.path.join(os.path.dirname(torch.__file__), "lib")
gomp = sorted(glob.glob(os.path.join(lib, "libgomp*.so*")))
gomp += sorted(glob.glob(os.path.join(os.path.dirname(torch.__file__) + ".libs", "libgomp*.so*")))
print(torch.__version__)
print(";".join(cpp_extension.include_paths()))
print(lib)
print(gomp[0] if gomp else "")
]=])
execute_process(COMMAND ${Python_EXECUTABLE} -c "${_probe}"
                OUTPUT_VARIABLE _answer ERROR_VARIABLE _error RESULT_VARIABLE _status
                OUTPUT_STRIP_TRAILING_WHITESPACE)
if(NOT _status EQUAL 0)
  message(FATAL_ERROR "mtp_ext builds against an installed torch and found none with "
                      "${Python_EXECUTABLE}:\n${_error}\n"
                      "Install it first, then build without isolation:\n"
                      "  pip install torch\n  pip install --no-build-isolation .")
endif()
string(REPLACE ";" "\\;" _answer "${_answer}")
string(REPLACE "\n" ";" _answer "${_answer}")
list(GET _answer 0 MTP_TORCH_VERSION)
list(GET _answer 1 _include)
list(GET _answer 2 _lib)
list(LENGTH _answer _lines)
set(_gomp "")
if(_lines GREATER 3)
  list(GET _answer 3 _gomp)
endif()

add_library(mtp_torch INTERFACE)
target_include_directories(mtp_torch SYSTEM INTERFACE ${_include})
target_link_libraries(mtp_torch INTERFACE ${_lib}/libc10${CMAKE_SHARED_LIBRARY_SUFFIX}
                                          ${_lib}/libtorch_cpu${CMAKE_SHARED_LIBRARY_SUFFIX})

# OpenMP: compile with the compiler's flag, link the runtime that torch ships, so that one process
# never holds two thread pools. Without one in the wheel, torch uses the system's and so do we.
find_package(OpenMP COMPONENTS CXX)
add_library(mtp_openmp INTERFACE)
if(OpenMP_CXX_FOUND)
  target_compile_options(mtp_openmp INTERFACE $<$<COMPILE_LANGUAGE:CXX>:${OpenMP_CXX_FLAGS}>)
  if(_gomp)
    target_link_libraries(mtp_openmp INTERFACE ${_gomp})
  else()
    target_link_libraries(mtp_openmp INTERFACE ${OpenMP_CXX_LIBRARIES})
  endif()
else()
  message(STATUS "mtp_ext: no OpenMP in this compiler; CPU kernels will use one thread")
endif()
message(STATUS "mtp_ext: torch ${MTP_TORCH_VERSION}")
