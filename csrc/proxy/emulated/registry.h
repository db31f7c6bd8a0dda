// The host functions that are known by the name of a kernel.
#pragma once

#include <mutex>
#include <set>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "proxy/emulated/kernels.h"

namespace mnemosyne::proxy::emulated {

// Any thread may call any method.
class Registry {
 public:
  // Loads the libraries that the environment names. Returns what is wrong with
  // one, or nothing.
  std::string load(const char* paths);

  // A name may be a pattern, where `*` stands for anything. A full name comes
  // before a pattern, and an earlier pattern before a later one.
  void add(const std::string& device_name, Kernel* kernel);
  Kernel* find(const std::string& device_name) const;

  // A kernel that nobody knows was launched and skipped; says so once for each.
  void skipped(const std::string& device_name);
  size_t numSkipped() const;

 private:
  mutable std::mutex mutex_;
  std::unordered_map<std::string, Kernel*> kernels_;
  std::vector<std::pair<std::string, Kernel*>> patterns_;
  // What the patterns gave for a name, or null.
  mutable std::unordered_map<std::string, Kernel*> matched_;
  std::set<std::string> skipped_;
  size_t num_skipped_ = 0;
};

Registry& registry();

}  // namespace mnemosyne::proxy::emulated
