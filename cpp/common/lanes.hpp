// Fixed virtual vectors (16 floats, 8 doubles) made of as many machine registers as the ISA flags of the including file
// need. Kernels written with them do the same operations in the same order on every machine.
//
// Everything is in an anonymous namespace and forced inline: a file compiled for AVX-512 must not leave a copy that the
// linker might pick for a file compiled for the baseline. Uses the vector extensions of GCC and Clang, no std library.
#pragma once

#include <stddef.h>
#include <stdint.h>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "common/readings.hpp"

#define LL_INLINE inline __attribute__((always_inline))

namespace layerlens {
namespace {

// Asks for the cache lines of `bytes` bytes that lie one or two pages beyond x, or for none. May point beyond the array.
template <Reading reading, int bytes, int will_write = 0>
LL_INLINE void prefetch_ahead(const void* x) {
  if (reading == Reading::hardware) return;
  constexpr bool near = reading == Reading::page_ahead;
  const uintptr_t ahead = reinterpret_cast<uintptr_t>(x) + (near ? 4096 : 8192);
  for (int at = 0; at < bytes; at += 64) {
    __builtin_prefetch(reinterpret_cast<const void*>(ahead + at), will_write, near ? 3 : 2);
  }
}

#if defined(__AVX512F__)
constexpr int register_bytes = 64;
#elif defined(__AVX2__)
constexpr int register_bytes = 32;
#else
constexpr int register_bytes = 16;
#endif
constexpr int parts = 64 / register_bytes;

typedef float f32_register __attribute__((vector_size(register_bytes)));
typedef double f64_register __attribute__((vector_size(register_bytes)));
typedef int32_t i32_register __attribute__((vector_size(register_bytes)));
typedef int64_t i64_register __attribute__((vector_size(register_bytes)));

template <class Register>
struct Lanes {
  Register part[parts];

  static LL_INLINE Lanes zero() {
    Lanes result;
    for (int p = 0; p < parts; ++p) result.part[p] = Register{};
    return result;
  }
  static LL_INLINE Lanes load(const void* from) {
    // One copy per register: GCC 12 takes a copy of the whole struct through the stack.
    Lanes result;
    for (int p = 0; p < parts; ++p) {
      __builtin_memcpy(&result.part[p], static_cast<const char*>(from) + p * register_bytes, register_bytes);
    }
    return result;
  }
  LL_INLINE void store(void* to) const {
    for (int p = 0; p < parts; ++p) {
      __builtin_memcpy(static_cast<char*>(to) + p * register_bytes, &part[p], register_bytes);
    }
  }

  LL_INLINE Lanes& operator+=(const Lanes& other) {
    for (int p = 0; p < parts; ++p) part[p] += other.part[p];
    return *this;
  }
  friend LL_INLINE Lanes operator+(Lanes a, const Lanes& b) { return a += b; }
  friend LL_INLINE Lanes operator*(Lanes a, const Lanes& b) {
    for (int p = 0; p < parts; ++p) a.part[p] *= b.part[p];
    return a;
  }
};

using f32x16 = Lanes<f32_register>;
using f64x8 = Lanes<f64_register>;
using i32x16 = Lanes<i32_register>;
using i64x8 = Lanes<i64_register>;

template <class To, class From>
LL_INLINE To bits_of(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "reinterpretation keeps the size");
  To to;
  for (int p = 0; p < parts; ++p) __builtin_memcpy(&to.part[p], &from.part[p], register_bytes);
  return to;
}

// |x| as bits: ordered like the values for signed integer comparison, with NaN above infinity.
LL_INLINE i32x16 magnitude(const f32x16& x) {
  i32x16 bits = bits_of<i32x16>(x);
  for (int p = 0; p < parts; ++p) bits.part[p] &= 0x7fffffff;
  return bits;
}
LL_INLINE i64x8 magnitude(const f64x8& x) {
  i64x8 bits = bits_of<i64x8>(x);
  for (int p = 0; p < parts; ++p) bits.part[p] &= 0x7fffffffffffffff;
  return bits;
}

template <class Register>
LL_INLINE Lanes<Register> larger(Lanes<Register> a, const Lanes<Register>& b) {
  for (int p = 0; p < parts; ++p) a.part[p] = a.part[p] > b.part[p] ? a.part[p] : b.part[p];
  return a;
}

// The 16 lanes as two times 8 doubles: lanes 0..7 and lanes 8..15.
struct Widened {
  f64x8 low, high;
};

LL_INLINE f64x8 widen_f32x8(const float* x) {
  f64x8 result;
#if defined(__AVX512F__)
  result.part[0] = reinterpret_cast<f64_register>(_mm512_cvtps_pd(_mm256_loadu_ps(x)));
#elif defined(__AVX2__)
  result.part[0] = reinterpret_cast<f64_register>(_mm256_cvtps_pd(_mm_loadu_ps(x)));
  result.part[1] = reinterpret_cast<f64_register>(_mm256_cvtps_pd(_mm_loadu_ps(x + 4)));
#else
  for (int p = 0; p < parts; ++p) {
    float pair[2];
    __builtin_memcpy(pair, x + 2 * p, sizeof pair);
    result.part[p] = f64_register{static_cast<double>(pair[0]), static_cast<double>(pair[1])};
  }
#endif
  return result;
}

LL_INLINE Widened widen(const f32x16& x) {
  Widened result;
#if defined(__AVX512F__)
  const __m512 v = reinterpret_cast<__m512>(x.part[0]);
  result.low.part[0] = reinterpret_cast<f64_register>(_mm512_cvtps_pd(_mm512_castps512_ps256(v)));
  result.high.part[0] = reinterpret_cast<f64_register>(_mm512_cvtps_pd(_mm512_extractf32x8_ps(v, 1)));
#elif defined(__AVX2__)
  const __m256 low = reinterpret_cast<__m256>(x.part[0]), high = reinterpret_cast<__m256>(x.part[1]);
  result.low.part[0] = reinterpret_cast<f64_register>(_mm256_cvtps_pd(_mm256_castps256_ps128(low)));
  result.low.part[1] = reinterpret_cast<f64_register>(_mm256_cvtps_pd(_mm256_extractf128_ps(low, 1)));
  result.high.part[0] = reinterpret_cast<f64_register>(_mm256_cvtps_pd(_mm256_castps256_ps128(high)));
  result.high.part[1] = reinterpret_cast<f64_register>(_mm256_cvtps_pd(_mm256_extractf128_ps(high, 1)));
#else
  float lanes[16];
  x.store(lanes);
  result.low = widen_f32x8(lanes);
  result.high = widen_f32x8(lanes + 8);
#endif
  return result;
}

// 16 doubles rounded to floats, as the current rounding mode says.
LL_INLINE f32x16 narrow(const Widened& x) {
  f32x16 result;
#if defined(__AVX512F__)
  const __m256 low = _mm512_cvtpd_ps(reinterpret_cast<__m512d>(x.low.part[0]));
  const __m256 high = _mm512_cvtpd_ps(reinterpret_cast<__m512d>(x.high.part[0]));
  result.part[0] = reinterpret_cast<f32_register>(_mm512_insertf32x8(_mm512_castps256_ps512(low), high, 1));
#elif defined(__AVX2__)
  const auto join = [](const f64x8& half) __attribute__((always_inline)) {
    return reinterpret_cast<f32_register>(_mm256_set_m128(_mm256_cvtpd_ps(reinterpret_cast<__m256d>(half.part[1])),
                                                          _mm256_cvtpd_ps(reinterpret_cast<__m256d>(half.part[0]))));
  };
  result.part[0] = join(x.low);
  result.part[1] = join(x.high);
#else
  double wide[16];
  float lanes[16];
  x.low.store(wide);
  x.high.store(wide + 8);
  for (int i = 0; i < 16; ++i) lanes[i] = static_cast<float>(wide[i]);
  result = f32x16::load(lanes);
#endif
  return result;
}

// A fixed tree over the 8 lanes.
LL_INLINE double sum_of_lanes(const f64x8& x) {
  double lane[8];
  x.store(lane);
  return ((lane[0] + lane[4]) + (lane[2] + lane[6])) + ((lane[1] + lane[5]) + (lane[3] + lane[7]));
}

LL_INLINE float largest_magnitude(const i32x16& bits) {
  int32_t lane[16], top = 0;
  bits.store(lane);
  for (int i = 0; i < 16; ++i) top = lane[i] > top ? lane[i] : top;
  float result;
  __builtin_memcpy(&result, &top, sizeof result);
  return result;
}
LL_INLINE double largest_magnitude(const i64x8& bits) {
  int64_t lane[8], top = 0;
  bits.store(lane);
  for (int i = 0; i < 8; ++i) top = lane[i] > top ? lane[i] : top;
  double result;
  __builtin_memcpy(&result, &top, sizeof result);
  return result;
}

// --- 16-bit floats -------------------------------------------------------------------------------------------------

// 32 bfloat16: the even-numbered elements in one vector, the odd-numbered in the other (a shift and a mask).
LL_INLINE void load_bf16x32(const uint16_t* x, f32x16& even, f32x16& odd) {
  const i32x16 words = i32x16::load(x);
  i32x16 low, high;
  for (int p = 0; p < parts; ++p) {
    low.part[p] = words.part[p] << 16;
    high.part[p] = words.part[p] & static_cast<int32_t>(0xffff0000u);
  }
  even = bits_of<f32x16>(low);
  odd = bits_of<f32x16>(high);
}

// 16 bfloat16 in their order.
LL_INLINE f32x16 load_bf16x16(const uint16_t* x) {
  i32x16 words;
#if defined(__AVX512F__)
  words.part[0] =
      reinterpret_cast<i32_register>(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x))));
#elif defined(__AVX2__)
  for (int p = 0; p < parts; ++p) {
    words.part[p] = reinterpret_cast<i32_register>(
        _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x + 8 * p))));
  }
#else
  uint16_t halves[16];
  int32_t wide[16];
  __builtin_memcpy(halves, x, sizeof halves);
  for (int i = 0; i < 16; ++i) wide[i] = halves[i];
  words = i32x16::load(wide);
#endif
  for (int p = 0; p < parts; ++p) words.part[p] <<= 16;
  return bits_of<f32x16>(words);
}

#if !defined(__F16C__)
// IEEE binary16 to binary32 without the instruction. Exponent and mantissa are moved into a float that is 2^112 too
// small (a subnormal float when the half is subnormal) and scaled; infinity and NaN get their exponent back by hand.
LL_INLINE float half_to_float(uint16_t half) {
  const uint32_t magnitude_bits = static_cast<uint32_t>(half & 0x7fff) << 13;
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000) << 16;
  float scaled;
  __builtin_memcpy(&scaled, &magnitude_bits, sizeof scaled);
  scaled *= 0x1p112f;
  uint32_t bits;
  __builtin_memcpy(&bits, &scaled, sizeof bits);
  if (magnitude_bits >= (0x7c00u << 13)) bits = magnitude_bits | 0x7f800000u;
  bits |= sign;
  __builtin_memcpy(&scaled, &bits, sizeof scaled);
  return scaled;
}
#endif

LL_INLINE f32x16 load_f16x16(const uint16_t* x) {
  f32x16 result;
#if defined(__AVX512F__)
  result.part[0] =
      reinterpret_cast<f32_register>(_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x))));
#elif defined(__AVX2__)
  for (int p = 0; p < parts; ++p) {
    result.part[p] =
        reinterpret_cast<f32_register>(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x + 8 * p))));
  }
#else
  uint16_t halves[16];
  float floats[16];
  __builtin_memcpy(halves, x, sizeof halves);
  for (int i = 0; i < 16; ++i) floats[i] = half_to_float(halves[i]);
  result = f32x16::load(floats);
#endif
  return result;
}

}  // namespace
}  // namespace layerlens
