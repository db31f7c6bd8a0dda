// Half-precision numbers: widened to float, combined, and rounded to the
// nearest, ties to even. NaN stays NaN, made quiet, with the sign and what fits
// of the payload; so do the processors that convert by themselves.
//
// In an anonymous namespace, because it is built for several instruction sets:
// see reduce_kernels.cc.
#pragma once

#include <cstdint>
#ifdef __F16C__
#include <immintrin.h>
#endif

namespace mnemosyne::ccl {
namespace {

struct Bfloat16 {
  uint16_t bits;

  template <typename Op>
  static Bfloat16 combine(Op op, Bfloat16 a, Bfloat16 b) {
    return {static_cast<uint16_t>(round(op(a.wide(), b.wide())) >> 16)};
  }
  float wide() const {
    return __builtin_bit_cast(float, static_cast<uint32_t>(bits) << 16);
  }
  // In the upper half; what is left in the lower means nothing.
  static uint32_t round(float value) {
    const auto wide = __builtin_bit_cast(uint32_t, value);
    return value == value ? wide + 0x7fff + (wide >> 16 & 1) : wide | 0x400000;
  }

  // Two at once: vectorized, loops over words need no shuffles between lanes
  // and are half as fast again. No word has a first half that is named, so the
  // order of bytes does not matter.
  struct Many {
    uint32_t bits;

    template <typename Op>
    static Many combine(Op op, Many a, Many b) {
      const uint32_t upper = round(op(a.upper(), b.upper()));
      const uint32_t lower = round(op(a.lower(), b.lower()));
      return {(upper & 0xffff0000) | lower >> 16};
    }
    float upper() const { return __builtin_bit_cast(float, bits & 0xffff0000); }
    float lower() const { return __builtin_bit_cast(float, bits << 16); }
  };
};

struct Float16 {
  uint16_t bits;

  template <typename Op>
  static Float16 combine(Op op, Float16 a, Float16 b) {
    return {round(op(a.wide(), b.wide()))};
  }

#if defined(__F16C__)
  float wide() const { return _cvtsh_ss(bits); }
  static uint16_t round(float value) {
    return _cvtss_sh(value, _MM_FROUND_TO_NEAREST_INT);
  }

  // As many as fit, because compilers do not vectorize these conversions.
#ifdef __AVX512F__
  struct Many {
    __m256i bits;
    typedef float Floats __attribute__((vector_size(64)));

    template <typename Op>
    static Many combine(Op op, Many a, Many b) {
      const Floats value = op(a.wide(), b.wide());
      return {_mm512_maskz_cvtps_ph(kAll, (__m512)value,
                                    _MM_FROUND_TO_NEAREST_INT)};
    }
    Floats wide() const { return (Floats)_mm512_maskz_cvtph_ps(kAll, bits); }
    // Masks that keep all lanes: without one GCC 12 warns of a variable in its
    // own header (gcc.gnu.org/PR105593).
    static constexpr __mmask16 kAll = 0xffff;
  };
#else
  struct Many {
    __m128i bits;
    typedef float Floats __attribute__((vector_size(32)));

    template <typename Op>
    static Many combine(Op op, Many a, Many b) {
      const Floats value = op(a.wide(), b.wide());
      return {_mm256_cvtps_ph((__m256)value, _MM_FROUND_TO_NEAREST_INT)};
    }
    Floats wide() const { return (Floats)_mm256_cvtph_ps(bits); }
  };
#endif

#elif defined(__aarch64__)
  using Many = Float16;
  float wide() const { return __builtin_bit_cast(__fp16, bits); }
  static uint16_t round(float value) {
    const auto bits = __builtin_bit_cast(uint16_t, static_cast<__fp16>(value));
    // GCC leaves out conversions around min and max, which make NaN quiet.
    return value == value ? bits : bits | 0x200;
  }

#else
  using Many = Float16;
  float wide() const {
    const uint32_t sign = (bits & 0x8000u) << 16;
    const uint32_t magnitude = bits & 0x7fffu;
    if (magnitude < 0x400) {  // zero or subnormal: a multiple of 2^-24, exact
      const float value = static_cast<float>(magnitude) * 0x1p-24f;
      return __builtin_bit_cast(float,
                                sign | __builtin_bit_cast(uint32_t, value));
    }
    // Re-biased by 127 - 15; infinity and NaN keep the largest exponent.
    const uint32_t bias = magnitude < 0x7c00 ? 112u << 23 : 224u << 23;
    return __builtin_bit_cast(float, sign | ((magnitude << 13) + bias));
  }
  static uint16_t round(float value) {
    const auto wide = __builtin_bit_cast(uint32_t, value);
    const uint32_t magnitude = wide & 0x7fffffff;
    uint32_t rounded = 0x7c00;  // 2^16 and more, infinity included
    if (magnitude > 0x7f800000) {
      rounded = 0x7e00 | (magnitude >> 13 & 0x3ff);
    } else if (magnitude < 0x38800000) {
      // Below 2^-14 the result is a multiple of 2^-24. Adding 0.5 puts that
      // unit at the last place of a float, so the adder does the rounding.
      const float shifted = __builtin_bit_cast(float, magnitude) + 0.5f;
      rounded = __builtin_bit_cast(uint32_t, shifted) - 0x3f000000;
    } else if (magnitude < 0x47800000) {
      rounded = (magnitude + 0xfff + (magnitude >> 13 & 1) - 0x38000000) >> 13;
    }
    return static_cast<uint16_t>((wide >> 16 & 0x8000) | rounded);
  }
#endif
};

}  // namespace
}  // namespace mnemosyne::ccl
