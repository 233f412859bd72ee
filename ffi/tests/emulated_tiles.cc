#include "tests/emulated_tiles.h"

#include "cpu/kernels/tiles.h"

namespace int4mm::cpu {
namespace {

struct EmulatedTiles {
  static constexpr int kTile = kTileEdge * kTileEdge;

  // Outside of it, what the registers hold is void.
  class Scope {
   public:
    Scope() { Poison(); }
    ~Scope() { Poison(); }
    Scope(const Scope&) = delete;
    Scope& operator=(const Scope&) = delete;

   private:
    static void Poison() { std::memset(registers, 0xFF, sizeof(registers)); }
  };

  template <int t>
  static void Zero() {
    std::memset(registers[t], 0, sizeof(registers[t]));
  }

  template <int t>
  static void Load(const float* p) {
    std::memcpy(registers[t], p, sizeof(registers[t]));
  }

  template <int t>
  static void Store(float* p) {
    std::memcpy(p, registers[t], sizeof(registers[t]));
  }

  // As the instruction is documented: even and odd values are added up apart.
  template <int c, int a, int b>
  static void MultiplyAdd() {
    for (int i = 0; i < kTileEdge; ++i) {
      float even[kTileEdge] = {};
      float odd[kTileEdge] = {};
      for (int l = 0; l < kTileEdge; ++l) {
        uint32_t weights;
        std::memcpy(&weights, &registers[a][i * kTileEdge + l], sizeof(weights));
        for (int j = 0; j < kTileEdge; ++j) {
          uint32_t activations;
          std::memcpy(&activations, &registers[b][l * kTileEdge + j], sizeof(activations));
          even[j] += Low(weights) * Low(activations);
          odd[j] += High(weights) * High(activations);
        }
      }
      for (int j = 0; j < kTileEdge; ++j) registers[c][i * kTileEdge + j] += even[j] + odd[j];
    }
  }

 private:
  static float Low(uint32_t pair) { return High(pair << 16); }
  static float High(uint32_t pair) {
    const uint32_t bits = pair & 0xFFFF0000u;
    float value;
    std::memcpy(&value, &bits, sizeof(value));
    return value;
  }

  static thread_local float registers[8][kTile];
};

thread_local float EmulatedTiles::registers[8][kTile];

}  // namespace

constexpr Kernel kEmulatedTilesKernel = TileMatmul<EmulatedTiles>::MakeKernel();

}  // namespace int4mm::cpu
