// A pool of plain threads, so that the tests need no XLA and a sanitizer sees every thread.
#pragma once

#include <cstdint>
#include <functional>
#include <thread>
#include <utility>
#include <vector>

#include "cpu/parallel.h"

namespace int4mm::cpu {

class StdThreadPool final : public ThreadPool {
 public:
  explicit StdThreadPool(int64_t threads) : threads_(threads) {}
  ~StdThreadPool() override {
    for (std::thread& helper : helpers_) helper.join();
  }
  int64_t num_threads() const override { return threads_; }
  void Schedule(std::function<void()> task) override { helpers_.emplace_back(std::move(task)); }

 private:
  int64_t threads_;
  std::vector<std::thread> helpers_;
};

}  // namespace int4mm::cpu
