// The client's side: one server process at a time, and the ring to it.
//
//   Off -> Healthy -> Lost -> Restoring -> Healthy      (and Failed, Child)
//
// While the device is lost every post() and call() returns the same error,
// until recover() has another server in which all memory is mapped at its old
// addresses. One waits for that from the first use of the device on, without a
// part of the device, so that a recovery need not wait for its start. Nothing
// here recovers by itself: whoever calls recover()
// knows that the contents of the device are gone.
#pragma once

#include <sys/types.h>

#include <array>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <initializer_list>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "common/deadline.h"
#include "common/fd.h"
#include "proxy/address_space.h"
#include "proxy/command.h"
#include "proxy/cuda_abi.h"
#include "proxy/protocol.h"
#include "proxy/waiting.h"

namespace mnemosyne::proxy {

class Connection;

// What a program holds as a stream, an event, a kernel ...: a record of ours
// that outlives servers. A server that does not know it yet is told by
// define().
class Handle {
 public:
  explicit Handle(uint32_t id) : id_(id) {}
  virtual ~Handle() = default;
  uint32_t id() const { return id_; }

 protected:
  // Called with the ring locked; uses Connection::put and callLocked.
  virtual void define(Connection& connection) = 0;

 private:
  friend class Connection;
  const uint32_t id_;
  uint64_t generation_ = 0;  // of the last server that was told
};

enum class State : int {
  kOff,
  kHealthy,
  kLost,
  kRestoring,
  kFailed,  // no server could be started
  kChild,   // a fork of the process that has one
};

// Room for the answer of a call.
struct Answer {
  void* data = nullptr;
  size_t size_bytes = 0;
  size_t got_bytes = 0;
};

// One thread at a time adds to it, any may look.
class Count {
 public:
  void add(uint64_t more) {
    value_.store(value_.load(std::memory_order_relaxed) + more,
                 std::memory_order_relaxed);
  }
  uint64_t get() const { return value_.load(std::memory_order_relaxed); }

 private:
  std::atomic<uint64_t> value_{0};
};

class Connection {
 public:
  // Lives as long as the process: other libraries call CUDA while they are
  // unloaded.
  static Connection& instance();

  // Starts the first server, if there was none. All below start it as well.
  int start();
  // As start(), and makes sure that the device is in use, so that device() is
  // valid.
  int use();
  // Ends the server of a process that has only counted devices, and the thread
  // that waits for it; the next call starts another.
  void rest();
  // The device that the process uses from now on. False if it uses another
  // already.
  bool choose(int device);

  // Sends a command, and in front of it what the server has to know of `needs`.
  // Returns 0, or the error of the lost device, or one of an earlier command.
  int post(const CommandWriter& command,
           std::initializer_list<Handle*> needs = {});

  // As post(), and waits for the answer.
  int call(const CommandWriter& command, Answer* answer = nullptr,
           std::initializer_list<Handle*> needs = {});

  // Tells the server of `handle`, if it does not know it.
  int define(Handle* handle);

  // For what must stand in the ring in one piece, and for define().
  // Requires: mutex() held by this thread.
  int put(const CommandWriter& command);
  int callLocked(const CommandWriter& command, Answer* answer = nullptr);
  void need(Handle* handle);  // nothing if it is null
  std::mutex& mutex() { return mutex_; }

  // Starts a new server for the lost one (a healthy one is ended first) and
  // maps all memory, full of NaN. Returns 0 or the error; message() says more.
  int recover(int timeout_ms);
  // Ends the server, which makes the device lost: for one that hangs.
  void kill();
  void shutdown();

  // Says something beside the ring.
  void tell(ControlMessage message);

  // How long the longest wait for the server that is in progress has taken.
  double waitingSeconds() const;

  // An eventfd that becomes readable when a server is lost; the caller reads
  // it.
  int lostFd();

  State state() const {
    const State state = state_.load();
    return state == State::kHealthy && is_lost_ ? State::kLost : state;
  }
  bool isUsable() const { return state() == State::kHealthy; }
  int error() const { return error_.load(); }  // of the lost device
  pid_t serverPid() const { return pid_.load(); }
  uint64_t generation() const { return generation_.load(); }
  std::string message();
  const AttachReply& device() const { return device_; }
  int numDevices() const { return num_devices_; }
  int driverVersion() const { return driver_version_; }
  SegmentHead* segment() const { return segment_; }
  uint64_t numCommands() const { return num_commands_.get(); }
  uint64_t numCalls() const { return num_calls_.get(); }
  uint64_t numBytes() const { return num_bytes_.get(); }
  // A number that tells one sequence of commands (what, and how long) from
  // another, since it was last asked for, which begins it. What servers are
  // told to know things and what only looks are not in it.
  uint64_t takeTrace();

  // Which addresses are in use; both lock themselves.
  AddressSpace device_space{kDeviceBase, kDeviceBase + kDeviceBytes,
                            kDeviceGranularity};
  AddressSpace host_space{kHostBase, kHostEnd, 4096};

  // The device that the next command goes to; fixed by the first that needs
  // one.
  std::atomic<int> chosen_device{0};

 private:
  struct Server;

  Connection();
  int startLocked(int timeout_ms);
  int launch(int timeout_ms);
  std::shared_ptr<Server> spawn();
  bool begin(Server& server, Deadline deadline, Hello* hello);
  void keepSpare();
  int attach();
  int attachTo(const DeviceUuid& device);
  bool attachToAnother();
  int prepare(uint16_t opcode, std::initializer_list<Handle*> needs);
  void numberDevices();
  int callWhenFree(const CommandWriter& command, Answer* answer = nullptr);
  int restoreMemory();
  void fail(int error, const std::string& message);
  void forgetServer();
  void freeAllSlots();
  int lossError() const {  // never 0
    const int error = error_;
    return error != 0 ? error : int{kCudaLaunchFailure};
  }
  std::shared_ptr<Server> currentServer();
  void watch(std::shared_ptr<Server> server);
  int submit(const CommandWriter& command, uint16_t reply);
  int deliver(const CommandWriter& command, uint16_t reply);
  void trace(const CommandWriter& command);
  int await(uint16_t slot, Answer* answer);
  int takeLateError();
  uint16_t takeSlot();
  void giveSlot(uint16_t slot);

  std::mutex mutex_;  // of the ring's end for writing, and of the server
  std::unique_ptr<RingWriter> ring_;
  std::mutex server_mutex_;
  std::shared_ptr<Server> server_;  // set with both locks
  // The next one: it runs, and waits to be told to begin.
  std::shared_ptr<Server> spare_;  // with mutex_ held
  std::thread watcher_;
  Fd segment_fd_;
  SegmentHead* segment_ = nullptr;
  AttachReply device_{};
  // By their numbers in this process, and in the server's; with mutex_ held.
  std::vector<DeviceUuid> devices_, server_devices_;
  Fd claim_;  // of the device in use
  int num_devices_ = 0;
  int driver_version_ = 0;
  bool is_attached_ = false;
  bool had_device_ = false;  // some server of this process

  std::atomic<State> state_{State::kOff};
  std::atomic<bool> is_lost_{false};  // the server of this generation has ended
  std::atomic<int> error_{0};
  std::atomic<int> lost_fd_{-1};
  // One for each reply, and the last for room in the ring.
  std::array<WaitClock, kNumReplies + 1> waits_{};
  std::atomic<pid_t> pid_{0};
  std::atomic<uint64_t> generation_{0};
  Count num_commands_, num_calls_, num_bytes_;  // with mutex_ held
  std::atomic<bool> is_traced_{false};
  uint64_t trace_ = 0;  // with mutex_ held

  std::mutex slots_mutex_;
  std::condition_variable slot_freed_;
  std::vector<uint16_t> free_slots_;

  std::mutex message_mutex_;
  std::string message_;
};

}  // namespace mnemosyne::proxy
