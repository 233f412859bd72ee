// A plain read of memory on all threads, for benchmarks/read_floor_cpu.py.
#include <cstdint>

extern "C" uint64_t read_words(const uint64_t* words, int64_t count) {
  uint64_t all = 0;
#pragma omp parallel for reduction(^ : all)
  for (int64_t i = 0; i < count; ++i) all ^= words[i];
  return all;
}
