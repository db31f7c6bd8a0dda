// What the device says of itself: that of an H100.
#pragma once

#include <cstddef>

namespace mnemosyne::proxy::emulated {

constexpr char kDeviceName[] = "Mnemosyne emulated device";
constexpr int kLastDeviceAttribute = 147;  // of CUDA 13.0

constexpr int kMaxThreadsPerBlock = 1024;
constexpr int kMaxThreadsPerMultiprocessor = 2048;
constexpr int kMaxBlocksPerMultiprocessor = 32;
constexpr int kSharedBytesPerBlock = 48 << 10;
constexpr int kSharedBytesPerBlockOptIn = 227 << 10;
constexpr int kSharedBytesPerMultiprocessor = 228 << 10;

// Of a CUdevice_attribute; 0 for what the device cannot do.
int deviceAttribute(int attribute);

// The 16 bytes by which the device with this number is known.
void writeUuid(int serial, void* uuid);

// Fills a cudaDeviceProp.
void fillProperties(size_t memory_bytes, int serial, void* properties);

}  // namespace mnemosyne::proxy::emulated
