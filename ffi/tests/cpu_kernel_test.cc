// Every CPU kernel that runs here against a float64 oracle written apart from it, without XLA and without Python.
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <iterator>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "core/ceil_div.h"
#include "core/problem.h"
#include "cpu/kernels/exact_table.h"
#include "cpu/kernels/kernel.h"
#include "cpu/launch.h"
#include "cpu/plan.h"
#include "tests/check.h"
#include "tests/std_thread_pool.h"

#if defined(__x86_64__)
#include <immintrin.h>

#include "tests/emulated_tiles.h"
#endif

namespace int4mm::cpu {
namespace {

// Those of this CPU, and matrix registers, which are emulated where it has none.
CpuFeatures Features() {
  CpuFeatures features = DetectCpuFeatures();
  features.amx_bf16 |= features.avx512bf16;
  return features;
}

bool IsEmulated(Isa isa) { return isa == Isa::kAmx && !DetectCpuFeatures().amx_bf16; }

// An array whose end is followed by a page that traps, and whose beginning is watched.
template <typename T>
class GuardedArray {
 public:
  explicit GuardedArray(int64_t size) : size_(size) {
    const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    const size_t bytes = static_cast<size_t>(size) * sizeof(T);
    mapped_bytes_ = (bytes + kBand + page - 1) / page * page + page;
    mapping_ = static_cast<char*>(
        mmap(nullptr, mapped_bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    if (mapping_ == MAP_FAILED) {
      mapping_ = nullptr;
      return;
    }
    mprotect(mapping_ + mapped_bytes_ - page, page, PROT_NONE);
    data_ = reinterpret_cast<T*>(mapping_ + mapped_bytes_ - page - bytes);
    std::memset(reinterpret_cast<char*>(data_) - kBand, kPattern, kBand);
  }
  GuardedArray(const GuardedArray&) = delete;
  GuardedArray& operator=(const GuardedArray&) = delete;
  ~GuardedArray() {
    if (mapping_ != nullptr) munmap(mapping_, mapped_bytes_);
  }

  explicit operator bool() const { return data_ != nullptr; }
  T* data() { return data_; }
  T& operator[](int64_t i) { return data_[i]; }
  int64_t size() const { return size_; }
  T* begin() { return data_; }
  T* end() { return data_ + size_; }
  bool BandIntact() const {
    const char* band = reinterpret_cast<const char*>(data_) - kBand;
    return std::all_of(band, band + kBand, [](char c) { return c == kPattern; });
  }

 private:
  static constexpr size_t kBand = 256;
  static constexpr char kPattern = 0x5A;
  int64_t size_;
  size_t mapped_bytes_ = 0;
  char* mapping_ = nullptr;
  T* data_ = nullptr;
};

static_assert(LDBL_MANT_DIG >= 64, "the oracle needs products to be exact and sums to keep many more bits than dtype");

int SignificandBits(DType dtype) { return dtype == DType::kBFloat16 ? 8 : 11; }
int SmallestExponent(DType dtype) { return dtype == DType::kBFloat16 ? -126 : -14; }

// The distance of neighbouring numbers at `value`.
double Ulp(DType dtype, double value) {
  const int exponent = value == 0 ? SmallestExponent(dtype) : std::max(std::ilogb(value), SmallestExponent(dtype));
  return std::ldexp(1.0, exponent - SignificandBits(dtype) + 1);
}

// value + lost to the nearest, ties to even, where lost is too small to matter but for the direction of a tie.
double Round(DType dtype, long double value, long double lost = 0) {
  if (!std::isfinite(value)) return static_cast<double>(value);
  const double ulp = Ulp(dtype, static_cast<double>(value));
  double rounded = static_cast<double>(std::nearbyintl(value / ulp) * ulp);
  const long double rest = value - rounded;
  if (2 * std::fabs(rest) == ulp && lost * rest > 0) rounded += std::copysign(ulp, static_cast<double>(rest));
  const double limit = std::ldexp(1.0, 2 - SmallestExponent(dtype));  // The first power of two that is too large.
  return std::fabs(rounded) < limit ? rounded : std::copysign(INFINITY, rounded);
}

double Decode(DType dtype, uint16_t bits) {
  const int fraction_bits = SignificandBits(dtype) - 1;
  const int exponent = (bits & 0x7FFF) >> fraction_bits;
  const int fraction = bits & ((1 << fraction_bits) - 1);
  const int largest_exponent = (1 << (15 - fraction_bits)) - 1;
  double magnitude;
  if (exponent == largest_exponent) {
    magnitude = fraction == 0 ? INFINITY : NAN;
  } else if (exponent == 0) {
    magnitude = std::ldexp(fraction, SmallestExponent(dtype) - fraction_bits);
  } else {
    magnitude = std::ldexp(fraction + (1 << fraction_bits), SmallestExponent(dtype) + exponent - 1 - fraction_bits);
  }
  return (bits & 0x8000) != 0 ? -magnitude : magnitude;
}

// The bits of a value that `dtype` holds.
uint16_t Encode(DType dtype, double value) {
  const int fraction_bits = SignificandBits(dtype) - 1;
  const uint16_t sign = std::signbit(value) ? 0x8000 : 0;
  const double magnitude = std::fabs(value);
  if (magnitude < std::ldexp(1.0, SmallestExponent(dtype))) {
    return static_cast<uint16_t>(sign | static_cast<int>(magnitude / Ulp(dtype, 0)));
  }
  const int exponent = std::ilogb(magnitude);
  const int fraction = static_cast<int>(std::ldexp(magnitude, fraction_bits - exponent)) - (1 << fraction_bits);
  return static_cast<uint16_t>(sign | ((exponent - SmallestExponent(dtype) + 1) << fraction_bits) | fraction);
}

double Weight(DType dtype, int q, double scale, double zero) {
  const long double product = (q - 8) * static_cast<long double>(scale);
  const long double sum = product + static_cast<long double>(zero);
  const long double zero_part = sum - product;
  return Round(dtype, sum, (product - (sum - zero_part)) + (zero - zero_part));
}

enum class Scales { kOrdinary, kTraps, kSubnormal, kAnyExponent };

struct Case {
  Problem problem;
  std::vector<uint8_t> q;  // [n][k]; of a batch, unused.
  GuardedArray<uint16_t> x;
  GuardedArray<uint32_t> packed;
  GuardedArray<uint16_t> scales_and_zeros;
  std::vector<double> weights;        // [n][k], rounded,
  std::vector<double> exact_weights;  // and not.

  explicit Case(const Problem& p)
      : problem(p),
        q(static_cast<size_t>(p.n * p.k)),
        x((p.shared_x ? 1 : p.batch) * p.m * p.k),
        packed(p.batch * p.n * p.k / 8),
        scales_and_zeros(p.batch * p.k / p.group_size * p.n * 2),
        weights(static_cast<size_t>(p.n * p.k)),
        exact_weights(weights.size()) {}

  Operands operands() { return {x.data(), packed.data(), scales_and_zeros.data(), nullptr}; }
};

// The format as the specification words it, one nibble at a time.
void Pack(Case& c) {
  const Problem& p = c.problem;
  std::fill(c.packed.begin(), c.packed.end(), 0u);
  const int64_t ikt = p.inner_k_tiles;
  for (int64_t n = 0; n < p.n; ++n) {
    for (int64_t k = 0; k < p.k; ++k) {
      const int64_t tile = (n / 8) * (p.k / (16 * ikt)) + k / (16 * ikt);
      const int64_t lane = 4 * (n % 8) + k / 2 % 4;
      const int64_t word = k % (16 * ikt) / 32;
      const int64_t nibble = 4 * (k % 2) + 2 * (k / 16 % 2) + k / 8 % 2;
      c.packed[(tile * 32 + lane) * (ikt / 2) + word] |= static_cast<uint32_t>(c.q[static_cast<size_t>(n * p.k + k)])
                                                         << (4 * nibble);
    }
  }
}

std::string Name(const Problem& p) {
  std::ostringstream name;
  name << DTypeName(p.dtype) << " m=" << p.m << " n=" << p.n << " k=" << p.k << " group_size=" << p.group_size
       << " inner_k_tiles=" << p.inner_k_tiles << " batch=" << p.batch << (p.shared_x ? " with one x" : "")
       << (p.float32_result ? ", float32 result" : "");
  return name.str();
}

// float16 pairs of scale and zero for which the f32 sum of some weight is inexact and a midpoint of float16, although
// the zero is as large as 2^-11 of the scale: rounding that sum again is wrong for about half of them. They are so rare
// that random cases miss them.
const std::vector<std::pair<double, double>>& InexactMidpoints() {
  static const std::vector<std::pair<double, double>> pairs = [] {
    std::vector<std::pair<double, double>> found;
    for (int s = 1024; s < 2048; ++s) {
      for (int z = 1024; z < 2048; ++z) {
        const double scale = std::ldexp(s, -10);
        const double zero = std::ldexp(z, -21);
        for (int q = 0; q < 16; ++q) {
          const double sum = (q - 8) * scale + zero;
          const float rounded = static_cast<float>(sum);
          uint32_t bits;
          std::memcpy(&bits, &rounded, sizeof(bits));
          if (rounded == sum || (bits & 0x1FFF) != 0x1000) continue;
          found.emplace_back(scale, zero);
          break;
        }
      }
    }
    return found;
  }();
  return pairs;
}

void FillScales(Case& c, Scales scales, std::mt19937_64& random) {
  const Problem& p = c.problem;
  std::normal_distribution<double> normal;
  std::uniform_int_distribution<int> die(0, 9);
  const auto round = [&](double v) { return Round(p.dtype, v); };
  for (int64_t group = 0; group < p.k / p.group_size; ++group) {
    for (int64_t n = 0; n < p.n; ++n) {
      double scale = round(0.01 * normal(random));
      double zero = round(0.05 * normal(random));
      const int choice = die(random);
      if (choice == 0) zero = 0;
      if (choice == 1) scale = 0;
      if (scales == Scales::kTraps) {
        // Zeros that are tiny beside the scale, where rounding the f32 sum again goes wrong.
        const int down = std::uniform_int_distribution<int>(8, p.dtype == DType::kBFloat16 ? 34 : 14)(random);
        scale = round(std::ldexp(1 + std::fabs(normal(random)), p.dtype == DType::kBFloat16 ? 0 : 8));
        zero = round(std::ldexp(scale * normal(random), -down));
        if (p.dtype == DType::kFloat16 && choice < 5) {
          const auto& pairs = InexactMidpoints();
          std::tie(scale, zero) = pairs[std::uniform_int_distribution<size_t>(0, pairs.size() - 1)(random)];
          if (choice % 2 == 0) scale = -scale;
        }
      }
      if (scales == Scales::kSubnormal) {
        scale = round(std::ldexp(normal(random), SmallestExponent(p.dtype) - 2));
        zero = round(std::ldexp(normal(random), SmallestExponent(p.dtype) - 2));
      }
      if (scales == Scales::kAnyExponent) {
        const auto number = [&](int largest) {
          const int exponent = std::uniform_int_distribution<int>(SmallestExponent(p.dtype) - 4, largest)(random);
          return round(std::ldexp(std::uniform_real_distribution<double>(-2, 2)(random), exponent));
        };
        scale = number(-SmallestExponent(p.dtype) - 4);  // Eight of it are still finite.
        zero = number(-SmallestExponent(p.dtype) - 1);
      }
      const int64_t index = 2 * (group * p.n + n);
      c.scales_and_zeros[index] = Encode(p.dtype, scale);
      c.scales_and_zeros[index + 1] = Encode(p.dtype, zero);
      double rounded[16];  // Once each: long double is slow where it is software.
      for (int q = 0; q < 16; ++q) rounded[q] = Weight(p.dtype, q, scale, zero);
      for (int64_t k = group * p.group_size; k < (group + 1) * p.group_size; ++k) {
        const size_t i = static_cast<size_t>(n * p.k + k);
        c.weights[i] = rounded[c.q[i]];
        c.exact_weights[i] = (c.q[i] - 8) * scale + zero;
      }
    }
  }
}

void Fill(Case& c, Scales scales, std::mt19937_64& random) {
  std::uniform_int_distribution<int> nibble(0, 15);
  for (uint8_t& q : c.q) q = static_cast<uint8_t>(nibble(random));
  Pack(c);
  FillScales(c, scales, random);
  std::normal_distribution<double> normal;
  for (uint16_t& x : c.x) x = Encode(c.problem.dtype, Round(c.problem.dtype, normal(random)));
}

// NaNs, the first in both types of 16 bits, and never the result of these cases.
constexpr uint16_t kPoison = 0x7FB1;
constexpr uint32_t kPoison32 = 0x7FB1FEED;

// The bits of y, on `threads` threads, by the kernels of one instruction set, or by one of them, "/<tile>".
template <typename Bits>
std::vector<Bits> Run(const Problem& problem, Operands operands, Isa isa, int64_t threads,
                      const std::string& tile = "") {
  constexpr Bits kUnwritten = sizeof(Bits) == 2 ? kPoison : kPoison32;
  GuardedArray<Bits> y(problem.batch * problem.m * problem.n);
  std::fill(y.begin(), y.end(), kUnwritten);
  operands.y = y.data();
  const StatusOr<Plan> plan = MakePlan(problem, Features(), IsaName(isa) + tile);
  EXPECT(plan.ok()) << plan.status().message();
  StdThreadPool pool(threads);
#if defined(__x86_64__)
  const Status status = IsEmulated(isa) ? Launch(problem, *plan, kEmulatedTilesKernel, operands, pool)
                                        : Launch(problem, *plan, operands, pool);
#else
  const Status status = Launch(problem, *plan, operands, pool);
#endif
  EXPECT(status.ok()) << status.message();
  EXPECT(y.BandIntact()) << IsaName(isa) << " wrote before y, " << Name(problem);
  EXPECT(std::find(y.begin(), y.end(), kUnwritten) == y.end())
      << IsaName(isa) << " left outputs unwritten, " << Name(problem);
  return std::vector<Bits>(y.begin(), y.end());
}

// Of the first m tokens.
std::vector<uint16_t> Run(Case& c, Isa isa, int64_t m, int64_t threads, const std::string& tile = "") {
  Problem problem = c.problem;
  problem.m = m;
  return Run<uint16_t>(problem, c.operands(), isa, threads, tile);
}

std::vector<float> RunFloat32(Case& c, Isa isa, int64_t m, int64_t threads) {
  Problem problem = c.problem;
  problem.m = m;
  problem.float32_result = true;
  const std::vector<uint32_t> bits = Run<uint32_t>(problem, c.operands(), isa, threads);
  std::vector<float> y(bits.size());
  std::memcpy(y.data(), bits.data(), bits.size() * sizeof(float));
  return y;
}

// y in f32: near to the sums, and what is rounded where it has 16 bits.
void ExpectSums(Case& c, Isa isa, const std::vector<float>& sums, const std::vector<uint16_t>& y,
                const std::vector<double>& exact, const std::vector<double>& magnitude) {
  const Problem& p = c.problem;
  for (size_t i = 0; i < sums.size(); ++i) {
    const bool near = std::fabs(sums[i] - exact[i]) <= std::ldexp(magnitude[i], -20);
    if (!near || Encode(p.dtype, Round(p.dtype, sums[i])) != y[i]) {
      EXPECT(false) << IsaName(isa) << " " << Name(p) << " y[" << i / static_cast<size_t>(p.n) << "]["
                    << i % static_cast<size_t>(p.n) << "] is " << sums[i] << " in float32, " << Decode(p.dtype, y[i])
                    << " in 16 bits, and should be " << exact[i];
      return;
    }
  }
}

// y within the bound of the documentation: f32 accumulation in any order, one rounding.
void ExpectClose(Case& c, Isa isa, const std::vector<uint16_t>& y, const std::vector<double>& exact,
                 const std::vector<double>& magnitude) {
  const Problem& p = c.problem;
  int64_t different = 0;
  for (size_t i = 0; i < y.size(); ++i) {
    const double actual = Decode(p.dtype, y[i]);
    const double expected = Round(p.dtype, exact[i]);
    const double bound = p.dtype == DType::kBFloat16
                             ? Ulp(p.dtype, std::max(std::fabs(expected), std::ldexp(magnitude[i], -16)))
                             : Ulp(p.dtype, expected) + std::ldexp(magnitude[i], -20);
    different += actual != expected;
    if (!(std::fabs(actual - expected) <= bound)) {
      EXPECT(false) << IsaName(isa) << " " << Name(p) << " y[" << i / static_cast<size_t>(p.n) << "]["
                    << i % static_cast<size_t>(p.n) << "] is " << actual << ", expected " << expected << " +- "
                    << bound;
      return;
    }
  }
  if (p.dtype == DType::kBFloat16) {
    EXPECT(static_cast<double>(different) <= 3 + 0.005 * static_cast<double>(y.size()))
        << IsaName(isa) << " " << Name(p) << ": " << different << " of " << y.size() << " differ in the last place";
  }
}

using AlignedFloats = std::unique_ptr<float, void (*)(void*)>;

// To a cache line, in whole lines.
AlignedFloats Aligned(int64_t floats) {
  constexpr int64_t kLine = 64;
  const int64_t bytes = CeilDiv(floats * static_cast<int64_t>(sizeof(float)), kLine) * kLine;
  return {static_cast<float*>(std::aligned_alloc(kLine, static_cast<size_t>(bytes))), std::free};
}

std::vector<Isa> Those(const std::vector<Isa>& isas, DType dtype) {
  std::vector<Isa> found;
  std::copy_if(isas.begin(), isas.end(), std::back_inserter(found), [&](Isa isa) { return Multiplies(isa, dtype); });
  return found;
}

// Of all formats; with INT4MM_TEST_SHARE=<s> one of s, others every time, for machines that are emulated or watched.
std::vector<Problem> Grid(std::mt19937_64& random) {
  const char* share_text = std::getenv("INT4MM_TEST_SHARE");
  const uint64_t share = share_text == nullptr ? 1 : std::max<uint64_t>(std::strtoull(share_text, nullptr, 10), 1);
  std::vector<Problem> problems;
  for (const DType dtype : {DType::kBFloat16, DType::kFloat16}) {
    for (const int64_t group_size : {32, 64, 128, 256}) {
      for (const int64_t inner_k_tiles : {2, 4, 8}) {
        const int64_t step = std::lcm(16 * inner_k_tiles, group_size);
        for (const auto& [n, steps] : {std::pair<int64_t, int64_t>{8, 1}, {40, 3}, {136, 768 / step + 1}}) {
          if (random() % share == 0) problems.push_back({65, n, steps * step, group_size, inner_k_tiles, dtype});
        }
      }
    }
  }
  return problems;
}

bool IsExact(const Problem& problem, Isa isa) {
  const StatusOr<Plan> plan = MakePlan(problem, Features(), IsaName(isa));
  EXPECT(plan.ok()) << plan.status().message();
  return Explain(problem, *plan).weights == "exact";
}

// y before it is rounded, and the sums of the sizes of its products, by weights [n][k].
std::pair<std::vector<double>, std::vector<double>> Sums(Case& c, const std::vector<double>& weights) {
  const Problem& p = c.problem;
  std::vector<double> exact(static_cast<size_t>(p.m * p.n));
  std::vector<double> magnitude(exact.size());
  std::vector<double> x(static_cast<size_t>(p.k));
  for (int64_t m = 0; m < p.m; ++m) {
    for (int64_t k = 0; k < p.k; ++k) x[static_cast<size_t>(k)] = Decode(p.dtype, c.x[m * p.k + k]);
    for (int64_t n = 0; n < p.n; ++n) {
      const double* w = &weights[static_cast<size_t>(n * p.k)];
      double sum = 0;
      double sum_magnitude = 0;
      for (size_t k = 0; k < x.size(); ++k) {
        sum += w[k] * x[k];
        sum_magnitude += std::fabs(w[k] * x[k]);
      }
      exact[static_cast<size_t>(m * p.n + n)] = sum;
      magnitude[static_cast<size_t>(m * p.n + n)] = sum_magnitude;
    }
  }
  return {exact, magnitude};
}

void TestProducts(const std::vector<Isa>& isas, std::mt19937_64& random) {
  for (const Problem& p : Grid(random)) {
    Case c(p);
    Fill(c, Scales::kOrdinary, random);
    const auto of_rounded = Sums(c, c.weights);
    const auto of_exact = Sums(c, c.exact_weights);
    for (const Isa isa : Those(isas, p.dtype)) {
      // What few tokens give may be exact where that of more is not; those of a kind are alike.
      for (const int64_t most_tokens : {p.m, int64_t{8}, int64_t{2}}) {
        Problem most = p;
        most.m = most_tokens;
        const bool is_exact = IsExact(most, isa);
        const auto& [sums, magnitude] = is_exact ? of_exact : of_rounded;
        const std::vector<uint16_t> y = Run(c, isa, most.m, 1);
        ExpectClose(c, isa, y, sums, magnitude);
        ExpectSums(c, isa, RunFloat32(c, isa, most.m, 2), y, sums, magnitude);
        for (const int64_t m : {1, 2, 3, 4, 5, 7, 8, 9, 16, 17, 33, 65}) {
          Problem some = p;
          some.m = m;
          if (m > most.m || IsExact(some, isa) != is_exact) continue;
          const std::vector<uint16_t> rows = Run(c, isa, m, 1 + m % 5);
          EXPECT(std::equal(rows.begin(), rows.end(), y.begin()))
              << IsaName(isa) << " " << Name(p) << ": rows of y change with m=" << m << " or with the threads";
          ExpectSums(c, isa, RunFloat32(c, isa, m, 1), rows, sums, magnitude);
        }
        // By name the weights of few tokens are rounded all the same.
        if (most.m < p.m || isa != Isa::kAvx512Bf16) continue;
        for (const auto& [m, tile] : {std::pair<int64_t, const char*>{1, "/direct-8x1"}, {8, "/direct-4x4"}}) {
          const std::vector<uint16_t> rows = Run(c, isa, m, 2, tile);
          EXPECT(std::equal(rows.begin(), rows.end(), y.begin())) << IsaName(isa) << tile << " " << Name(p);
        }
      }
    }
  }
}

// A batch is, in every bit, its products one by one.
template <typename Bits>
void TestBatch(const std::vector<Isa>& all_isas, const Problem& batch, std::mt19937_64& random) {
  const std::vector<Isa> isas = Those(all_isas, batch.dtype);
  Case all(batch);
  Problem one = batch;
  one.batch = 1;
  std::vector<std::vector<Bits>> expected(isas.size());
  for (int64_t i = 0; i < batch.batch; ++i) {
    Case c(one);
    Fill(c, Scales::kOrdinary, random);
    if (batch.shared_x && i > 0) {
      std::copy(all.x.begin(), all.x.end(), c.x.begin());
    } else {
      std::copy(c.x.begin(), c.x.end(), all.x.begin() + i * c.x.size());
    }
    std::copy(c.packed.begin(), c.packed.end(), all.packed.begin() + i * c.packed.size());
    std::copy(c.scales_and_zeros.begin(), c.scales_and_zeros.end(),
              all.scales_and_zeros.begin() + i * c.scales_and_zeros.size());
    for (size_t isa = 0; isa < isas.size(); ++isa) {
      const std::vector<Bits> y = Run<Bits>(one, c.operands(), isas[isa], 1);
      expected[isa].insert(expected[isa].end(), y.begin(), y.end());
    }
  }
  for (size_t isa = 0; isa < isas.size(); ++isa) {
    for (const int64_t threads : {1, 3}) {
      EXPECT(Run<Bits>(batch, all.operands(), isas[isa], threads) == expected[isa])
          << IsaName(isas[isa]) << " " << Name(batch) << ": a product of the batch is not what it is alone, " << threads
          << " threads";
    }
  }
}

void TestBatches(const std::vector<Isa>& isas, std::mt19937_64& random) {
  for (const bool shared_x : {false, true}) {
    // One token, some, and more than a pass takes; few products, and more than are computed side by side.
    for (const int64_t m : {1, 5, 280}) {
      for (const int64_t batch : {1, 3, 29}) {
        Problem p{m, 40, 384, 64, 4, DType::kBFloat16};
        p.batch = batch;
        p.shared_x = shared_x;
        TestBatch<uint16_t>(isas, p, random);
        p.dtype = DType::kFloat16;
        p.float32_result = true;
        TestBatch<uint32_t>(isas, p, random);
      }
    }
  }
}

// Without products there is nothing to read or write.
void TestEmptyBatch(const std::vector<Isa>& isas) {
  for (const Isa isa : isas) {
    Problem p{4, 40, 384, 64, 4, DType::kBFloat16};
    p.batch = 0;
    EXPECT(Run<uint16_t>(p, Operands(), isa, 2).empty()) << IsaName(isa);
  }
}

// Multiplying by the identity reads off the weights, which must be right in every bit (a weight of -0 comes out as +0).
void TestWeights(const std::vector<Isa>& isas, std::mt19937_64& random) {
  for (Problem p : Grid(random)) {
    if (p.n != 40) continue;
    p.m = p.k;
    for (const Scales scales : {Scales::kOrdinary, Scales::kTraps, Scales::kSubnormal, Scales::kAnyExponent}) {
      Case c(p);
      Fill(c, scales, random);
      for (int64_t m = 0; m < p.m; ++m) {
        for (int64_t k = 0; k < p.k; ++k) c.x[m * p.k + k] = Encode(p.dtype, m == k ? 1 : 0);
      }
      for (const Isa isa : Those(isas, p.dtype)) {
        const std::vector<uint16_t> y = Run(c, isa, p.m, 3);
        int64_t wrong = 0;
        for (int64_t k = 0; k < p.k; ++k) {
          for (int64_t n = 0; n < p.n; ++n) {
            wrong +=
                Decode(p.dtype, y[static_cast<size_t>(k * p.n + n)]) != c.weights[static_cast<size_t>(n * p.k + k)];
          }
        }
        EXPECT(wrong == 0) << IsaName(isa) << " " << Name(p) << ": " << wrong << " of " << p.n * p.k
                           << " weights are wrong, kind of scales " << static_cast<int>(scales);
      }
    }
  }
}

// Every kind of scale and zero, infinities and NaN too, and sums that overflow though their parts do not, or the
// reverse.
void TestExactTable(std::mt19937_64& random) {
  for (const DType dtype : {DType::kBFloat16, DType::kFloat16}) {
    for (int i = 0; i < 200000; ++i) {
      const double scale = Decode(dtype, static_cast<uint16_t>(random()));
      const double zero = Decode(dtype, static_cast<uint16_t>(random()));
      float table[16];
      ExactTable(dtype, static_cast<float>(scale), static_cast<float>(zero), table);
      for (int q = 0; q < 16; ++q) {
        const double expected = Weight(dtype, q, scale, zero);
        EXPECT(table[q] == expected || (std::isnan(table[q]) && std::isnan(expected)))
            << DTypeName(dtype) << " q=" << q << " scale=" << scale << " zero=" << zero << " gave " << table[q]
            << ", expected " << expected;
      }
    }
  }
}

// This thread's floating point control register, and the bits of it that flush subnormals to zero.
#if defined(__x86_64__)
constexpr uint64_t kFlushBits = 0x8040;
uint64_t FloatControl() { return _mm_getcsr(); }
void SetFloatControl(uint64_t bits) { _mm_setcsr(static_cast<unsigned>(bits)); }
#elif defined(__aarch64__)
constexpr uint64_t kFlushBits = uint64_t{1} << 24;
uint64_t FloatControl() {
  uint64_t bits;
  __asm__ volatile("mrs %0, fpcr" : "=r"(bits));
  return bits;
}
void SetFloatControl(uint64_t bits) { __asm__ volatile("msr fpcr, %0" : : "r"(bits) : "memory"); }
#endif

// A thread that flushes subnormals, as XLA's do, gets the same y, and finds its settings as it left them.
void TestFlushToZero(const std::vector<Isa>& isas, std::mt19937_64& random) {
  for (const int64_t m : {2, 20}) {
    Case c(Problem{m, 16, 256, 128, 8, DType::kBFloat16});
    Fill(c, Scales::kSubnormal, random);
    for (const Isa isa : isas) {
      const std::vector<uint16_t> y = Run(c, isa, m, 1);
      EXPECT(std::any_of(y.begin(), y.end(), [](uint16_t v) { return (v & 0x7FFF) != 0; }))
          << "flushed weights would make all of y zero, which this case must not be by itself";
      const uint64_t before = FloatControl();
      SetFloatControl(before | kFlushBits);
      const std::vector<uint16_t> flushed = Run(c, isa, m, 1);
      const uint64_t after = FloatControl();
      SetFloatControl(before);
      EXPECT(flushed == y) << IsaName(isa) << " depends on the caller's flush-to-zero, m=" << m;
      EXPECT((after & kFlushBits) == kFlushBits) << IsaName(isa) << " changed the caller's floating point environment";
    }
  }
}

// NaN and infinity reach y as such.
void TestNonFinite(const std::vector<Isa>& isas, std::mt19937_64& random) {
  for (const DType dtype : {DType::kBFloat16, DType::kFloat16}) {
    Problem p{6, 8, 128, 128, 8, dtype};
    Case c(p);
    Fill(c, Scales::kOrdinary, random);
    const uint16_t infinity = dtype == DType::kBFloat16 ? 0x7F80 : 0x7C00;
    c.x[1 * p.k + 5] = infinity | 1;
    c.x[3 * p.k + 7] = infinity;
    for (int64_t n = 0; n < p.n; ++n) {
      c.q[static_cast<size_t>(n * p.k + 7)] = 12;
      c.scales_and_zeros[2 * n] = Encode(dtype, n % 2 == 0 ? 0.5 : -0.5);
      c.scales_and_zeros[2 * n + 1] = 0;
    }
    Pack(c);
    for (const Isa isa : Those(isas, dtype)) {
      for (const int64_t m : {4, 6}) {
        const std::vector<uint16_t> y = Run(c, isa, m, 1);
        for (int64_t row = 0; row < m; ++row) {
          for (int64_t n = 0; n < p.n; ++n) {
            const double v = Decode(dtype, y[static_cast<size_t>(row * p.n + n)]);
            const bool right = row == 1   ? std::isnan(v)
                               : row == 3 ? v == (n % 2 == 0 ? INFINITY : -INFINITY)
                                          : std::isfinite(v);
            EXPECT(right) << IsaName(isa) << " " << Name(p) << " y[" << row << "][" << n << "] is " << v;
          }
        }
      }
    }
  }
}

// Tokens of every size, of values that are far apart, of zeros and of subnormals.
void TestRangesOfActivations(const std::vector<Isa>& isas, std::mt19937_64& random) {
  const auto power = [&](int least, int most) {
    return std::ldexp(1.0, std::uniform_int_distribution<int>(least, most)(random));
  };
  std::normal_distribution<double> normal;
  for (const auto& [m, in_range] :
       {std::pair<int64_t, bool>{2, true}, {2, false}, {4, true}, {4, false}, {40, true}, {40, false}}) {
    Case c(Problem{m, 16, 2304, m == 4 ? 32 : 128, 8, DType::kBFloat16});
    Fill(c, Scales::kOrdinary, random);
    for (int64_t token = 0; token < m; ++token) {
      // One with neighbours that are 2^-141 of each other, which is more than the products of pairs can keep.
      const bool is_out = token == 0 && !in_range;
      const double size = is_out ? 0x1p60 : power(-130, 110);
      const int spread = is_out ? 141 : std::uniform_int_distribution<int>(0, 2)(random) * 47;
      for (int64_t k = 0; k < c.problem.k; ++k) {
        const double value = token % 7 == 3 ? 0 : normal(random) * size * power(-spread, 0);
        c.x[token * c.problem.k + k] = Encode(DType::kBFloat16, Round(DType::kBFloat16, value));
      }
    }
    for (const Isa isa : isas) {
      // What is out of range is multiplied by weights that are rounded.
      const bool is_exact = in_range && IsExact(c.problem, isa);
      const auto [sums, magnitude] = Sums(c, is_exact ? c.exact_weights : c.weights);
      ExpectClose(c, isa, Run(c, isa, m, 2), sums, magnitude);
    }
  }
}

#if defined(__x86_64__)
// The kernel of bfloat16 pairs says what it cannot multiply, and no more: the launcher would quietly run another.
void TestRangeOfPairs(const std::vector<Isa>& isas, std::mt19937_64& random) {
  if (std::find(isas.begin(), isas.end(), Isa::kAvx512Bf16) == isas.end()) return;
  const auto bits = [](double value) {
    if (std::isfinite(value)) return Encode(DType::kBFloat16, value);
    return static_cast<uint16_t>(std::isnan(value) ? 0x7FC0 : 0x7F80);
  };
  const auto refuses = [](Case& c) {
    const Problem& p = c.problem;
    bool out_of_range = false;
    float factor;
    std::vector<uint16_t> y(static_cast<size_t>(p.n));
    const Kernel& tiles = IsEmulated(Isa::kAmx) ? kEmulatedTilesKernel : kAmxKernel;
    const AlignedFloats x = Aligned(WholeTiles(1) * p.k);
    const AlignedFloats scratch = Aligned(std::max(PanelScratchFloats(1, p.n), TileScratchFloats(1, p.n)));
    MatmulArgs args;
    args.problem = p;
    args.operands = c.operands();
    args.operands.y = y.data();
    args.tokens = 1;
    args.x = x.get();
    args.token_factors = &factor;
    args.out_of_range = &out_of_range;
    std::vector<float> group_sums(static_cast<size_t>(p.k / p.group_size));
    args.group_sums = group_sums.data();
    kAvx512Bf16Kernel.order_exact(args, 0, 1);
    kAvx512Bf16Kernel.exact(args, 0, p.n, scratch.get());
    const bool exact = out_of_range;
    out_of_range = false;
    kAvx512Bf16Kernel.order_activations(args, 0, 1);
    const bool x_out_of_range = out_of_range;
    kAvx512Bf16Kernel.direct(args, 0, p.n, scratch.get());
    const bool direct = out_of_range;
    EXPECT(exact == direct);
    out_of_range = x_out_of_range;
    kAvx512Bf16Kernel.panel(args, 0, p.n, scratch.get());
    EXPECT(direct == out_of_range);
    out_of_range = false;
    tiles.order_tiles(args, 0, 1);
    tiles.tiles(args, 0, p.n, scratch.get());
    EXPECT(direct == out_of_range);
    return direct;
  };
  const auto with_x = [&](double one, double other) {
    Case c(Problem{1, 16, 1280, 32, 8, DType::kBFloat16});
    Fill(c, Scales::kOrdinary, random);
    std::fill(c.x.begin(), c.x.end(), bits(one));
    c.x[static_cast<int64_t>(random() % 1280)] = bits(other);
    return refuses(c);
  };
  const auto with_pair = [&](double scale, double zero) {
    Case c(Problem{1, 16, 1280, 32, 8, DType::kBFloat16});
    Fill(c, Scales::kOrdinary, random);
    const int64_t pair = static_cast<int64_t>(random() % (16 * 40));
    c.scales_and_zeros[2 * pair] = bits(scale);
    c.scales_and_zeros[2 * pair + 1] = bits(zero);
    return refuses(c);
  };
  for (const double size : {0x1p-126, 0x1p-50, 1.0, 0x1p50, 0x1p127}) {
    EXPECT(!with_x(size, size)) << size;
    EXPECT(!with_x(size, 0)) << size;
    EXPECT(!with_x(0, -size)) << size;
  }
  EXPECT(!with_x(0, 0));
  EXPECT(!with_x(1, 0x1p-126));
  EXPECT(!with_x(0x1p14, 0x1p-126));
  EXPECT(with_x(0x1p15, 0x1p-126));
  EXPECT(!with_x(0x1p70, 0x1p-70));
  EXPECT(with_x(0x1p70, 0x1p-71));
  EXPECT(!with_x(0x1p-120, 0x1p-133));  // Subnormal.
  EXPECT(with_x(0x1p20, 0x1p-133));
  EXPECT(with_x(1, INFINITY));
  EXPECT(with_x(1, NAN));
  EXPECT(!with_pair(0, 0));
  EXPECT(!with_pair(0x1p-30, -0x1p-30));
  EXPECT(!with_pair(-0x1.FEp25, 0x1.FEp25));
  for (const double outside : {0x1.FEp-31, -0x1p-133, 0x1p26, -0x1p100, static_cast<double>(INFINITY)}) {
    EXPECT(with_pair(outside, 0)) << outside;
    EXPECT(with_pair(0, outside)) << outside;
  }
}
#endif

// The last tile of arrays of more than 2^32 bytes and elements; only the pages that are touched exist.
void TestLargeOffsets(std::mt19937_64& random) {
  constexpr int64_t kToken = (int64_t{1} << 32) / 8192 + 3;
  Problem large{kToken + 1, (int64_t{1} << 20) + 8, 8192, 256, 8, DType::kBFloat16};
  Problem small = large;
  small.m = 1;
  small.n = 8;
  Case expected(small);
  Fill(expected, Scales::kOrdinary, random);

  GuardedArray<uint16_t> x(large.m * large.k);
  GuardedArray<uint32_t> packed(large.n * large.k / 8);
  GuardedArray<uint16_t> scales_and_zeros(large.k / large.group_size * large.n * 2);
  GuardedArray<uint16_t> y(large.m * large.n);
  if (!x || !packed || !scales_and_zeros || !y) {
    std::cout << "SKIPPED TestLargeOffsets: no address space\n";
    return;
  }
  std::copy(expected.x.begin(), expected.x.end(), x.end() - small.k);
  std::copy(expected.packed.begin(), expected.packed.end(), packed.end() - expected.packed.size());
  for (int64_t group = 0; group < small.k / small.group_size; ++group) {
    std::copy_n(expected.scales_and_zeros.data() + 2 * group * small.n, 2 * small.n,
                scales_and_zeros.data() + 2 * ((group + 1) * large.n - small.n));
  }
  const std::vector<uint16_t> expected_y = Run(expected, Isa::kScalar, 1, 1);
  std::vector<float> ordered(static_cast<size_t>(large.k));
  const AlignedFloats scratch = Aligned(PanelScratchFloats(1, 8));
  MatmulArgs args;
  args.problem = large;
  args.operands = {x.data(), packed.data(), scales_and_zeros.data(), y.data()};
  args.first_token = kToken;
  args.tokens = 1;
  args.x = ordered.data();
  kScalarKernel.order_activations(args, 0, 1);
  kScalarKernel.direct(args, large.n - 8, large.n, scratch.get());
  EXPECT(std::equal(expected_y.begin(), expected_y.end(), y.end() - 8)) << "direct";
  std::fill(y.end() - 8, y.end(), kPoison);
  kScalarKernel.panel(args, large.n - 8, large.n, scratch.get());
  EXPECT(std::equal(expected_y.begin(), expected_y.end(), y.end() - 8)) << "panel";
}

int Main() {
  std::mt19937_64 random(test::Seed());
  const std::vector<Isa> isas = SupportedIsas(Features());
  for (const Isa isa : {Isa::kAmx, Isa::kAvx512Bf16, Isa::kAvx512, Isa::kAvx2, Isa::kNeon, Isa::kScalar}) {
    const bool runs = std::find(isas.begin(), isas.end(), isa) != isas.end();
    std::cout << (runs ? "testing " : "SKIPPED ") << IsaName(isa)
              << (!runs             ? ": this CPU does not have it\n"
                  : IsEmulated(isa) ? ", its registers emulated\n"
                                    : "\n");
  }
  TestExactTable(random);
  TestWeights(isas, random);
  TestProducts(isas, random);
  TestBatches(isas, random);
  TestEmptyBatch(isas);
  TestFlushToZero(isas, random);
  TestNonFinite(isas, random);
  TestRangesOfActivations(isas, random);
#if defined(__x86_64__)
  TestRangeOfPairs(isas, random);
#endif
  TestLargeOffsets(random);
  return test::Result();
}

}  // namespace
}  // namespace int4mm::cpu

int main() { return int4mm::cpu::Main(); }
