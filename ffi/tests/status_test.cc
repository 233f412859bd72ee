#include "core/status.h"

#include <string>
#include <utility>

#include "tests/check.h"

namespace int4mm {
namespace {

Status Refuse(int n) { return InvalidArgument() << "op: n is " << n << ", " << 0.5 << " too many" << std::string("."); }

StatusOr<std::string> Half(int n) {
  if (n % 2 != 0) return Unimplemented() << "op: " << n << " is odd.";
  return std::to_string(n / 2);
}

void TestDefaultIsOk() {
  const Status status;
  EXPECT(status.ok());
  EXPECT(status.code() == StatusCode::kOk);
  EXPECT(status.message().empty()) << status.message();
}

void TestBuilderCollectsOneSentence() {
  const Status status = Refuse(7);
  EXPECT(!status.ok());
  EXPECT(status.code() == StatusCode::kInvalidArgument);
  EXPECT(status.message() == "op: n is 7, 0.5 too many.") << status.message();
}

void TestBuildersCarryTheirCode() {
  const std::pair<Status, StatusCode> statuses[] = {
      {InvalidArgument(), StatusCode::kInvalidArgument},
      {Unimplemented(), StatusCode::kUnimplemented},
      {FailedPrecondition(), StatusCode::kFailedPrecondition},
      {Internal(), StatusCode::kInternal},
  };
  for (const auto& [status, code] : statuses) {
    EXPECT(status.code() == code) << static_cast<int>(status.code());
    EXPECT(!status.ok());
  }
}

void TestStatusOr() {
  const StatusOr<std::string> value = Half(8);
  EXPECT(value.ok());
  EXPECT(value.status().ok());
  EXPECT(*value == "4" && value->size() == 1) << *value;

  const StatusOr<std::string> error = Half(9);
  EXPECT(!error.ok());
  EXPECT(error.status().code() == StatusCode::kUnimplemented);
  EXPECT(error.status().message() == "op: 9 is odd.") << error.status().message();
}

}  // namespace
}  // namespace int4mm

int main() {
  int4mm::TestDefaultIsOk();
  int4mm::TestBuilderCollectsOneSentence();
  int4mm::TestBuildersCarryTheirCode();
  int4mm::TestStatusOr();
  return int4mm::test::Result();
}
