// What the environment variable MNEMOSYNE_EMULATED asks of the device: its size
// and the fault that it shall have.
//
//   MNEMOSYNE_EMULATED=memory=1g,fault=illegal_address,at=37,server=0
//
//   memory=N[k|m|g|t]      bytes of device memory; 8g
//   devices=N              how many there are, of which a process uses one; 1
//   serial=N               the number of the first in its UUID, and so on; 0
//   fault=NAME             one of the table in faults.cc; none. `lost_device`
//                          takes the first device away from later servers, and
//                          with `stalled_communicator` a call of NCCL waits
//                          until its communicator is aborted
//   at=N                   with which device operation (a launch, a copy, a
//                          memset, a BLAS or NCCL call; the first is 0); 0.
//                          `stalled_communicator` counts calls of NCCL only
//   server=G               only in the server of this generation, which
//                          MNEMOSYNE_PROXY_GENERATION tells; in any
//   slow_ms=N              what `slow` adds to each operation; 5
//   full_ms=N              for how long from its start on memory is still that
//                          of a process that has ended; 0
//   address=other          reservations of addresses ignore the wish
//   unknown_kernels=skip   do nothing where no host function is known
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <stdexcept>
#include <string>

namespace mnemosyne::proxy::emulated {

enum class Fault {
  kNone,
  kIllegalAddress,
  kAssert,
  kEcc,
  kHang,
  kLostDevice,
  kKill,
  kSlow,
  kStalledCommunicator,
};

class OptionError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

struct Options {
  size_t memory_bytes = size_t{8} << 30;
  int num_devices = 1;
  int serial = 0;
  Fault fault = Fault::kNone;
  uint64_t at = 0;
  std::optional<int> server;
  int slow_ms = 5;
  int full_ms = 0;
  bool other_address = false;
  bool skip_unknown_kernels = false;
  int generation = 0;

  // Throws OptionError. Null pointers stand for unset variables.
  static Options parse(const char* list, const char* generation);

  // The first device went away in an earlier server; the others move up.
  bool deviceIsLost() const;
  // What is left.
  int numDevices() const { return num_devices - deviceIsLost(); }
  int serialOf(int ordinal) const { return serial + deviceIsLost() + ordinal; }

  // Called in front of operation `number`: does what the fault does, and
  // returns the error that the operation ends with.
  int strike(uint64_t number) const;
  // Whether NCCL's call `number` is the one that waits for ever.
  bool stalls(uint64_t number) const;
};

}  // namespace mnemosyne::proxy::emulated
