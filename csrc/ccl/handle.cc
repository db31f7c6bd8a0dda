#include "ccl/handle.h"

#include <charconv>
#include <string_view>

#include "common/error.h"

namespace mnemosyne::ccl {
namespace {

constexpr std::string_view kName = "mnemosyne:";

// Takes a number and the colon behind it.
template <typename T>
bool take(std::string_view* text, T* number) {
  const char* end = text->data() + text->size();
  const auto [rest, error] = std::from_chars(text->data(), end, *number);
  if (error != std::errc() || rest == end || *rest != ':') return false;
  text->remove_prefix(static_cast<size_t>(rest + 1 - text->data()));
  return true;
}

}  // namespace

std::string Handle::toString() const {
  return std::string(kName) + std::to_string(job_tag) + ":" +
         std::to_string(worker_id) + ":" + std::to_string(epoch) + ":" +
         address;
}

Handle Handle::parse(const std::string& text) {
  std::string_view rest = text;
  Handle handle;
  bool is_good = rest.starts_with(kName);
  if (is_good) rest.remove_prefix(kName.size());
  is_good = is_good && take(&rest, &handle.job_tag) &&
            take(&rest, &handle.worker_id) && take(&rest, &handle.epoch) &&
            !rest.empty();
  if (!is_good)
    throw ConfigError("not the reconfigure handle of a worker: '" + text + "'");
  handle.address = rest;
  return handle;
}

}  // namespace mnemosyne::ccl
