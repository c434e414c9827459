// One machine register of Scalars at a time, for kernels that live from the FMA units. Their results may differ between
// instruction sets; where they must not, use lanes.hpp.
#pragma once

#include "common/lanes.hpp"

namespace layerlens {
namespace {

template <class Scalar>
struct RegisterOf;
template <>
struct RegisterOf<float> {
  using Type = f32_register;
  using Index = i32_register;
};
template <>
struct RegisterOf<double> {
  using Type = f64_register;
  using Index = i64_register;
};

template <class Scalar>
using Register = typename RegisterOf<Scalar>::Type;

template <class Scalar>
constexpr int width = register_bytes / static_cast<int>(sizeof(Scalar));

template <class Scalar>
LL_INLINE Register<Scalar> load(const Scalar* x) {
  Register<Scalar> result;
  __builtin_memcpy(&result, x, sizeof result);
  return result;
}

// x in every lane: x - 0 is x, so what the compiler leaves is a broadcasting load. {} + x must turn -0 into +0, and so
// becomes an addition and a shuffle on the two ports that the multiply-adds need.
template <class Scalar>
LL_INLINE Register<Scalar> broadcast(const Scalar* x) {
  return *x - Register<Scalar>{};
}

// a * b + c in one rounding where the machine can (the build forbids the compiler to contract by itself).
LL_INLINE f32_register fused(f32_register a, f32_register b, f32_register c) {
#if defined(__AVX512F__)
  return reinterpret_cast<f32_register>(
      _mm512_fmadd_ps(reinterpret_cast<__m512>(a), reinterpret_cast<__m512>(b), reinterpret_cast<__m512>(c)));
#elif defined(__AVX2__)
  return reinterpret_cast<f32_register>(
      _mm256_fmadd_ps(reinterpret_cast<__m256>(a), reinterpret_cast<__m256>(b), reinterpret_cast<__m256>(c)));
#else
  return a * b + c;
#endif
}
LL_INLINE f64_register fused(f64_register a, f64_register b, f64_register c) {
#if defined(__AVX512F__)
  return reinterpret_cast<f64_register>(
      _mm512_fmadd_pd(reinterpret_cast<__m512d>(a), reinterpret_cast<__m512d>(b), reinterpret_cast<__m512d>(c)));
#elif defined(__AVX2__)
  return reinterpret_cast<f64_register>(
      _mm256_fmadd_pd(reinterpret_cast<__m256d>(a), reinterpret_cast<__m256d>(b), reinterpret_cast<__m256d>(c)));
#else
  return a * b + c;
#endif
}

// The lower and the upper half of the lanes as doubles.
LL_INLINE f64_register widen_low(f32_register x) {
#if defined(__AVX512F__)
  return reinterpret_cast<f64_register>(_mm512_cvtps_pd(_mm512_castps512_ps256(reinterpret_cast<__m512>(x))));
#elif defined(__AVX2__)
  return reinterpret_cast<f64_register>(_mm256_cvtps_pd(_mm256_castps256_ps128(reinterpret_cast<__m256>(x))));
#else
  return f64_register{static_cast<double>(x[0]), static_cast<double>(x[1])};
#endif
}
LL_INLINE f64_register widen_high(f32_register x) {
#if defined(__AVX512F__)
  return reinterpret_cast<f64_register>(_mm512_cvtps_pd(_mm512_extractf32x8_ps(reinterpret_cast<__m512>(x), 1)));
#elif defined(__AVX2__)
  return reinterpret_cast<f64_register>(_mm256_cvtps_pd(_mm256_extractf128_ps(reinterpret_cast<__m256>(x), 1)));
#else
  return f64_register{static_cast<double>(x[2]), static_cast<double>(x[3])};
#endif
}

// The sums over the lanes of `width` registers, one per lane of the result: a tree of width - 1 steps, each of which
// adds the halves of the segments of two registers and puts them side by side.
template <class Scalar, int segment>
LL_INLINE Register<Scalar> side_by_side(Register<Scalar> a, Register<Scalar> b) {
  constexpr int lanes = width<Scalar>, half = segment / 2;
  typename RegisterOf<Scalar>::Index low, high;
  for (int i = 0; i < lanes; ++i) {
    const int which = i / half, at = i % half;  // which segment of a (then of b), which lane of its half
    low[i] = which * segment + at;              // indices from `lanes` on count into b
    high[i] = which * segment + half + at;
  }
  return __builtin_shuffle(a, b, low) + __builtin_shuffle(a, b, high);
}

template <class Scalar, int segment>
LL_INLINE Register<Scalar> sums_of_lanes(Register<Scalar>* x) {
  if constexpr (segment == 1) {
    return x[0];
  } else {
    constexpr int results = segment / 2;
    Register<Scalar> joined[results];
    for (int i = 0; i < results; ++i) joined[i] = side_by_side<Scalar, segment>(x[2 * i], x[2 * i + 1]);
    return sums_of_lanes<Scalar, segment / 2>(joined);
  }
}

}  // namespace
}  // namespace layerlens
