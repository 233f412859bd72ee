// The matrix registers of Intel's AMX, which multiply 16 x 32 by 32 x 16 bfloat16 at once. Compiled with the flags of
// avx512_bf16.cc; the instructions are spelled out, since not every compiler's intrinsics say that they touch memory.
#include "cpu/kernels/tiles.h"

namespace int4mm::cpu {
namespace {

struct AmxTiles {
  static constexpr int64_t kRowBytes = 64;

  // What the registers were configured for before is configured again after, for other libraries remember what they
  // asked for in this thread.
  class Scope {
   public:
    Scope() {
      __asm__ volatile("sttilecfg %0" : "=m"(saved_));
      Config config{};
      config.palette = 1;
      for (int t = 0; t < 8; ++t) {
        config.row_bytes[t] = kRowBytes;
        config.rows[t] = kTileEdge;
      }
      __asm__ volatile("ldtilecfg %0" : : "m"(config));
    }
    Scope(const Scope&) = delete;
    Scope& operator=(const Scope&) = delete;
    ~Scope() {
      if (saved_.palette == 0) {
        __asm__ volatile("tilerelease");
      } else {
        __asm__ volatile("ldtilecfg %0" : : "m"(saved_));
      }
    }

   private:
    // As LDTILECFG reads it.
    struct alignas(64) Config {
      uint8_t palette;
      uint8_t start_row;
      uint8_t reserved[14];
      uint16_t row_bytes[16];
      uint8_t rows[16];
    };
    static_assert(sizeof(Config) == 64);
    Config saved_;
  };

  template <int t>
  static void Zero() {
    __asm__ volatile("tilezero %%tmm%c0" : : "i"(t));
  }

  template <int t>
  static void Load(const float* p) {
    __asm__ volatile("tileloadd (%0,%1), %%tmm%c2" : : "r"(p), "r"(kRowBytes), "i"(t) : "memory");
  }

  template <int t>
  static void Store(float* p) {
    __asm__ volatile("tilestored %%tmm%c2, (%0,%1)" : : "r"(p), "r"(kRowBytes), "i"(t) : "memory");
  }

  template <int c, int a, int b>
  static void MultiplyAdd() {
    __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(c), "i"(a), "i"(b));
  }
};

}  // namespace

constexpr Kernel kAmxKernel = TileMatmul<AmxTiles>::MakeKernel();

}  // namespace int4mm::cpu
