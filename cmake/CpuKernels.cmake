# mtp_cpu_kernels(<target> <sources...>): compiles every CPU kernel once per instruction-set level.
# csrc/cpu/common/isa.h describes the levels; the dispatcher picks one at run time.

set(MTP_CPU_ISA_LEVELS "" CACHE STRING "Levels to compile; empty: all the compiler can")

include(CheckCXXCompilerFlag)

set(_isa_flags_generic "")
set(_isa_flags_avx2 -mavx2 -mfma -mf16c)
set(_isa_flags_avx512 ${_isa_flags_avx2} -mavx512f -mavx512bw -mavx512dq -mavx512vl
                      -mprefer-vector-width=512)
set(_isa_flags_avx512_bf16 ${_isa_flags_avx512} -mavx512bf16 -mavx512vbmi)
set(_isa_flags_amx ${_isa_flags_avx512_bf16} -mamx-tile -mamx-bf16 -mamx-int8)

function(mtp_cpu_kernels target)
  set(levels generic)
  if(CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64|amd64")
    set(known avx2 avx512 avx512_bf16 amx)
    foreach(level IN LISTS known)
      if(MTP_CPU_ISA_LEVELS AND NOT level IN_LIST MTP_CPU_ISA_LEVELS)
        continue()
      endif()
      string(REPLACE ";" " " flags "${_isa_flags_${level}}")
      set(CMAKE_REQUIRED_FLAGS "${flags}")
      check_cxx_compiler_flag("${flags}" MTP_COMPILER_HAS_${level})
      unset(CMAKE_REQUIRED_FLAGS)
      if(MTP_COMPILER_HAS_${level})
        list(APPEND levels ${level})
      endif()
    endforeach()
  endif()

  set(have "")
  foreach(level IN LISTS levels)
    string(TOUPPER ${level} upper)
    list(APPEND have MTP_HAVE_${upper})
  endforeach()
  # Only the dispatchers ask which levels there are: isa.cpp and the generic objects.
  set_source_files_properties(csrc/cpu/common/isa.cpp PROPERTIES COMPILE_DEFINITIONS "${have}")

  # The simulator's build only links them.
  set(optimise $<IF:$<BOOL:${MTP_PTXSIM}>,-O0,-O3>)
  set(number 0)
  foreach(level generic avx2 avx512 avx512_bf16 amx)
    if(level IN_LIST levels)
      # The baseline objects come first: should a function template of the standard library stay
      # out of line, the linker keeps the copy that runs everywhere.
      add_library(${target}_${level} OBJECT ${ARGN})
      target_link_libraries(${target}_${level} PRIVATE mtp_headers mtp_openmp)
      target_compile_definitions(${target}_${level} PRIVATE MTP_ISA=${level}
                                 MTP_ISA_LEVEL=${number})
      if(level STREQUAL generic)
        target_compile_definitions(${target}_${level} PRIVATE ${have})
      endif()
      target_compile_options(${target}_${level} PRIVATE ${_isa_flags_${level}} ${optimise}
                             -fno-math-errno -fno-trapping-math
                             # GCC 105593: its own AVX-512 headers
                             -Wno-maybe-uninitialized -Wno-uninitialized)
      target_sources(${target} PRIVATE $<TARGET_OBJECTS:${target}_${level}>)
    endif()
    math(EXPR number "${number} + 1")
  endforeach()
  string(REPLACE ";" ", " shown "${levels}")
  message(STATUS "mtp_ext: CPU kernels for ${shown}")
endfunction()
