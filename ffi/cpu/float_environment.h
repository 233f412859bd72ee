#pragma once

#include <cstdint>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace int4mm::cpu {

// Rounding to nearest and subnormals kept, for as long as it lives. XLA's threads flush subnormals to zero, which would
// lose weights and activations that bfloat16 and float16 can hold and make results depend on the thread.
class ScopedFloatEnvironment {
 public:
  ScopedFloatEnvironment(const ScopedFloatEnvironment&) = delete;
  ScopedFloatEnvironment& operator=(const ScopedFloatEnvironment&) = delete;

#if defined(__x86_64__)
  ScopedFloatEnvironment() : saved_(_mm_getcsr()) { _mm_setcsr(kAllExceptionsMasked); }
  ~ScopedFloatEnvironment() { _mm_setcsr(saved_); }

 private:
  static constexpr unsigned kAllExceptionsMasked = 0x1F80;
  unsigned saved_;
#elif defined(__aarch64__)
  ScopedFloatEnvironment() {
    __asm__ volatile("mrs %0, fpcr" : "=r"(saved_));
    Set(0);
  }
  ~ScopedFloatEnvironment() { Set(saved_); }

 private:
  static void Set(uint64_t fpcr) { __asm__ volatile("msr fpcr, %0" : : "r"(fpcr) : "memory"); }
  uint64_t saved_;
#else
  ScopedFloatEnvironment() = default;
#endif
};

}  // namespace int4mm::cpu
