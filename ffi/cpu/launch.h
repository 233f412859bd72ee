#pragma once

#include "core/problem.h"
#include "core/status.h"
#include "cpu/kernels/kernel.h"
#include "cpu/parallel.h"
#include "cpu/plan.h"

namespace int4mm::cpu {

// Computes y as planned; the plan must be this problem's. Returns when y is written, an error only for want of memory.
// The result does not depend, in any bit, on the pool.
Status Launch(const Problem& problem, const Plan& plan, const Operands& operands, ThreadPool& pool);

// The same by another kernel than that of the plan's instruction set: for tests.
Status Launch(const Problem& problem, const Plan& plan, const Kernel& kernel, const Operands& operands,
              ThreadPool& pool);

}  // namespace int4mm::cpu
