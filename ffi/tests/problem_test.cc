#include "core/problem.h"

#include <string>

#include "tests/check.h"

namespace int4mm {
namespace {

constexpr Problem kGood{1, 16, 256, 128, 8, DType::kBFloat16};

void TestAccepts() {
  for (const int64_t m : {int64_t{0}, int64_t{1}, int64_t{1} << 40, kUnknownM}) {
    Problem p = kGood;
    p.m = m;
    EXPECT(Validate(p).ok()) << "m=" << m << ": " << Validate(p).message();
  }
  for (const int64_t batch : {int64_t{0}, int64_t{1}, int64_t{1} << 40}) {
    Problem p = kGood;
    p.batch = batch;
    EXPECT(Validate(p).ok()) << "batch=" << batch << ": " << Validate(p).message();
  }
  for (const int64_t group_size : {32, 64, 128, 256}) {
    for (const int64_t inner_k_tiles : {2, 4, 8}) {
      const Problem p{1, 8, 256, group_size, inner_k_tiles, DType::kFloat16};
      EXPECT(Validate(p).ok()) << Validate(p).message();
    }
  }
}

// Each rule on its own: the sentence names the operation, the value given and, where there is one, the rule's number.
void TestRefuses() {
  struct Refusal {
    Problem problem;
    const char* says;
  };
  const Refusal refusals[] = {
      {{1, 16, 256, 0, 8, DType::kBFloat16}, "group_size is 0; it must be 32, 64, 128 or 256"},
      {{1, 16, 256, -32, 8, DType::kBFloat16}, "group_size is -32"},
      {{1, 16, 256, 16, 8, DType::kBFloat16}, "group_size is 16"},
      {{1, 16, 256, 512, 8, DType::kBFloat16}, "group_size is 512"},
      {{1, 16, 256, 128, 0, DType::kBFloat16}, "inner_k_tiles is 0; it must be 2, 4 or 8"},
      {{1, 16, 256, 128, 6, DType::kBFloat16}, "inner_k_tiles is 6"},
      {{1, 16, 256, 128, 16, DType::kBFloat16}, "inner_k_tiles is 16"},
      {{-2, 16, 256, 128, 8, DType::kBFloat16}, "-2"},
      {{1, 0, 256, 128, 8, DType::kBFloat16}, "n and k must be positive"},
      {{1, 16, 0, 128, 8, DType::kBFloat16}, "n and k must be positive"},
      {{1, -8, 256, 128, 8, DType::kBFloat16}, "n and k must be positive"},
      {{1, 12, 256, 128, 8, DType::kBFloat16}, "n is 12; it must be a multiple of 8"},
      {{1, 16, 192, 64, 8, DType::kBFloat16}, "k is 192; with inner_k_tiles 8 it must be a multiple of 128"},
      {{1, 16, 48, 32, 2, DType::kBFloat16}, "k is 48; with inner_k_tiles 2 it must be a multiple of 32"},
      {{1, 16, 384, 256, 8, DType::kBFloat16}, "group_size 256 does not divide k, which is 384"},
      {{1, 16, 256, 128, 8, DType::kBFloat16, false, -1}, "batch is -1; it must not be negative"},
      // 2^63 bytes of x, of w (as values of 32 bits) and of y.
      {{int64_t{1} << 53, 8, 256, 128, 8, DType::kBFloat16}, "fewer than 2^63"},
      {{1, int64_t{1} << 40, 256, 128, 8, DType::kBFloat16, false, 1 << 13}, "fewer than 2^63"},
      {{int64_t{1} << 30, 1 << 21, 256, 128, 8, DType::kBFloat16, true, 1 << 10}, "fewer than 2^63"},
      {{kUnknownM, 16, 256, 128, 8, DType::kBFloat16, false, int64_t{1} << 52}, "batch, m, n, k are 4503599627370496"},
  };
  for (const Refusal& refusal : refusals) {
    const Status status = Validate(refusal.problem);
    EXPECT(status.code() == StatusCode::kInvalidArgument) << refusal.says;
    EXPECT(status.message().rfind("int4pack_mm: ", 0) == 0) << status.message();
    EXPECT(status.message().find(refusal.says) != std::string::npos) << status.message();
  }
}

void TestDequantizeProblems() {
  for (const int64_t batch : {0, 1, 7}) {
    const Status status = Validate(DequantizeProblem{batch, 8, 256, 128, 2, DType::kFloat16});
    EXPECT(status.ok()) << status.message();
  }
  for (const DequantizeProblem& p :
       {DequantizeProblem{1, 12, 256, 128, 8, DType::kBFloat16}, DequantizeProblem{1, 16, 256, 48, 8, DType::kBFloat16},
        DequantizeProblem{1, 16, 192, 64, 8, DType::kBFloat16},
        DequantizeProblem{-1, 16, 256, 64, 8, DType::kBFloat16}}) {
    const Status status = Validate(p);
    EXPECT(status.code() == StatusCode::kInvalidArgument);
    EXPECT(status.message().rfind("dequantize: ", 0) == 0) << status.message();
  }
}

void TestEmpty() {
  Problem p = kGood;
  EXPECT(!p.Empty());
  p.batch = 0;
  EXPECT(p.Empty());
  p = kGood;
  p.m = 0;
  EXPECT(p.Empty());
  p.m = kUnknownM;
  EXPECT(!p.Empty());
}

void TestNames() {
  EXPECT(DTypeName(DType::kBFloat16) == std::string("bfloat16"));
  EXPECT(DTypeName(DType::kFloat16) == std::string("float16"));
}

}  // namespace
}  // namespace int4mm

int main() {
  int4mm::TestAccepts();
  int4mm::TestRefuses();
  int4mm::TestDequantizeProblems();
  int4mm::TestEmpty();
  int4mm::TestNames();
  return int4mm::test::Result();
}
