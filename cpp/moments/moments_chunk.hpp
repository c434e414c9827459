// The statistics of one chunk on virtual lanes; included once per instruction set. See layerlens/moments.hpp for the
// order of operations and the error bound.
#pragma once

#include "common/lanes.hpp"
#include "layerlens/moments.hpp"
#include "moments/moments_isa.hpp"

namespace layerlens {
namespace {

// How 64 consecutive elements (32 for f64) become four vectors. The order inside the step differs between types (bf16
// splits even from odd); only its being fixed matters.
struct LoadF32 {
  using Element = float;
  static LL_INLINE void step(const Element* x, f32x16 (&v)[4]) {
    for (int g = 0; g < 4; ++g) v[g] = f32x16::load(x + 16 * g);
  }
};
struct LoadBF16 {
  using Element = uint16_t;
  static LL_INLINE void step(const Element* x, f32x16 (&v)[4]) {
    load_bf16x32(x, v[0], v[1]);
    load_bf16x32(x + 32, v[2], v[3]);
  }
};
struct LoadF16 {
  using Element = uint16_t;
  static LL_INLINE void step(const Element* x, f32x16 (&v)[4]) {
    for (int g = 0; g < 4; ++g) v[g] = load_f16x16(x + 16 * g);
  }
};

template <class Vector>
LL_INLINE Vector fold(const Vector (&v)[4]) {
  return (v[0] + v[1]) + (v[2] + v[3]);
}

// Below this a chunk may owe more than 2^-30 of its value to squares that were rounded as subnormals: at most
// 32768 * 2^-126 even when the processor flushes them to zero.
constexpr double trusted_minimum = 0x1p-80;

LL_INLINE bool in_range_of_f32(double sum_of_squares) {
  return sum_of_squares >= trusted_minimum && sum_of_squares <= 0x1p1000;
}

// What is read off the bits: the largest magnitude, NaN and infinities, zeros. Exact in every order.
template <class Bits, class Integer>
struct BitCounts {
  Bits top[4], not_finite[4], zero[4];

  LL_INLINE BitCounts() {
    for (int g = 0; g < 4; ++g) top[g] = not_finite[g] = zero[g] = Bits::zero();
  }
  template <class Vector>
  LL_INLINE void add(int g, const Vector& v, Integer infinity) {
    const Bits bits = magnitude(v);
    top[g] = larger(top[g], bits);
    // Comparisons are -1 where true.
    for (int p = 0; p < parts; ++p) {
      not_finite[g].part[p] -= bits.part[p] >= infinity;
      zero[g].part[p] -= bits.part[p] == 0;
    }
  }
  static LL_INLINE int64_t total(const Bits (&counts)[4]) {
    Integer lane[64 / sizeof(Integer)];
    ((counts[0] + counts[1]) + (counts[2] + counts[3])).store(lane);
    int64_t sum = 0;
    for (Integer count : lane) sum += count;
    return sum;
  }
  // Fills the exact part of `result`; `padding` zeros were added to complete the last step.
  LL_INLINE void finish(Statistics& result, ptrdiff_t padding) const {
    result.max_abs = largest_magnitude(larger(larger(top[0], top[1]), larger(top[2], top[3])));
    result.non_finite = total(not_finite);
    result.zeros = total(zero) - padding;
  }
};

// Cuts n elements into groups of `steps` steps of `width` elements and calls group(x, count, last) on each: `count`
// whole steps from x, then one on `last` if it is not null: the last elements, completed with zeros. Returns how many
// zeros were added.
template <int width, int steps, class Element, class Group>
LL_INLINE ptrdiff_t in_groups(const Element* x, ptrdiff_t n, const Group& group) {
  const Element* const end = x + n;
  for (; end - x >= width * steps; x += width * steps) group(x, steps, nullptr);
  const int whole = static_cast<int>((end - x) / width);
  const ptrdiff_t rest = end - x - whole * width;
  if (rest > 0) {
    Element padded[width] = {};
    __builtin_memcpy(padded, x + whole * width, static_cast<size_t>(rest) * sizeof(Element));
    group(x, whole, padded);
    return width - rest;
  }
  if (whole > 0) group(x, whole, nullptr);
  return 0;
}

// `full` says whether all statistics are wanted, or the sum of squares only (the others stay 0).
template <class Load, bool full>
struct Chunk {
  using Element = typename Load::Element;

  // Lanes of f64 from lanes of f32, flushed every moments_flush steps.
  template <Reading reading>
  static LL_INLINE Statistics fast(const Element* x, ptrdiff_t n) {
    f64x8 square_low = f64x8::zero(), square_high = f64x8::zero();
    f64x8 sum_low = f64x8::zero(), sum_high = f64x8::zero();
    BitCounts<i32x16, int32_t> counts;

    const auto group = [&](const Element* at, int count, const Element* last) __attribute__((always_inline)) {
      f32x16 square_f32[4], sum_f32[4];
      for (int g = 0; g < 4; ++g) square_f32[g] = sum_f32[g] = f32x16::zero();
      const auto step = [&](const Element* from) __attribute__((always_inline)) {
        f32x16 v[4];
        prefetch_ahead<reading, 64 * sizeof(Element)>(from);
        Load::step(from, v);
        for (int g = 0; g < 4; ++g) {
          square_f32[g] += v[g] * v[g];
          if (full) {
            sum_f32[g] += v[g];
            counts.add(g, v[g], 0x7f800000);
          }
        }
      };
// Unrolled in full, GCC 12 takes one lane group after the other and so reads the cache lines out of order.
#pragma GCC unroll 2
      for (int k = 0; k < count; ++k) step(at + 64 * k);
      if (last != nullptr) step(last);
      const Widened squares = widen(fold(square_f32));
      square_low += squares.low;
      square_high += squares.high;
      if (full) {
        const Widened sums = widen(fold(sum_f32));
        sum_low += sums.low;
        sum_high += sums.high;
      }
    };
    const ptrdiff_t padding = in_groups<64, moments_flush>(x, n, group);
    Statistics result = {sum_of_lanes(sum_low + sum_high), sum_of_lanes(square_low + square_high), 0.0, 0, 0};
    if (full) counts.finish(result, padding);
    return result;
  }

  // The sums in f64, where the square of an f32 is exact: for chunks outside the range of f32.
  static __attribute__((noinline)) void widen_sums(const Element* x, ptrdiff_t n, Statistics& result) {
    f64x8 square[2] = {f64x8::zero(), f64x8::zero()}, sum[2] = {f64x8::zero(), f64x8::zero()};
    const auto step = [&](const Element* at) __attribute__((always_inline)) {
      f32x16 v[4];
      Load::step(at, v);
      for (int g = 0; g < 4; ++g) {
        const Widened w = widen(v[g]);
        square[0] += w.low * w.low;
        square[1] += w.high * w.high;
        if (full) {
          sum[0] += w.low;
          sum[1] += w.high;
        }
      }
    };
    in_groups<64, 1>(x, n, [&](const Element* at, int count, const Element* last) __attribute__((always_inline)) {
      if (count > 0) step(at);
      if (last != nullptr) step(last);
    });
    result.sum = sum_of_lanes(sum[0] + sum[1]);
    result.sum_of_squares = sum_of_lanes(square[0] + square[1]);
  }

  template <Reading reading>
  static LL_INLINE Statistics of(const void* data, ptrdiff_t n) {
    const Element* x = static_cast<const Element*>(data);
    Statistics result = fast<reading>(x, n);
    if (!in_range_of_f32(result.sum_of_squares)) widen_sums(x, n, result);
    return result;
  }
};

template <bool full, Reading reading>
LL_INLINE Statistics chunk_f64(const void* data, ptrdiff_t n) {
  const double* x = static_cast<const double*>(data);
  f64x8 square[4] = {f64x8::zero(), f64x8::zero(), f64x8::zero(), f64x8::zero()};
  f64x8 sum[4] = {f64x8::zero(), f64x8::zero(), f64x8::zero(), f64x8::zero()};
  BitCounts<i64x8, int64_t> counts;
  const auto step = [&](const double* at) __attribute__((always_inline)) {
    prefetch_ahead<reading, 32 * sizeof(double)>(at);
    for (int g = 0; g < 4; ++g) {
      const f64x8 v = f64x8::load(at + 8 * g);
      square[g] += v * v;
      if (full) {
        sum[g] += v;
        counts.add(g, v, 0x7ff0000000000000);
      }
    }
  };
  const auto group = [&](const double* at, int count, const double* last) __attribute__((always_inline)) {
    if (count > 0) step(at);
    if (last != nullptr) step(last);
  };
  const ptrdiff_t padding = in_groups<32, 1>(x, n, group);
  Statistics result = {sum_of_lanes(fold(sum)), sum_of_lanes(fold(square)), 0.0, 0, 0};
  if (full) counts.finish(result, padding);
  return result;
}

// Which NaN an operation returns depends on operand order, so on the compiler: always return the same one.
LL_INLINE double canonical(double x) { return x == x ? x : __builtin_nan(""); }

template <bool full, Reading reading>
LL_INLINE Statistics chunk(DType dtype, const void* x, ptrdiff_t n) {
  Statistics result;
  switch (dtype) {
    case DType::f64:
      result = chunk_f64<full, reading>(x, n);
      break;
    case DType::bf16:
      result = Chunk<LoadBF16, full>::template of<reading>(x, n);
      break;
    case DType::f16:
      result = Chunk<LoadF16, full>::template of<reading>(x, n);
      break;
    default:
      result = Chunk<LoadF32, full>::template of<reading>(x, n);
      break;
  }
  result.sum = canonical(result.sum);
  result.sum_of_squares = canonical(result.sum_of_squares);
  result.max_abs = canonical(result.max_abs);
  return result;
}

template <bool full>
LL_INLINE Statistics chunk(Reading reading, DType dtype, const void* x, ptrdiff_t n) {
  switch (reading) {
    case Reading::hardware:
      return chunk<full, Reading::hardware>(dtype, x, n);
    case Reading::second_cache:
      return chunk<full, Reading::second_cache>(dtype, x, n);
    default:
      return chunk<full, Reading::page_ahead>(dtype, x, n);
  }
}

}  // namespace
}  // namespace layerlens

#define LAYERLENS_DEFINE_MOMENTS(isa)                                                                         \
  namespace layerlens {                                                                                       \
  Statistics chunk_statistics_##isa(Reading reading, DType dtype, const void* x, std::ptrdiff_t n) noexcept { \
    return chunk<true>(reading, dtype, x, n);                                                                 \
  }                                                                                                           \
  double chunk_sum_of_squares_##isa(Reading reading, DType dtype, const void* x, std::ptrdiff_t n) noexcept { \
    return chunk<false>(reading, dtype, x, n).sum_of_squares;                                                 \
  }                                                                                                           \
  }
