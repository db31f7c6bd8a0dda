// Nonsense from an authentic peer, and from strangers: a typed error that names
// the peer, or none; never a crash, a hang, or harm to anybody else.
//
// MNEMOSYNE_FUZZ_S says for how long, MNEMOSYNE_FUZZ_SEED with what to start;
// a failure tells the seed of its round.
#include <arpa/inet.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <random>
#include <thread>

#include "common/error.h"
#include "fake_peer.h"
#include "world.h"

namespace mnemosyne::testing {
namespace {

using Bytes = std::vector<std::byte>;

long fromEnvironment(const char* name, long otherwise) {
  const char* text = std::getenv(name);
  return text != nullptr ? std::atol(text) : otherwise;
}

class Generator {
 public:
  explicit Generator(unsigned seed) : random_(seed) {}

  uint64_t below(uint64_t limit) { return random_() % limit; }
  bool oneIn(uint64_t n) { return below(n) == 0; }
  template <typename T>
  T among(std::initializer_list<T> values) {
    return *(values.begin() + below(values.size()));
  }

  // Frames that are right, nearly right, or not, and then some damage.
  Bytes stream(uint64_t group, int64_t epoch) {
    Bytes bytes;
    const uint64_t count = 1 + below(8);
    for (uint64_t n = 0; n < count; ++n) append(&bytes, group, epoch);
    if (oneIn(2)) return bytes;
    for (uint64_t n = below(4); n > 0; --n) damage(&bytes);
    return bytes;
  }

  void damage(Bytes* bytes) {
    if (bytes->empty()) return;
    const size_t at = below(bytes->size());
    const auto here = bytes->begin() + static_cast<std::ptrdiff_t>(at);
    switch (below(4)) {
      case 0:
        *here ^= static_cast<std::byte>(1 << below(8));
        return;
      case 1:
        *here = static_cast<std::byte>(random_());
        return;
      case 2:
        bytes->erase(here, std::min(here + 1 + static_cast<int>(below(60)),
                                    bytes->end()));
        return;
      case 3:
        bytes->resize(at);
        return;
    }
  }

 private:
  void append(Bytes* bytes, uint64_t group, int64_t epoch) {
    FrameHeader frame;
    frame.type = oneIn(20) ? static_cast<FrameType>(random_())
                           : static_cast<FrameType>(1 + below(7));
    frame.credited = static_cast<uint8_t>(oneIn(10) ? random_() : below(2));
    frame.signature = static_cast<uint16_t>(oneIn(8) ? random_() : 0);
    frame.epoch =
        oneIn(12) ? epoch + among<int64_t>({-1, 1, -9, 1l << 62}) : epoch;
    frame.key.group = oneIn(16) ? random_() : group;
    frame.key.sequence = among<uint64_t>(
        {kPointToPoint, kPointToPoint, kPointToPoint | 1, 0, 1, ~0ull});
    frame.key.tag = among<uint64_t>({0, 1, 1, 2, 2, 3, ~0ull});
    frame.total = among<uint64_t>(
        {0, 4, 400, 400, 400, 40'000, 40'000, ~0ull, ~0ull - 127});
    frame.payload_bytes = 0;
    if (frame.type == FrameType::kData || oneIn(12)) {
      frame.payload_bytes = static_cast<uint32_t>(
          among<uint64_t>({frame.total, frame.total, frame.total / 2, 1, 0, 400,
                           kChunkBytes, kChunkBytes + 1, 0xffffffff}));
    }
    const auto* from = reinterpret_cast<const std::byte*>(&frame);
    bytes->insert(bytes->end(), from, from + sizeof(frame));
    const uint64_t most = oneIn(50) ? kChunkBytes + 1 : 50'000;
    bytes->resize(bytes->size() +
                  std::min<uint64_t>(frame.payload_bytes, most));
  }

  std::mt19937 random_;
};

// Two ranks that are meshes, and one that the fuzzer plays.
class Fuzzed {
 public:
  explicit Fuzzed(bool use_shm)
      : use_shm_(use_shm), world_(2, use_shm), peer_(1) {
    // The one that is played has the lowest number: its dial stands.
    for (int rank : {0, 1}) world_.replace(rank);
    checkOthers();
  }

  void round(Generator& random) {
    const int64_t epoch = world_.epoch + 1;
    world_.members.push_back(peer_.member());
    peer_.members = Mesh::digestOf(world_.members);
    EXPECT(peer_.dial(*world_.meshes[0], world_.members[0].worker_id, epoch,
                      use_shm_) == Handshake::State::kLinked);
    world_.seat();
    world_.members.pop_back();
    auto group = std::make_shared<Group>("all", std::vector<int>{0, 1, 2}, 0,
                                         Milliseconds(20'000), true);
    std::vector<TestOperation::Ptr> ops = {
        world_.recv(group, 2, 1, 100),
        world_.recv(group, 2, 2, 10'000),
        world_.recv(group, -1, 3, 100),
        world_.send(group, 2, 1, {1}),
        world_.allReduce(group, 100),
        world_.send(group, 2, 2, std::vector<int>(10'000)),
    };
    const Bytes bytes = random.stream(group->id(), epoch);
    // Who claims to be ahead is not read: it is left with a full link.
    peer_.say(bytes.data(), bytes.size(), Milliseconds(20));
    peer_.hangUp();
    waitForTheEnd();
    for (const auto& op : ops) checkEnded(op);
  }

  // Those whom the fuzzer does not play still understand each other.
  void checkOthers() {
    // In place of a link over which an epoch far ahead was told.
    Mesh& mesh = *world_.meshes[0];
    const int64_t opened = mesh.counters()["links_opened"];
    if (peer_.dial(mesh, world_.members[0].worker_id, world_.epoch + 1,
                   use_shm_) == Handshake::State::kLinked) {
      const Deadline deadline = Deadline::in(Milliseconds(15'000));
      while (mesh.counters()["links_opened"] == opened) {
        EXPECT(!deadline.expired());
        std::this_thread::yield();
      }
    }
    peer_.hangUp();
    // Twice: the first may come between its verdict and the new link.
    world_.seat();
    world_.seat();
    std::vector<TestOperation::Ptr> ops;
    for (int rank : {0, 1}) {
      auto pair = std::make_shared<Group>("pair", std::vector<int>{0, 1}, rank,
                                          Milliseconds(20'000), true);
      ops.push_back(world_.allReduce(pair, 1000));
    }
    for (const auto& op : ops) {
      op->wait();
      EXPECT_EQ(op->data[0][999], 3);
    }
  }

  // Any bytes at all in place of a handshake, or of a part of it.
  void strangers(Generator& random) {
    const TcpAddress address = Address::parse(world_.meshes[0]->address()).tcp;
    const int fd = ::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    sockaddr_in name{};
    name.sin_family = AF_INET;
    name.sin_port = htons(address.port);
    ::inet_pton(AF_INET, address.host.c_str(), &name.sin_addr);
    EXPECT_EQ(::connect(fd, reinterpret_cast<sockaddr*>(&name), sizeof(name)),
              0);
    Hello hello{};
    std::memcpy(hello.magic.data(), "mnemlink", 8);
    hello.version = kHandshakeVersion;
    hello.worker_id = 1;
    hello.target_id = world_.members[0].worker_id;
    hello.at.epoch = world_.epoch + 1;
    Bytes bytes(sizeof(hello) + sizeof(Digest) + random.below(40));
    std::memcpy(bytes.data(), &hello, sizeof(hello));
    for (uint64_t n = random.below(5); n > 0; --n) random.damage(&bytes);
    (void)!::send(fd, bytes.data(), bytes.size(), MSG_NOSIGNAL);
    ::close(fd);
  }

 private:
  // The mesh has found an error, or that the link has closed. What waits for
  // others is ended then.
  void waitForTheEnd() {
    Mesh& mesh = *world_.meshes[0];
    const Deadline deadline = Deadline::in(Milliseconds(15'000));
    while (mesh.failure() == nullptr &&
           mesh.counters()["links_open"] > kLinksToOthers) {
      if (deadline.expired()) throw std::runtime_error("it did not notice");
      std::this_thread::yield();
    }
    mesh.fence("the round is over", -1);
  }

  // Well, or with an error of ours, within its time.
  static void checkEnded(const TestOperation::Ptr& op) {
    try {
      op->wait();
    } catch (const CollectiveTimeout& error) {
      throw std::runtime_error(std::string("it hung: ") + error.what());
    } catch (const Error&) {
    }
  }

  const bool use_shm_;
  static constexpr int64_t kLinksToOthers = 1;
  World world_;
  FakePeer peer_;
};

void fuzz(bool use_shm) {
  const auto seconds = fromEnvironment("MNEMOSYNE_FUZZ_S", 6);
  auto seed = static_cast<unsigned>(fromEnvironment("MNEMOSYNE_FUZZ_SEED", 1));
  const Deadline end = Deadline::in(std::chrono::seconds(seconds));
  Fuzzed fuzzed(use_shm);
  int rounds = 0;
  for (; !end.expired(); ++seed, ++rounds) {
    Generator random(seed);
    try {
      fuzzed.round(random);
      if (random.oneIn(4)) fuzzed.strangers(random);
      if (random.oneIn(16)) fuzzed.checkOthers();
    } catch (const std::exception& error) {
      throw std::runtime_error("seed " + std::to_string(seed) + ": " +
                               error.what());
    }
  }
  fuzzed.checkOthers();
  std::cout << "      " << rounds << " rounds" << std::endl;
}

}  // namespace

TEST(nonsense_over_shared_memory_is_an_error_at_most) { fuzz(true); }
TEST(nonsense_over_tcp_is_an_error_at_most) { fuzz(false); }

}  // namespace mnemosyne::testing
