// The device that the process uses, whichever of those it could: its memory,
// its streams and its health.
#pragma once

#include <atomic>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <vector>

#include "common/deadline.h"
#include "proxy/emulated/faults.h"
#include "proxy/emulated/memory.h"
#include "proxy/emulated/stream.h"

namespace mnemosyne::proxy::emulated {

// Streams without a handle: CU_STREAM_LEGACY and CU_STREAM_PER_THREAD, of which
// there is one for all threads.
constexpr uintptr_t kLegacyStream = 1;
constexpr uintptr_t kPerThreadStream = 2;

// Any thread may call any method. Those that return int return a CudaError.
class Device {
 public:
  explicit Device(const Options& options);

  const Options& options() const { return options_; }
  Memory& memory() { return memory_; }
  // Memory is still that of a process that has ended.
  bool isFull() const { return !full_until_.expired(); }

  // What broke the device; every call returns it from then on.
  int error() const { return error_; }
  void fail(int error);
  // Called once the device is broken, from the thread that broke it: for those
  // who wait for something else than a stream.
  void onFailure(std::function<void()> call);

  void* createStream(bool is_blocking);
  int destroyStream(void* handle);

  // Puts an operation into a stream (null: the legacy default stream), behind
  // those that it is ordered with, and tells where it is.
  int submit(void* stream, Operation operation, Point* at = nullptr);

  // All that a synchronization with the stream waits for.
  int pointsOf(void* stream, std::vector<Point>* points);
  // Waits for them. Returns what the device is broken with.
  int wait(const std::vector<Point>& points) const;
  std::vector<Point> allPoints();

 private:
  std::shared_ptr<Stream> find(void* handle);  // Requires: mutex_ held.
  void order(Stream& stream, std::vector<Point>* after);  // the same
  void execute(Operation& operation);
  std::shared_ptr<Stream> makeStream(bool is_blocking);  // the same

  const Options options_;
  Memory memory_;
  const Deadline full_until_;
  std::atomic<int> error_ = 0;

  // Guards all below, and the order of operations among streams. Locked before
  // a stream's.
  std::mutex mutex_;
  std::map<void*, std::shared_ptr<Stream>> streams_;
  std::vector<std::weak_ptr<Stream>> all_streams_;  // destroyed ones may run
  std::vector<std::function<void()>> on_failure_;
  uint64_t num_counted_ = 0;
};

// What cuInit made, or null. Never destroyed: its threads end with the process.
Device* device();
// Reads the environment. Returns cuInit's CudaError.
int openDevice();

}  // namespace mnemosyne::proxy::emulated
