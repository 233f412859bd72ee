// How many pieces of one size cover another.
#pragma once

#include <type_traits>

namespace int4mm {

// a / b, rounded up, of numbers that are not negative.
template <typename A, typename B>
constexpr std::common_type_t<A, B> CeilDiv(A a, B b) {
  return (a + b - 1) / b;
}

}  // namespace int4mm
