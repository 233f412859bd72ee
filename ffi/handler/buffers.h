// What handlers say of XLA's buffers, and statuses -> XLA's errors.
#pragma once

#include <algorithm>
#include <cstdint>
#include <initializer_list>
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

// A buffer's dimensions for a message: "[2, 64]".
inline std::string Dimensions(const xla::ffi::AnyBuffer& buffer) {
  std::string text = "[";
  for (const int64_t size : buffer.dimensions()) {
    if (text.size() > 1) text += ", ";
    text += std::to_string(size);
  }
  return text + "]";
}

inline bool HasDimensions(const xla::ffi::AnyBuffer& buffer, std::initializer_list<int64_t> sizes) {
  const auto dimensions = buffer.dimensions();
  return dimensions.size() == sizes.size() && std::equal(sizes.begin(), sizes.end(), dimensions.begin());
}

}  // namespace int4mm
