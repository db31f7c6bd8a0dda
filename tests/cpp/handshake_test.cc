// What a stranger can do to a mesh: nothing. docs/design.md, "Handshake".
#include "ccl/handshake.h"

#include <arpa/inet.h>
#include <netinet/in.h>
#include <poll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <unistd.h>

#include <cstring>
#include <filesystem>
#include <random>

#include "ccl/connector.h"
#include "ccl/frame.h"
#include "world.h"

namespace mnemosyne::testing {
namespace {

constexpr uint64_t kStranger = 77;

// A plain blocking connection to a mesh's TCP port.
class Stranger {
 public:
  explicit Stranger(const Mesh& mesh) {
    const TcpAddress address = Address::parse(mesh.address()).tcp;
    fd_ = ::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    sockaddr_in name{};
    name.sin_family = AF_INET;
    name.sin_port = htons(address.port);
    ::inet_pton(AF_INET, address.host.c_str(), &name.sin_addr);
    EXPECT_EQ(::connect(fd_, reinterpret_cast<sockaddr*>(&name), sizeof(name)),
              0);
  }
  ~Stranger() { ::close(fd_); }

  void say(const void* data, size_t size) {
    (void)!::send(fd_, data, size, MSG_NOSIGNAL);
  }
  bool hear(void* data, size_t size) {
    auto* to = static_cast<char*>(data);
    while (size > 0) {
      pollfd entry{fd_, POLLIN, 0};
      if (::poll(&entry, 1, 15'000) != 1) return false;
      const ssize_t n = ::recv(fd_, to, size, 0);
      if (n <= 0) return false;
      to += n;
      size -= static_cast<size_t>(n);
    }
    return true;
  }
  // Whether the mesh hangs up on us.
  bool isRefused() {
    char byte;
    return !hear(&byte, 1);
  }

 private:
  int fd_;
};

Hello helloTo(const World& world, uint64_t from = kStranger) {
  Hello hello{};
  std::memcpy(hello.magic.data(), "mnemlink", 8);
  hello.version = kHandshakeVersion;
  hello.worker_id = from;
  hello.target_id = world.members[0].worker_id;
  hello.at = {world.epoch, Mesh::digestOf(world.members)};
  return hello;
}

size_t numDescriptors() {
  const std::filesystem::directory_iterator all("/proc/self/fd");
  return static_cast<size_t>(std::distance(begin(all), end(all)));
}

// Allows this process only so many descriptors.
class FewDescriptors {
 public:
  explicit FewDescriptors(rlim_t count) {
    EXPECT_EQ(::getrlimit(RLIMIT_NOFILE, &before_), 0);
    const rlimit few{count, before_.rlim_max};
    EXPECT_EQ(::setrlimit(RLIMIT_NOFILE, &few), 0);
  }
  ~FewDescriptors() { ::setrlimit(RLIMIT_NOFILE, &before_); }

 private:
  rlimit before_{};
};

// The two ranks go on as before.
void checkUndisturbed(World& world,
                      std::vector<std::shared_ptr<Group>>& groups) {
  world.checkAllReduce(groups, 10'000);
  for (auto& mesh : world.meshes) EXPECT(mesh->failure() == nullptr);
  EXPECT_EQ(world.meshes[0]->counters()["links_open"], 1);
}

}  // namespace

TEST(garbage_disturbs_nobody) {
  World world(2, true);
  auto groups = world.groups();
  std::mt19937 random(3);
  for (int round = 0; round < 50; ++round) {
    Stranger stranger(*world.meshes[0]);
    std::vector<uint32_t> noise(random() % 300);
    for (auto& word : noise) word = random();
    stranger.say(noise.data(), noise.size() * 4);
    if (noise.size() * 4 >= sizeof(Hello)) EXPECT(stranger.isRefused());
  }
  checkUndisturbed(world, groups);
}

TEST(a_hello_with_any_wrong_field_is_refused) {
  World world(2, true);
  auto groups = world.groups();
  for (int field = 0; field < 5; ++field) {
    Hello hello = helloTo(world);
    if (field == 0) hello.magic[3] ^= 1;
    if (field == 1) hello.version += 1;
    if (field == 2) hello.is_shm = 1;
    if (field == 3) hello.target_id += 1;
    if (field == 4) hello.worker_id = hello.target_id;
    Stranger stranger(*world.meshes[0]);
    stranger.say(&hello, sizeof(hello));
    EXPECT(stranger.isRefused());
  }
  checkUndisturbed(world, groups);
}

TEST(who_does_not_know_the_secret_is_refused) {
  World world(2, true);
  auto groups = world.groups();
  const Hello hello = helloTo(world);
  Challenge challenge;
  Stranger stranger(*world.meshes[0]);
  stranger.say(&hello, sizeof(hello));
  EXPECT(stranger.hear(&challenge, sizeof(challenge)));
  const Digest proof = proofMac("another secret", hello, challenge);
  stranger.say(&proof, sizeof(proof));
  EXPECT(stranger.isRefused());
  // Nor does it help to send the challenge's own code back.
  Stranger mirror(*world.meshes[0]);
  mirror.say(&hello, sizeof(hello));
  EXPECT(mirror.hear(&challenge, sizeof(challenge)));
  mirror.say(&challenge.mac, sizeof(challenge.mac));
  EXPECT(mirror.isRefused());
  checkUndisturbed(world, groups);
  EXPECT_EQ(world.meshes[0]->counters()["handshakes_refused"], 2);
}

TEST(a_recorded_handshake_cannot_be_replayed) {
  World world(2, true);
  auto groups = world.groups();
  Hello hello = helloTo(world);
  hello.at.epoch = world.epoch + 1;  // a worker of a later membership: let in
  Challenge challenge;
  Digest proof;
  {
    Stranger honest(*world.meshes[0]);
    honest.say(&hello, sizeof(hello));
    EXPECT(honest.hear(&challenge, sizeof(challenge)));
    EXPECT(
        equalDigests(challenge.mac, challengeMac("secret", hello, challenge)));
    proof = proofMac("secret", hello, challenge);
    honest.say(&proof, sizeof(proof));
    Verdict verdict;
    EXPECT(honest.hear(&verdict, sizeof(verdict)));
    EXPECT(verdict == Verdict::kAccepted);
  }
  Stranger replay(*world.meshes[0]);
  replay.say(&hello, sizeof(hello));
  EXPECT(replay.hear(&challenge, sizeof(challenge)));
  replay.say(&proof, sizeof(proof));
  EXPECT(replay.isRefused());
}

TEST(a_worker_that_is_no_member_is_not_let_in) {
  World world(2, true);
  auto groups = world.groups();
  const Hello hello = helloTo(world);
  Challenge challenge;
  Stranger zombie(*world.meshes[0]);
  zombie.say(&hello, sizeof(hello));
  EXPECT(zombie.hear(&challenge, sizeof(challenge)));
  const Digest proof = proofMac("secret", hello, challenge);
  zombie.say(&proof, sizeof(proof));
  Verdict verdict;
  EXPECT(zombie.hear(&verdict, sizeof(verdict)));
  EXPECT(verdict == Verdict::kNotAMember);
  EXPECT(zombie.isRefused());
  checkUndisturbed(world, groups);
}

TEST(a_handshake_cut_at_any_byte_disturbs_nobody) {
  World world(2, true);
  auto groups = world.groups();
  const Hello hello = helloTo(world);
  for (size_t size = 0; size <= sizeof(hello); ++size) {
    Stranger stranger(*world.meshes[0]);
    stranger.say(&hello, size);
  }
  const Digest proof{};
  for (size_t size = 0; size < sizeof(proof); ++size) {
    Stranger stranger(*world.meshes[0]);
    stranger.say(&hello, sizeof(hello));
    Challenge challenge;
    EXPECT(stranger.hear(&challenge, sizeof(challenge)));
    stranger.say(&proof, size);
  }
  checkUndisturbed(world, groups);
}

// More half-open connections than there are places; a worker still gets in.
TEST(silent_connections_do_not_keep_a_worker_out) {
  World world(2, false);
  auto groups = world.groups();
  std::vector<std::unique_ptr<Stranger>> silent;
  for (int i = 0; i < 300; ++i)
    silent.push_back(std::make_unique<Stranger>(*world.meshes[0]));
  checkUndisturbed(world, groups);
}

TEST(an_authentic_peer_that_sends_nonsense_is_a_lost_peer) {
  World world(2, false);
  auto groups = world.groups();
  // Take the place of rank 1: the same worker, in a later epoch.
  Hello hello = helloTo(world, world.members[1].worker_id);
  hello.at.epoch = world.epoch + 1;
  Challenge challenge;
  Stranger peer(*world.meshes[0]);
  peer.say(&hello, sizeof(hello));
  EXPECT(peer.hear(&challenge, sizeof(challenge)));
  const Digest proof = proofMac("secret", hello, challenge);
  peer.say(&proof, sizeof(proof));
  Verdict verdict;
  EXPECT(peer.hear(&verdict, sizeof(verdict)));
  EXPECT(verdict == Verdict::kAccepted);
  // Its marker of a newer epoch is a failure already; the nonsense is read
  // after the mesh has moved there.
  FrameHeader frame;
  frame.type = static_cast<FrameType>(99);
  frame.epoch = hello.at.epoch;
  peer.say(&frame, sizeof(frame));
  ++world.epoch;
  world.seat(0);
  EXPECT(endsWith<PeerLost>(world.recv(groups[0], 1, 0, 1)));
}

// They get a quarter of the descriptors, and who is new gets the place of who
// has been silent for long.
TEST(silent_strangers_use_up_neither_the_descriptors_nor_the_places) {
  constexpr size_t kLimit = 400, kStrangers = 150;
  FewDescriptors few(kLimit);
  World world(2, false);
  auto groups = world.groups();
  const size_t before = numDescriptors();
  std::vector<std::unique_ptr<Stranger>> strangers;
  const auto num_held = [&] {
    return numDescriptors() - before - strangers.size();
  };
  while (strangers.size() < kStrangers)
    strangers.push_back(std::make_unique<Stranger>(*world.meshes[0]));
  const Deadline deadline = Deadline::in(Milliseconds(8'000));
  while (num_held() < kLimit / 4) EXPECT(!deadline.expired());
  EXPECT(num_held() <= kLimit / 4 + 1);
  // Rank 1, which alone dials, waits behind all of them.
  auto sent = world.send(groups[1], 0, 0, {7});
  const Deadline linked = Deadline::in(Milliseconds(30'000));
  while (world.meshes[0]->counters()["links_open"] < 1)
    EXPECT(!linked.expired());
  world.recv(groups[0], 1, 0, 1)->wait();
  sent->wait();
  EXPECT(world.meshes[0]->counters()["handshakes_refused"] > 0);
  EXPECT(num_held() <= kLimit / 4 + 1);
  checkUndisturbed(world, groups);
}

// A link between two living workers that breaks is replaced as well.
TEST(a_broken_link_is_replaced_in_the_next_epoch) {
  World world(2, false);
  auto groups = world.groups();
  world.checkAllReduce(groups, 1000);
  auto waiting = world.recv(groups[1], 0, 0, 1);
  {
    // Whoever proves to be rank 1 in a later epoch takes over its link; the old
    // one closes, which rank 1 sees.
    Hello hello = helloTo(world, world.members[1].worker_id);
    hello.at.epoch = world.epoch + 1;
    Challenge challenge;
    Stranger peer(*world.meshes[0]);
    peer.say(&hello, sizeof(hello));
    EXPECT(peer.hear(&challenge, sizeof(challenge)));
    const Digest proof = proofMac("secret", hello, challenge);
    peer.say(&proof, sizeof(proof));
    EXPECT(endsWith<PeerLost>(waiting));
  }
  const auto replaced = world.seat();
  EXPECT_EQ(replaced[0], 1);
  EXPECT_EQ(replaced[1], 1);
  // Rank 0 still took the impostor for rank 1, until it read that it had gone.
  EXPECT(endsWith<PeerLost>(world.recv(groups[0], 1, 0, 1)));
  world.seat();
  checkUndisturbed(world, groups);
}

}  // namespace mnemosyne::testing
