#include "test.h"

#include <utility>
#include <vector>

namespace mnemosyne::testing {
namespace {

using Test = std::pair<std::string, std::function<void()>>;

std::vector<Test>& tests() {
  static std::vector<Test> all;
  return all;
}

}  // namespace

Registration::Registration(const char* name, std::function<void()> body) {
  tests().emplace_back(name, std::move(body));
}

}  // namespace mnemosyne::testing

// Operations cancelled together share one exception, and whoever lets go of it
// last destroys it. Its count lies in libstdc++.so, which is not instrumented:
// ThreadSanitizer sees the destruction, but not that the count ordered it
// behind every other use.
extern "C" const char* __tsan_default_suppressions() {
  return "race:^std::__exception_ptr::exception_ptr::_M_release";
}

// Runs all tests, or those whose name contains the argument.
int main(int argc, char** argv) {
  const std::string wanted = argc > 1 ? argv[1] : "";
  int failures = 0;
  for (const auto& [name, body] : mnemosyne::testing::tests()) {
    if (name.find(wanted) == std::string::npos) continue;
    try {
      body();
      std::cout << "ok    " << name << std::endl;
    } catch (const std::exception& error) {
      ++failures;
      std::cout << "FAIL  " << name << ": " << error.what() << std::endl;
    }
  }
  return failures == 0 ? 0 : 1;
}
