// The errors that cross the boundary to Python, named as in
// mnemosyne_plugin/errors.py.
#pragma once

#include <cstdint>
#include <exception>
#include <stdexcept>
#include <string>

namespace mnemosyne {

// What went wrong, and with whom. rank and epoch are -1 where unknown.
class Error : public std::runtime_error {
 public:
  Error(const std::string& what, int rank, int64_t epoch)
      : std::runtime_error(what), rank_(rank), epoch_(epoch) {}
  int rank() const { return rank_; }
  int64_t epoch() const { return epoch_; }

 private:
  int rank_;
  int64_t epoch_;
};

// A worker died, or its link broke.
class PeerLost : public Error {
 public:
  using Error::Error;
};

// An operation did not finish before its deadline.
class CollectiveTimeout : public Error {
 public:
  using Error::Error;
};

// The job moved on to another epoch, so the operation was cancelled.
class StaleEpoch : public Error {
 public:
  using Error::Error;
};

// Two ranks disagree on an operation: kind, size, type or root.
class CollectiveMismatch : public Error {
 public:
  using Error::Error;
};

// The operation's group was aborted or shut down, by this rank or another.
class GroupAborted : public Error {
 public:
  using Error::Error;
};

// What the caller asks for breaks a rule; also a ValueError in Python.
class ConfigError : public Error {
 public:
  explicit ConfigError(const std::string& what) : Error(what, -1, -1) {}
};

// Throws std::system_error with errno and what was tried.
[[noreturn]] void throwErrno(const std::string& what);

}  // namespace mnemosyne
