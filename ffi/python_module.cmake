# int4mm_add_python_module(<name> <sources>...): a nanobind module of the Python package, with the XLA FFI headers.

# Without a component to ask for, scikit-build-core is building for a Python that nanobind has no stable ABI for.
find_package(Python 3.11 REQUIRED COMPONENTS Interpreter Development.Module ${SKBUILD_SABI_COMPONENT})
find_package(nanobind CONFIG REQUIRED)

# jaxlib is found, not imported: importing it would load all of XLA.
execute_process(
  COMMAND ${Python_EXECUTABLE} -c
    "import importlib.util as u, os; s = u.find_spec('jaxlib'); print(os.path.dirname(s.origin) if s else '')"
  OUTPUT_VARIABLE jaxlib_dir OUTPUT_STRIP_TRAILING_WHITESPACE COMMAND_ERROR_IS_FATAL ANY)
set(xla_ffi_header "${jaxlib_dir}/include/xla/ffi/api/c_api.h")
if(NOT EXISTS "${xla_ffi_header}")
  message(FATAL_ERROR "jax_int4mm: ${Python_EXECUTABLE} has no jaxlib with the XLA FFI headers, which the extension "
    "modules need. Build without --no-build-isolation, or first run: ${Python_EXECUTABLE} -m pip install "
    "'jaxlib==0.10.*'")
endif()

# jaxlib 0.10, the oldest that we support, has version 0.3 of the FFI's API.
file(STRINGS "${xla_ffi_header}" api_version REGEX "^#define XLA_FFI_API_(MAJOR|MINOR) [0-9]+")
list(TRANSFORM api_version REPLACE "^.* ([0-9]+).*" "\\1")
list(JOIN api_version "." api_version)
if(api_version VERSION_GREATER 0.3)
  message(WARNING "jax_int4mm: the XLA FFI headers in ${jaxlib_dir} have API version ${api_version}. Modules built on "
    "them are refused by older jaxlibs; for modules that run on every supported one, build with jaxlib==0.10.*.")
endif()

add_library(xla_ffi INTERFACE)
target_include_directories(xla_ffi SYSTEM INTERFACE "${jaxlib_dir}/include")

function(int4mm_add_python_module name)
  nanobind_add_module(${name} NB_STATIC STABLE_ABI NB_SUPPRESS_WARNINGS ${ARGN})
  target_link_libraries(${name} PRIVATE int4mm_core int4mm_warnings xla_ffi)
  # Other extensions in the process may hold the same static libraries; ours stay to ourselves.
  target_link_options(${name} PRIVATE LINKER:--exclude-libs,ALL)
  install(TARGETS ${name} LIBRARY DESTINATION jax_int4mm)
endfunction()
