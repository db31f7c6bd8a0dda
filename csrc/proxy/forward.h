// What the code that is generated from api.def needs, written by hand:
// the client has the functions of the first part, the server the class of the
// second.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "proxy/command.h"
#include "proxy/cuda_abi.h"

namespace mnemosyne::proxy {

enum class Library : uint8_t { kCuda, kCudart, kCublas, kCublasLt, kNccl };

// The first opcodes belong to the commands that are written by hand.
constexpr uint16_t kFirstForward = 256;

// ---- The client. None of these may throw: their callers are C functions.

// Sends a command and does not wait. Returns 0, or while the device is lost the
// code of the sticky error in the words of the library. Operations between
// ncclGroupStart and ncclGroupEnd are kept back here.
int postForward(const CommandWriter& command, Library library);

// Writes what the server needs to make the handle: its number, stream, math
// mode, pointer mode and workspace. GeneratedContext::cublas reads it.
void putCublas(CommandWriter& command, void* handle);

// What a cuBLAS handle holds. It travels with each call, so a new server needs
// no other knowledge of a handle.
struct CublasState {
  uint32_t id;
  uint32_t stream;
  int32_t math_mode;
  int32_t pointer_mode;  // CublasPointerMode
  uint64_t workspace;
  uint64_t workspace_bytes;
  bool operator==(const CublasState&) const = default;
};

enum class CublasPointerMode : int { kHost = 0, kDevice = 1 };
CublasPointerMode pointerMode(void* cublas_handle);

uint32_t commId(void* comm);
uint32_t streamId(void* stream);

// Counts a call that the proxy cannot do, and names it once.
void noteUnsupported(const char* library, const char* name);

// ---- The server.

class GeneratedContext {
 public:
  virtual ~GeneratedContext() = default;

  virtual void* cublas(CommandReader& reader) = 0;
  virtual void* comm(uint32_t id) = 0;
  virtual void* stream(uint32_t id) = 0;

  // The library's function, or nullptr. It is asked once for each and kept.
  virtual void* symbol(Library library, const char* name) = 0;

  // The library returned `code`, which is not 0 (NCCL's may be "in progress").
  virtual void failed(Library library, const char* name, int code) = 0;
};

// Runs one command. Returns false if no generated function has this opcode;
// throws ProtocolError if the arguments are too few or too many.
bool executeGenerated(uint16_t opcode, CommandReader& reader,
                      GeneratedContext& context);

// ---- Both.

// alpha or beta of a matrix product. In the command: the size of its value and
// the value, or size 0 and the device pointer.
class Scalar {
 public:
  static constexpr size_t kMaxBytes = 16;

  static void put(CommandWriter& command, CublasPointerMode mode,
                  const void* scalar, size_t size_bytes) {
    if (mode == CublasPointerMode::kDevice) {
      command.put(uint8_t{0}).put(scalar);
      return;
    }
    command.put(static_cast<uint8_t>(size_bytes));
    std::memcpy(command.reserve(size_bytes), scalar, size_bytes);
  }

  explicit Scalar(CommandReader& reader) {
    const size_t size_bytes = reader.get<uint8_t>();
    if (size_bytes == 0) {
      pointer_ = reader.get<const void*>();
      return;
    }
    if (size_bytes > kMaxBytes) throw ProtocolError("a scalar is too large");
    std::memcpy(value_, reader.take(size_bytes).data(), size_bytes);
    pointer_ = value_;
  }
  Scalar(const Scalar&) = delete;  // pointer_ may point into it
  Scalar& operator=(const Scalar&) = delete;

  template <typename T>
  const T* as() const {
    return static_cast<const T*>(pointer_);
  }

 private:
  alignas(16) std::byte value_[kMaxBytes] = {};
  const void* pointer_;
};

// How large alpha and beta are, by cublasComputeType_t and the cudaDataType of
// the result; 0 for a type that is not known here.
constexpr size_t scalarBytes(int compute_type, int result_type) {
  constexpr int kComplexFloat = 4, kComplexDouble = 5;
  switch (compute_type) {
    case 64:  // 16F
    case 65:  // 16F_PEDANTIC
      return 2;
    case 68:  // 32F
    case 69:  // 32F_PEDANTIC
    case 74:  // 32F_FAST_16F
    case 75:  // 32F_FAST_16BF
    case 77:  // 32F_FAST_TF32
    case 78:  // 32F_EMULATED_16BFX9
      return result_type == kComplexFloat ? 8 : 4;
    case 70:  // 64F
    case 71:  // 64F_PEDANTIC
    case 79:  // 64F_EMULATED_FIXEDPOINT
      return result_type == kComplexDouble ? 16 : 8;
    case 72:  // 32I
    case 73:  // 32I_PEDANTIC
      return 4;
    default:
      return 0;
  }
}

}  // namespace mnemosyne::proxy
