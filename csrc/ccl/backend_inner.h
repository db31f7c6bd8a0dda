// A backend of torch's own that moves, for one of our groups, what lies on a
// device: its life. docs/design.md, "Groups on devices".
#pragma once

#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <vector>

#include <c10/core/Event.h>
#include <torch/csrc/distributed/c10d/Backend.hpp>

#include "ccl/group.h"

namespace mnemosyne::ccl {

// Thread-safe.
class Inner {
 public:
  using BackendPtr = c10::intrusive_ptr<c10d::Backend>;
  using WorkPtr = c10::intrusive_ptr<c10d::Work>;
  // Makes one for the ranks of a group; all of them do, with the same `life`.
  using Make = std::function<BackendPtr(uint64_t group, int64_t life, int rank,
                                        int size)>;

  // Returns when all ranks of the group have called it.
  using Meet = std::function<void(uint64_t group, int64_t life, int size)>;

  Inner(Make make, Meet meet)
      : make_(std::move(make)), meet_(std::move(meet)) {}

  // The one that there is, or a new one. Throws GroupAborted between abort()
  // and drop(), and what Make throws.
  BackendPtr get(const Group& group, int64_t life);
  // Null if there is none.
  BackendPtr current() const;
  // Whether all ranks have begun a collective with it, or are about to.
  bool hasCollectives() const;
  // In front of a collective: sees to it that the first one finds all ranks
  // there. Ranks may come to it far apart, and NCCL waits for a shorter time.
  void meet(const Group& group);

  // While one of these lives it is not quiet: something is being asked of it.
  class Use {
   public:
    explicit Use(Inner& inner) : inner_(inner) { inner_.count(1); }
    ~Use() { inner_.count(-1); }
    Use(const Use&) = delete;
    Use& operator=(const Use&) = delete;

   private:
    Inner& inner_;
  };

  // It was asked for a collective, or for a message to or from a rank. `work`:
  // null where it is part of a bundle.
  void note(const WorkPtr& work, int to, int from);
  // The same while a graph is captured, which is not in flight. Process-wide.
  static void setCapturing(bool is_capturing);
  static bool isCapturing();
  void noteCaptured();
  uint64_t numCaptured() const;

  // It has not done all before this is over.
  void watch(const WorkPtr& work);
  // This thread's stream on `device` waits for it from now on: it need not be
  // kept, and with it the tensors, to know when it is done.
  void follow(const WorkPtr& work, c10::Device device);
  // Waits as the collectives that are in flight are waited for.
  void wait();
  // What was asked of it has failed, and all know.
  void fail();
  // What has failed in it by itself, unless it is aborted; else null.
  std::exception_ptr failure();

  // What the ranks compare, to tell whether it can be used on.
  struct Standing {
    int64_t life = -1;     // -1: there is none
    bool is_quiet = true;  // all that was asked of it has been done, and well
    uint64_t collectives = 0;
    std::vector<uint64_t> sent;  // messages, by rank of the group
    std::vector<uint64_t> received;
  };
  Standing standing();

  // Ends what is in flight, and refuses what is new. May take long.
  void abort();
  void abortIfBusy();
  // Lets it go: get() makes another.
  void drop();

 private:
  struct Flight {
    WorkPtr work;  // null if there is an event
    std::shared_ptr<c10::Event> done;
    bool is_message;
  };

  void count(int change);
  // Takes out what has ended, to be destroyed without mu_: tensors may need the
  // interpreter's lock for it. Requires: mu_.
  std::vector<WorkPtr> prune();

  const Make make_;
  const Meet meet_;
  std::mutex making_mu_;   // held while one is made
  std::mutex meeting_mu_;  // held while ranks meet
  mutable std::mutex mu_;  // guards all below
  BackendPtr backend_;
  bool have_met_ = false;
  bool is_aborted_ = false;
  bool has_failed_ = false;   // something that was asked of it
  std::exception_ptr error_;  // of something that was in flight
  int num_uses_ = 0;
  uint64_t num_captured_ = 0;
  Standing standing_;
  std::deque<Flight> flight_;
};

}  // namespace mnemosyne::ccl
