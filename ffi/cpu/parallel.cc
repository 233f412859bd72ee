#include "cpu/parallel.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <new>
#include <vector>

namespace int4mm::cpu {
namespace {

// So long the calling thread looks for the others' end before it sleeps: they have at most a task left, some ten
// microseconds, and to be woken takes longer than that.
constexpr std::chrono::microseconds kPatience{50};

void Pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Outlives the loop: a helper that the pool starts late finds no task left and touches nothing else.
struct Loop {
  Loop(int64_t num_tasks, int64_t num_workers, const std::function<void(int64_t, int64_t)>* loop_body)
      : tasks(num_tasks), body(loop_body), shares(static_cast<size_t>(num_workers)) {
    int64_t begin = 0;
    for (size_t i = 0; i < shares.size(); ++i) {
      shares[i].next.store(begin, std::memory_order_relaxed);
      shares[i].end = begin = tasks * static_cast<int64_t>(i + 1) / num_workers;
    }
  }

  void Work(int64_t worker) {
    int64_t finished = 0;
    for (size_t i = 0; i < shares.size(); ++i) {
      Share& share = shares[(static_cast<size_t>(worker) + i) % shares.size()];
      for (int64_t task; (task = share.next.fetch_add(1, std::memory_order_relaxed)) < share.end; ++finished) {
        (*body)(task, worker);
      }
    }
    if (finished == 0 || done.fetch_add(finished, std::memory_order_acq_rel) + finished < tasks) return;
    const std::lock_guard<std::mutex> lock(mutex);
    all_done.notify_one();
  }

  bool Done() const { return done.load(std::memory_order_acquire) == tasks; }

  void Wait() {
    for (const auto end = std::chrono::steady_clock::now() + kPatience; std::chrono::steady_clock::now() < end;
         Pause()) {
      if (Done()) return;
    }
    std::unique_lock<std::mutex> lock(mutex);
    all_done.wait(lock, [this] { return Done(); });
  }

  // Neighbouring tasks, of which the first is taken next, in a cache line of its own.
  struct alignas(64) Share {
    std::atomic<int64_t> next;
    int64_t end;
  };

  const int64_t tasks;
  const std::function<void(int64_t, int64_t)>* const body;  // Valid until `done` reaches `tasks`.
  std::vector<Share> shares;
  std::atomic<int64_t> done{0};
  std::mutex mutex;
  std::condition_variable all_done;
};

}  // namespace

void ParallelFor(ThreadPool& pool, int64_t tasks, int64_t workers,
                 const std::function<void(int64_t task, int64_t worker)>& body) {
  workers = std::min(workers, tasks);
  if (workers <= 1) {
    for (int64_t task = 0; task < tasks; ++task) body(task, 0);
    return;
  }
  const auto loop = std::make_shared<Loop>(tasks, workers, &body);
  for (int64_t worker = 1; worker < workers; ++worker) {
    try {
      pool.Schedule([loop, worker] { loop->Work(worker); });
    } catch (const std::bad_alloc&) {
      break;  // Fewer helpers; those already scheduled use `body`, so the loop must be finished here.
    }
  }
  loop->Work(0);
  loop->Wait();
}

}  // namespace int4mm::cpu
