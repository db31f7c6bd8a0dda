// The server: takes commands from the ring and calls the device with them.
//
// One thread executes, in the order of the ring, and never waits for the
// device: what waits (a synchronisation, a copy to pageable memory, the start
// of a communicator) is done by threads of its own, which answer by themselves.
// The first error after which a process can do nothing more with its device is
// published in the segment, and the server ends: a new one takes its place.
#pragma once

#include <atomic>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <unordered_map>
#include <unordered_set>
#include <vector>

#include "proxy/command.h"
#include "proxy/cuda_abi.h"
#include "proxy/forward.h"
#include "proxy/libraries.h"
#include "proxy/protocol.h"
#include "proxy/waiters.h"

namespace mnemosyne::proxy {

// How the answer of a call gets to the client; may be given to another thread.
class Responder {
 public:
  Responder(SegmentHead* segment, uint16_t slot)
      : segment_(segment), slot_(slot) {}
  void answer(int result, const void* data = nullptr,
              size_t size_bytes = 0) const;
  template <typename T>
  void answerWith(int result, const T& value) const {
    answer(result, &value, sizeof value);
  }

 private:
  SegmentHead* segment_;
  uint16_t slot_;
};

// Whether a process can do nothing more with its device after this error.
bool endsDevice(int code);

class Server final : public GeneratedContext {
 public:
  Server(SegmentHead* segment, std::string emulated);

  // Loads the driver's library; all of them if there is time for it. Nothing
  // of a device is touched.
  void load(bool all);
  // Looks for the devices; what the client is told.
  Hello hello();
  // Executes until the ring is closed.
  void run();
  void execute(const Record& record);
  void abortComm(uint32_t comm);
  // The calling thread is going to call the device.
  void enterThread();

  // GeneratedContext
  void* cublas(CommandReader& reader) override;
  void* comm(uint32_t id) override;
  void* stream(uint32_t id) override;
  void* symbol(Library library, const char* name) override;
  void failed(Library library, const char* name, int code) override;

 private:
  struct Stream {
    void* real = nullptr;
    unsigned flags = 0;
    int priority = 0;
  };
  struct Cublas {
    void* real = nullptr;
    CublasState state{};
  };

  void executeMemory(uint16_t opcode, CommandReader& reader,
                     Responder responder);
  void executeStreams(uint16_t opcode, CommandReader& reader,
                      Responder responder);
  void executeKernels(uint16_t opcode, CommandReader& reader,
                      Responder responder);
  void executeLibraries(uint16_t opcode, CommandReader& reader,
                        Responder responder);
  void executeQuery(uint16_t opcode, CommandReader& reader,
                    Responder responder);
  int attach(int device, AttachReply* reply);
  int ordinalOf(const DeviceUuid& uuid) const;
  int ordinal(int device) const;
  int mapMemory(uint64_t address, size_t size_bytes, bool is_lost);
  void launch(CommandReader& reader);
  int functionAttributes(void* kernel, FunctionAttributes* attributes);
  void initComm(CommandReader& reader, Responder responder);
  void waitForComms();
  int commState(void* comm);
  int commError();
  void* lt();
  void ltMatmul(CommandReader& reader);
  void ltHeuristic(CommandReader& reader, Responder responder);
  void* event(uint32_t id);
  void* kernel(uint32_t id);
  // A command that nobody waits for gave `code`.
  void check(int code, const char* what);
  // Ends the process if `code` says that its device is of no use any more.
  int endIfLost(int code, const char* what);
  void later(std::function<void()> work);

  SegmentHead* const segment_;
  Libraries libraries_;
  std::unique_ptr<Driver> driver_;
  std::vector<DeviceUuid> uuids_;    // of the driver's devices
  std::vector<DeviceUuid> numbers_;  // of the client's
  int device_ = -1;                  // the driver's number of the one in use
  void* context_ = nullptr;
  std::unordered_map<uint32_t, Stream> streams_;
  std::unordered_map<uint32_t, void*> events_;
  std::unordered_map<uint32_t, void*> loaded_;  // libraries of kernels
  std::unordered_map<uint32_t, void*> kernels_;
  std::unordered_map<uint32_t, Cublas> cublas_;
  void* lt_ = nullptr;
  // Held while NCCL is called, which never waits in there: so an abort, from
  // beside the ring, hits nobody in the middle of a call.
  std::mutex comms_mutex_;
  std::unordered_map<uint32_t, void*> comms_;
  std::unordered_set<uint32_t> aborted_comms_;
  Waiters waiters_;  // last: its threads use the rest
};

}  // namespace mnemosyne::proxy
