# The CUDA toolkit: which nvcc builds the kernels, its runtime, and the architectures that it knows.

set(INT4MM_NVCC_MINIMUM 12.4)
set(INT4MM_NVCC_OF_THE_SYSTEM /usr/local/cuda/bin/nvcc)

# int4mm_try_nvcc(<path> <where it was found>): sets INT4MM_NVCC, INT4MM_NVCC_VERSION and INT4MM_NVCC_ORIGIN in the
# caller where <path> is an nvcc that is new enough and compiles with the host compiler; otherwise adds one sentence to
# INT4MM_NVCC_REJECTED.
function(int4mm_try_nvcc path origin)
  execute_process(COMMAND "${path}" --version RESULT_VARIABLE result OUTPUT_VARIABLE banner ERROR_QUIET)
  if(NOT result EQUAL 0 OR NOT banner MATCHES "release [0-9.]+, V([0-9.]+)")
    set(reason "is not an nvcc that runs")
  else()
    set(version ${CMAKE_MATCH_1})
    if(version VERSION_LESS INT4MM_NVCC_MINIMUM)
      set(reason "is nvcc ${version}, older than ${INT4MM_NVCC_MINIMUM}")
    else()
      # An nvcc without its headers, or one that refuses a newer host compiler, shows here and not halfway through.
      set(probe "${CMAKE_CURRENT_BINARY_DIR}/CMakeFiles/int4mm_nvcc_probe")
      file(WRITE "${probe}.cu" "#include <cuda_bf16.h>\n__global__ void probe() {}\n")
      set(host_compiler)
      if(CMAKE_CUDA_HOST_COMPILER)
        set(host_compiler -ccbin "${CMAKE_CUDA_HOST_COMPILER}")
      endif()
      execute_process(COMMAND "${path}" ${host_compiler} -c "${probe}.cu" -o "${probe}.o"
                      RESULT_VARIABLE result OUTPUT_VARIABLE output ERROR_VARIABLE output)
      if(result EQUAL 0)
        set(INT4MM_NVCC "${path}" PARENT_SCOPE)
        set(INT4MM_NVCC_VERSION ${version} PARENT_SCOPE)
        set(INT4MM_NVCC_ORIGIN "${origin}" PARENT_SCOPE)
        return()
      endif()
      set(reason "is nvcc ${version}, which cannot compile an empty kernel here:\n${output}")
    endif()
  endif()
  string(APPEND INT4MM_NVCC_REJECTED "\n  ${path} (from ${origin}) ${reason}")
  set(INT4MM_NVCC_REJECTED "${INT4MM_NVCC_REJECTED}" PARENT_SCOPE)
endfunction()

# int4mm_find_nvcc(): tries every place in turn, the most explicit first.
macro(int4mm_find_nvcc)
  set(INT4MM_NVCC "")
  set(INT4MM_NVCC_REJECTED "")

  # The host compiler of the kernels is the one that compiles the rest, unless the user chose another.
  if(NOT CMAKE_CUDA_HOST_COMPILER)
    if(DEFINED ENV{CUDAHOSTCXX})
      set(CMAKE_CUDA_HOST_COMPILER "$ENV{CUDAHOSTCXX}")
    elseif(CMAKE_CXX_COMPILER)
      set(CMAKE_CUDA_HOST_COMPILER "${CMAKE_CXX_COMPILER}")
    endif()
  endif()

  if(CMAKE_CUDA_COMPILER)
    int4mm_try_nvcc("${CMAKE_CUDA_COMPILER}" CMAKE_CUDA_COMPILER)
  endif()
  if(NOT INT4MM_NVCC AND DEFINED ENV{CUDACXX})
    int4mm_try_nvcc("$ENV{CUDACXX}" CUDACXX)
  endif()
  foreach(_variable CUDA_HOME CUDA_PATH)
    if(NOT INT4MM_NVCC AND DEFINED ENV{${_variable}})
      int4mm_try_nvcc("$ENV{${_variable}}/bin/nvcc" ${_variable})
    endif()
  endforeach()
  if(NOT INT4MM_NVCC)
    find_program(_nvcc_on_path nvcc PATHS ENV PATH NO_DEFAULT_PATH NO_CACHE)
    if(_nvcc_on_path)
      int4mm_try_nvcc("${_nvcc_on_path}" PATH)
    endif()
  endif()
  if(NOT INT4MM_NVCC AND EXISTS "${INT4MM_NVCC_OF_THE_SYSTEM}")
    int4mm_try_nvcc("${INT4MM_NVCC_OF_THE_SYSTEM}" /usr/local/cuda)
  endif()
  if(NOT INT4MM_NVCC AND Python_EXECUTABLE)
    # The wheels of one CUDA major version share one folder, nvidia/cu<major>, a toolkit in itself.
    execute_process(
      COMMAND "${Python_EXECUTABLE}" -c
        "import importlib.util as u, pathlib; s = u.find_spec('nvidia'); \
print(*(n for p in (s.submodule_search_locations if s else ()) for n in sorted(pathlib.Path(p).glob('cu*/bin/nvcc'), reverse=True)), sep=';')"
      OUTPUT_VARIABLE _nvcc_wheels OUTPUT_STRIP_TRAILING_WHITESPACE)
    foreach(_nvcc_wheel IN LISTS _nvcc_wheels)
      if(NOT INT4MM_NVCC)
        int4mm_try_nvcc("${_nvcc_wheel}" "the nvidia-cuda-nvcc wheel")
      endif()
    endforeach()
  endif()
endmacro()

# int4mm_resolve_cuda(<ON|OFF|AUTO>): sets INT4MM_CUDA_ENABLED, says why, and finds nvcc where it is wanted.
macro(int4mm_resolve_cuda mode)
  set(INT4MM_CUDA_ENABLED OFF)
  if("${mode}" STREQUAL "OFF")
    message(STATUS "jax_int4mm: CUDA module: off, as asked by JAX_INT4MM_CUDA=OFF")
  elseif("${mode}" MATCHES "^(ON|AUTO)$")
    int4mm_find_nvcc()
    if(INT4MM_NVCC)
      set(INT4MM_CUDA_ENABLED ON)
      message(STATUS "jax_int4mm: CUDA module: on, with nvcc ${INT4MM_NVCC_VERSION}, ${INT4MM_NVCC} "
                     "(from ${INT4MM_NVCC_ORIGIN})")
    else()
      set(_missing
        "no usable nvcc of version ${INT4MM_NVCC_MINIMUM} or newer was found in CUDACXX, CUDA_HOME, CUDA_PATH, PATH, "
        "/usr/local/cuda or the nvidia-cuda-nvcc wheel of the building Python.${INT4MM_NVCC_REJECTED}\n"
        "To build it, install a CUDA toolkit and set CUDACXX to its nvcc, or let pip fetch the compiler from PyPI: "
        "JAX_INT4MM_CUDA=ON pip install .")
      if("${mode}" STREQUAL "ON")
        message(FATAL_ERROR "jax_int4mm: the CUDA module was asked for by JAX_INT4MM_CUDA=ON, but " ${_missing}
                            "\nFor a build without it: JAX_INT4MM_CUDA=OFF.")
      endif()
      message(STATUS "jax_int4mm: CUDA module: off, since " ${_missing})
    endif()
  else()
    message(FATAL_ERROR "jax_int4mm: JAX_INT4MM_CUDA is \"${mode}\"; it must be ON, OFF or AUTO.")
  endif()
endmacro()

# int4mm_find_cuda_runtime(): the headers and the static runtime that belong to INT4MM_NVCC, as nvcc itself sees them.
# Sets INT4MM_CUDA_INCLUDE_DIR and INT4MM_CUDART_STATIC. CMake's FindCUDAToolkit wants a libcudart.so, which the wheels
# do not have.
function(int4mm_find_cuda_runtime)
  execute_process(COMMAND "${INT4MM_NVCC}" --dryrun -x cu -c /dev/null OUTPUT_VARIABLE dryrun ERROR_VARIABLE dryrun
                  COMMAND_ERROR_IS_FATAL ANY)
  string(REGEX MATCH "#\\$ TOP=([^\r\n]+)" _ "${dryrun}")
  set(top "${CMAKE_MATCH_1}")
  string(REGEX MATCHALL "-I[^\" \r\n]+" include_dirs "${dryrun}")
  string(REGEX MATCHALL "-L[^\" \r\n]+" library_dirs "${dryrun}")
  list(TRANSFORM include_dirs REPLACE "^-I" "")
  list(TRANSFORM library_dirs REPLACE "^-L" "")
  find_path(include_dir cuda_runtime.h HINTS ${include_dirs} "${top}/include" REQUIRED NO_CACHE)
  find_library(cudart_static cudart_static HINTS ${library_dirs} "${top}/lib64" "${top}/lib" REQUIRED NO_CACHE)
  set(INT4MM_CUDA_INCLUDE_DIR "${include_dir}" PARENT_SCOPE)
  set(INT4MM_CUDART_STATIC "${cudart_static}" PARENT_SCOPE)
endfunction()

# int4mm_cuda_architectures(<variable>): those of our architectures that INT4MM_NVCC knows, machine code for each, and
# PTX for the newest, which later GPUs compile for themselves.
function(int4mm_cuda_architectures variable)
  execute_process(COMMAND "${INT4MM_NVCC}" --list-gpu-arch OUTPUT_VARIABLE known COMMAND_ERROR_IS_FATAL ANY)
  set(architectures)
  foreach(architecture 80 86 89 90a 100 120)
    # The list names the family, 90, and leaves out 90a, the same with wgmma and setmaxnreg.
    string(REPLACE "a" "" family ${architecture})
    if(known MATCHES "compute_${family}[^0-9]")
      list(APPEND architectures ${architecture}-real)
      set(newest ${family}-virtual)
    endif()
  endforeach()
  set(${variable} ${architectures} ${newest} PARENT_SCOPE)
endfunction()
