#include "cpu/parallel.h"

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <functional>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>

#include "tests/check.h"
#include "tests/std_thread_pool.h"

namespace int4mm::cpu {
namespace {

bool AllOnce(const std::vector<int>& counts) {
  return std::all_of(counts.begin(), counts.end(), [](int n) { return n == 1; });
}

// With every thread of the pool stuck, the caller does the work alone.
void TestParallelForNeedsNoHelper() {
  class StuckPool final : public ThreadPool {
   public:
    int64_t num_threads() const override { return 4; }
    void Schedule(std::function<void()> task) override { late.push_back(std::move(task)); }
    std::vector<std::function<void()>> late;
  };
  StuckPool pool;
  std::vector<int> counts(100);
  ParallelFor(pool, 100, 4, [&](int64_t task, int64_t worker) {
    ++counts[static_cast<size_t>(task)];
    EXPECT(worker == 0) << worker;
  });
  EXPECT(AllOnce(counts));
  EXPECT(pool.late.size() == 3) << pool.late.size();
  for (const auto& task : pool.late) task();
  EXPECT(AllOnce(counts)) << "a late helper took a task";
}

// A worker has neighbouring tasks first, its own, and then what others have left.
void TestWorkersHaveShares() {
  class PromptPool final : public ThreadPool {
   public:
    int64_t num_threads() const override { return 3; }
    void Schedule(std::function<void()> task) override { task(); }
  };
  PromptPool pool;
  std::vector<int64_t> tasks;
  ParallelFor(pool, 8, 3, [&](int64_t task, int64_t worker) {
    tasks.push_back(task);
    EXPECT(worker == 1) << worker;
  });
  EXPECT((tasks == std::vector<int64_t>{2, 3, 4, 5, 6, 7, 0, 1}));
}

void TestParallelForRunsEachTaskOnce() {
  for (const int64_t threads : {1, 2, 7}) {
    StdThreadPool pool(threads);
    std::mutex mutex;
    std::vector<int> counts(1000);
    ParallelFor(pool, 1000, threads, [&](int64_t task, int64_t worker) {
      const std::lock_guard<std::mutex> lock(mutex);
      ++counts[static_cast<size_t>(task)];
      EXPECT(worker >= 0 && worker < threads) << worker;
    });
    EXPECT(AllOnce(counts)) << threads << " threads";
  }
}

// What the tasks wrote is the caller's to read when the loop returns: no lock here, a race detector watches.
void TestWritesAreVisible() {
  StdThreadPool pool(4);
  std::vector<int64_t> values(4096);
  for (int round = 0; round < 20; ++round) {
    ParallelFor(pool, 4096, 4, [&](int64_t task, int64_t) { values[static_cast<size_t>(task)] += task; });
  }
  for (size_t i = 0; i < values.size(); ++i) EXPECT(values[i] == 20 * static_cast<int64_t>(i)) << i;
}

// Tasks that run at once have different workers, so that each worker may own scratch memory.
void TestWorkersAreExclusive() {
  constexpr int kThreads = 4;
  StdThreadPool pool(kThreads);
  std::atomic<int> arrived{0};
  std::vector<int64_t> worker_of(kThreads, -1);
  ParallelFor(pool, kThreads, kThreads, [&](int64_t task, int64_t worker) {
    worker_of[static_cast<size_t>(task)] = worker;
    // Until every thread has a task none can take another.
    for (++arrived; arrived < kThreads;) std::this_thread::yield();
  });
  std::sort(worker_of.begin(), worker_of.end());
  EXPECT((worker_of == std::vector<int64_t>{0, 1, 2, 3}))
      << "workers " << worker_of[0] << ", " << worker_of[1] << ", " << worker_of[2] << ", " << worker_of[3];
}

void TestNoTasks() {
  StdThreadPool pool(4);
  ParallelFor(pool, 0, 4, [](int64_t task, int64_t) { EXPECT(false) << task; });
}

}  // namespace
}  // namespace int4mm::cpu

int main() {
  using namespace int4mm::cpu;
  TestParallelForNeedsNoHelper();
  TestWorkersHaveShares();
  TestParallelForRunsEachTaskOnce();
  TestWritesAreVisible();
  TestWorkersAreExclusive();
  TestNoTasks();
  return int4mm::test::Result();
}
