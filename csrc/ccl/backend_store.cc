#include "ccl/backend_store.h"

#include <algorithm>

#include "common/deadline.h"

namespace mnemosyne::ccl {
namespace {

// How late a failure may be seen: the store tells of keys at once, but not of
// what happens elsewhere.
constexpr Milliseconds kPatience{100};

}  // namespace

std::vector<uint8_t> FencedStore::get(const std::string& key) {
  wait({key});
  return PrefixStore::get(key);
}

void FencedStore::wait(const std::vector<std::string>& keys) {
  wait(keys, getTimeout());
}

void FencedStore::wait(const std::vector<std::string>& keys,
                       const std::chrono::milliseconds& timeout) {
  const Deadline deadline = Deadline::in(timeout);
  while (true) {
    if (const std::exception_ptr failure = mesh_->failure())
      std::rethrow_exception(failure);
    const auto begun = Clock::now();
    const Milliseconds left(std::max(1, deadline.remainingMs()));
    try {
      return PrefixStore::wait(keys, std::min(kPatience, left));
    } catch (const std::exception&) {
      // What comes earlier is an error of the store; types differ between
      // stores.
      const bool is_early =
          Clock::now() - begun < std::min(kPatience, left) / 2;
      if (is_early || deadline.expired()) throw;
    }
  }
}

}  // namespace mnemosyne::ccl
