// What handlers say of XLA's buffers, and statuses -> XLA's errors.
#pragma once

#include <algorithm>
#include <cstdint>
#include <string>

#include "core/status.h"
#include "xla/ffi/api/ffi.h"

namespace int4mm {

inline xla::ffi::Error ToXla(const Status& status) {
  switch (status.code()) {
    case StatusCode::kOk:
      return xla::ffi::Error::Success();
    case StatusCode::kInvalidArgument:
      return xla::ffi::Error(xla::ffi::ErrorCode::kInvalidArgument, status.message());
    case StatusCode::kUnimplemented:
      return xla::ffi::Error(xla::ffi::ErrorCode::kUnimplemented, status.message());
    case StatusCode::kFailedPrecondition:
      return xla::ffi::Error(xla::ffi::ErrorCode::kFailedPrecondition, status.message());
    case StatusCode::kInternal:
      break;
  }
  return xla::ffi::Error(xla::ffi::ErrorCode::kInternal, status.message());
}

using Sizes = xla::ffi::AnyBuffer::Dimensions;

// For a message: "[2, 64]".
inline std::string Text(Sizes sizes) {
  std::string text = "[";
  for (const int64_t size : sizes) {
    if (text.size() > 1) text += ", ";
    text += std::to_string(size);
  }
  return text + "]";
}

inline bool Equal(Sizes a, Sizes b) { return std::equal(a.begin(), a.end(), b.begin(), b.end()); }

}  // namespace int4mm
