# CUTLASS and CuTe headers come from the nvidia-cutlass package (pip install --no-deps).
execute_process(COMMAND ${Python_EXECUTABLE} -c
"import importlib.metadata as m, importlib.util as u, os
spec = u.find_spec('cutlass_library')
print(os.path.join(os.path.dirname(spec.origin), 'source', 'include') if spec else '')
print(m.version('nvidia-cutlass') if spec else '')"
                OUTPUT_VARIABLE _answer OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
string(REPLACE "\n" ";" _answer "${_answer}")
set(MTP_CUTLASS_VERSION "")
add_library(mtp_cutlass INTERFACE)
list(LENGTH _answer _lines)
if(_lines EQUAL 2)
  list(GET _answer 0 _include)
  list(GET _answer 1 MTP_CUTLASS_VERSION)
  target_include_directories(mtp_cutlass SYSTEM INTERFACE ${_include})
  target_compile_definitions(mtp_cutlass INTERFACE MTP_WITH_CUTLASS)
elseif(MTP_WITH_CUDA)
  message(STATUS "mtp_ext: no CUTLASS headers (pip install --no-deps nvidia-cutlass): many rows "
                 "are multiplied without wgmma on sm_90a")
endif()
