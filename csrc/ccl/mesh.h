// All links of this worker, and the operations that run over them.
//
// One per process. Whoever holds the engine (its mutex) may turn it: start
// operations, move bytes, complete what is done. That is the progress thread,
// which sleeps until something happens, or a thread that submits an operation
// or waits for one and so saves two thread switches. The public methods may be
// called by any thread, also while others wait for operations.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <set>
#include <string>
#include <thread>
#include <unordered_map>
#include <utility>
#include <vector>

#include "ccl/callback_thread.h"
#include "ccl/connector.h"
#include "ccl/event_loop.h"
#include "ccl/history.h"
#include "ccl/operation.h"
#include "ccl/peer.h"
#include "ccl/setup_log.h"
#include "common/error.h"

namespace mnemosyne::ccl {

class Turn;

class Mesh final : private Peer::Host, private Connector::Host {
 public:
  struct Member {
    uint64_t worker_id;
    std::string address;
  };
  // Tells whether two workers mean the same by an epoch's ranks.
  static uint64_t digestOf(const std::vector<Member>& members);

  // As long as keepalive takes where nothing is under way, see socket.cc.
  static constexpr Milliseconds kPatience{25'000};

  // `patience`: after which a host that acknowledges nothing is lost.
  Mesh(uint64_t worker_id, std::string secret, const std::string& bind_host,
       bool use_shm, Milliseconds patience = kPatience);
  // Requires: not isInherited().
  ~Mesh() override;

  // Whether this is the copy that a forked child has got. Its threads do not
  // exist and its state may be torn, so it must never be destroyed, only
  // forgotten.
  bool isInherited() const { return generation_ != forkGeneration(); }

  std::string address() const { return address_; }
  // An eventfd that is readable while a failure is latched.
  int failureFd() const { return failure_fd_.get(); }

  // Moves to a newer epoch: ends what is in flight, clears the failure, and
  // goes on with the given workers; members[r] holds rank r. Returns how many
  // links are replaced. Throws StaleEpoch if the epoch is not newer.
  int reconfigure(int64_t epoch, int rank, std::vector<Member> members);
  // Latches a failure from outside.
  void fence(const std::string& reason, int lost_rank);
  std::exception_ptr failure() const;
  void absorb(bool on);

  // ---- groups (closing.cc)
  // To be called once for each new group, before its first operation. Throws
  // ConfigError if the membership has no such ranks.
  void adopt(Group& group);
  // As adopt(next); aborts `former`, which it replaces, where it was in use.
  void replace(Group& former, Group& next);
  // Ends the group's operations in flight, refuses new ones, and tells the
  // other ranks; other groups go on. While failures are absorbed it fences the
  // mesh instead, so that the step is redone. Nothing happens if the mesh is
  // closed or inherited.
  void abort(Group& group);
  // Takes no new operations; when those in flight have ended, the others are
  // told, and those of them that need this rank are refused.
  void leave(Group& group);
  // What operations of the group fail with now, or null.
  std::exception_ptr failureOf(Group& group);

  // ---- membership, for the verbs of groups
  struct Membership {
    int64_t epoch;
    int rank;
    std::vector<Member> members;
  };
  Membership membership();
  // The same for all workers of a job, and of no other.
  uint64_t jobTag() const { return job_tag_; }
  uint64_t workerId() const { return worker_id_; }
  // From here on only reconfigure() moves the mesh: its epochs are somebody's.
  void lockMembership() { is_locked_ = true; }
  bool isLocked() const { return is_locked_; }
  // The death of these workers is expected: only who needs them fails.
  void excuse(const std::vector<uint64_t>& worker_ids);
  // Moves on with the same members: past a failure that is latched, or to the
  // epoch in which one of them is already. False if there is neither, or if the
  // membership is locked.
  bool advance();

  bool hasFailed() const override { return has_failed_; }
  // Whether operations that fail now are made to look as if they had not.
  bool absorbsFailure() const { return has_failed_ && absorbs_; }

  void startRecording();
  std::string stopRecording();
  void startReplay(const std::string& log);
  // While on, operations run over the links though a log is being replayed, and
  // are not recorded.
  void holdReplay(bool on);
  void stopReplay();
  // What becomes of operations now: in a set-up, they are recorded or answered.
  enum class Setup { kNone, kRecorded, kReplayed };
  Setup setup() const { return setup_; }

  int64_t currentEpoch() const { return public_epoch_.load(); }
  int rank() const { return public_rank_.load(); }
  int worldSize() const { return public_size_.load(); }
  std::map<std::string, int64_t> counters() const;

  // Takes the operation and completes it, always. Throws if the mesh is closed.
  // Does not wait: starts it, unless another thread has the engine.
  void submit(Operation* op);
  // Turns the engine until the flag is set, for as long as that is better than
  // to sleep. For a thread that is about to wait for an operation.
  void help(const std::atomic<bool>& is_over);

  // An operation in flight. Ranks are global.
  struct Pending {
    const Operation* operation;  // only to be compared
    Kind kind;
    std::string group;
    uint64_t sequence;
    size_t num_bytes;
    const char* type_name;
    Clock::time_point began;
    Milliseconds timeout;
    std::vector<int> waits_for;
  };
  // What is in flight now, oldest first.
  std::vector<Pending> pending();
  // The last that were in flight, oldest first.
  std::vector<Finished> finished();

  // Ends all operations and says farewell. Can be called again.
  void close();

 private:
  friend class Operation;
  friend class Transfer;
  friend class Turn;

  class Waker final : public EventSink {
   public:
    Waker();
    void wake();
    void wait(Deadline deadline);  // for nothing else
    void onEvents(uint32_t events) override;
    int fd() const { return fd_.get(); }

   private:
    Fd fd_;
  };

  struct Command;

  void checkOwner() const;
  void enqueue(Submission* submission);
  void perform(std::function<void()> action);
  bool hasSubmissions();
  void drive();

  // ---- progress thread
  void loop();
  void sleep(std::unique_lock<std::mutex>& engine);

  // ---- with the engine held
  bool turn() noexcept;
  bool turnOnce();
  bool hasWork() const;  // for another turn
  void breakDown(std::exception_ptr error);
  void letGo();
  bool lookAtLinks();
  bool hasSockets() const;
  void leaveSockets();
  bool armLinks();
  Deadline nextDeadline() const;
  bool runSubmissions();
  void resumeReady();
  void pumpListed();
  void checkDeadlines();
  void checkSilence();

  void start(Operation* op) noexcept;
  void tryToStart(Operation* op);
  void resume(Operation* op);
  void finish(Operation* op, std::exception_ptr error,
              bool may_absorb = true) noexcept;
  bool isInFlight(const Operation& op) const {
    return op.flight_previous_ != nullptr || flight_ == &op;
  }
  void note(const Operation& op, const std::exception_ptr& error,
            bool is_absorbed);
  void ready(Operation* op);
  void abortAll(const std::exception_ptr& error);

  void latch(std::exception_ptr error);
  void setFailure(std::exception_ptr error);
  void timeOut(Operation* op);

  void changeSetup(const std::function<void()>& change);
  int moveTo(int64_t epoch, int rank, std::vector<Member> members,
             bool dials_lost = true);
  void stampSeats(const std::vector<Member>& members, int64_t epoch);
  void closePeersWithout(const std::set<uint64_t>& ids);
  Peer& peerOf(uint64_t worker_id);
  Peer& peerOf(Operation& op, int group_rank);
  void dialIfNeeded(int rank);
  int rankOf(uint64_t worker_id) const;
  void bury(std::unique_ptr<Peer> peer);
  void beginClosing();
  bool isClosed() const;

  // What is known of the groups of one id: those of the first generations are
  // closed.
  struct Closed {
    uint64_t num_generations = 0;
    Closing why = Closing::kAborted;
    int rank = -1;  // who did it
    bool is_ours = false;
    bool is_replaced = false;  // nobody will use it again
    bool is_open = false;      // the next generation is in use
  };
  void performIfOpen(const std::function<void()>& action);
  void takeIn(Group& group);
  bool hasClosed(const Group& group) const;
  std::exception_ptr refusal(const Group& group) const;
  Closed* closeGroup(uint64_t id, uint64_t generation, Closing why, int rank);
  void startClosedAnew();
  void endClosed();
  void endThoseThatMiss(Peer& peer);
  void sendClosed(Peer& peer);
  static void sayClosed(Peer& peer, uint64_t id, const Closed& closed);

  bool isContradicted(Operation& op);
  void addTurn(Turn* turn);
  void removeTurn(Turn* turn);
  void scanTurns(uint64_t group, uint64_t tag);

  // Peer::Host and Connector::Host
  int64_t epoch() const override { return epoch_; }
  uint64_t membersDigest() const override { return members_digest_; }
  Standing standing() const override { return {epoch_, members_digest_}; }
  void onTransferDone(Operation* op, Transfer* transfer) override;
  bool contradicts(const MessageKey& key, uint16_t signature) override;
  void onArrival(Peer& peer, const MessageKey& key) override;
  void onMismatch(Peer& peer, const std::string& what) override;
  bool isClosed(const MessageKey& key) const override;
  void onClose(Peer& peer, const MessageKey& key, Closing why) override;
  void onMissed(Peer& peer, const MessageKey& key) override;
  void onMarker(Peer& peer) override;
  void onLost(Peer& peer, const std::string& why) override;
  void onWork(Peer& peer) override;
  void onUnlinked(Peer& peer) override;
  void onClosing(int fd) override;
  void onBytes(size_t sent, size_t received) override;
  Verdict admits(uint64_t worker_id, int64_t its_epoch,
                 bool has_lost_link) override;
  bool makeRoomForEarly(int64_t its_epoch);
  void onLinked(const Handshake& handshake,
                std::unique_ptr<Link> link) override;
  void onDialFailed(uint64_t worker_id, const std::string& why) override;
  void onRefused() override { ++counters_.handshakes_refused; }

  // Constant after construction.
  const uint64_t worker_id_;
  const unsigned generation_;  // of the process that owns it
  const uint64_t job_tag_;
  const Milliseconds patience_;
  Fd failure_fd_;
  std::string address_;

  // Shared. Lock order: engine_mu_ first, of the others one at a time.
  std::mutex engine_mu_;
  std::mutex submit_mu_;
  Submission* submitted_first_ = nullptr;  // guarded by submit_mu_
  Submission* submitted_last_ = nullptr;   // guarded by submit_mu_
  bool is_closing_ = false;                // guarded by submit_mu_
  mutable std::mutex failure_mu_;
  std::exception_ptr failure_;  // guarded by failure_mu_
  std::mutex close_mu_;         // one thread closes
  std::atomic<bool> is_locked_{false};
  std::atomic<int64_t> public_epoch_{-1};
  std::atomic<int> public_rank_{-1};
  std::atomic<int> public_size_{0};
  std::atomic<int> num_helpers_{0};
  struct {
    std::atomic<int64_t> links_open{0};
    std::atomic<int64_t> links_opened{0};
    std::atomic<int64_t> links_replaced{0};
    std::atomic<int64_t> links_shm{0};
    std::atomic<int64_t> bytes_sent{0};
    std::atomic<int64_t> bytes_received{0};
    std::atomic<int64_t> handshakes_refused{0};
    std::atomic<int64_t> operations{0};
    std::atomic<int64_t> absorbed{0};
    std::atomic<int64_t> failures{0};
  } counters_;

  // Guarded by engine_mu_.
  bool is_sleeping_ = false;  // the progress thread, until:
  Deadline sleeps_until_ = Deadline::never();
  bool is_armed_ = false;  // it sleeps until a bell rings
  bool is_deaf_ = false;   // it leaves sockets to a helper
  Clock::time_point helped_at_{};
  bool is_broken_down_ = false;
  EventLoop loop_;
  Waker waker_;
  Connector connector_;
  int64_t epoch_ = -1;
  int rank_ = -1;
  std::vector<Member> members_;
  uint64_t members_digest_ = 0;
  std::unordered_map<uint64_t, int> ranks_;  // by worker id
  std::map<uint64_t, std::unique_ptr<Peer>> peers_;
  std::vector<int64_t> seated_since_;  // epochs; see Group::seated_since
  std::set<uint64_t> broken_;  // members whose link was lost in this epoch
  std::map<uint64_t, Closed> closed_;             // by group id
  std::unordered_map<uint64_t, uint64_t> begun_;  // next numbers, by group id
  // Monitored barriers that failed: their messages may still come.
  std::set<std::pair<uint64_t, uint64_t>> gave_up_;
  std::vector<uint64_t> closing_;  // groups with operations still to end
  std::vector<uint64_t> missing_;  // workers that left a group just now
  std::atomic<bool> has_failed_{false};
  bool must_abort_ = false;  // has_failed_, and operations are still in flight
  std::atomic<bool> absorbs_{false};
  Deadline close_by_ = Deadline::never();
  Operation* flight_ = nullptr;
  History history_;
  Deadline next_timeout_ = Deadline::never();
  Deadline ask_hosts_at_ = Deadline::never();  // if there is a link over TCP
  std::vector<Operation*> ready_;
  std::vector<Peer*> listed_;
  std::vector<Peer*> pumping_;
  std::map<std::pair<uint64_t, uint64_t>, std::vector<Turn*>> turns_;
  std::optional<SetupLog> recording_;
  std::optional<SetupLog> replaying_;
  bool holds_replay_ = false;
  std::atomic<Setup> setup_{Setup::kNone};

  std::unique_ptr<CallbackThreads> callbacks_;
  std::thread thread_;  // last: everything else is there when it starts
};

}  // namespace mnemosyne::ccl
