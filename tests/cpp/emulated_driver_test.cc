// The emulated device's memory, streams, events and launches.
#include <atomic>
#include <cstring>
#include <map>

#include "emulated_api.h"
#include "fat_binary_writer.h"
#include "test.h"

namespace mnemosyne::testing {
namespace {

using proxy::emulated::Launch;

constexpr unsigned kNonBlocking = 1;
constexpr int kNotReady = 600;

void* makeStream(unsigned flags) {
  void* stream = nullptr;
  CHECK(cuStreamCreateWithPriority(&stream, flags, 0));
  return stream;
}

void* makeEvent() {
  void* event = nullptr;
  CHECK(cuEventCreate(&event, 0));
  return event;
}

// y[i] += x[i], as vectors of `count` floats.
void addKernel(const Launch& launch) {
  auto* const y = launch.parameter<float*>(0);
  const auto* const x = launch.parameter<const float*>(8);
  const auto count = launch.parameter<uint32_t>(16);
  forEachThread(launch, [&](proxy::Dim3 block, proxy::Dim3 thread) {
    const uint32_t i = block.x * launch.block.x + thread.x;
    if (i < count) y[i] += x[i];
  });
}

void* kernelNamed(const char* name) {
  // The head of a fat binary that holds nothing.
  static const uint32_t kEmpty[4] = {0xba55ed50, 0x00100001, 0, 0};
  void *library, *kernel, *function;
  CHECK(cuLibraryLoadData(&library, kEmpty, nullptr, nullptr, 0, nullptr,
                          nullptr, 0));
  CHECK(cuLibraryGetKernel(&kernel, library, name));
  CHECK(cuKernelGetFunction(&function, kernel));
  return function;
}

struct AddParameters {
  DevicePointer y, x;
  uint32_t count;
};

int launchAdd(void* function, AddParameters parameters, void* stream) {
  size_t size = 20;
  void* extra[] = {reinterpret_cast<void*>(1), &parameters,
                   reinterpret_cast<void*>(2), &size, nullptr};
  proxy::LaunchConfig config = {};
  config.grid = {(parameters.count + 127) / 128, 1, 1};
  config.block = {128, 1, 1};
  config.stream = stream;
  return cuLaunchKernelEx(&config, function, nullptr, extra);
}

}  // namespace

TEST(copies_and_fills_reach_all_places) {
  withDevice("", [] {
    openContext();
    Allocation a(1 << 20), b(1 << 20);
    std::vector<int> values(1000);
    for (int i = 0; i < 1000; ++i) values[i] = i * i;
    upload(a.address(), values);
    CHECK(cuMemcpyDtoDAsync_v2(b.address(), a.address(), 4000, nullptr));
    EXPECT(download<int>(b.address(), 1000) == values);
    CHECK(cuMemsetD32Async(b.address(), 7, 10, nullptr));
    CHECK(cuMemsetD16Async(b.address() + 40, 0x0101, 2, nullptr));
    CHECK(cuMemsetD8Async(b.address() + 44, 2, 4, nullptr));
    const auto filled = download<int>(b.address(), 13);
    EXPECT_EQ(filled[9], 7);
    EXPECT_EQ(filled[10], 0x01010101);
    EXPECT_EQ(filled[11], 0x02020202);
    EXPECT_EQ(filled[12], values[12]);
    EXPECT_EQ(cuMemsetD8Async(0x1000, 0, 1, nullptr), 1);
    EXPECT_EQ(cuMemcpyHtoDAsync_v2(0x1000, values.data(), 4, nullptr), 1);
  });
}

TEST(a_plane_is_copied_row_by_row) {
  withDevice("", [] {
    openContext();
    Allocation device(4096);
    std::vector<uint8_t> from(64), to(64, 0);
    for (int i = 0; i < 64; ++i) from[i] = static_cast<uint8_t>(i);
    struct {
      size_t x, y;
      int type;
      const void* host;
      DevicePointer device;
      void* array;
      size_t pitch;
    } sides[2] = {{1, 2, 1, from.data(), 0, nullptr, 8},
                  {0, 0, 2, nullptr, device.address(), nullptr, 16}};
    struct {
      std::byte sides[112];
      size_t width, height;
    } plane = {{}, 3, 4};
    std::memcpy(plane.sides, sides, sizeof sides);
    CHECK(cuMemcpy2DAsync_v2(&plane, nullptr));
    const auto rows = download<uint8_t>(device.address(), 64);
    for (int row = 0; row < 4; ++row) {
      for (int x = 0; x < 3; ++x) {
        EXPECT_EQ(int{rows[row * 16 + x]}, (row + 2) * 8 + 1 + x);
      }
      EXPECT_EQ(int{rows[row * 16 + 3]}, 0);
    }
  });
}

TEST(memory_beyond_the_budget_is_refused_and_comes_back_when_released) {
  withDevice("memory=8m", [] {
    openContext();
    size_t free_bytes = 0, total_bytes = 0;
    {
      Allocation six(6 << 20);
      CHECK(cuMemGetInfo_v2(&free_bytes, &total_bytes));
      EXPECT_EQ(free_bytes, size_t{2} << 20);
      EXPECT_EQ(total_bytes, size_t{8} << 20);
      const proxy::AllocationProperties properties = {
          1, 0, {1, 0}, nullptr, {}};
      unsigned long long handle;
      EXPECT_EQ(cuMemCreate(&handle, 4 << 20, &properties, 0), 2);
    }
    Allocation eight(8 << 20);
    CHECK(cuMemsetD8Async(eight.address(), 1, 8 << 20, nullptr));
    CHECK(cuMemGetInfo_v2(&free_bytes, &total_bytes));
    EXPECT_EQ(free_bytes, size_t{0});
  });
}

TEST(memory_keeps_its_content_when_it_is_mapped_elsewhere) {
  withDevice("", [] {
    openContext();
    constexpr size_t kSize = 2 << 20;
    const proxy::AllocationProperties properties = {1, 0, {1, 0}, nullptr, {}};
    const proxy::AccessDescriptor access = {{1, 0}, 3};
    unsigned long long handle;
    DevicePointer range;
    CHECK(cuMemCreate(&handle, kSize, &properties, 0));
    CHECK(cuMemAddressReserve(&range, 4 * kSize, 0, 0, 0));
    for (const DevicePointer at : {range, range + 2 * kSize}) {
      CHECK(cuMemMap(at, kSize, 0, handle, 0));
      EXPECT_EQ(cuMemMap(at, kSize, 0, handle, 0), 1);
      CHECK(cuMemSetAccess(at, kSize, &access, 1));
      if (at == range) CHECK(cuMemsetD32Async(at, 41, 10, nullptr));
      EXPECT_EQ(download<int>(at, 10)[9], 41);
      CHECK(cuMemUnmap(at, kSize));
      EXPECT_EQ(cuMemsetD8Async(at, 0, 1, nullptr), 1);
    }
    CHECK(cuMemRelease(handle));
    EXPECT_EQ(cuMemMap(range, kSize, 0, handle, 0), 1);
    CHECK(cuMemAddressFree(range, 4 * kSize));
  });
}

TEST(a_reservation_gets_the_address_that_it_asks_for_unless_told_otherwise) {
  constexpr size_t kSize = size_t{1} << 30;
  for (const bool other : {false, true}) {
    withDevice(other ? "address=other" : "", [&] {
      openContext();
      DevicePointer first, again;
      CHECK(cuMemAddressReserve(&first, kSize, 0, 0, 0));
      // Taken already: somewhere else.
      CHECK(cuMemAddressReserve(&again, kSize, 0, first, 0));
      EXPECT(again != first);
      const DevicePointer wish = (std::min(first, again) - 8 * kSize) &
                                 ~((DevicePointer{2} << 20) - 1);
      DevicePointer got;
      CHECK(cuMemAddressReserve(&got, kSize, 0, wish, 0));
      EXPECT_EQ(got == wish, !other);
    });
  }
}

TEST(pinned_copies_are_asynchronous_and_pageable_ones_are_safe_to_reuse) {
  withDevice("", [] {
    openContext();
    void* const stream = makeStream(kNonBlocking);
    Allocation device(4096);
    int pinned = 1, pageable = 2;
    CHECK(cuMemHostRegister_v2(&pinned, sizeof pinned, 0));
    EXPECT_EQ(cuMemHostRegister_v2(&pinned, sizeof pinned, 0), 712);
    Gate gate(stream);
    CHECK(cuMemcpyHtoDAsync_v2(device.address(), &pinned, 4, stream));
    CHECK(cuMemcpyHtoDAsync_v2(device.address() + 4, &pageable, 4, stream));
    pinned = 10;    // is read when the stream gets there
    pageable = 20;  // was read already
    gate.open();
    CHECK(cuStreamSynchronize(stream));
    EXPECT_EQ(download<int>(device.address(), 2)[0], 10);
    EXPECT_EQ(download<int>(device.address(), 2)[1], 2);
    CHECK(cuMemHostUnregister(&pinned));
    EXPECT_EQ(cuMemHostUnregister(&pinned), 713);
  });
}

TEST(a_stream_is_in_order_and_an_event_orders_two_streams) {
  withDevice("", [] {
    openContext();
    void* const first = makeStream(kNonBlocking);
    void* const second = makeStream(kNonBlocking);
    void* const event = makeEvent();
    Allocation memory(4096);
    EXPECT_EQ(cuEventQuery(event), 0);  // never recorded
    Gate gate(first);
    for (unsigned i = 1; i <= 100; ++i) {
      CHECK(cuMemsetD32Async(memory.address(), i, 1, first));
    }
    CHECK(cuEventRecord(event, first));
    CHECK(cuStreamWaitEvent(second, event, 0));
    CHECK(cuMemcpyDtoDAsync_v2(memory.address() + 4, memory.address(), 4,
                               second));
    EXPECT_EQ(cuEventQuery(event), kNotReady);
    EXPECT_EQ(cuStreamQuery(second), kNotReady);
    gate.open();
    CHECK(cuStreamSynchronize(second));
    EXPECT_EQ(cuEventQuery(event), 0);
    EXPECT_EQ(download<unsigned>(memory.address(), 2)[1], 100u);
    CHECK(cuEventDestroy_v2(event));
    EXPECT_EQ(cuEventQuery(event), 400);
    CHECK(cuStreamDestroy_v2(first));
    EXPECT_EQ(cuStreamQuery(first), 400);
  });
}

TEST(the_default_stream_waits_for_blocking_streams_and_they_for_it) {
  withDevice("", [] {
    openContext();
    void* const blocking = makeStream(0);
    void* const free = makeStream(kNonBlocking);
    Gate gate(blocking);
    Allocation memory(4096);
    CHECK(cuMemsetD32Async(memory.address(), 1, 1, nullptr));
    EXPECT_EQ(cuStreamQuery(nullptr), kNotReady);
    EXPECT_EQ(cuStreamQuery(reinterpret_cast<void*>(1)), kNotReady);
    CHECK(cuStreamSynchronize(free));  // is not held up
    gate.open();
    CHECK(cuStreamSynchronize(nullptr));
    EXPECT_EQ(cuStreamQuery(blocking), 0);

    Gate default_gate(nullptr);
    CHECK(cuMemsetD32Async(memory.address(), 2, 1, blocking));
    CHECK(cuMemsetD32Async(memory.address() + 4, 2, 1, free));
    CHECK(cuStreamSynchronize(free));
    EXPECT_EQ(cuStreamQuery(blocking), kNotReady);
    EXPECT_EQ(*memory.as<volatile unsigned>(), 1u);
    default_gate.open();
    CHECK(cuStreamSynchronize(blocking));
    EXPECT_EQ(*memory.as<volatile unsigned>(), 2u);
  });
}

TEST(a_stream_writes_a_value_where_the_host_sees_it_behind_its_work) {
  withDevice("", [] {
    openContext();
    void* const stream = makeStream(kNonBlocking);
    alignas(8) static std::atomic<uint64_t> counter{0};
    const auto address = reinterpret_cast<DevicePointer>(&counter);
    EXPECT_EQ(cuStreamWriteValue64_v2(stream, address, 1, 0), 1);
    CHECK(cuMemHostRegister_v2(&counter, sizeof counter, 0));
    Gate gate(stream);
    CHECK(cuStreamWriteValue64_v2(stream, address, 5, 0));
    EXPECT_EQ(counter.load(), 0u);
    gate.open();
    CHECK(cuStreamSynchronize(stream));
    EXPECT_EQ(counter.load(), 5u);
  });
}

TEST(events_tell_the_time_between_them) {
  withDevice("fault=slow,slow_ms=20", [] {
    openContext();
    Allocation memory(4096);
    void* const begin = makeEvent();
    void* const end = makeEvent();
    float milliseconds = 0;
    EXPECT_EQ(cuEventElapsedTime(&milliseconds, begin, end), 400);
    CHECK(cuEventRecord(begin, nullptr));
    CHECK(cuMemsetD8Async(memory.address(), 0, 1, nullptr));
    CHECK(cuEventRecord(end, nullptr));
    CHECK(cuEventSynchronize(end));
    CHECK(cuEventElapsedTime(&milliseconds, begin, end));
    EXPECT(milliseconds >= 20);
  });
}

TEST(a_kernel_runs_as_the_host_function_of_its_name) {
  withDevice("", [] {
    openContext();
    mnemosyne_emulated_register_kernel("_Z3addPfPKfj", addKernel);
    void* const function = kernelNamed("_Z3addPfPKfj");
    Allocation y(4096), x(4096);
    upload(y.address(), std::vector<float>(300, 1.5f));
    upload(x.address(), std::vector<float>(300, 2));
    CHECK(launchAdd(function, {y.address(), x.address(), 299}, nullptr));
    const auto sums = download<float>(y.address(), 300);
    EXPECT_EQ(sums[298], 3.5f);
    EXPECT_EQ(sums[299], 1.5f);

    proxy::LaunchConfig too_wide = {};
    too_wide.block = {1025, 1, 1};
    void* extra[] = {nullptr};
    EXPECT_EQ(cuLaunchKernelEx(&too_wide, function, nullptr, extra), 1);
  });
}

TEST(a_pattern_names_many_kernels_and_a_full_name_comes_first) {
  static int called;
  const auto calls = [](void* function) {
    called = 0;
    CHECK(launchAdd(function, {0, 0, 1}, nullptr));
    CHECK(cuCtxSynchronize());
    return called;
  };
  withDevice("", [&] {
    openContext();
    mnemosyne_emulated_register_kernel("_Z*addI*EvT_",
                                       [](auto&) { called = 1; });
    mnemosyne_emulated_register_kernel("_Z*", [](auto&) { called = 2; });
    mnemosyne_emulated_register_kernel("_Z3addIlEvT_",
                                       [](auto&) { called = 3; });
    EXPECT_EQ(calls(kernelNamed("_Z3addIiEvT_")), 1);
    EXPECT_EQ(calls(kernelNamed("_Z3subIiEvT_")), 2);
    EXPECT_EQ(calls(kernelNamed("_Z3addIlEvT_")), 3);
  });
}

TEST(an_unknown_kernel_is_not_found_or_skipped_and_counted) {
  static const uint32_t kEmpty[4] = {0xba55ed50, 0x00100001, 0, 0};
  withDevice("", [] {
    openContext();
    void *library, *kernel;
    CHECK(cuLibraryLoadData(&library, kEmpty, nullptr, nullptr, 0, nullptr,
                            nullptr, 0));
    EXPECT_EQ(cuLibraryGetKernel(&kernel, library, "nobody"), 500);
    EXPECT_EQ(cuLibraryLoadData(&library, "no image", nullptr, nullptr, 0,
                                nullptr, nullptr, 0),
              200);
  });
  withDevice("unknown_kernels=skip", [] {
    openContext();
    void* const function = kernelNamed("nobody");
    for (int i = 0; i < 3; ++i) CHECK(launchAdd(function, {0, 0, 1}, nullptr));
    CHECK(cuCtxSynchronize());
    EXPECT_EQ(mnemosyne_emulated_num_skipped(), size_t{3});
  });
}

TEST(a_fat_binary_tells_the_parameters_and_the_variables) {
  withDevice("", [] {
    openContext();
    mnemosyne_emulated_register_kernel("add", addKernel);
    const Bytes code = CubinWriter()
                           .kernel("add", {{0, 8}, {8, 8}, {16, 4}})
                           .kernel("unwritten", {{0, 4}})
                           .variable("history", 40)
                           .variable("greeting", 5, bytesOf("hello"))
                           .build();
    void *library, *kernel, *unwritten, *unknown;
    CHECK(cuLibraryLoadData(&library, code.data(), nullptr, nullptr, 0, nullptr,
                            nullptr, 0));
    CHECK(cuLibraryGetKernel(&kernel, library, "add"));
    size_t offset = 0, size = 0;
    CHECK(cuKernelGetParamInfo(kernel, 2, &offset, &size));
    EXPECT_EQ(offset, size_t{16});
    EXPECT_EQ(size, size_t{4});
    EXPECT_EQ(cuKernelGetParamInfo(kernel, 3, &offset, &size), 1);

    Allocation y(4096), x(4096);
    upload(y.address(), std::vector<float>{1, 2});
    upload(x.address(), std::vector<float>{3, 4});
    DevicePointer at_y = y.address(), at_x = x.address();
    uint32_t count = 2;
    void* parameters[] = {&at_y, &at_x, &count};
    proxy::LaunchConfig config = {};
    config.block.x = 2;
    CHECK(cuLaunchKernelEx(&config, kernel, parameters, nullptr));
    EXPECT(download<float>(at_y, 2) == (std::vector<float>{4, 6}));

    // The fat binary has it, the host has not.
    CHECK(cuLibraryGetKernel(&unwritten, library, "unwritten"));
    EXPECT_EQ(cuLaunchKernelEx(&config, unwritten, parameters, nullptr), 500);
    EXPECT_EQ(cuLibraryGetKernel(&unknown, library, "unknown"), 500);

    DevicePointer greeting, history;
    CHECK(cuLibraryGetGlobal(&greeting, &size, library, "greeting"));
    EXPECT_EQ(size, size_t{5});
    const auto text = download<char>(greeting, 5);
    EXPECT_EQ(std::string(text.begin(), text.end()), std::string("hello"));
    CHECK(cuLibraryGetGlobal(&history, &size, library, "history"));
    EXPECT_EQ(size, size_t{40});
    EXPECT_EQ(download<int>(history, 10)[9], 0);
    EXPECT_EQ(cuLibraryGetGlobal(&history, &size, library, "add"), 500);
    CHECK(cuLibraryUnload(library));
    EXPECT_EQ(cuLaunchKernelEx(&config, kernel, parameters, nullptr), 400);
    EXPECT_EQ(cuMemsetD8Async(greeting, 0, 1, nullptr), 1);
  });
}

TEST(calls_without_a_context_are_refused) {
  withDevice("", [] {
    EXPECT_EQ(cuCtxSynchronize(), 3);
    CHECK(cuInit(0));
    EXPECT_EQ(cuCtxSynchronize(), 201);
    openContext();
    CHECK(cuCtxSynchronize());
  });
}

TEST(functions_are_found_by_the_name_without_a_version) {
  withDevice("", [] {
    void* function = nullptr;
    int status = -1;
    CHECK(cuGetProcAddress_v2("cuMemGetInfo", &function, 13000, 0, &status));
    EXPECT(function == reinterpret_cast<void*>(&cuMemGetInfo_v2));
    EXPECT_EQ(status, 0);
    EXPECT_EQ(cuGetProcAddress_v2("cuNone", &function, 13000, 0, &status), 500);
    EXPECT_EQ(status, 1);
  });
}

}  // namespace mnemosyne::testing
