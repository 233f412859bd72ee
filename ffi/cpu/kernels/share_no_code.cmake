# cmake -DNM=<nm> -DOBJECTS=<object files> -P share_no_code.cmake
# Of an inline function that several objects emit the linker keeps one copy. Kept from a file that is compiled for a newer
# CPU, it would be an illegal instruction in code that runs on an older one: such files must emit none.
foreach(object IN LISTS OBJECTS)
  if(object MATCHES "/(avx2|avx512|avx512_bf16|amx)\\.")
    execute_process(COMMAND ${NM} --demangle --defined-only ${object} OUTPUT_VARIABLE symbols COMMAND_ERROR_IS_FATAL ANY)
    string(REGEX MATCHALL "[^\n]* W [^\n]*" shared "${symbols}")
    if(shared)
      list(JOIN shared "\n" shared)
      message(SEND_ERROR "${object} emits code that the linker may share with other files; make it static, always "
        "inline or a template over this file's Simd type:\n${shared}")
    endif()
  endif()
endforeach()
