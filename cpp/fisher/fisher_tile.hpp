// Column sums of squares on virtual lanes; included once per instruction set.
#pragma once

#include "common/lanes.hpp"
#include "fisher/fisher_isa.hpp"

namespace layerlens {
namespace {

// 16 consecutive elements as doubles.
struct WidenF32 {
    using Element = float;
    static LL_INLINE Widened load(const Element* x) { return {widen_f32x8(x), widen_f32x8(x + 8)}; }
};
struct WidenF64 {
    using Element = double;
    static LL_INLINE Widened load(const Element* x) { return {f64x8::load(x), f64x8::load(x + 8)}; }
};
struct WidenBF16 {
    using Element = uint16_t;
    static LL_INLINE Widened load(const Element* x) { return widen(load_bf16x16(x)); }
};
struct WidenF16 {
    using Element = uint16_t;
    static LL_INLINE Widened load(const Element* x) { return widen(load_f16x16(x)); }
};

// Rows taken together, so that a tile's sums are loaded and stored once for so many samples.
constexpr int rows_together = 8;

template <class Load, int rows>
LL_INLINE void add_rows(const unsigned char* x, ptrdiff_t row_stride, ptrdiff_t cols, double* squares) {
    using Element = typename Load::Element;
    const auto add = [&](ptrdiff_t c, auto element_at) __attribute__((always_inline)) {
        f64x8 low = f64x8::load(squares + c), high = f64x8::load(squares + c + 8);
        for (int n = 0; n < rows; ++n) {
            const Widened g = Load::load(element_at(n));
            low += g.low * g.low;
            high += g.high * g.high;
        }
        low.store(squares + c);
        high.store(squares + c + 8);
    };
    ptrdiff_t c = 0;
    for (; c + 16 <= cols; c += 16) {
        add(c, [&](int n) __attribute__((always_inline)) {
            return reinterpret_cast<const Element*>(x + n * row_stride) + c;
        });
    }
    if (c < cols) {
        Element padded[rows][16] = {};
        for (int n = 0; n < rows; ++n) {
            __builtin_memcpy(padded[n], x + n * row_stride + c * static_cast<ptrdiff_t>(sizeof(Element)),
                             static_cast<size_t>(cols - c) * sizeof(Element));
        }
        add(c, [&](int n) __attribute__((always_inline)) { return &padded[n][0]; });
    }
}

template <class Load>
LL_INLINE void add_tile(const void* data, ptrdiff_t row_stride, ptrdiff_t rows, ptrdiff_t cols, double* squares) {
    const unsigned char* x = static_cast<const unsigned char*>(data);
    ptrdiff_t n = 0;
    for (; n + rows_together <= rows; n += rows_together) {
        add_rows<Load, rows_together>(x + n * row_stride, row_stride, cols, squares);
    }
    for (; n < rows; ++n) add_rows<Load, 1>(x + n * row_stride, row_stride, cols, squares);
}

LL_INLINE void add_tile(DType dtype, const void* x, ptrdiff_t row_stride, ptrdiff_t rows, ptrdiff_t cols,
                        double* squares) {
    switch (dtype) {
        case DType::f64: return add_tile<WidenF64>(x, row_stride, rows, cols, squares);
        case DType::bf16: return add_tile<WidenBF16>(x, row_stride, rows, cols, squares);
        case DType::f16: return add_tile<WidenF16>(x, row_stride, rows, cols, squares);
        default: return add_tile<WidenF32>(x, row_stride, rows, cols, squares);
    }
}

}  // namespace
}  // namespace layerlens

#define LAYERLENS_DEFINE_FISHER(isa)                                                                          \
    namespace layerlens {                                                                                     \
    void add_tile_squares_##isa(DType dtype, const void* x, std::ptrdiff_t row_stride, std::ptrdiff_t rows,   \
                                std::ptrdiff_t cols, double* squares) noexcept {                              \
        add_tile(dtype, x, row_stride, rows, cols, squares);                                                  \
    }                                                                                                         \
    }
