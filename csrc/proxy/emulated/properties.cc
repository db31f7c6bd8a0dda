#include "proxy/emulated/properties.h"

#include <climits>
#include <cstdint>
#include <cstdio>
#include <cstring>

#include "proxy/cuda_abi.h"

namespace mnemosyne::proxy::emulated {
namespace {

// cudaDeviceProp of CUDA 13; tests/cpp/cuda_abi_test.cc reads it with NVIDIA's.
struct Properties {
  char name[256];
  char uuid[16];
  char luid[8];
  uint32_t luid_device_node_mask;
  size_t total_memory;
  size_t shared_per_block;
  int registers_per_block;
  int warp_size;
  size_t memory_pitch;
  int max_threads_per_block;
  int max_threads_dim[3];
  int max_grid_size[3];
  size_t total_constant_memory;
  int major;
  int minor;
  size_t texture_alignment;
  size_t texture_pitch_alignment;
  int multiprocessor_count;
  int integrated;
  int can_map_host_memory;
  int textures_and_surfaces[39];
  size_t surface_alignment;
  int concurrent_kernels;
  int ecc_enabled;
  int pci_bus;
  int pci_device;
  int pci_domain;
  int tcc_driver;
  int async_engine_count;
  int unified_addressing;
  int memory_bus_width;
  int l2_cache_size;
  int persisting_l2_cache_max_size;
  int max_threads_per_multiprocessor;
  int stream_priorities_supported;
  int global_l1_cache_supported;
  int local_l1_cache_supported;
  size_t shared_per_multiprocessor;
  int registers_per_multiprocessor;
  int managed_memory;
  int is_multi_gpu_board;
  int multi_gpu_board_group;
  int host_native_atomic_supported;
  int pageable_memory_access;
  int concurrent_managed_access;
  int compute_preemption_supported;
  int can_use_host_pointer_for_registered_memory;
  int cooperative_launch;
  size_t shared_per_block_opt_in;
  int pageable_memory_access_uses_host_page_tables;
  int direct_managed_memory_access_from_host;
  int max_blocks_per_multiprocessor;
  int access_policy_max_window_size;
  size_t reserved_shared_per_block;
  int host_register_supported;
  int unsupported[10];
  int cluster_launch;
  int rest[64];
};
static_assert(sizeof(Properties) == kDevicePropertiesBytes);
static_assert(offsetof(Properties, surface_alignment) == 552);
static_assert(offsetof(Properties, shared_per_block_opt_in) == 672);
static_assert(offsetof(Properties, cluster_launch) == 748);

struct Attribute {
  int id;
  int value;
};
constexpr Attribute kAttributes[] = {
    {1, kMaxThreadsPerBlock},
    {2, 1024},     // block, x
    {3, 1024},     // y
    {4, 64},       // z
    {5, INT_MAX},  // grid, x
    {6, 65535},    // y
    {7, 65535},    // z
    {8, kSharedBytesPerBlock},
    {9, 65536},       // constant memory
    {10, 32},         // warp
    {11, INT_MAX},    // pitch
    {12, 65536},      // registers per block
    {13, 1'980'000},  // kHz
    {14, 512},        // alignment of textures
    {15, 1},          // overlap of copies and kernels
    {16, 132},        // multiprocessors
    {19, 1},          // maps memory of the host
    {31, 1},          // concurrent kernels
    {32, 1},          // ECC
    {33, 1},          // PCI bus
    {36, 2'619'000},  // kHz of the memory
    {37, 5120},       // bits of its bus
    {38, 50 << 20},   // L2
    {39, kMaxThreadsPerMultiprocessor},
    {40, 3},   // copy engines
    {41, 1},   // unified addresses
    {51, 32},  // alignment of the textures' pitch
    {75, 9},   // compute capability
    {76, 0},
    {78, 1},  // priorities of streams
    {79, 1},  // L1 for globals
    {80, 1},  // and for locals
    {81, kSharedBytesPerMultiprocessor},
    {82, 65536},  // registers per multiprocessor
    {87, 2},      // ratio of single to double precision
    {90, 1},      // preemption
    {91, 1},      // host pointers of registered memory
    {92, 1},      // stream memory operations
    {93, 1},      // of 64 bits
    {95, 1},      // cooperative launches
    {97, kSharedBytesPerBlockOptIn},
    {99, 1},   // registration of memory of the host
    {102, 1},  // virtual memory management
    {106, kMaxBlocksPerMultiprocessor},
    {111, 1024},  // shared memory kept by the driver, per block
    {120, 1},     // clusters
    {122, 1},     // 64-bit stream memory operations
    {134, -1},    // NUMA node of the host
};

}  // namespace

int deviceAttribute(int attribute) {
  for (const Attribute& each : kAttributes) {
    if (each.id == attribute) return each.value;
  }
  return 0;
}

void writeUuid(int serial, void* uuid) {
  char text[17];
  std::snprintf(text, sizeof text, "emulated-%07d", serial);
  std::memcpy(uuid, text, 16);
}

void fillProperties(size_t memory_bytes, int serial, void* to) {
  Properties p = {};
  std::memcpy(p.name, kDeviceName, sizeof kDeviceName);
  writeUuid(serial, p.uuid);
  p.total_memory = memory_bytes;
  p.shared_per_block = kSharedBytesPerBlock;
  p.registers_per_block = deviceAttribute(12);
  p.warp_size = deviceAttribute(10);
  p.memory_pitch = INT_MAX;
  p.max_threads_per_block = kMaxThreadsPerBlock;
  for (int i = 0; i < 3; ++i) {
    p.max_threads_dim[i] = deviceAttribute(2 + i);
    p.max_grid_size[i] = deviceAttribute(5 + i);
  }
  p.total_constant_memory = deviceAttribute(9);
  p.major = deviceAttribute(75);
  p.minor = deviceAttribute(76);
  p.texture_alignment = deviceAttribute(14);
  p.texture_pitch_alignment = deviceAttribute(51);
  p.multiprocessor_count = deviceAttribute(16);
  p.can_map_host_memory = 1;
  p.surface_alignment = 512;
  p.concurrent_kernels = 1;
  p.ecc_enabled = 1;
  p.pci_bus = deviceAttribute(33);
  p.pci_domain = serial & 0xffff;
  p.async_engine_count = deviceAttribute(40);
  p.unified_addressing = 1;
  p.memory_bus_width = deviceAttribute(37);
  p.l2_cache_size = deviceAttribute(38);
  p.max_threads_per_multiprocessor = kMaxThreadsPerMultiprocessor;
  p.stream_priorities_supported = 1;
  p.global_l1_cache_supported = 1;
  p.local_l1_cache_supported = 1;
  p.shared_per_multiprocessor = kSharedBytesPerMultiprocessor;
  p.registers_per_multiprocessor = deviceAttribute(82);
  p.compute_preemption_supported = 1;
  p.can_use_host_pointer_for_registered_memory = 1;
  p.cooperative_launch = 1;
  p.shared_per_block_opt_in = kSharedBytesPerBlockOptIn;
  p.max_blocks_per_multiprocessor = kMaxBlocksPerMultiprocessor;
  p.reserved_shared_per_block = deviceAttribute(111);
  p.host_register_supported = 1;
  p.cluster_launch = 1;
  std::memcpy(to, &p, sizeof p);
}

}  // namespace mnemosyne::proxy::emulated
