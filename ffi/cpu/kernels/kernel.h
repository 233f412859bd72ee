// What one instruction set offers the launcher. Each kernels/<isa>.cc defines one Kernel.
#pragma once

#include <cstdint>

#include "core/ceil_div.h"
#include "core/problem.h"
#include "cpu/isa.h"

namespace int4mm::cpu {

// Some tokens of one product; the operands are its own, and the problem's batch means nothing. `x` holds their
// activations in the order of kernels/order.h, `pack` of them in each lane of 32 bits, in slabs of kSlab lanes:
// [lanes of k / kSlab][tokens][kSlab], the last slab as long as what is left of k. For `tiles` it holds them in
// matrices of kTileEdge lanes by kTileEdge tokens, the last tokens' filled up with any: [lanes of k /
// kTileSlab][tokens / kTileEdge][kTileSlab / kTileEdge][kTileEdge lanes][kTileEdge tokens].
//
// Where pack is 2, the instructions flush subnormals. Each token is multiplied by a power of two that keeps its
// products from being subnormal, and the sums are multiplied by `token_factors`, its inverse. What that cannot save, a
// token of very different values, or a scale or zero far from 1, sets *out_of_range, and y is then void.
struct MatmulArgs {
  Problem problem;
  Operands operands;
  int64_t first_token = 0;
  int64_t tokens = 0;
  float* x = nullptr;
  float* token_factors = nullptr;  // [tokens]
  float* group_sums = nullptr;     // [k / ExactGroup(group_size)][tokens], of the activations, scaled; for `exact`
  bool* out_of_range = nullptr;    // Set by several threads at once.
};

struct Kernel {
  // Fills args.x and args.token_factors for tokens [begin, end) of 0 .. args.tokens-1, as `direct` and `panel` read
  // them.
  void (*order_activations)(const MatmulArgs& args, int64_t begin, int64_t end);
  // y for rows [row_begin, row_end), both multiples of 8, and at most MaxDirectTokens tokens.
  void (*direct)(const MatmulArgs& args, int64_t row_begin, int64_t row_end, float* scratch);
  // y for rows [row_begin, row_end), both multiples of 8, and any number of tokens.
  void (*panel)(const MatmulArgs& args, int64_t row_begin, int64_t row_end, float* scratch);
  // The same for `exact`: as `direct`, but scale and zero are applied to the sums of a group, in f32, and no weight is
  // rounded. Null where there is none.
  void (*order_exact)(const MatmulArgs& args, int64_t begin, int64_t end);
  void (*exact)(const MatmulArgs& args, int64_t row_begin, int64_t row_end, float* scratch);
  // The same for `tiles`, any number of tokens; begin is a multiple of kTileEdge. Null where there are no tiles, and
  // where there are they are all there is.
  void (*order_tiles)(const MatmulArgs& args, int64_t begin, int64_t end);
  void (*tiles)(const MatmulArgs& args, int64_t row_begin, int64_t row_end, float* scratch);
  int pack;  // Activations in one lane of x.
};

// The size of `scratch`, which is aligned to a cache line, contents undefined: a panel, but for the direct kernels, and
// the sums of all rows of a call, or of kDirectRows.
constexpr int64_t DirectScratchFloats(int64_t tokens) { return kDirectRows * tokens; }
constexpr int64_t PanelScratchFloats(int64_t tokens, int64_t rows) { return kPanelRows * kSlab + rows * tokens; }
constexpr int64_t TileScratchFloats(int64_t tokens, int64_t rows) {
  return kTileBlockRows * kTileSlab + CeilDiv(rows, kTileBlockRows) * kTileBlockRows * WholeTiles(tokens);
}

extern const Kernel kScalarKernel;
extern const Kernel kAvx2Kernel;
extern const Kernel kAvx512Kernel;
extern const Kernel kAvx512Bf16Kernel;
extern const Kernel kAmxKernel;
extern const Kernel kNeonKernel;

}  // namespace int4mm::cpu
