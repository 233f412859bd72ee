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
