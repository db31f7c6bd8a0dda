#include "ccl/task.h"

#include <new>

namespace mnemosyne::ccl {

FramePool& FramePool::local() {
  thread_local FramePool pool;
  return pool;
}

FramePool::~FramePool() {
  for (auto& frames : free_)
    for (void* frame : frames) ::operator delete(frame);
}

void* FramePool::allocate(size_t size) {
  const size_t slot = (size - 1) / kStep;
  if (slot >= kSizes) return ::operator new(size);
  auto& frames = local().free_[slot];
  if (frames.empty()) return ::operator new((slot + 1) * kStep);
  void* frame = frames.back();
  frames.pop_back();
  return frame;
}

void FramePool::release(void* frame, size_t size) {
  const size_t slot = (size - 1) / kStep;
  if (slot >= kSizes) return ::operator delete(frame);
  local().free_[slot].push_back(frame);
}

}  // namespace mnemosyne::ccl
