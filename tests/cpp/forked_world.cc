#include "forked_world.h"

#include <poll.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <chrono>
#include <utility>

#include "common/error.h"
#include "test.h"
#include "worker_main.h"

namespace mnemosyne::testing {
namespace {

constexpr int kAnswerMs = 60'000;

}  // namespace

int64_t nowNs() {
  return Clock::now().time_since_epoch() / std::chrono::nanoseconds(1);
}

void raiseFdLimit() {
  rlimit limit{};
  if (::getrlimit(RLIMIT_NOFILE, &limit) != 0) throwErrno("getrlimit");
  limit.rlim_cur = limit.rlim_max;
  if (::setrlimit(RLIMIT_NOFILE, &limit) != 0) throwErrno("setrlimit");
}

ForkedWorker::ForkedWorker(uint64_t id, bool use_shm) {
  int ends[2];
  if (::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends) != 0)
    throwErrno("socketpair");
  // Closed in what is forked, as all of its kind are; the other end is not.
  pipe_ = Fd::make([&] { return ends[0]; });
  const pid_t parent = ::getpid();
  pid_ = ::fork();
  if (pid_ < 0) throwErrno("fork");
  if (pid_ == 0) {
    (void)::prctl(PR_SET_PDEATHSIG, SIGKILL);
    if (::getppid() != parent) std::_Exit(1);
    workerMain(ends[1], id, use_shm);
  }
  ::close(ends[1]);
  member_.worker_id = id;
  member_.address = answer().text;
}

ForkedWorker::~ForkedWorker() { kill(); }

ForkedWorker::ForkedWorker(ForkedWorker&& other) noexcept
    : pid_(std::exchange(other.pid_, -1)),
      pipe_(std::move(other.pipe_)),
      member_(std::move(other.member_)) {}

ForkedWorker& ForkedWorker::operator=(ForkedWorker&& other) noexcept {
  kill();
  pid_ = std::exchange(other.pid_, -1);
  pipe_ = std::move(other.pipe_);
  member_ = std::move(other.member_);
  return *this;
}

void ForkedWorker::tell(const Request& request,
                        const std::vector<ccl::Mesh::Member>& members) {
  std::string text;
  for (const auto& member : members)
    text += std::to_string(member.worker_id) + " " + member.address + "\n";
  Request sent = request;
  sent.num_members = static_cast<uint32_t>(members.size());
  // The worker may be dead: its answer, or none, tells.
  sendWhole(pipe_.get(), &sent, sizeof(sent));
  const uint64_t size = text.size();
  sendWhole(pipe_.get(), &size, sizeof(size));
  sendWhole(pipe_.get(), text.data(), size);
}

bool ForkedWorker::hasAnswered(int timeout_ms) {
  pollfd entry{pipe_.get(), POLLIN, 0};
  return ::poll(&entry, 1, timeout_ms) == 1;
}

Answer ForkedWorker::answer() {
  if (!hasAnswered(kAnswerMs))
    throw std::runtime_error("a worker does not answer");
  Answer answer;
  if (!receiveWhole(pipe_.get(), &answer, sizeof(answer)))
    throw std::runtime_error("a worker has died");
  return answer;
}

void ForkedWorker::stop() {
  ::kill(pid_, SIGSTOP);
  ::waitpid(pid_, nullptr, WUNTRACED);
}

void ForkedWorker::resume() { ::kill(pid_, SIGCONT); }

void ForkedWorker::kill() {
  if (pid_ < 0) return;
  ::kill(pid_, SIGKILL);
  ::waitpid(std::exchange(pid_, -1), nullptr, 0);
}

int ForkedWorker::end() {
  tell({});
  int status = 0;
  // Its end closes its end of the pipe.
  if (!hasAnswered(kAnswerMs))
    throw std::runtime_error("a worker does not end");
  ::waitpid(std::exchange(pid_, -1), &status, 0);
  return status;
}

// ---------------------------------------------------------------- the world

ForkedWorld::ForkedWorld(int size, bool use_shm) : use_shm_(use_shm) {
  raiseFdLimit();
  for (int rank = 0; rank < size; ++rank)
    workers.emplace_back(next_id_++, use_shm_);
}

void ForkedWorld::replace(int rank) {
  workers[rank] = ForkedWorker(next_id_++, use_shm_);
}

void ForkedWorld::tellSeat(int rank) {
  std::vector<ccl::Mesh::Member> members;
  for (const ForkedWorker& worker : workers) members.push_back(worker.member());
  workers[rank].tell({.verb = Verb::kSeat, .rank = rank, .epoch = epoch},
                     members);
}

std::vector<Answer> ForkedWorld::seat() {
  ++epoch;
  for (int rank = 0; rank < size(); ++rank) tellSeat(rank);
  std::vector<Answer> got = answers();
  for (const Answer& answer : got)
    if (answer.outcome != Outcome::kDone) throw std::runtime_error(answer.text);
  return got;
}

void ForkedWorld::tellAll(Request request) {
  for (ForkedWorker& worker : workers) worker.tell(request);
}

std::vector<Answer> ForkedWorld::answers() {
  std::vector<Answer> got;
  for (ForkedWorker& worker : workers) got.push_back(worker.answer());
  return got;
}

std::vector<Answer> ForkedWorld::all(Request request) {
  tellAll(request);
  std::vector<Answer> got = answers();
  for (const Answer& answer : got)
    if (answer.outcome != Outcome::kDone) throw std::runtime_error(answer.text);
  return got;
}

void ForkedWorld::end() {
  for (ForkedWorker& worker : workers) EXPECT_EQ(worker.end(), 0);
}

}  // namespace mnemosyne::testing
