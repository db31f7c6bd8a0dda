// What the exported functions of the driver have in common.
#pragma once

#include <cstdint>

#include "proxy/cuda_abi.h"
#include "proxy/emulated/device.h"
#include "proxy/emulated/export.h"

namespace mnemosyne::proxy::emulated {

using CuDevicePtr = unsigned long long;  // CUdeviceptr

// Whether there is a device with this number.
int deviceError(int ordinal);

// Whether a call that needs a context may go on: kCudaSuccess, or what the call
// returns.
int contextError();

// The same for the libraries above the driver, which open the device and take
// its context themselves.
int libraryError();

}  // namespace mnemosyne::proxy::emulated
