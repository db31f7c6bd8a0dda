// What the code generated from api.def needs of client and server.
#pragma once

#include <cstdint>

#include "proxy/command.h"
#include "proxy/libraries.h"

namespace mnemosyne::proxy {

// What a cuBLAS handle holds. It travels with each call: a new server needs no
// other knowledge of a handle.
struct CublasState {
  uint32_t id;
  uint32_t stream;
  int32_t math_mode;
  int32_t
      pointer_mode;  // 0: alpha, beta and results on the host, 1: on the device
  uint64_t workspace;
  uint64_t workspace_bytes;
  bool operator==(const CublasState&) const = default;
};

// Client.
int postForward(const CommandWriter& command, Library library);
void putCublas(CommandWriter& command, void* handle);
int pointerMode(void* handle);
uint32_t commId(void* comm);
uint32_t streamId(void* stream);
void noteUnsupported(const char* library, const char* name);

// Server.
class GeneratedContext {
 public:
  virtual ~GeneratedContext() = default;
  virtual void* cublas(CommandReader& reader) = 0;
  virtual void* comm(uint32_t id) = 0;
  virtual void* stream(uint32_t id) = 0;
  virtual void* symbol(Library library, const char* name) = 0;
  virtual void failed(Library library, const char* name, int code) = 0;
};
bool executeGenerated(uint16_t opcode, CommandReader& reader,
                      GeneratedContext& server);

}  // namespace mnemosyne::proxy
