#include "proxy/emulated/faults.h"

#include <unistd.h>

#include <charconv>
#include <chrono>
#include <csignal>
#include <sstream>
#include <thread>

#include "proxy/cuda_abi.h"

namespace mnemosyne::proxy::emulated {
namespace {

constexpr struct {
  const char* name;
  Fault fault;
  int error;  // of the operation, and of all calls behind it
} kFaults[] = {
    {"none", Fault::kNone, kCudaSuccess},
    {"illegal_address", Fault::kIllegalAddress, kCudaIllegalAddress},
    {"assert", Fault::kAssert, kCudaAssert},
    {"ecc", Fault::kEcc, kCudaEccUncorrectable},
    {"hang", Fault::kHang, kCudaSuccess},
    {"lost_device", Fault::kLostDevice, kCudaUnknown},
    {"kill", Fault::kKill, kCudaSuccess},
    {"slow", Fault::kSlow, kCudaSuccess},
    {"stalled_communicator", Fault::kStalledCommunicator, kCudaSuccess},
};

uint64_t number(const std::string& text, const std::string& of) {
  uint64_t value = 0;
  const char* const end = text.data() + text.size();
  const auto result = std::from_chars(text.data(), end, value);
  if (text.empty() || result.ec != std::errc() || result.ptr != end) {
    throw OptionError(of + " takes a number, not '" + text + "'");
  }
  return value;
}

int smallNumber(const std::string& text, const std::string& of) {
  const uint64_t value = number(text, of);
  if (value > 1'000'000) throw OptionError(of + " is too large: " + text);
  return static_cast<int>(value);
}

size_t size(std::string text) {
  static const std::string kUnits = "kmgt";
  const size_t unit = text.empty() ? text.npos : kUnits.find(text.back());
  if (unit == text.npos) return number(text, "memory");
  text.pop_back();
  const uint64_t count = number(text, "memory");
  const unsigned shift = 10 * (unit + 1);
  if (count > (uint64_t{1} << 46) >> shift) {
    throw OptionError("memory is larger than an address space");
  }
  return count << shift;
}

Fault fault(const std::string& name) {
  std::string known;
  for (const auto& each : kFaults) {
    if (name == each.name) return each.fault;
    known += std::string(known.empty() ? "" : ", ") + each.name;
  }
  throw OptionError("no fault '" + name + "'; there are " + known);
}

void only(const std::string& key, const std::string& value, const char* word) {
  if (value != word) {
    throw OptionError(key + " takes only '" + word + "', not '" + value + "'");
  }
}

}  // namespace

Options Options::parse(const char* list, const char* generation) {
  Options options;
  if (generation != nullptr) {
    options.generation = smallNumber(generation, "MNEMOSYNE_PROXY_GENERATION");
  }
  std::istringstream entries(list == nullptr ? "" : list);
  for (std::string entry; std::getline(entries, entry, ',');) {
    const size_t equals = entry.find('=');
    if (equals == entry.npos) {
      throw OptionError("'" + entry + "' is not of the form key=value");
    }
    const std::string key = entry.substr(0, equals);
    const std::string value = entry.substr(equals + 1);
    if (key == "memory") {
      options.memory_bytes = size(value);
    } else if (key == "devices") {
      options.num_devices = smallNumber(value, key);
    } else if (key == "serial") {
      options.serial = smallNumber(value, key);
    } else if (key == "fault") {
      options.fault = emulated::fault(value);
    } else if (key == "at") {
      options.at = number(value, key);
    } else if (key == "server") {
      options.server = smallNumber(value, key);
    } else if (key == "slow_ms") {
      options.slow_ms = smallNumber(value, key);
    } else if (key == "full_ms") {
      options.full_ms = smallNumber(value, key);
    } else if (key == "address") {
      only(key, value, "other");
      options.other_address = true;
    } else if (key == "unknown_kernels") {
      only(key, value, "skip");
      options.skip_unknown_kernels = true;
    } else {
      throw OptionError("no option '" + key + "'");
    }
  }
  return options;
}

bool Options::deviceIsLost() const {
  return fault == Fault::kLostDevice && generation > server.value_or(0);
}

int Options::strike(uint64_t number) const {
  if (fault == Fault::kNone || number < at) return kCudaSuccess;
  if (server.has_value() && *server != generation) return kCudaSuccess;
  if (fault == Fault::kSlow) {
    std::this_thread::sleep_for(std::chrono::milliseconds(slow_ms));
    return kCudaSuccess;
  }
  if (number != at) return kCudaSuccess;
  if (fault == Fault::kKill) kill(getpid(), SIGKILL);
  while (fault == Fault::kHang) pause();
  for (const auto& each : kFaults) {
    if (each.fault == fault) return each.error;
  }
  return kCudaSuccess;
}

bool Options::stalls(uint64_t number) const {
  return fault == Fault::kStalledCommunicator && number == at &&
         server.value_or(generation) == generation;
}

}  // namespace mnemosyne::proxy::emulated
