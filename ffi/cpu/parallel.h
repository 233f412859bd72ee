// One loop over independent tasks, shared between the calling thread and a thread pool.
#pragma once

#include <cstdint>
#include <functional>

namespace int4mm::cpu {

// Where the loop gets its help: XLA's thread pool in the handler, std::thread in the tests.
class ThreadPool {
 public:
  virtual ~ThreadPool() = default;
  virtual int64_t num_threads() const = 0;
  // Runs `task` later on some thread, or at once on this one.
  virtual void Schedule(std::function<void()> task) = 0;
};

// Calls body(task, worker) once for every task of 0 .. tasks-1, on up to `workers` threads, and returns when all are
// done. The worker, 0 .. workers-1, is the index of the thread within this loop. Each begins with a share of its own,
// tasks / workers neighbours in order, and goes on with what is left of the others': what a task asks memory for ahead
// of the next is then in the cache of the core that wants it. The calling thread takes tasks itself and waits for no
// thread that has not begun one, so the loop ends even where every thread of the pool is such a caller. `body` must not
// throw.
void ParallelFor(ThreadPool& pool, int64_t tasks, int64_t workers,
                 const std::function<void(int64_t task, int64_t worker)>& body);

}  // namespace int4mm::cpu
