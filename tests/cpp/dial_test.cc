// Handshakes from the side that dials, and links that only one side has lost.
// docs/design.md, "Handshake" and "Fence".
#include <poll.h>
#include <sys/epoll.h>

#include <array>
#include <thread>

#include "common/error.h"
#include "fake_peer.h"
#include "world.h"

namespace mnemosyne::testing {
namespace {

constexpr uint64_t kFakeId = 1000;

// Listens as a worker does, and hangs up after so many bytes of its answers,
// as often as it is told to.
class FakeListener {
 public:
  FakeListener() {
    address_.unix_name = "mnemosyne-test-" + std::to_string(::getpid());
    unix_ = listenUnix(address_.unix_name);
    tcp_ = listenTcp("127.0.0.1", &address_.tcp);
  }

  // On the same host as the mesh.
  Mesh::Member member(const Mesh& mesh) {
    address_.host_id = Address::parse(mesh.address()).host_id;
    return {kFakeId, address_.toString()};
  }

  // Answers a dial until `num_bytes` of challenge and verdict are said.
  void cut(const Standing& at, size_t num_bytes) {
    bool is_shm = false;
    Fd socket = accept(&is_shm);
    Hello hello{};
    hear(socket.get(), &hello, sizeof(hello));
    Challenge challenge{at, {}, {}};
    challenge.mac = challengeMac("secret", hello, challenge);
    const iovec part{&challenge, std::min(num_bytes, sizeof(challenge))};
    EXPECT_EQ(sendSome(socket.get(), &part, 1),
              static_cast<ssize_t>(part.iov_len));
    Digest proof;
    if (num_bytes >= sizeof(challenge))
      hear(socket.get(), proof.data(), proof.size());
  }

  // Answers a dial to its good end.
  std::unique_ptr<Link> link(const Standing& at) {
    bool is_shm = false;
    Fd socket = accept(&is_shm);
    auto handshake = Handshake::answer(
        self_, std::move(socket), is_shm, [at] { return at; },
        [](const Hello&) { return Verdict::kAccepted; },
        Deadline::in(Milliseconds(15'000)));
    while (handshake->state() == Handshake::State::kBusy) {
      waitFor(handshake->fd());
      handshake->onEvents(EPOLLIN);
    }
    EXPECT(handshake->state() == Handshake::State::kLinked);
    return handshake->takeLink();
  }

 private:
  Fd accept(bool* is_shm) {
    pollfd entries[2] = {{unix_.get(), POLLIN, 0}, {tcp_.get(), POLLIN, 0}};
    EXPECT(::poll(entries, 2, 15'000) > 0);
    *is_shm = entries[0].revents != 0;
    return acceptOne(entries[*is_shm ? 0 : 1].fd);
  }

  static void hear(int fd, void* data, size_t size) {
    auto* to = static_cast<std::byte*>(data);
    while (size > 0) {
      waitFor(fd);
      const ssize_t n = recvSome(fd, to, size);
      EXPECT(n > 0);
      to += n;
      size -= static_cast<size_t>(n);
    }
  }

  static void waitFor(int fd) {
    pollfd entry{fd, POLLIN, 0};
    EXPECT_EQ(::poll(&entry, 1, 15'000), 1);
  }

  const Handshake::Self self_{kFakeId, "secret"};
  Address address_;
  Fd unix_;
  Fd tcp_;
};

void forBothTransports(const std::function<void(bool)>& body) {
  body(true);
  body(false);
}

// A mesh on rank 0, and whatever the test makes of rank 1.
struct Pair {
  explicit Pair(bool use_shm) : world(1, use_shm), listener() {
    world.members.push_back(listener.member(mesh()));
    move();
  }
  Mesh& mesh() { return *world.meshes[0]; }
  void move() {
    ++world.epoch;
    world.seat(0);
  }
  Standing at() const { return {world.epoch, Mesh::digestOf(world.members)}; }
  std::shared_ptr<Group> group() const {
    return std::make_shared<Group>("pair", std::vector<int>{0, 1}, 0,
                                   Milliseconds(20'000), true);
  }
  // Sends 4 bytes to rank 1, which reads them from the link.
  void check(Link& link) {
    auto sent = world.send(group(), 1, 0, {7});
    std::array<std::byte, sizeof(FrameHeader) + sizeof(int)> frame;
    size_t got = 0;
    const Deadline deadline = Deadline::in(Milliseconds(15'000));
    while (got < frame.size()) {
      EXPECT(!deadline.expired() && !link.ended());
      got += link.read(frame.data() + got, frame.size() - got);
      link.onEvents(EPOLLIN);
    }
    sent->wait();
    EXPECT(mesh().failure() == nullptr);
  }

  World world;
  FakeListener listener;
};

}  // namespace

TEST(a_dial_that_is_cut_at_any_byte_is_made_again) {
  forBothTransports([](bool use_shm) {
    Pair pair(use_shm);
    for (size_t cut = 0; cut <= sizeof(Challenge); ++cut) {
      auto received = pair.world.recv(pair.group(), 1, 0, 1);  // makes it dial
      pair.listener.cut(pair.at(), cut);
      auto link = pair.listener.link(pair.at());
      pair.check(*link);
      link.reset();
      EXPECT(endsWith<PeerLost>(received));
      pair.world.members.pop_back();  // so that it is dialled anew
      pair.move();
      pair.world.members.push_back(pair.listener.member(pair.mesh()));
      pair.move();
    }
  });
}

TEST(who_never_completes_a_handshake_is_named_in_the_end) {
  forBothTransports([](bool use_shm) {
    Pair pair(use_shm);
    auto received = pair.world.recv(pair.group(), 1, 0, 1);
    for (int attempt = 0; attempt < 5; ++attempt)
      pair.listener.cut(pair.at(), sizeof(Challenge));
    EXPECT(endsWith<PeerLost>(received));
  });
}

// The mesh was in the epoch already when the link was made, so its end and the
// new dial are of the same epoch.
TEST(a_link_that_is_dead_at_one_end_only_is_replaced_within_an_epoch) {
  forBothTransports([](bool use_shm) {
    Pair pair(use_shm);
    FakePeer peer(kFakeId);
    peer.members = pair.at().members;
    const uint64_t target = pair.world.members[0].worker_id;
    EXPECT(peer.dial(pair.mesh(), target, pair.world.epoch - 1, use_shm) ==
           Handshake::State::kLinked);
    const auto dead = peer.abandon();
    EXPECT(peer.dial(pair.mesh(), target, pair.world.epoch, use_shm) ==
           Handshake::State::kLinked);
    auto received = pair.world.recv(pair.group(), 1, 0, 1);
    FrameHeader frame;
    frame.credited = 1;
    frame.payload_bytes = frame.total = sizeof(int);
    frame.epoch = pair.world.epoch;
    frame.key = {pair.group()->id(), kPointToPoint, 0};
    const int value = 5;
    EXPECT(peer.say(&frame, sizeof(frame)) && peer.say(&value, sizeof(value)));
    received->wait();
    EXPECT_EQ(received->data[0][0], 5);
    EXPECT(pair.mesh().failure() == nullptr);
  });
}

// Two dials that cross are another matter: the one that has no link yet waits.
TEST(a_second_dial_of_the_same_epoch_does_not_displace_a_link) {
  Pair pair(false);
  FakePeer one(kFakeId), other(kFakeId);
  one.members = other.members = pair.at().members;
  const uint64_t target = pair.world.members[0].worker_id;
  EXPECT(one.dial(pair.mesh(), target, pair.world.epoch, false) ==
         Handshake::State::kLinked);
  EXPECT(other.dial(pair.mesh(), target, pair.world.epoch, false) ==
         Handshake::State::kDuplicate);
  other.former_link = 12345;  // not the one that it is about
  EXPECT(other.dial(pair.mesh(), target, pair.world.epoch, false) ==
         Handshake::State::kDuplicate);
}

// It broke in the former epoch, but that is seen only in this one.
TEST(a_link_that_ends_before_it_is_used_in_an_epoch_is_made_anew) {
  forBothTransports([](bool use_shm) {
    Pair pair(use_shm);
    auto first = pair.world.recv(pair.group(), 1, 0, 1);
    auto link = pair.listener.link(pair.at());
    pair.check(*link);
    const Standing before = pair.at();
    pair.move();
    EXPECT(endsWith<StaleEpoch>(first));
    link.reset();
    link = pair.listener.link(before);
    pair.check(*link);
    // Once only: who keeps hanging up is lost.
    link.reset();
    EXPECT(endsWith<PeerLost>(pair.world.recv(pair.group(), 1, 1, 1)));
  });
}

TEST(two_memberships_of_one_epoch_are_told_apart) {
  forBothTransports([](bool use_shm) {
    World world(3, use_shm);
    auto groups = world.groups();
    const auto ours = world.members;
    world.members[2].worker_id += 100;  // another worker, to rank 1 alone
    ++world.epoch;
    world.seat(1);
    world.members = ours;
    world.seat(0);
    EXPECT(endsWith<CollectiveMismatch>(world.recv(groups[0], 1, 0, 1)));
    EXPECT(endsWith<CollectiveMismatch>(world.recv(groups[1], 0, 0, 1)));
    world.seat();
    world.checkAllReduce(groups, 1000);
  });
}

TEST(two_memberships_of_one_epoch_are_told_apart_over_an_old_link) {
  forBothTransports([](bool use_shm) {
    World world(2, use_shm);
    auto groups = world.groups();
    world.checkAllReduce(groups, 10);
    const auto ours = world.members;
    ++world.epoch;
    world.seat(0);
    world.members.push_back(world.members[0]);
    world.members.back().worker_id = 99;
    world.seat(1);
    EXPECT(endsWith<CollectiveMismatch>(world.recv(groups[0], 1, 0, 1)));
    EXPECT(endsWith<CollectiveMismatch>(world.recv(groups[1], 0, 0, 1)));
    world.members = ours;
    world.seat();
    world.checkAllReduce(groups, 1000);
  });
}

TEST(a_worker_that_is_no_member_is_told_that_the_epoch_has_others) {
  World world(2, false);
  World others(1, false);
  others.members.push_back(world.members[0]);
  others.members[0].worker_id = 1;
  others.meshes[0] = std::make_unique<Mesh>(50, "secret", "127.0.0.1", false);
  others.members[0] = {50, others.meshes[0]->address()};
  others.epoch = world.epoch;
  others.seat(0);
  auto group = std::make_shared<Group>("pair", std::vector<int>{0, 1}, 0,
                                       Milliseconds(20'000), true);
  try {
    others.recv(group, 1, 0, 1)->wait();
    EXPECT(false);
  } catch (const PeerLost& error) {
    EXPECT(std::string(error.what()).find("has other members") !=
           std::string::npos);
  }
  EXPECT(world.meshes[0]->failure() == nullptr);
}

// Who is no member may be one of a later epoch, so its link is kept, unread.
TEST(only_so_many_who_are_no_members_wait_and_the_nearest_of_them) {
  World world(1, false);
  Mesh& mesh = *world.meshes[0];
  const uint64_t target = world.members[0].worker_id;
  constexpr int kPlaces = 256;
  std::vector<std::unique_ptr<FakePeer>> early;
  for (int n = 0; n < kPlaces; ++n) {
    early.push_back(std::make_unique<FakePeer>(kFakeId + n));
    EXPECT(early[n]->dial(mesh, target, world.epoch + 10 + n, false) ==
           Handshake::State::kLinked);
  }
  const auto awaitLinks = [&](int64_t count) {
    const Deadline deadline = Deadline::in(Milliseconds(15'000));
    while (mesh.counters()["links_opened"] < count) EXPECT(!deadline.expired());
  };
  awaitLinks(kPlaces);
  FakePeer farther(5000), nearer(6000);
  world.members.push_back(nearer.member());
  nearer.members = Mesh::digestOf(world.members);
  EXPECT(farther.dial(mesh, target, world.epoch + 100'000, false) ==
         Handshake::State::kNotAMember);
  EXPECT(nearer.dial(mesh, target, world.epoch + 1, false) ==
         Handshake::State::kLinked);
  awaitLinks(kPlaces + 1);
  EXPECT_EQ(mesh.counters()["links_open"], kPlaces);
  // What they claim is a failure, but not one of each epoch again.
  EXPECT(mesh.failure() != nullptr);
  ++world.epoch;
  world.seat(0);
  EXPECT_EQ(mesh.counters()["links_open"], kPlaces);
  EXPECT(mesh.failure() == nullptr);
}

}  // namespace mnemosyne::testing
