// A link as the engine sees it: one ordered byte channel to one worker.
//
// All methods are called with the engine held, and none of them waits.
#pragma once

#include <sys/uio.h>

#include <cstddef>
#include <cstdint>
#include <memory>

#include "common/deadline.h"
#include "common/fd.h"
#include "common/shm.h"

namespace mnemosyne::ccl {

class Link {
 public:
  virtual ~Link() = default;

  // What the mesh watches with epoll, edge-triggered.
  virtual int fd() const = 0;
  // Takes note of epoll events at fd().
  virtual void onEvents(uint32_t events) = 0;

  // Takes as many bytes as there is room for now and returns their number. A
  // link whose peer
  // is gone takes everything and drops it: that the peer is gone is for read()
  // to find, after all that the peer had sent.
  virtual size_t write(const iovec* parts, int num_parts) = 0;
  // Makes sure that the peer looks at what was written.
  virtual void flush() = 0;

  // Returns up to `size` bytes; 0 if there are none now.
  virtual size_t read(void* data, size_t size) = 0;

  // Whether fd() tells of news only after arm().
  virtual bool isSilent() const = 0;
  // Whether a read that found nothing, or a short write, can go on. Cheap.
  virtual bool hasNews(bool wants_room) const = 0;
  // Asks for an event at fd() when hasNews() comes true; false if it is.
  virtual bool arm(bool wants_room) = 0;
  // The peer has closed its end, or died, and all it sent has been read.
  virtual bool ended() const = 0;
  // Nothing more will be written; the peer reads to the end and sees it.
  virtual void endWriting() = 0;

  // Whether something has waited that long for the peer's host to acknowledge
  // it, and nothing came. To be asked from time to time, at least twice. A host
  // answers for a worker that does not read.
  virtual bool isUnanswered(Milliseconds patience) = 0;

  virtual const char* kind() const = 0;
};

// `socket` is connected and both sides have proved who they are.
std::unique_ptr<Link> makeTcpLink(Fd socket);

// The bytes are in `memory`, in two rings; `socket` is a Unix socket that
// serves as doorbell and, by its EOF, as death signal. The side that dialled
// writes ring 0.
std::unique_ptr<Link> makeShmLink(Fd socket, SharedMemory memory, bool dialled);
size_t shmLinkBytes();

}  // namespace mnemosyne::ccl
