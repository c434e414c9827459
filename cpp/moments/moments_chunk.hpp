// The moments of one chunk on virtual lanes; included once per instruction set. See layerlens/moments.hpp for the
// order of operations and the error bound.
#pragma once

#include "layerlens/moments.hpp"
#include "moments/moments_isa.hpp"
#include "common/lanes.hpp"

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

template <class Bits>
LL_INLINE Bits fold_larger(const Bits (&v)[4]) {
    return larger(larger(v[0], v[1]), larger(v[2], v[3]));
}

// Below this a chunk may owe more than 2^-30 of its value to squares that were rounded as subnormals: at most
// 32768 * 2^-126 even when the processor flushes them to zero.
constexpr double trusted_minimum = 0x1p-80;

LL_INLINE bool in_range_of_f32(double sum_of_squares) {
    return sum_of_squares >= trusted_minimum && sum_of_squares <= 0x1p1000;
}

// `full` says whether sum and max_abs are wanted too; without it they stay 0.
template <class Load, bool full>
struct Chunk {
    using Element = typename Load::Element;

    // Lanes of f64 from lanes of f32, flushed every moments_flush steps.
    static LL_INLINE Moments fast(const Element* x, ptrdiff_t n) {
        f64x8 square_low = f64x8::zero(), square_high = f64x8::zero();
        f64x8 sum_low = f64x8::zero(), sum_high = f64x8::zero();
        i32x16 top[4] = {i32x16::zero(), i32x16::zero(), i32x16::zero(), i32x16::zero()};
        f32x16 square_f32[4], sum_f32[4];

        const auto start = [&] {
            for (int g = 0; g < 4; ++g) square_f32[g] = f32x16::zero();
            if (full) {
                for (int g = 0; g < 4; ++g) sum_f32[g] = f32x16::zero();
            }
        };
        const auto step = [&](const Element* at) __attribute__((always_inline)) {
            f32x16 v[4];
            Load::step(at, v);
            for (int g = 0; g < 4; ++g) {
                square_f32[g] += v[g] * v[g];
                if (full) {
                    sum_f32[g] += v[g];
                    top[g] = larger(top[g], magnitude(v[g]));
                }
            }
        };
        const auto flush = [&]() __attribute__((always_inline)) {
            const Widened squares = widen(fold(square_f32));
            square_low += squares.low;
            square_high += squares.high;
            if (full) {
                const Widened sums = widen(fold(sum_f32));
                sum_low += sums.low;
                sum_high += sums.high;
            }
        };

        ptrdiff_t i = 0;
        for (; i + 64 * moments_flush <= n; i += 64 * moments_flush) {
            start();
            for (int k = 0; k < moments_flush; ++k) step(x + i + 64 * k);
            flush();
        }
        if (i < n) {
            start();
            for (; i + 64 <= n; i += 64) step(x + i);
            if (i < n) {
                Element padded[64] = {};
                __builtin_memcpy(padded, x + i, static_cast<size_t>(n - i) * sizeof(Element));
                step(padded);
            }
            flush();
        }
        return {sum_of_lanes(sum_low + sum_high), sum_of_lanes(square_low + square_high),
                full ? static_cast<double>(largest_magnitude(fold_larger(top))) : 0.0};
    }

    // Everything in f64, where the square of an f32 is exact: for chunks outside the range of f32.
    static __attribute__((noinline)) Moments wide(const Element* x, ptrdiff_t n) {
        f64x8 square[2] = {f64x8::zero(), f64x8::zero()}, sum[2] = {f64x8::zero(), f64x8::zero()};
        i32x16 top = i32x16::zero();
        for (ptrdiff_t i = 0; i < n; i += 64) {
            f32x16 v[4];
            if (i + 64 <= n) {
                Load::step(x + i, v);
            } else {
                Element padded[64] = {};
                __builtin_memcpy(padded, x + i, static_cast<size_t>(n - i) * sizeof(Element));
                Load::step(padded, v);
            }
            for (int g = 0; g < 4; ++g) {
                const Widened w = widen(v[g]);
                square[0] += w.low * w.low;
                square[1] += w.high * w.high;
                if (full) {
                    sum[0] += w.low;
                    sum[1] += w.high;
                    top = larger(top, magnitude(v[g]));
                }
            }
        }
        return {sum_of_lanes(sum[0] + sum[1]), sum_of_lanes(square[0] + square[1]),
                full ? static_cast<double>(largest_magnitude(top)) : 0.0};
    }

    static LL_INLINE Moments of(const void* data, ptrdiff_t n) {
        const Element* x = static_cast<const Element*>(data);
        const Moments result = fast(x, n);
        return in_range_of_f32(result.sum_of_squares) ? result : wide(x, n);
    }
};

template <bool full>
LL_INLINE Moments chunk_f64(const void* data, ptrdiff_t n) {
    const double* x = static_cast<const double*>(data);
    f64x8 square[4] = {f64x8::zero(), f64x8::zero(), f64x8::zero(), f64x8::zero()};
    f64x8 sum[4] = {f64x8::zero(), f64x8::zero(), f64x8::zero(), f64x8::zero()};
    i64x8 top[4] = {i64x8::zero(), i64x8::zero(), i64x8::zero(), i64x8::zero()};
    const auto step = [&](const double* at) __attribute__((always_inline)) {
        for (int g = 0; g < 4; ++g) {
            const f64x8 v = f64x8::load(at + 8 * g);
            square[g] += v * v;
            if (full) {
                sum[g] += v;
                top[g] = larger(top[g], magnitude(v));
            }
        }
    };
    ptrdiff_t i = 0;
    for (; i + 32 <= n; i += 32) step(x + i);
    if (i < n) {
        double padded[32] = {};
        __builtin_memcpy(padded, x + i, static_cast<size_t>(n - i) * sizeof(double));
        step(padded);
    }
    return {sum_of_lanes(fold(sum)), sum_of_lanes(fold(square)), full ? largest_magnitude(fold_larger(top)) : 0.0};
}

// Which NaN an operation returns depends on operand order, so on the compiler: always return the same one.
LL_INLINE double canonical(double x) { return x == x ? x : __builtin_nan(""); }

template <bool full>
LL_INLINE Moments chunk(DType dtype, const void* x, ptrdiff_t n) {
    Moments result;
    switch (dtype) {
        case DType::f64: result = chunk_f64<full>(x, n); break;
        case DType::bf16: result = Chunk<LoadBF16, full>::of(x, n); break;
        case DType::f16: result = Chunk<LoadF16, full>::of(x, n); break;
        default: result = Chunk<LoadF32, full>::of(x, n); break;
    }
    return {canonical(result.sum), canonical(result.sum_of_squares), canonical(result.max_abs)};
}

}  // namespace
}  // namespace layerlens

#define LAYERLENS_DEFINE_MOMENTS(isa)                                                             \
    namespace layerlens {                                                                         \
    Moments chunk_moments_##isa(DType dtype, const void* x, std::ptrdiff_t n) noexcept {          \
        return chunk<true>(dtype, x, n);                                                          \
    }                                                                                             \
    double chunk_sum_of_squares_##isa(DType dtype, const void* x, std::ptrdiff_t n) noexcept {    \
        return chunk<false>(dtype, x, n).sum_of_squares;                                          \
    }                                                                                             \
    }
