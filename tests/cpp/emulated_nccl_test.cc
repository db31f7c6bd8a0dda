// The emulated device's NCCL, between processes.
#include <unistd.h>

#include <climits>
#include <csignal>
#include <cstring>

#include "emulated_api.h"
#include "proxy/emulated/numbers.h"
#include "test.h"

extern "C" {
using mnemosyne::proxy::NcclUniqueId;
int ncclGetUniqueId(NcclUniqueId*);
int ncclCommInitRank(void**, int, NcclUniqueId, int);
int ncclCommInitRankConfig(void**, int, NcclUniqueId, int, void*);
int ncclCommSplit(void*, int, int, void**, void*);
int ncclCommCount(void*, int*);
int ncclCommUserRank(void*, int*);
int ncclCommGetAsyncError(void*, int*);
int ncclCommDestroy(void*);
int ncclCommAbort(void*);
int ncclRedOpCreatePreMulSum(int*, void*, int, int, void*);
int ncclRedOpDestroy(int, void*);
int ncclGroupStart();
int ncclGroupEnd();
int ncclAllReduce(const void*, void*, size_t, int, int, void*, void*);
int ncclBroadcast(const void*, void*, size_t, int, int, void*, void*);
int ncclReduce(const void*, void*, size_t, int, int, int, void*, void*);
int ncclAllGather(const void*, void*, size_t, int, void*, void*);
int ncclReduceScatter(const void*, void*, size_t, int, int, void*, void*);
int ncclAlltoAll(const void*, void*, size_t, int, void*, void*);
int ncclSend(const void*, size_t, int, int, void*, void*);
int ncclRecv(void*, size_t, int, int, void*, void*);
}

namespace mnemosyne::testing {
namespace {

using proxy::emulated::Bfloat16;
using proxy::emulated::Float16;

enum Type {
  kInt8,
  kUint8,
  kInt32,
  kUint32,
  kInt64,
  kUint64,
  kHalf,
  kFloat,
  kDouble,
  kBfloat
};
enum Op { kSum, kProduct, kMaximum, kMinimum, kAverage };
constexpr int kInProgress = 7;

// What processes that are forked later can pass on.
class Pipe {
 public:
  Pipe() {
    if (pipe(fds_) != 0) throw std::runtime_error("no pipe");
  }
  template <typename T>
  void put(const T& value) const {
    EXPECT_EQ(write(fds_[1], &value, sizeof value), ssize_t{sizeof value});
  }
  template <typename T>
  T get() const {
    T value;
    EXPECT_EQ(read(fds_[0], &value, sizeof value), ssize_t{sizeof value});
    return value;
  }

 private:
  int fds_[2];
};

// Runs the body in each rank of a world that has a communicator.
struct World {
  int num_ranks;
  int rank;
  void* communicator;
  void* stream;
};

void withWorld(int num_ranks, const std::function<void(const World&)>& body) {
  const Pipe ids;
  withRanks(num_ranks, [&](int rank) {
    openContext();
    World world = {num_ranks, rank, nullptr, nullptr};
    NcclUniqueId id;
    if (rank == 0) {
      CHECK(ncclGetUniqueId(&id));
      for (int peer = 1; peer < num_ranks; ++peer) ids.put(id);
    } else {
      id = ids.get<NcclUniqueId>();
    }
    CHECK(ncclCommInitRank(&world.communicator, num_ranks, id, rank));
    CHECK(cuStreamCreateWithPriority(&world.stream, 1, 0));
    body(world);
  });
}

// The input of a rank.
double input(int rank, size_t i) {
  return static_cast<double>((i + 3 * rank) % 5) + 1;
}

template <typename T>
T number(double value) {
  if constexpr (sizeof(T) == 2) return T(static_cast<float>(value));
  return static_cast<T>(value);
}

template <typename T>
std::vector<T> inputs(int rank, size_t count) {
  std::vector<T> values;
  for (size_t i = 0; i < count; ++i) {
    values.push_back(number<T>(input(rank, i)));
  }
  return values;
}

// Reduces with each operation, and compares with the numbers themselves.
template <typename T>
void expectReductions(const World& world, int type) {
  constexpr size_t kCount = 1000;
  Allocation from(kCount * sizeof(T)), to(kCount * sizeof(T));
  upload(from.address(), inputs<T>(world.rank, kCount));
  for (int op = kSum; op <= kAverage; ++op) {
    CHECK(ncclAllReduce(from.as<void>(), to.as<void>(), kCount, type, op,
                        world.communicator, world.stream));
    CHECK(cuStreamSynchronize(world.stream));
    const auto results = download<T>(to.address(), kCount);
    for (size_t i = 0; i < kCount; ++i) {
      double want = input(0, i);
      for (int rank = 1; rank < world.num_ranks; ++rank) {
        const double next = input(rank, i);
        want = op == kProduct   ? want * next
               : op == kMaximum ? std::max(want, next)
               : op == kMinimum ? std::min(want, next)
                                : want + next;
      }
      if (op == kAverage) {
        want = type >= kHalf ? static_cast<float>(want) / world.num_ranks
                             : static_cast<int>(want) / world.num_ranks;
        if (type == kDouble)
          want = (input(0, i) + input(1, i) + input(2, i)) / 3;
        if (type == kFloat) want = static_cast<float>(want);
      }
      EXPECT_EQ(static_cast<double>(results[i]),
                static_cast<double>(number<T>(want)));
    }
  }
}

}  // namespace

TEST(three_ranks_reduce_all_types_by_all_operations) {
  withWorld(3, [](const World& world) {
    expectReductions<int8_t>(world, kInt8);
    expectReductions<uint8_t>(world, kUint8);
    expectReductions<int32_t>(world, kInt32);
    expectReductions<uint32_t>(world, kUint32);
    expectReductions<int64_t>(world, kInt64);
    expectReductions<uint64_t>(world, kUint64);
    expectReductions<Float16>(world, kHalf);
    expectReductions<float>(world, kFloat);
    expectReductions<double>(world, kDouble);
    expectReductions<Bfloat16>(world, kBfloat);
    CHECK(ncclCommDestroy(world.communicator));
  });
}

TEST(a_sum_is_made_in_the_order_of_the_ranks_in_place_and_in_many_pieces) {
  withWorld(4, [](const World& world) {
    constexpr size_t kCount = 700'000;  // more than two pieces, and some
    Allocation memory(kCount * 4);
    const auto value = [](int rank, size_t i) {
      return 1.0f / static_cast<float>(1 + (i * 7 + rank * 13) % 1009);
    };
    for (size_t i = 0; i < kCount; ++i) {
      memory.as<float>()[i] = value(world.rank, i);
    }
    CHECK(ncclAllReduce(memory.as<void>(), memory.as<void>(), kCount, kFloat,
                        kSum, world.communicator, world.stream));
    CHECK(cuStreamSynchronize(world.stream));
    for (size_t i = 0; i < kCount; ++i) {
      float want = value(0, i);
      for (int rank = 1; rank < 4; ++rank) want += value(rank, i);
      EXPECT_EQ(memory.as<float>()[i], want);
    }
  });
}

TEST(ranks_move_what_is_to_be_moved) {
  withWorld(3, [](const World& world) {
    constexpr size_t kCount = 50'000;  // more than a ring holds
    const int ranks = world.num_ranks, me = world.rank;
    void *const comm = world.communicator, *const stream = world.stream;
    Allocation from(ranks * kCount * 4), to(ranks * kCount * 4);
    const auto mark = [](int rank, size_t i) {
      return static_cast<int>(rank * 1'000'000 + i);
    };
    const auto reset = [&] {
      for (size_t i = 0; i < ranks * kCount; ++i) {
        from.as<int>()[i] = mark(me, i);
        to.as<int>()[i] = -1;
      }
    };
    const auto expectFrom = [&](size_t place, int rank, size_t first) {
      for (size_t i = 0; i < kCount; ++i) {
        EXPECT_EQ(to.as<int>()[place * kCount + i], mark(rank, first + i));
      }
    };

    reset();
    CHECK(ncclBroadcast(from.as<void>(), to.as<void>(), kCount, kInt32, 1, comm,
                        stream));
    CHECK(cuStreamSynchronize(stream));
    expectFrom(0, 1, 0);

    reset();
    CHECK(ncclAllGather(from.as<void>(), to.as<void>(), kCount, kInt32, comm,
                        stream));
    CHECK(cuStreamSynchronize(stream));
    for (int rank = 0; rank < ranks; ++rank) expectFrom(rank, rank, 0);

    reset();
    CHECK(ncclAlltoAll(from.as<void>(), to.as<void>(), kCount, kInt32, comm,
                       stream));
    CHECK(cuStreamSynchronize(stream));
    for (int rank = 0; rank < ranks; ++rank) {
      expectFrom(rank, rank, me * kCount);
    }

    reset();
    CHECK(ncclReduceScatter(from.as<void>(), to.as<void>(), kCount, kInt32,
                            kMaximum, comm, stream));
    CHECK(cuStreamSynchronize(stream));
    expectFrom(0, ranks - 1, me * kCount);

    reset();
    CHECK(ncclReduce(from.as<void>(), to.as<void>(), kCount, kInt32, kMinimum,
                     2, comm, stream));
    CHECK(cuStreamSynchronize(stream));
    if (me == 2) expectFrom(0, 0, 0);
    if (me != 2) EXPECT_EQ(to.as<int>()[0], -1);
  });
}

TEST(a_group_sends_and_receives_at_once_between_all_ranks) {
  withWorld(4, [](const World& world) {
    constexpr size_t kCount = 100'000;
    Allocation from(4 * kCount * 4), to(4 * kCount * 4);
    for (size_t i = 0; i < 4 * kCount; ++i) {
      from.as<int>()[i] = static_cast<int>(world.rank * 10 + i / kCount);
    }
    CHECK(ncclGroupStart());
    for (int peer = 0; peer < 4; ++peer) {
      CHECK(ncclSend(from.as<int>() + peer * kCount, kCount, kInt32, peer,
                     world.communicator, world.stream));
    }
    for (int peer = 3; peer >= 0; --peer) {
      CHECK(ncclRecv(to.as<int>() + peer * kCount, kCount, kInt32, peer,
                     world.communicator, world.stream));
    }
    CHECK(ncclGroupEnd());
    CHECK(cuStreamSynchronize(world.stream));
    for (size_t i = 0; i < 4 * kCount; ++i) {
      EXPECT_EQ(to.as<int>()[i],
                static_cast<int>(i / kCount * 10 + world.rank));
    }
    EXPECT_EQ(ncclGroupEnd(), 5);
  });
}

TEST(a_sum_can_multiply_first_and_each_rank_has_its_own_factor) {
  withWorld(2, [](const World& world) {
    Allocation memory(8), factor(4);
    upload(memory.address(), std::vector<float>{3, 5});
    float by = world.rank == 0 ? 2 : 10;
    int immediate, on_device;
    CHECK(ncclRedOpCreatePreMulSum(&immediate, &by, kFloat, 1,
                                   world.communicator));
    by = 0;
    upload(factor.address(), std::vector<float>{0.5f});
    CHECK(ncclRedOpCreatePreMulSum(&on_device, factor.as<void>(), kFloat, 0,
                                   world.communicator));
    CHECK(ncclAllReduce(memory.as<void>(), memory.as<void>(), 1, kFloat,
                        immediate, world.communicator, world.stream));
    CHECK(ncclAllReduce(memory.as<float>() + 1, memory.as<float>() + 1, 1,
                        kFloat, on_device, world.communicator, world.stream));
    CHECK(ncclRedOpDestroy(immediate, world.communicator));
    CHECK(cuStreamSynchronize(world.stream));
    EXPECT_EQ(memory.as<float>()[0], 36.0f);
    EXPECT_EQ(memory.as<float>()[1], 5.0f);
    EXPECT_EQ(ncclAllReduce(memory.as<void>(), memory.as<void>(), 1, kFloat,
                            immediate, world.communicator, world.stream),
              4);
  });
}

TEST(a_world_is_split_by_colors_and_ordered_by_keys) {
  withWorld(4, [](const World& world) {
    void* half = nullptr;
    const int color = world.rank == 3 ? -1 : world.rank % 2;
    CHECK(
        ncclCommSplit(world.communicator, color, -world.rank, &half, nullptr));
    if (world.rank == 3) {
      EXPECT(half == nullptr);
      return;
    }
    int count, rank;
    CHECK(ncclCommCount(half, &count));
    CHECK(ncclCommUserRank(half, &rank));
    EXPECT_EQ(count, world.rank == 1 ? 1 : 2);
    EXPECT_EQ(rank, world.rank == 0 ? 1 : 0);
    Allocation memory(4);
    upload(memory.address(), std::vector<int>{10 + world.rank});
    CHECK(ncclAllReduce(memory.as<void>(), memory.as<void>(), 1, kInt32, kSum,
                        half, world.stream));
    CHECK(cuStreamSynchronize(world.stream));
    EXPECT_EQ(memory.as<int>()[0], world.rank == 1 ? 11 : 22);
  });
}

TEST(a_dead_peer_is_waited_for_until_the_communicator_is_aborted) {
  withWorld(3, [](const World& world) {
    if (world.rank == 2) return;  // the process ends
    Allocation memory(4);
    CHECK(ncclAllReduce(memory.as<void>(), memory.as<void>(), 1, kInt32, kSum,
                        world.communicator, world.stream));
    usleep(50'000);  // it would be done by now, if it did not wait
    EXPECT_EQ(cuStreamQuery(world.stream), 600);
    int error = -1;
    CHECK(ncclCommGetAsyncError(world.communicator, &error));
    EXPECT_EQ(error, 0);
    CHECK(ncclCommAbort(world.communicator));
    CHECK(cuStreamSynchronize(world.stream));
    EXPECT_EQ(ncclCommAbort(world.communicator), 4);
  });
}

TEST(a_broken_device_does_not_wait_for_its_peers) {
  withWorld(2, [](const World& world) {
    if (world.rank == 1) return;
    Allocation memory(4);
    mnemosyne_emulated_register_kernel(
        "assert",
        [](const proxy::emulated::Launch& launch) { launch.fail(710); });
    static const uint32_t kEmpty[4] = {0xba55ed50, 0x00100001, 0, 0};
    void *library, *kernel, *other;
    CHECK(cuLibraryLoadData(&library, kEmpty, nullptr, nullptr, 0, nullptr,
                            nullptr, 0));
    CHECK(cuLibraryGetKernel(&kernel, library, "assert"));
    CHECK(cuStreamCreateWithPriority(&other, 1, 0));
    CHECK(ncclAllReduce(memory.as<void>(), memory.as<void>(), 1, kInt32, kSum,
                        world.communicator, world.stream));
    proxy::LaunchConfig config = {};
    config.stream = other;
    size_t size = 0;
    void* extra[] = {reinterpret_cast<void*>(2), &size, nullptr};
    CHECK(cuLaunchKernelEx(&config, kernel, nullptr, extra));
    EXPECT_EQ(cuStreamSynchronize(world.stream), 710);
    int error = 0;
    CHECK(ncclCommGetAsyncError(world.communicator, &error));
    EXPECT_EQ(error, 1);
    EXPECT_EQ(ncclAllReduce(memory.as<void>(), memory.as<void>(), 1, kInt32,
                            kSum, world.communicator, world.stream),
              1);
    CHECK(ncclCommAbort(world.communicator));
  });
}

TEST(a_meeting_that_nobody_comes_to_can_be_left) {
  withRanks(1, [](int) {
    openContext();
    struct {
      size_t size;
      unsigned magic, version;
      int blocking;
      std::byte rest[100];
    } config = {};
    NcclUniqueId id;
    CHECK(ncclGetUniqueId(&id));
    void* communicator;
    EXPECT_EQ(ncclCommInitRankConfig(&communicator, 2, id, 0, &config),
              kInProgress);
    int error = 0;
    CHECK(ncclCommGetAsyncError(communicator, &error));
    EXPECT_EQ(error, kInProgress);
    EXPECT_EQ(
        ncclAllReduce(nullptr, nullptr, 0, kInt32, kSum, communicator, nullptr),
        4);
    CHECK(ncclCommAbort(communicator));
  });
}

TEST(one_rank_alone_meets_nobody) {
  withRanks(1, [](int) {
    openContext();
    const NcclUniqueId no_meeting = {};
    void* communicator;
    CHECK(ncclCommInitRank(&communicator, 1, no_meeting, 0));
    Allocation from(8), to(8);
    upload(from.address(), std::vector<float>{3, 5});
    CHECK(ncclAllReduce(from.as<void>(), to.as<void>(), 2, kFloat, kAverage,
                        communicator, nullptr));
    CHECK(ncclGroupStart());
    CHECK(ncclSend(to.as<void>(), 1, kFloat, 0, communicator, nullptr));
    CHECK(ncclRecv(from.as<float>() + 1, 1, kFloat, 0, communicator, nullptr));
    CHECK(ncclGroupEnd());
    CHECK(cuCtxSynchronize());
    EXPECT_EQ(to.as<float>()[1], 5.0f);
    EXPECT_EQ(from.as<float>()[1], 3.0f);
    CHECK(ncclCommDestroy(communicator));
  });
}

}  // namespace mnemosyne::testing
