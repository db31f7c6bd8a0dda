// The device code that nvcc puts into a program: several images (cubins, PTX)
// in one container, of which the driver loads the one that suits the device.
//
//   const FatBinary binary = FatBinary::at(wrapper);  //
//   __cudaRegisterFatBinary const KernelTable table = binary.kernels(90);
//   table.kernels.at("_Z3addPfi").parameters
//
// The client needs to know where each parameter of a kernel lies, without a
// driver: cubins tell it in their .nv.info sections, PTX in its text.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <span>
#include <stdexcept>
#include <string>
#include <vector>

#include "proxy/cuda_abi.h"

namespace mnemosyne::proxy {

// The bytes are no device code, or none that we can read.
class FatBinaryError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

struct KernelLayout {
  std::vector<KernelParameter> parameters;  // in the order of the source
  uint32_t size_bytes = 0;                  // of them all, with the gaps
};

// By the name in the device code, which is the mangled one.
struct KernelTable {
  std::map<std::string, KernelLayout, std::less<>> kernels;
  // Size in bytes of what is __device__, __constant__ or __managed__.
  std::map<std::string, uint64_t, std::less<>> variables;
  // What those begin as that do not begin as zeros; only of cubins, and without
  // the addresses of others.
  std::map<std::string, std::vector<std::byte>, std::less<>> initial_values;
};

// A view: whoever made it keeps the bytes alive, which a loaded program does.
class FatBinary {
 public:
  // `code` is a registered wrapper, a fat binary, a cubin, or PTX that ends in
  // a zero: all that the driver loads. Its own header tells how far it goes.
  static FatBinary at(const void* code);
  // The same without the wrapper, where the end is known.
  static FatBinary in(std::span<const std::byte> code);

  // What to give to the driver, and its size.
  std::span<const std::byte> bytes() const { return bytes_; }
  size_t sizeBytes() const { return bytes_.size(); }

  // What the device of this capability (90: 9.0) would get of it. Only the
  // image that is chosen is unpacked, each time anew.
  KernelTable kernels(int compute_capability) const;

 private:
  explicit FatBinary(std::span<const std::byte> bytes) : bytes_(bytes) {}

  std::span<const std::byte> bytes_;
};

}  // namespace mnemosyne::proxy
