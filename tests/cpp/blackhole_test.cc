// A network that loses everything while both workers live, and a worker that
// does not read while its host answers. docs/design.md, "Lost packets".
#include <net/if.h>
#include <poll.h>
#include <sched.h>
#include <sys/ioctl.h>
#include <sys/socket.h>

#include <cstring>

#include "ccl/transport.h"
#include "common/error.h"
#include "common/socket.h"
#include "world.h"

namespace mnemosyne::testing {
namespace {

constexpr Milliseconds kPatience{1000};

// A network of this thread's own, and of those that it starts. False where that
// is not allowed.
bool leaveNetwork() {
  return ::unshare(CLONE_NEWNET) == 0 ||
         ::unshare(CLONE_NEWUSER | CLONE_NEWNET) == 0;
}

bool setLoopback(bool is_up) {
  const Fd fd = Fd::make([] { return ::socket(AF_INET, SOCK_DGRAM, 0); });
  ifreq request{};
  std::strcpy(request.ifr_name, "lo");
  request.ifr_flags = is_up ? IFF_UP : 0;
  return ::ioctl(fd.get(), SIOCSIFFLAGS, &request) == 0;
}

struct Pair {
  std::unique_ptr<Link> link;
  Fd other;
};

Pair makePair() {
  TcpAddress address;
  const Fd listener = listenTcp("127.0.0.1", &address);
  Fd one = connectTcp(address);
  pollfd entry{listener.get(), POLLIN, 0};
  EXPECT_EQ(::poll(&entry, 1, 15'000), 1);
  return {makeTcpLink(std::move(one)), acceptOne(listener.get())};
}

// Writes until there is no room any more.
void fill(Link& link) {
  std::vector<std::byte> bytes(1 << 20);
  const iovec part{bytes.data(), bytes.size()};
  while (link.write(&part, 1) == bytes.size()) {
  }
}

// Asks the link for so long, as the mesh does.
bool isLostWithin(Link& link, Milliseconds time) {
  for (const Deadline end = Deadline::in(time); !end.expired();) {
    if (link.isUnanswered(kPatience)) return true;
    (void)::poll(nullptr, 0, 20);
  }
  return false;
}

}  // namespace

TEST(a_host_that_answers_for_a_worker_that_does_not_read_is_not_lost) {
  Pair pair = makePair();
  fill(*pair.link);
  EXPECT(!isLostWithin(*pair.link, 3 * kPatience));
}

TEST(a_network_that_loses_what_is_under_way_is_seen_without_a_timeout) {
  if (!leaveNetwork() || !setLoopback(true)) {
    std::cout << "      skipped: no network namespace can be made here\n";
    return;
  }
  World world(1, false);
  for (int rank : {0, 1}) {
    const uint64_t id = 10 + rank;
    world.meshes.resize(2);
    world.members.resize(2);
    world.meshes[rank] =
        std::make_unique<Mesh>(id, "secret", "127.0.0.1", false, kPatience);
    world.members[rank] = {id, world.meshes[rank]->address()};
  }
  world.seat();
  auto groups = world.groups();
  for (size_t count : {1, 1'000'000}) {
    world.checkAllReduce(groups, count);
    EXPECT(setLoopback(false));
    EXPECT(endsWith<PeerLost>(world.allReduce(groups[1], count)));
    EXPECT(setLoopback(true));
    // Rank 0 has not noticed. The new dial tells it.
    const int64_t opened = world.meshes[0]->counters()["links_opened"];
    EXPECT_EQ(world.seat()[1], 1);
    const Deadline deadline = Deadline::in(Milliseconds(15'000));
    while (world.meshes[0]->counters()["links_opened"] == opened)
      EXPECT(!deadline.expired());
    world.checkAllReduce(groups, count);
  }
}

}  // namespace mnemosyne::testing
