// All that these tests need of a framework: EXPECT(condition) << what was seen; a failure is printed and counted, and
// main returns Result().
#pragma once

#include <cstdint>
#include <cstdlib>
#include <iostream>
#include <random>
#include <sstream>
#include <utility>

namespace int4mm::test {

inline int& Failures() {
  static int failures = 0;
  return failures;
}

class Failure {
 public:
  Failure(const char* file, int line, const char* condition) { text_ << file << ":" << line << ": " << condition; }
  ~Failure() {
    std::cerr << "FAILED " << text_.str() << "\n";
    if (++Failures() == 20) {
      std::cerr << "too many failures\n";
      std::exit(1);
    }
  }

  template <typename T>
  Failure& operator<<(const T& value) {
    text_ << (std::exchange(first_, false) ? "; " : "") << value;
    return *this;
  }

 private:
  std::ostringstream text_;
  bool first_ = true;
};

#define EXPECT(condition) \
  if (condition) {        \
  } else                  \
    ::int4mm::test::Failure(__FILE__, __LINE__, #condition)

inline int Result() {
  if (Failures() == 0) std::cout << "all passed\n";
  return Failures() == 0 ? 0 : 1;
}

// A new seed every run, printed; INT4MM_TEST_SEED repeats one.
inline uint64_t Seed() {
  const char* given = std::getenv("INT4MM_TEST_SEED");
  const uint64_t seed = given != nullptr ? std::strtoull(given, nullptr, 10) : std::random_device{}();
  std::cout << "INT4MM_TEST_SEED=" << seed << "\n";
  return seed;
}

}  // namespace int4mm::test
