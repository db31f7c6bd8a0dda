#include "worker_main.h"

#include <dirent.h>
#include <malloc.h>
#include <sys/socket.h>

#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <map>
#include <sstream>

#include "common/error.h"
#include "forked_world.h"
#include "world.h"

#if defined(__SANITIZE_THREAD__) || defined(__SANITIZE_ADDRESS__)
// Of sanitizer/allocator_interface.h, which not every compiler brings.
extern "C" size_t __sanitizer_get_current_allocated_bytes();
#endif

namespace mnemosyne::testing {
namespace {

class WrongResult : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

void expectValue(int got, int wanted, size_t index) {
  if (got == wanted) return;
  throw WrongResult("element " + std::to_string(index) + " is " +
                    std::to_string(got) + ", not " + std::to_string(wanted));
}

class Worker {
 public:
  Worker(int pipe, uint64_t id, bool use_shm)
      : pipe_(pipe), mesh_(id, "secret", "127.0.0.1", use_shm) {
    Answer hello;
    hello.outcome = Outcome::kDone;
    std::snprintf(hello.text, sizeof(hello.text), "%s",
                  mesh_.address().c_str());
    sendWhole(pipe_, &hello, sizeof(hello));
  }

  void serve() {
    Request request;
    uint64_t size = 0;
    while (receiveWhole(pipe_, &request, sizeof(request)) &&
           receiveWhole(pipe_, &size, sizeof(size))) {
      std::string text(size, '\0');
      if (!receiveWhole(pipe_, text.data(), size)) return;
      if (request.verb == Verb::kEnd) return;
      const Answer answer = attempt(request, text);
      sendWhole(pipe_, &answer, sizeof(answer));
    }
  }

 private:
  Answer attempt(const Request& request, const std::string& members) {
    Answer answer;
    const auto failed = [&](Outcome outcome, const std::exception& error,
                            int rank) {
      answer.outcome = outcome;
      answer.rank = rank;
      std::snprintf(answer.text, sizeof(answer.text), "rank %d: %s",
                    mesh_.rank(), error.what());
    };
    const int64_t start = nowNs();
    try {
      perform(request, members, &answer);
      answer.outcome = Outcome::kDone;
    } catch (const PeerLost& error) {
      failed(Outcome::kPeerLost, error, error.rank());
    } catch (const StaleEpoch& error) {
      failed(Outcome::kStale, error, error.rank());
    } catch (const CollectiveTimeout& error) {
      failed(Outcome::kTimeout, error, error.rank());
    } catch (const WrongResult& error) {
      failed(Outcome::kWrongResult, error, -1);
    } catch (const std::exception& error) {
      failed(Outcome::kFailed, error, -1);
    }
    answer.took_ns = nowNs() - start;
    return answer;
  }

  void perform(const Request& request, const std::string& members,
               Answer* answer) {
    switch (request.verb) {
      case Verb::kSeat:
        answer->value = seat(request, members);
        return;
      case Verb::kAllReduce:
        return allReduce(request);
      case Verb::kConnect:
        return connect(request);
      case Verb::kBarrier:
        return run(TestOperation::make(Kind::kBarrier, group(0)), request);
      case Verb::kReceive:
        return receive(request);
      case Verb::kSend:
        return send(request);
      case Verb::kFence:
        return mesh_.fence("the test says so", request.peer);
      case Verb::kMeasure:
        answer->usage = measure();
        return;
      case Verb::kEnd:
        return;
    }
  }

  int seat(const Request& request, const std::string& text) {
    std::vector<Mesh::Member> members(request.num_members);
    std::istringstream lines(text);
    for (Mesh::Member& member : members)
      lines >> member.worker_id >> member.address;
    const int replaced =
        mesh_.reconfigure(request.epoch, request.rank, std::move(members));
    return replaced;
  }

  // The same objects in every epoch, as with a job's groups.
  std::shared_ptr<Group> group(int number) {
    auto& group = groups_[number];
    if (!group) {
      std::vector<int> ranks(mesh_.worldSize());
      std::iota(ranks.begin(), ranks.end(), 0);
      group = std::make_shared<Group>("group " + std::to_string(number), ranks,
                                      mesh_.rank(), Milliseconds(20'000), true);
    }
    return group;
  }

  // Differs between epochs, ranks and elements.
  int valueOf(int rank, size_t index) const {
    return static_cast<int>(mesh_.currentEpoch() * 1000 + rank + index % 251);
  }

  void run(const TestOperation::Ptr& op, const Request& request) {
    op->timeout = Milliseconds(request.timeout_ms);
    op->submit(mesh_, op);
    op->wait();
  }

  void allReduce(const Request& request) {
    std::vector<TestOperation::Ptr> ops;
    for (int number = 0; number < request.groups; ++number) {
      auto op = TestOperation::make(Kind::kAllReduce, group(number));
      op->type = DataType::kInt32;
      op->timeout = Milliseconds(request.timeout_ms);
      std::vector<int> values(request.count);
      for (size_t i = 0; i < values.size(); ++i)
        values[i] = valueOf(mesh_.rank(), i) + number;
      op->outputs = {op->own(std::move(values))};
      op->submit(mesh_, op);
      ops.push_back(op);
    }
    const int size = mesh_.worldSize();
    for (int number = 0; number < request.groups; ++number) {
      ops[number]->wait();
      const std::vector<int>& values = ops[number]->data[0];
      for (size_t i = 0; i < values.size(); ++i) {
        const int sum = size * (valueOf(0, i) + number) + size * (size - 1) / 2;
        expectValue(values[i], sum, i);
      }
    }
  }

  void connect(const Request& request) {
    auto op = TestOperation::make(Kind::kAllToAll, group(0));
    const int size = mesh_.worldSize();
    op->data.reserve(2 * static_cast<size_t>(size));
    for (int rank = 0; rank < size; ++rank)
      op->inputs.push_back(op->own({valueOf(mesh_.rank(), rank)}));
    for (int rank = 0; rank < size; ++rank)
      op->outputs.push_back(op->own({-1}));
    run(op, request);
    for (int rank = 0; rank < size; ++rank)
      expectValue(op->data[size + rank][0], valueOf(rank, mesh_.rank()), 0);
  }

  void receive(const Request& request) {
    auto op = TestOperation::make(Kind::kRecv, group(0));
    op->root = request.peer;
    op->outputs = {op->own(std::vector<int>(request.count, -1))};
    run(op, request);
    for (size_t i = 0; i < request.count; ++i)
      expectValue(op->data[0][i], valueOf(request.peer, i), i);
  }

  void send(const Request& request) {
    auto op = TestOperation::make(Kind::kSend, group(0));
    op->root = request.peer;
    std::vector<int> values(request.count);
    for (size_t i = 0; i < values.size(); ++i)
      values[i] = valueOf(mesh_.rank(), i);
    op->inputs = {op->own(std::move(values))};
    run(op, request);
  }

  Usage measure() const {
    std::map<std::string, int64_t> fields;  // kB, and counts
    std::ifstream status("/proc/self/status");
    for (std::string line; std::getline(status, line);) {
      const size_t colon = line.find(':');
      if (colon != std::string::npos)
        fields[line.substr(0, colon)] = std::atoll(&line[colon + 1]);
    }
    auto counters = mesh_.counters();
    return {fields["RssAnon"] * 1024,
            heapBytes(),
            fields["RssShmem"] * 1024,
            fields["VmSize"] * 1024,
            countFds(),
            fields["Threads"],
            counters["links_open"],
            counters["links_opened"],
            counters["bytes_sent"],
            counters["bytes_received"]};
  }

  static int64_t heapBytes() {
#if defined(__SANITIZE_THREAD__) || defined(__SANITIZE_ADDRESS__)
    return static_cast<int64_t>(__sanitizer_get_current_allocated_bytes());
#else
    const auto heap = ::mallinfo2();
    return static_cast<int64_t>(heap.uordblks + heap.hblkhd);
#endif
  }

  static int64_t countFds() {
    DIR* folder = ::opendir("/proc/self/fd");
    int64_t count = -3;  // ".", "..", and the folder itself
    while (::readdir(folder) != nullptr) ++count;
    ::closedir(folder);
    return count;
  }

  const int pipe_;
  Mesh mesh_;
  std::map<int, std::shared_ptr<Group>> groups_;
};

}  // namespace

void workerMain(int pipe, uint64_t id, bool use_shm) {
  try {
    Worker worker(pipe, id, use_shm);
    worker.serve();
  } catch (const std::exception& error) {
    std::fprintf(stderr, "worker %d: %s\n", static_cast<int>(id), error.what());
    std::_Exit(3);
  }
  std::exit(0);  // not _Exit: sanitizers report here
}

void sendWhole(int fd, const void* data, size_t size) {
  const auto* from = static_cast<const char*>(data);
  while (size > 0) {
    const ssize_t n = ::send(fd, from, size, MSG_NOSIGNAL);
    if (n < 0 && errno == EINTR) continue;
    if (n <= 0) return;
    from += n;
    size -= static_cast<size_t>(n);
  }
}

bool receiveWhole(int fd, void* data, size_t size) {
  auto* to = static_cast<char*>(data);
  while (size > 0) {
    const ssize_t n = ::recv(fd, to, size, 0);
    if (n < 0 && errno == EINTR) continue;
    if (n <= 0) return false;
    to += n;
    size -= static_cast<size_t>(n);
  }
  return true;
}

}  // namespace mnemosyne::testing
