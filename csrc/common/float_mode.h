// Rounding and the treatment of denormals belong to a thread, and a user may
// have changed his own. Whoever computes for all ranks must not depend on it.
#pragma once

#if defined(__SSE2__)
#include <xmmintrin.h>
#endif

namespace mnemosyne {

// The default mode, until the end of the scope.
class DefaultFloatMode {
 public:
  DefaultFloatMode() : before_(get()) {
    if ((before_ & ~kFlags) != kDefault) set(kDefault);
  }
  ~DefaultFloatMode() {
    if ((before_ & ~kFlags) != kDefault) set(before_);
  }
  DefaultFloatMode(const DefaultFloatMode&) = delete;
  DefaultFloatMode& operator=(const DefaultFloatMode&) = delete;

 private:
#if defined(__SSE2__)
  using Mode = unsigned;  // MXCSR
  // All exceptions masked, to the nearest, denormals as they are.
  static constexpr Mode kDefault = 0x1f80;
  static constexpr Mode kFlags = 0x3f;  // of what has happened
  static Mode get() { return _mm_getcsr(); }
  static void set(Mode mode) { _mm_setcsr(mode); }
#elif defined(__aarch64__)
  using Mode = unsigned long;  // FPCR
  static constexpr Mode kDefault = 0;
  static constexpr Mode kFlags = 0;
  static Mode get() {
    Mode mode;
    asm volatile("mrs %0, fpcr" : "=r"(mode));
    return mode;
  }
  static void set(Mode mode) { asm volatile("msr fpcr, %0" : : "r"(mode)); }
#else
  using Mode = unsigned;
  static constexpr Mode kDefault = 0;
  static constexpr Mode kFlags = 0;
  static Mode get() { return kDefault; }
  static void set(Mode) {}
#endif

  const Mode before_;
};

}  // namespace mnemosyne
