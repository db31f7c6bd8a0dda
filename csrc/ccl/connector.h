// Makes links: listens, dials, and lets nobody in who does not know the secret.
//
// Lives on the progress thread.
#pragma once

#include <cstdint>
#include <list>
#include <map>
#include <memory>
#include <string>
#include <unordered_map>

#include "ccl/event_loop.h"
#include "ccl/handshake.h"

namespace mnemosyne::ccl {

// Where a worker listens, as one printable string: "host id|unix
// name|host:port".
struct Address {
  std::string host_id;    // equal for workers that can share memory
  std::string unix_name;  // empty if it takes TCP only
  TcpAddress tcp;

  std::string toString() const;
  // Throws std::invalid_argument.
  static Address parse(const std::string& text);
};

class Connector {
 public:
  class Host {
   public:
    virtual ~Host() = default;
    virtual Standing standing() const = 0;
    // Whether a link that this worker dialled may be made. `has_lost_link`: its
    // end of the link that we have is dead.
    virtual Verdict admits(uint64_t worker_id, int64_t its_epoch,
                           bool has_lost_link) = 0;
    virtual void onLinked(const Handshake& handshake,
                          std::unique_ptr<Link> link) = 0;
    virtual void onDialFailed(uint64_t worker_id, const std::string& why) = 0;
    virtual void onRefused() = 0;
  };

  // Listens at once, so that address() is known. Throws like listenTcp.
  Connector(EventLoop& loop, Host& host, uint64_t worker_id, std::string secret,
            const std::string& bind_host, bool use_shm);

  std::string address() const { return address_.toString(); }

  // Dials until there is a link, or a failure that a new attempt will not mend.
  // Throws std::invalid_argument if the address has another form.
  void dial(uint64_t worker_id, const std::string& address);
  bool isDialling(uint64_t worker_id) const {
    return dials_.count(worker_id) > 0;
  }
  void cancel(uint64_t worker_id);
  void cancelAll();
  // The worker will not come back.
  void forget(uint64_t worker_id);

  // Called after each round of events, and when nextDeadline() is reached.
  void settle();
  Deadline nextDeadline() const;

 private:
  class Listener final : public EventSink {
   public:
    Listener(Connector& connector, Fd fd, bool is_shm)
        : connector_(connector), fd_(std::move(fd)), is_shm_(is_shm) {}
    void onEvents(uint32_t) override {
      connector_.acceptAll(fd_.get(), is_shm_);
    }
    int fd() const { return fd_.get(); }

   private:
    Connector& connector_;
    Fd fd_;
    bool is_shm_;
  };

  struct Dial {
    Address address;
    Deadline deadline;
    Deadline retry_at;
    int attempts = 0;
    bool without_shm = false;  // there was no memory to share
    std::string error;         // why the last attempt could not even start
    // None while it waits for the retry, or for the peer's own dial.
    std::unique_ptr<Handshake> handshake;
  };

  void acceptAll(int listener, bool is_shm);
  void attempt(uint64_t worker_id, Dial* dial);
  void bury(std::unique_ptr<Handshake> handshake);
  void settleDials();
  void settleAnswers();
  uint64_t lastLinkTo(uint64_t worker_id) const;

  EventLoop& loop_;
  Host& host_;
  const Handshake::Self self_;
  Address address_;
  std::unique_ptr<Listener> tcp_;
  std::unique_ptr<Listener> unix_;
  std::map<uint64_t, Dial> dials_;
  std::list<std::unique_ptr<Handshake>> answers_;  // oldest first
  // The id of the newest link to each worker, whether it lives or not.
  std::unordered_map<uint64_t, uint64_t> link_ids_;
  // When to accept again what could not be accepted for want of descriptors or
  // places: who waits in the queue already makes no new event.
  Deadline accept_at_ = Deadline::never();
};

}  // namespace mnemosyne::ccl
