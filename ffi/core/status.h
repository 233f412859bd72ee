// Errors as values: a code and one sentence that names the operation, what was given, the rule and the remedy.
// Nothing below the handlers throws, asserts or aborts on a caller's input.
#pragma once

#include <sstream>
#include <string>
#include <utility>
#include <variant>

namespace int4mm {

enum class StatusCode {
  kOk,
  kInvalidArgument,     // The caller's shapes, dtypes or attributes break a rule.
  kUnimplemented,       // Well formed, but the named kernel or this device cannot serve it.
  kFailedPrecondition,  // The program was compiled for another device than the one it runs on.
  kInternal,            // A launch or driver call failed.
};

class [[nodiscard]] Status {
 public:
  Status() = default;
  Status(StatusCode code, std::string message) : code_(code), message_(std::move(message)) {}

  bool ok() const { return code_ == StatusCode::kOk; }
  StatusCode code() const { return code_; }
  const std::string& message() const { return message_; }

 private:
  StatusCode code_ = StatusCode::kOk;
  std::string message_;
};

// Collects a sentence: `return InvalidArgument() << "int4pack_mm: n is " << n << ...;`
class StatusBuilder {
 public:
  explicit StatusBuilder(StatusCode code) : code_(code) {}

  template <typename T>
  StatusBuilder& operator<<(const T& value) {
    stream_ << value;
    return *this;
  }

  operator Status() const { return Status(code_, stream_.str()); }

 private:
  StatusCode code_;
  std::ostringstream stream_;
};

inline StatusBuilder InvalidArgument() { return StatusBuilder(StatusCode::kInvalidArgument); }
inline StatusBuilder Unimplemented() { return StatusBuilder(StatusCode::kUnimplemented); }
inline StatusBuilder FailedPrecondition() { return StatusBuilder(StatusCode::kFailedPrecondition); }
inline StatusBuilder Internal() { return StatusBuilder(StatusCode::kInternal); }

// A value, or the status that says why there is none.
template <typename T>
class [[nodiscard]] StatusOr {
 public:
  StatusOr(T value) : state_(std::move(value)) {}
  StatusOr(Status status) : state_(std::move(status)) {}
  StatusOr(const StatusBuilder& builder) : state_(Status(builder)) {}

  bool ok() const { return std::holds_alternative<T>(state_); }
  Status status() const { return ok() ? Status() : std::get<Status>(state_); }
  const T& value() const { return std::get<T>(state_); }
  const T& operator*() const { return value(); }
  const T* operator->() const { return &value(); }

 private:
  std::variant<Status, T> state_;
};

}  // namespace int4mm
