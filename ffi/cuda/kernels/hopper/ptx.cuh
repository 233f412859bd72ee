// Instructions that only sm_90a has: asynchronous copies of tensor tiles, their barriers, and products of warpgroups.
#pragma once

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "cuda/kernels/ptx.cuh"

namespace int4mm::cuda::ptx {

template <int kRegisters>
__device__ __forceinline__ void GrowRegisters() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" : : "n"(kRegisters));
}

template <int kRegisters>
__device__ __forceinline__ void ShrinkRegisters() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" : : "n"(kRegisters));
}

// True for one lane of a warp. Unlike a comparison of the thread's index it tells the compiler that one thread is alone
// in what follows; otherwise it wraps every copy of a tensor tile in a loop over lanes.
__device__ __forceinline__ bool Elected() {
  uint32_t elected;
  asm volatile("{.reg .pred p;\nelect.sync _|p, 0xFFFFFFFF;\nselp.u32 %0, 1, 0, p;}" : "=r"(elected));
  return elected != 0;
}

__device__ __forceinline__ void InitBarrier(uint32_t barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" : : "r"(barrier), "r"(arrivals) : "memory");
}

// Makes initialised barriers visible to the copy engine.
__device__ __forceinline__ void FenceBarrierInit() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ void ExpectBytes(uint32_t barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" : : "r"(barrier), "r"(bytes) : "memory");
}

__device__ __forceinline__ void Arrive(uint32_t barrier, int arrivals) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0], %1;" : : "r"(barrier), "r"(arrivals) : "memory");
}

// Predicated, not branched around: a branch between products makes the compiler run them one after another.
__device__ __forceinline__ void ArriveIf(bool condition, uint32_t barrier) {
  asm volatile("{.reg .pred p; setp.ne.b32 p, %0, 0; @p mbarrier.arrive.shared::cta.b64 _, [%1];}"
               :
               : "r"(static_cast<int>(condition)), "r"(barrier)
               : "memory");
}

// Until the phase of this parity is complete.
__device__ __forceinline__ void WaitBarrier(uint32_t barrier, uint32_t parity) {
  asm volatile(
      "{.reg .pred p;\n"
      "wait:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n"
      "@!p bra wait;}"
      :
      : "r"(barrier), "r"(parity)
      : "memory");
}

// The same where other CTAs of the cluster have stored.
__device__ __forceinline__ void WaitBarrierOfCluster(uint32_t barrier, uint32_t parity) {
  asm volatile(
      "{.reg .pred p;\n"
      "wait:\n"
      "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%0], %1;\n"
      "@!p bra wait;}"
      :
      : "r"(barrier), "r"(parity)
      : "memory");
}

__device__ __forceinline__ void PrefetchTensorMap(const CUtensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" : : "l"(map) : "memory");
}

// The box of one matrix of a 3-D tensor whose first element is [row][column]; what lies outside of the matrix is copied
// as zeros, and counted by the barrier all the same.
__device__ __forceinline__ void CopyTensorTile(uint32_t shared_address, const CUtensorMap* map, int matrix, int row,
                                               int column, uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4}], [%5];"
      :
      : "r"(shared_address), "l"(map), "r"(column), "r"(row), "r"(matrix), "r"(barrier)
      : "memory");
}

// The other way, where the box reaches out of the matrix only what lies inside.
__device__ __forceinline__ void StoreTensorTile(const CUtensorMap* map, int matrix, int row, int column,
                                                uint32_t shared_address) {
  asm volatile("cp.async.bulk.tensor.3d.global.shared::cta.bulk_group [%0, {%1, %2, %3}], [%4];"
               :
               : "l"(map), "r"(column), "r"(row), "r"(matrix), "r"(shared_address)
               : "memory");
}

// Waits until the stores of this thread have read shared memory.
__device__ __forceinline__ void WaitStoresRead() {
  asm volatile("cp.async.bulk.commit_group;\ncp.async.bulk.wait_group.read 0;" ::: "memory");
}

// What this thread wrote to shared memory becomes visible to the copy engine.
__device__ __forceinline__ void FenceCopyEngine() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// All threads of all CTAs of a cluster meet. What they wrote before need not be visible afterwards, but for barriers
// that were initialised.
__device__ __forceinline__ void ClusterMeet() {
  asm volatile("barrier.cluster.arrive.relaxed;\nbarrier.cluster.wait;" ::: "memory");
}

// The address of the same place in the shared memory of another CTA of the cluster.
__device__ __forceinline__ uint32_t MapToRank(uint32_t shared_address, int rank) {
  uint32_t mapped;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(mapped) : "r"(shared_address), "r"(rank));
  return mapped;
}

// To another CTA of the cluster, where 16 bytes are taken off what the barrier expects. Both addresses are mapped.
__device__ __forceinline__ void StoreToRank(uint32_t mapped_address, const float (&d)[4], uint32_t mapped_barrier) {
  asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%1, %2, %3, %4}, [%5];"
               :
               : "r"(mapped_address), "f"(d[0]), "f"(d[1]), "f"(d[2]), "f"(d[3]), "r"(mapped_barrier)
               : "memory");
}

__device__ __forceinline__ void StoreShared4(uint32_t shared_address, const float (&d)[4]) {
  asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};"
               :
               : "r"(shared_address), "f"(d[0]), "f"(d[1]), "f"(d[2]), "f"(d[3])
               : "memory");
}

__device__ __forceinline__ float4 LoadShared4(uint32_t shared_address) {
  float4 d;
  asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(d.x), "=f"(d.y), "=f"(d.z), "=f"(d.w)
               : "r"(shared_address)
               : "memory");
  return d;
}

// Four 8 x 8 matrices of 16-bit values, transposed; lane i gives the address of row i % 8 of matrix i / 8 as stored.
__device__ __forceinline__ void StoreMatrixTransposedX4(uint32_t shared_address, uint32_t d0, uint32_t d1, uint32_t d2,
                                                        uint32_t d3) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};"
               :
               : "r"(shared_address), "r"(d0), "r"(d1), "r"(d2), "r"(d3)
               : "memory");
}

// An 8 x 8 matrix of 16-bit values, a row of it a quad of lanes, transposed.
__device__ __forceinline__ uint32_t Transpose8x8(uint32_t rows) {
  uint32_t columns;
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(columns) : "r"(rows));
  return columns;
}

// Registers that were written become operands of the products that follow.
__device__ __forceinline__ void WgmmaFence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void WgmmaCommit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Waits until at most `kPending` of the newest groups of products are still under way.
template <int kPending>
__device__ __forceinline__ void WgmmaWait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" : : "n"(kPending) : "memory");
}

// Of a matrix of 16-bit values in shared memory whose rows are 128 bytes, stored with the swizzle of 128 bytes.
__device__ __forceinline__ uint64_t SwizzledMatrix(uint32_t shared_address) {
  constexpr uint64_t kSwizzle128 = uint64_t{1} << 62;
  constexpr uint64_t kBytesOf8Rows = uint64_t{1024 >> 4} << 32;
  return kSwizzle128 | kBytesOf8Rows | ((shared_address & 0x3FFFF) >> 4);
}

// d [64, kTokens] = a [64, 16] @ b [kTokens, 16]^T, plus d where `accumulate` is not 0. Asynchronous: neither d nor a
// may be touched until the product's group has been waited for.
template <typename Float, int kTokens>
struct Wgmma;

// Registers of d as asm operands, and their numbers.
#define INT4MM_D4(i) "+f"(d[i][0]), "+f"(d[i][1]), "+f"(d[i][2]), "+f"(d[i][3])
#define INT4MM_D8(i) INT4MM_D4(i), INT4MM_D4(i + 1)
#define INT4MM_R8(a, b, c, d, e, f, g, h) "%" #a ",%" #b ",%" #c ",%" #d ",%" #e ",%" #f ",%" #g ",%" #h
#define INT4MM_D16TOKENS INT4MM_D8(0)
#define INT4MM_R16TOKENS INT4MM_R8(0, 1, 2, 3, 4, 5, 6, 7)
#define INT4MM_D32TOKENS INT4MM_D16TOKENS, INT4MM_D8(2)
#define INT4MM_R32TOKENS INT4MM_R16TOKENS "," INT4MM_R8(8, 9, 10, 11, 12, 13, 14, 15)
#define INT4MM_D48TOKENS INT4MM_D32TOKENS, INT4MM_D8(4)
#define INT4MM_R48TOKENS INT4MM_R32TOKENS "," INT4MM_R8(16, 17, 18, 19, 20, 21, 22, 23)
#define INT4MM_D64TOKENS INT4MM_D48TOKENS, INT4MM_D8(6)
#define INT4MM_R64TOKENS INT4MM_R48TOKENS "," INT4MM_R8(24, 25, 26, 27, 28, 29, 30, 31)
#define INT4MM_D80TOKENS INT4MM_D64TOKENS, INT4MM_D8(8)
#define INT4MM_R80TOKENS INT4MM_R64TOKENS "," INT4MM_R8(32, 33, 34, 35, 36, 37, 38, 39)
#define INT4MM_D96TOKENS INT4MM_D80TOKENS, INT4MM_D8(10)
#define INT4MM_R96TOKENS INT4MM_R80TOKENS "," INT4MM_R8(40, 41, 42, 43, 44, 45, 46, 47)
#define INT4MM_D112TOKENS INT4MM_D96TOKENS, INT4MM_D8(12)
#define INT4MM_R112TOKENS INT4MM_R96TOKENS "," INT4MM_R8(48, 49, 50, 51, 52, 53, 54, 55)
#define INT4MM_D128TOKENS INT4MM_D112TOKENS, INT4MM_D8(14)
#define INT4MM_R128TOKENS INT4MM_R112TOKENS "," INT4MM_R8(56, 57, 58, 59, 60, 61, 62, 63)
#define INT4MM_D144TOKENS INT4MM_D128TOKENS, INT4MM_D8(16)
#define INT4MM_R144TOKENS INT4MM_R128TOKENS "," INT4MM_R8(64, 65, 66, 67, 68, 69, 70, 71)
#define INT4MM_D160TOKENS INT4MM_D144TOKENS, INT4MM_D8(18)
#define INT4MM_R160TOKENS INT4MM_R144TOKENS "," INT4MM_R8(72, 73, 74, 75, 76, 77, 78, 79)
#define INT4MM_D176TOKENS INT4MM_D160TOKENS, INT4MM_D8(20)
#define INT4MM_R176TOKENS INT4MM_R160TOKENS "," INT4MM_R8(80, 81, 82, 83, 84, 85, 86, 87)
#define INT4MM_D192TOKENS INT4MM_D176TOKENS, INT4MM_D8(22)
#define INT4MM_R192TOKENS INT4MM_R176TOKENS "," INT4MM_R8(88, 89, 90, 91, 92, 93, 94, 95)
#define INT4MM_D208TOKENS INT4MM_D192TOKENS, INT4MM_D8(24)
#define INT4MM_R208TOKENS INT4MM_R192TOKENS "," INT4MM_R8(96, 97, 98, 99, 100, 101, 102, 103)
#define INT4MM_D224TOKENS INT4MM_D208TOKENS, INT4MM_D8(26)
#define INT4MM_R224TOKENS INT4MM_R208TOKENS "," INT4MM_R8(104, 105, 106, 107, 108, 109, 110, 111)
#define INT4MM_D240TOKENS INT4MM_D224TOKENS, INT4MM_D8(28)
#define INT4MM_R240TOKENS INT4MM_R224TOKENS "," INT4MM_R8(112, 113, 114, 115, 116, 117, 118, 119)
#define INT4MM_D256TOKENS INT4MM_D240TOKENS, INT4MM_D8(30)
#define INT4MM_R256TOKENS INT4MM_R240TOKENS "," INT4MM_R8(120, 121, 122, 123, 124, 125, 126, 127)

// A, B and P are the numbers of the operands after d: a, b's descriptor, whether to accumulate.
#define INT4MM_WGMMA(kTokens, A, B, P, Float, TYPE)                                                              \
  template <>                                                                                                    \
  struct Wgmma<Float, kTokens> {                                                                                 \
    static __device__ __forceinline__ void Start(float (&d)[kTokens / 8][4], const uint32_t (&a)[4], uint64_t b, \
                                                 int accumulate) {                                               \
      asm volatile("{.reg .pred p; setp.ne.b32 p, %" #P                                                          \
                   ", 0;\n"                                                                                      \
                   "wgmma.mma_async.sync.aligned.m64n" #kTokens "k16.f32." TYPE "." TYPE                         \
                   " {" INT4MM_R##kTokens##TOKENS "}, {" A "}, %" #B ", p, 1, 1, 0;}"                            \
                   : INT4MM_D##kTokens##TOKENS                                                                   \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate));                       \
    }                                                                                                            \
  };
#define INT4MM_WGMMA_OF_BOTH(kTokens, A, B, P)          \
  INT4MM_WGMMA(kTokens, A, B, P, __nv_bfloat16, "bf16") \
  INT4MM_WGMMA(kTokens, A, B, P, __half, "f16")

INT4MM_WGMMA_OF_BOTH(16, "%8,%9,%10,%11", 12, 13)
INT4MM_WGMMA_OF_BOTH(32, "%16,%17,%18,%19", 20, 21)
INT4MM_WGMMA_OF_BOTH(48, "%24,%25,%26,%27", 28, 29)
INT4MM_WGMMA_OF_BOTH(64, "%32,%33,%34,%35", 36, 37)
INT4MM_WGMMA_OF_BOTH(80, "%40,%41,%42,%43", 44, 45)
INT4MM_WGMMA_OF_BOTH(96, "%48,%49,%50,%51", 52, 53)
INT4MM_WGMMA_OF_BOTH(112, "%56,%57,%58,%59", 60, 61)
INT4MM_WGMMA_OF_BOTH(128, "%64,%65,%66,%67", 68, 69)
INT4MM_WGMMA_OF_BOTH(144, "%72,%73,%74,%75", 76, 77)
INT4MM_WGMMA_OF_BOTH(160, "%80,%81,%82,%83", 84, 85)
INT4MM_WGMMA_OF_BOTH(176, "%88,%89,%90,%91", 92, 93)
INT4MM_WGMMA_OF_BOTH(192, "%96,%97,%98,%99", 100, 101)
INT4MM_WGMMA_OF_BOTH(208, "%104,%105,%106,%107", 108, 109)
INT4MM_WGMMA_OF_BOTH(224, "%112,%113,%114,%115", 116, 117)
INT4MM_WGMMA_OF_BOTH(240, "%120,%121,%122,%123", 124, 125)
INT4MM_WGMMA_OF_BOTH(256, "%128,%129,%130,%131", 132, 133)

#undef INT4MM_D16TOKENS
#undef INT4MM_R16TOKENS
#undef INT4MM_D32TOKENS
#undef INT4MM_R32TOKENS
#undef INT4MM_D48TOKENS
#undef INT4MM_R48TOKENS
#undef INT4MM_D64TOKENS
#undef INT4MM_R64TOKENS
#undef INT4MM_D80TOKENS
#undef INT4MM_R80TOKENS
#undef INT4MM_D96TOKENS
#undef INT4MM_R96TOKENS
#undef INT4MM_D112TOKENS
#undef INT4MM_R112TOKENS
#undef INT4MM_D128TOKENS
#undef INT4MM_R128TOKENS
#undef INT4MM_D144TOKENS
#undef INT4MM_R144TOKENS
#undef INT4MM_D160TOKENS
#undef INT4MM_R160TOKENS
#undef INT4MM_D176TOKENS
#undef INT4MM_R176TOKENS
#undef INT4MM_D192TOKENS
#undef INT4MM_R192TOKENS
#undef INT4MM_D208TOKENS
#undef INT4MM_R208TOKENS
#undef INT4MM_D224TOKENS
#undef INT4MM_R224TOKENS
#undef INT4MM_D240TOKENS
#undef INT4MM_R240TOKENS
#undef INT4MM_D256TOKENS
#undef INT4MM_R256TOKENS
#undef INT4MM_D4
#undef INT4MM_D8
#undef INT4MM_R8
#undef INT4MM_WGMMA
#undef INT4MM_WGMMA_OF_BOTH

}  // namespace int4mm::cuda::ptx
