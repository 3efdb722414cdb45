// The storage formats of accumkern, one scalar function at a time.
//
// This header is the only C++ statement of the arithmetic: the CPU and the CUDA kernels both call it, so what the
// CPU tests prove of it holds for the GPU. Everything is IEEE binary32, round to nearest even, subnormals kept;
// compile with contraction off (-ffp-contract=off, nvcc -fmad=false), every fused multiply-add is spelled out.
//
// A format says how one accumulated value x lies in memory: as `Sum`, the element of `.grad` (the upper half of x,
// rounded to nearest; encode says which way ties go), and `Residual`, what is missing of it.
//
//   decode(sum, residual)   the value            widen(sum)   the value of a sum whose residual counts as zero
//   encode(bits, ...)       both halves of it    round(bits)  the value rounded to nearest even, for .grad alone
//
// The split formats also say it for two neighbours at once, the first in the lower half of a 32-bit word: the same
// results in fewer instructions where a loop is vectorised over words instead of over elements of 1, 2 and 4 bytes.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#if defined(__CUDACC__)
#include <cuda_fp16.h>
#define ACCUMKERN_INLINE __host__ __device__ __forceinline__
#else
#define ACCUMKERN_INLINE inline __attribute__((always_inline))
#endif

namespace accumkern {

ACCUMKERN_INLINE uint32_t bits_of(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}

ACCUMKERN_INLINE float float_of(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

ACCUMKERN_INLINE float quotient_of(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fdiv_rn(a, b);
#else
  return a / b;
#endif
}

// The bits of x, with every NaN made the one quiet NaN 0x7FC00000: payloads differ between processors.
ACCUMKERN_INLINE uint32_t canonical_bits(float x) {
  return x == x ? bits_of(x) : 0x7FC00000u;
}

// ---- 16-bit floats -------------------------------------------------------------------------------------------

struct BFloat16 {
  static ACCUMKERN_INLINE float widen(uint16_t half) { return float_of(static_cast<uint32_t>(half) << 16); }

  static ACCUMKERN_INLINE uint16_t round(uint32_t bits) {  // canonical bits of a float
    return static_cast<uint16_t>((bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16);
  }
};

struct Float16 {
  static ACCUMKERN_INLINE float widen(uint16_t half) {
#if defined(__CUDA_ARCH__)
    return __half2float(__ushort_as_half(half));
#else
    const uint32_t sign = static_cast<uint32_t>(half & 0x8000u) << 16;
    const uint32_t magnitude = half & 0x7FFFu;
    const uint32_t rebias = magnitude >= 0x7C00u ? 224u << 23 : 112u << 23;  // inf and NaN: exponent 31 becomes 255
    const uint32_t subnormal = bits_of(static_cast<float>(static_cast<int32_t>(magnitude)) * 0x1p-24f);
    return float_of(sign | (magnitude < 0x0400u ? subnormal : (magnitude << 13) + rebias));
#endif
  }

  static ACCUMKERN_INLINE uint16_t round(uint32_t bits) {  // canonical bits of a float
#if defined(__CUDA_ARCH__)
    const uint16_t half = __half_as_ushort(__float2half_rn(float_of(bits)));
    return bits == 0x7FC00000u ? 0x7E00u : half;
#else
    const uint32_t sign = (bits >> 16) & 0x8000u;
    const uint32_t magnitude = bits & 0x7FFFFFFFu;
    // 2^16 is the first power of two past the largest half: clamping there rounds every larger value to infinity.
    const uint32_t clamped = (magnitude < 0x47800000u ? magnitude : 0x47800000u) - (112u << 23);
    const uint32_t normal = (clamped + 0xFFFu + ((clamped >> 13) & 1u)) >> 13;
    // Adding 0.5 leaves an ulp of 2^-24, the spacing of subnormal halves, so the hardware does the rounding.
    const uint32_t subnormal = bits_of(float_of(magnitude < 0x38800000u ? magnitude : 0u) + 0.5f) - 0x3F000000u;
    const uint32_t finite = magnitude < 0x38800000u ? subnormal : normal;
    return static_cast<uint16_t>(sign | (magnitude > 0x7F800000u ? 0x7E00u : finite));
#endif
  }
};

// Two neighbours whose bits are already right up to the upper half of each.
ACCUMKERN_INLINE uint32_t upper_halves(uint32_t first, uint32_t second) {
  return (first >> 16) | (second & 0xFFFF0000u);
}

// The bits of a zero or of what was decoded beside it: subtracting a residual borrows through the sign of a zero alone.
ACCUMKERN_INLINE float unless_borrowed(uint32_t sum_bits, uint32_t bits) {
  return float_of(static_cast<int32_t>(sum_bits ^ bits) < 0 ? sum_bits : bits);
}

// ---- formats -------------------------------------------------------------------------------------------------

// bfloat16 sum + int8: the upper 24 bits of a float (16-bit significand).
struct Split24 {
  using Sum = uint16_t;
  using Residual = int8_t;
  static constexpr bool kHasResidual = true;
  static constexpr bool kHasPairs = true;

  static ACCUMKERN_INLINE float widen(Sum sum) { return BFloat16::widen(sum); }
  static ACCUMKERN_INLINE Sum round(uint32_t bits) { return BFloat16::round(bits); }

  static ACCUMKERN_INLINE float decode(Sum sum, Residual residual) {
    // encode() never pairs a zero with a negative residual. Somebody zeroed .grad behind our back if it is there, and
    // the borrow would turn the zero into a NaN.
    const int32_t low = (sum & 0x7FFFu) == 0 && residual < 0 ? 0 : residual;
    return float_of((static_cast<uint32_t>(sum) << 16) + (static_cast<uint32_t>(low) << 8));
  }

  using ResidualPair = uint16_t;

  static ACCUMKERN_INLINE void decode_pair(uint32_t sums, ResidualPair residuals, float* first, float* second) {
    const uint32_t first_sum = sums << 16, second_sum = sums & 0xFFFF0000u;
    const uint32_t low = static_cast<uint32_t>(residuals) << 24;
    *first = unless_borrowed(first_sum, first_sum + static_cast<uint32_t>(static_cast<int32_t>(low) >> 16));
    *second = unless_borrowed(second_sum, (second_sum | ((residuals & 0xFF00u) ^ 0x8000u)) - 0x8000u);
  }

  static ACCUMKERN_INLINE void encode_pair(uint32_t first, uint32_t second, uint32_t* sums, ResidualPair* residuals) {
    // Rounded to 24 bits, and 0x80 of the residual's unit more: that rounds the sum and shifts the residual by 0x80.
    first += 0x807Fu + ((first >> 8) & 1u);
    second += 0x807Fu + ((second >> 8) & 1u);
    *sums = upper_halves(first, second);
    *residuals = static_cast<ResidualPair>((((first >> 8) & 0xFFu) | (second & 0xFF00u)) ^ 0x8080u);
  }

  static ACCUMKERN_INLINE void encode(uint32_t bits, Sum* sum, Residual* residual) {
    const uint32_t upper = (bits + 0x7Fu + ((bits >> 8) & 1u)) >> 8;
    const int32_t low = static_cast<int8_t>(upper & 0xFFu);
    *residual = static_cast<Residual>(low);
    *sum = static_cast<Sum>((upper - static_cast<uint32_t>(low)) >> 8);
  }
};

// bfloat16 sum + int16: exactly a float.
struct Split32 {
  using Sum = uint16_t;
  using Residual = int16_t;
  static constexpr bool kHasResidual = true;
  static constexpr bool kHasPairs = true;

  static ACCUMKERN_INLINE float widen(Sum sum) { return BFloat16::widen(sum); }
  static ACCUMKERN_INLINE Sum round(uint32_t bits) { return BFloat16::round(bits); }

  static ACCUMKERN_INLINE float decode(Sum sum, Residual residual) {
    const int32_t low = (sum & 0x7FFFu) == 0 && residual < 0 ? 0 : residual;  // see Split24
    return float_of((static_cast<uint32_t>(sum) << 16) + static_cast<uint32_t>(low));
  }

  using ResidualPair = uint32_t;

  static ACCUMKERN_INLINE void decode_pair(uint32_t sums, ResidualPair residuals, float* first, float* second) {
    const uint32_t first_sum = sums << 16, second_sum = sums & 0xFFFF0000u;
    const int32_t first_low = static_cast<int32_t>(residuals << 16) >> 16;
    const int32_t second_low = static_cast<int32_t>(residuals) >> 16;
    *first = unless_borrowed(first_sum, first_sum + static_cast<uint32_t>(first_low));
    *second = unless_borrowed(second_sum, second_sum + static_cast<uint32_t>(second_low));
  }

  static ACCUMKERN_INLINE void encode_pair(uint32_t first, uint32_t second, uint32_t* sums, ResidualPair* residuals) {
    *sums = upper_halves(first + 0x8000u, second + 0x8000u);
    *residuals = (first & 0xFFFFu) | (second << 16);
  }

  static ACCUMKERN_INLINE void encode(uint32_t bits, Sum* sum, Residual* residual) {
    const int32_t low = static_cast<int16_t>(bits & 0xFFFFu);
    *residual = static_cast<Residual>(low);
    *sum = static_cast<Sum>((bits - static_cast<uint32_t>(low)) >> 16);
  }
};

// 16-bit sum + the float itself ("main_grad"). A sum that is not the rounding of the float was edited, and wins.
template <class Half>
struct MainGrad {
  using Sum = uint16_t;
  using Residual = float;
  static constexpr bool kHasResidual = true;
  static constexpr bool kHasPairs = false;

  static ACCUMKERN_INLINE float widen(Sum sum) { return Half::widen(sum); }
  static ACCUMKERN_INLINE Sum round(uint32_t bits) { return Half::round(bits); }

  static ACCUMKERN_INLINE float decode(Sum sum, Residual main_grad) {
    return Half::round(canonical_bits(main_grad)) == sum ? main_grad : Half::widen(sum);
  }

  static ACCUMKERN_INLINE void encode(uint32_t bits, Sum* sum, Residual* main_grad) {
    *main_grad = float_of(bits);
    *sum = Half::round(bits);
  }
};

// A float32 sum, complete in itself.
struct Plain32 {
  using Sum = float;
  using Residual = uint8_t;  // never read or written
  static constexpr bool kHasResidual = false;
  static constexpr bool kHasPairs = false;

  static ACCUMKERN_INLINE float widen(Sum sum) { return sum; }
  static ACCUMKERN_INLINE Sum round(uint32_t bits) { return float_of(bits); }
  static ACCUMKERN_INLINE float decode(Sum sum, Residual) { return sum; }
  static ACCUMKERN_INLINE void encode(uint32_t bits, Sum* sum, Residual*) { *sum = float_of(bits); }
};

}  // namespace accumkern
