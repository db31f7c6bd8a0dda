// The faults that the emulated device has on demand, each in its own process.
#include <csignal>

#include "emulated_api.h"
#include "test.h"

namespace mnemosyne::testing {
namespace {

int fill(const Allocation& memory, unsigned value) {
  return cuMemsetD32Async(memory.address(), value, 1, nullptr);
}

}  // namespace

TEST(a_fault_breaks_the_device_with_its_operation_and_all_calls_behind) {
  const std::pair<const char*, int> faults[] = {{"illegal_address", 700},
                                                {"assert", 710},
                                                {"ecc", 214},
                                                {"lost_device", 999}};
  for (const auto& [name, error] : faults) {
    withDevice("at=2,fault=" + std::string(name), [error = error] {
      openContext();
      Allocation memory(4096);
      CHECK(fill(memory, 1));
      CHECK(fill(memory, 2));
      CHECK(cuCtxSynchronize());
      Gate gate(nullptr);
      CHECK(fill(memory, 3));  // asynchronous: not found yet
      CHECK(fill(memory, 4));
      gate.open();
      EXPECT_EQ(cuCtxSynchronize(), error);
      EXPECT_EQ(*memory.as<volatile unsigned>(), 2u);  // neither ran
      size_t bytes;
      void* stream;
      EXPECT_EQ(cuMemGetInfo_v2(&bytes, &bytes), error);
      EXPECT_EQ(cuStreamCreateWithPriority(&stream, 0, 0), error);
      EXPECT_EQ(fill(memory, 5), error);
    });
  }
}

TEST(a_lost_device_is_missing_in_later_servers_and_others_move_up) {
  const std::string options = "devices=2,serial=7,fault=lost_device,server=1";
  for (const auto& [generation, count, name] :
       {std::tuple("1", 2, "emulated-0000007"),
        std::tuple("2", 1, "emulated-0000008")}) {
    withDevice(
        options,
        [count = count, name = name] {
          CHECK(cuInit(0));
          int number = 0;
          CHECK(cuDeviceGetCount(&number));
          EXPECT_EQ(number, count);
          char uuid[16];
          CHECK(cuDeviceGetUuid_v2(uuid, 0));
          EXPECT_EQ(std::string(uuid, sizeof uuid), name);
          EXPECT_EQ(cuDeviceGetUuid_v2(uuid, count), 101);
        },
        0, generation);
  }
}

TEST(a_fault_in_one_stream_frees_those_who_wait_for_another) {
  withDevice("at=0,fault=assert", [] {
    openContext();
    void *held, *faulty;
    CHECK(cuStreamCreateWithPriority(&held, 1, 0));
    CHECK(cuStreamCreateWithPriority(&faulty, 1, 0));
    Allocation memory(4096);
    Gate never_opened(held);
    CHECK(cuMemsetD8Async(memory.address(), 0, 1, faulty));
    EXPECT_EQ(cuStreamSynchronize(held), 710);
  });
}

TEST(a_fault_strikes_in_the_server_that_it_is_meant_for) {
  for (const auto& [generation, error] :
       {std::pair("0", 0), std::pair("1", 700), std::pair("2", 0)}) {
    withDevice(
        "fault=illegal_address,server=1",
        [error = error] {
          openContext();
          Allocation memory(4096);
          CHECK(fill(memory, 1));
          EXPECT_EQ(cuCtxSynchronize(), error);
        },
        0, generation);
  }
}

TEST(a_kernel_that_hangs_stops_its_stream_and_nothing_else) {
  withDevice("fault=hang", [] {
    openContext();
    void *hanging, *free;
    CHECK(cuStreamCreateWithPriority(&hanging, 1, 0));
    CHECK(cuStreamCreateWithPriority(&free, 1, 0));
    Allocation* const memory = new Allocation(4096);  // outlives the hang
    CHECK(cuMemsetD8Async(memory->address(), 0, 1, hanging));
    for (int i = 0; i < 100; ++i) {
      CHECK(cuMemsetD8Async(memory->address(), 0, 1, free));
    }
    CHECK(cuStreamSynchronize(free));
    EXPECT_EQ(cuStreamQuery(hanging), 600);
  });
}

TEST(a_server_can_be_killed_at_an_operation) {
  withDevice(
      "fault=kill,at=1",
      [] {
        openContext();
        Allocation memory(4096);
        CHECK(fill(memory, 1));
        CHECK(cuCtxSynchronize());
        CHECK(fill(memory, 2));
        cuCtxSynchronize();
      },
      SIGKILL);
}

TEST(a_lost_device_is_gone_for_every_later_server) {
  for (const auto& [generation, error] :
       {std::pair("0", 0), std::pair("1", 0), std::pair("2", 100)}) {
    withDevice(
        "fault=lost_device,server=1",
        [error = error] { EXPECT_EQ(cuInit(0), error); }, 0, generation);
  }
}

TEST(options_that_nobody_knows_are_refused) {
  for (const char* const options :
       {"fault=none_such", "memory=lots", "memory=4x", "at=-1", "at",
        "color=red", "address=same", "server=one", "memory=1000000000t"}) {
    withDevice(options, [] { EXPECT_EQ(cuInit(0), 1); });
  }
}

}  // namespace mnemosyne::testing
