#include "cuda/decode_plan.h"

#include <algorithm>
#include <limits>

#include "core/ceil_div.h"

namespace int4mm::cuda {
namespace {

using decode::Config;
using decode::kConfigs;
using decode::Schedule;

constexpr int64_t kMostBlocks = 65535;             // gridDim.y, of tokens, and gridDim.z, of the batch.
constexpr int64_t kMostTokens = int64_t{1} << 30;  // Of the whole batch: the kernel counts them in 32 bits.

// What decides among schedules that fit is how many steps the slowest warp takes one after another; a warp with few row
// tiles under way waits for memory in each. In a sweep of every schedule (14 shapes, m = 1, 8 and 16, group sizes 32
// and 128, on an H200) the schedule with the least cost was 0.3 % slower than the fastest one in the mean, 5 % at most.
double Cost(const Problem& p, const Config& c, const Schedule& s) {
  constexpr int kEnoughAhead = 3;      // Row tiles under way in a warp.
  constexpr double kMissing = 1.5;     // What a step costs more for each that is missing.
  constexpr double kPerChunk = 0.01;   // Among equals, few chunks,
  constexpr double kPerWarp = 0.0001;  // then few warps.
  const int slices = static_cast<int>(p.k / decode::kStepK);
  double steps = static_cast<double>(CeilDiv(slices, s.warps_k)) * s.chunks * s.token_blocks;
  for (int ahead = c.ahead * s.warp_pairs; ahead < kEnoughAhead; ++ahead) steps *= kMissing;
  return steps + kPerChunk * s.chunks + kPerWarp * s.Warps();
}

// One config with so many warps along k and n; none if that does not fit the config, the problem or the device.
std::optional<Schedule> MakeSchedule(const Problem& problem, const DeviceDescription& device, int config, int warps_k,
                                     int warps_n) {
  const Config& c = kConfigs[config];
  const int64_t token_blocks = CeilDiv(problem.m, c.tokens);
  if (problem.inner_k_tiles != 8 || token_blocks > kMostBlocks || problem.batch > kMostBlocks) return std::nullopt;
  if (problem.batch * problem.m > kMostTokens) return std::nullopt;
  if (warps_k * warps_n > c.most_warps) return std::nullopt;
  const int tiles = static_cast<int>(problem.n / 8);
  const int tokens = static_cast<int>(std::min<int64_t>(problem.m, c.tokens));
  Schedule s;
  // The products of a batch run side by side and share the SMs.
  const int64_t sm_share = std::max(device.sm_count / std::max(problem.batch, int64_t{1}), int64_t{1});
  s.ctas = static_cast<int>(std::min<int64_t>(sm_share, tiles));
  s.token_blocks = static_cast<int>(token_blocks);
  s.warps_k = warps_k;
  s.warps_n = warps_n;
  // As few chunks as the registers of the warps allow, or more where their partial sums take too much shared memory.
  const int pairs = CeilDiv(CeilDiv(tiles, s.ctas), 2);
  int chunk_pairs = 0;
  for (int chunks = CeilDiv(pairs, c.pairs * warps_n);; ++chunks) {
    const int fewer = CeilDiv(pairs, chunks);
    if (fewer == chunk_pairs) continue;
    chunk_pairs = fewer;
    s.chunks = CeilDiv(pairs, chunk_pairs);
    s.chunk_tiles = 2 * chunk_pairs;
    s.warp_pairs = CeilDiv(chunk_pairs, warps_n);
    if (s.warp_pairs * (warps_n - 1) >= chunk_pairs) return std::nullopt;  // Warps without work.
    s.shared_bytes = decode::SharedBytes(c, s, tokens, decode::GroupsPerStep(problem.group_size));
    if (s.shared_bytes <= device.SharedBytesPerCta()) return s;
    if (chunk_pairs == 1) return std::nullopt;
  }
}

}  // namespace

std::optional<DecodePlan> PlanDecode(const Problem& problem, const DeviceDescription& device, int config) {
  std::optional<DecodePlan> best;
  double least = std::numeric_limits<double>::infinity();
  for (int i = 0; i < static_cast<int>(kConfigs.size()); ++i) {
    if (config >= 0 && i != config) continue;
    // Columns of tokens that x does not have cost as much as those that it has, and a second reading costs more.
    if (config < 0 && (problem.m > 8) != (kConfigs[i].tokens > 8)) continue;
    for (const int warps_k : {4, 8, 12, 16}) {
      for (const int warps_n : {1, 2, 4}) {
        const std::optional<Schedule> schedule = MakeSchedule(problem, device, i, warps_k, warps_n);
        if (!schedule) continue;
        const double cost = Cost(problem, kConfigs[i], *schedule);
        if (cost >= least) continue;
        best = DecodePlan{i, *schedule};
        least = cost;
      }
    }
  }
  return best;
}

}  // namespace int4mm::cuda
