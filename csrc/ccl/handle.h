// How a worker is named to others that are to share a group with it: the text
// that c10d calls a reconfigure handle.
#pragma once

#include <cstdint>
#include <string>

namespace mnemosyne::ccl {

struct Handle {
  uint64_t job_tag;  // Mesh::jobTag(); a handle is of no use in another job
  uint64_t worker_id;
  int64_t epoch;  // that the worker was in
  std::string address;

  // Printable, without blanks.
  std::string toString() const;
  // Throws ConfigError.
  static Handle parse(const std::string& text);
};

}  // namespace mnemosyne::ccl
