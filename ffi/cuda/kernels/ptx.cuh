// One instruction, one function. The instruction set is documented in NVIDIA's PTX ISA manual.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace int4mm::cuda::ptx {

// The 32-bit address of a pointer into shared memory, as the instructions below take it.
__device__ __forceinline__ uint32_t SharedAddress(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// `value`, of which the compiler then knows nothing: it keeps what follows from it, where it would compute it again in
// a loop.
__device__ __forceinline__ int Opaque(int value) {
  asm("" : "+r"(value));
  return value;
}

// (value & mask) | bits
template <uint32_t kMask, uint32_t kBits>
__device__ __forceinline__ uint32_t AndOr(uint32_t value) {
  uint32_t result;
  asm("lop3.b32 %0, %1, %2, %3, 0xEA;" : "=r"(result) : "r"(value), "n"(kMask), "n"(kBits));
  return result;
}

__device__ __forceinline__ uint32_t Permute(uint32_t low, uint32_t high, uint32_t selector) {
  return __byte_perm(low, high, selector);
}

// a * b + c on a pair, each rounded once; subnormals are kept.
template <typename Float>
__device__ __forceinline__ uint32_t FmaPair(uint32_t a, uint32_t b, uint32_t c);

template <>
__device__ __forceinline__ uint32_t FmaPair<__nv_bfloat16>(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t d;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}

template <>
__device__ __forceinline__ uint32_t FmaPair<__half>(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t d;
  asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}

// d [16, 8] += a [16, 16] @ b [16, 8] in f32.
template <typename Float>
__device__ __forceinline__ void MmaM16N8K16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);

template <>
__device__ __forceinline__ void MmaM16N8K16<__nv_bfloat16>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                                           uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

template <>
__device__ __forceinline__ void MmaM16N8K16<__half>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Four 8 x 8 matrices of 16-bit values; lane i gives the address of row i % 8 of matrix i / 8.
__device__ __forceinline__ void LoadMatrixX4(uint32_t (&d)[4], uint32_t shared_address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
               : "r"(shared_address)
               : "memory");
}

__device__ __forceinline__ uint32_t LoadShared(uint32_t shared_address) {
  uint32_t d;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(d) : "r"(shared_address) : "memory");
  return d;
}

__device__ __forceinline__ void LoadShared(uint32_t (&d)[4], uint32_t shared_address) {
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
               : "r"(shared_address)
               : "memory");
}

__device__ __forceinline__ void LoadShared(uint32_t (&d)[2], uint32_t shared_address) {
  asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(d[0]), "=r"(d[1]) : "r"(shared_address) : "memory");
}

// Copies 16 bytes to shared memory; where `valid` is false it writes zeros and reads nothing, wherever `global` points.
__device__ __forceinline__ void CopyAsync16(uint32_t shared_address, const void* global, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
               :
               : "r"(shared_address), "l"(global), "r"(valid ? 16 : 0)
               : "memory");
}

// CopyAsync16 of 4 or 8 bytes.
template <int kBytes>
__device__ __forceinline__ void CopyAsyncFew(uint32_t shared_address, const void* global, bool valid) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;"
               :
               : "r"(shared_address), "l"(global), "n"(kBytes), "r"(valid ? kBytes : 0)
               : "memory");
}

// CopyAsync16 where `condition` holds; else nothing is read or written. For words that are read once: memory is asked
// for 256 bytes at a time.
__device__ __forceinline__ void CopyAsync16If(bool condition, uint32_t shared_address, const void* global) {
  asm volatile("{.reg .pred p; setp.ne.b32 p, %2, 0; @p cp.async.cg.shared.global.L2::256B [%0], [%1], 16;}"
               :
               : "r"(shared_address), "l"(global), "r"(static_cast<int>(condition))
               : "memory");
}

__device__ __forceinline__ void CopyAsyncCommit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most `kPending` of the newest groups of this thread are still under way.
template <int kPending>
__device__ __forceinline__ void CopyAsyncWait() {
  asm volatile("cp.async.wait_group %0;" : : "n"(kPending) : "memory");
}

// Loads that are read once: past L1, through the read-only path.
__device__ __forceinline__ void LoadOnce(uint32_t (&d)[4], const uint32_t* global) {
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
               : "l"(global));
}

__device__ __forceinline__ void LoadOnce(uint32_t& d0, uint32_t& d1, const uint32_t* global) {
  asm volatile("ld.global.nc.L1::no_allocate.v2.u32 {%0, %1}, [%2];" : "=r"(d0), "=r"(d1) : "l"(global));
}

__device__ __forceinline__ void LoadOnce(uint32_t& d, const uint32_t* global) {
  asm volatile("ld.global.nc.L1::no_allocate.u32 %0, [%1];" : "=r"(d) : "l"(global));
}

// Writes 16 bytes where `condition` holds.
__device__ __forceinline__ void StoreIf(bool condition, void* global, const uint32_t (&value)[4]) {
  asm volatile("{.reg .pred p; setp.ne.b32 p, %0, 0; @p st.global.v4.u32 [%1], {%2, %3, %4, %5};}"
               :
               : "r"(static_cast<int>(condition)), "l"(global), "r"(value[0]), "r"(value[1]), "r"(value[2]),
                 "r"(value[3])
               : "memory");
}

}  // namespace int4mm::cuda::ptx
