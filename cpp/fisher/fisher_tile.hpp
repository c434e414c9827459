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

// Sums of squares over rows, 16 columns at a time, starting from what `begin` gives; `end` takes them. `fixed` is the
// number of rows if the compiler shall know it, else 0.
template <class Load, int fixed, Reading reading, class Begin, class End>
LL_INLINE void over_columns(const void* data, ptrdiff_t row_stride, ptrdiff_t rows, ptrdiff_t cols, const Begin& begin,
                            const End& end) {
  using Element = typename Load::Element;
  const unsigned char* x = static_cast<const unsigned char*>(data);
  const ptrdiff_t count = fixed > 0 ? fixed : rows;
  const auto row = [&](ptrdiff_t n, ptrdiff_t c) __attribute__((always_inline)) {
    return reinterpret_cast<const Element*>(x + n * row_stride) + c;
  };
  const auto add = [](Widened& squares, const Widened& g) __attribute__((always_inline)) {
    squares.low += g.low * g.low;
    squares.high += g.high * g.high;
  };
  ptrdiff_t c = 0;
  for (; c + 16 <= cols; c += 16) {
    if (fixed == 1) prefetch_ahead<reading, 16 * sizeof(Element)>(row(0, c));
    Widened squares = begin(c, 16);
    for (ptrdiff_t n = 0; n < count; ++n) add(squares, Load::load(row(n, c)));
    end(c, 16, squares);
  }
  if (c < cols) {
    Widened squares = begin(c, cols - c);
    for (ptrdiff_t n = 0; n < count; ++n) {
      Element padded[16] = {};
      __builtin_memcpy(padded, row(n, c), static_cast<size_t>(cols - c) * sizeof(Element));
      add(squares, Load::load(padded));
    }
    end(c, cols - c, squares);
  }
}

template <class Load>
LL_INLINE void add_tile(const void* data, ptrdiff_t row_stride, ptrdiff_t rows, ptrdiff_t cols, double* squares) {
  const unsigned char* x = static_cast<const unsigned char*>(data);
  const auto begin = [&](ptrdiff_t c, ptrdiff_t) __attribute__((always_inline)) {
    return Widened{f64x8::load(squares + c), f64x8::load(squares + c + 8)};
  };
  const auto end = [&](ptrdiff_t c, ptrdiff_t, const Widened& sums) __attribute__((always_inline)) {
    sums.low.store(squares + c);
    sums.high.store(squares + c + 8);
  };
  constexpr Reading reading = Reading::hardware;  // so many rows are as many streams
  // Eight rows together, so that a tile's sums are loaded and stored once for so many samples.
  ptrdiff_t n = 0;
  for (; n + 8 <= rows; n += 8) over_columns<Load, 8, reading>(x + n * row_stride, row_stride, 8, cols, begin, end);
  if (n < rows) over_columns<Load, 0, reading>(x + n * row_stride, row_stride, rows - n, cols, begin, end);
}

// to[0..15] += x. Into floats x is rounded first: widening `to` instead cost a tenth of the speed of one sample.
LL_INLINE void add_to(float* to, const Widened& x) { (f32x16::load(to) + narrow(x)).store(to); }
LL_INLINE void add_to(double* to, const Widened& x) {
  (f64x8::load(to) + x.low).store(to);
  (f64x8::load(to + 8) + x.high).store(to + 8);
}

template <class Load, class Sum, Reading reading>
LL_INLINE void add_few(const void* x, ptrdiff_t row_stride, ptrdiff_t rows, ptrdiff_t cols, double scale, void* data) {
  Sum* out = static_cast<Sum*>(data);
  f64x8 factor;
  for (int p = 0; p < parts; ++p) factor.part[p] = f64_register{} + scale;
  const auto begin = [&](ptrdiff_t, ptrdiff_t)
                         __attribute__((always_inline)) { return Widened{f64x8::zero(), f64x8::zero()}; };
  const auto end = [&](ptrdiff_t c, ptrdiff_t width, const Widened& sums) __attribute__((always_inline)) {
    Sum padded[16] = {};
    Sum* to = out + c;
    prefetch_ahead<reading, 16 * sizeof(Sum), 1>(to);
    if (width < 16) {
      __builtin_memcpy(padded, to, static_cast<size_t>(width) * sizeof(Sum));
      to = padded;
    }
    add_to(to, Widened{factor * sums.low, factor * sums.high});
    if (width < 16) __builtin_memcpy(out + c, padded, static_cast<size_t>(width) * sizeof(Sum));
  };
  if (rows == 1) over_columns<Load, 1, reading>(x, row_stride, rows, cols, begin, end);
  else if (rows == 8) over_columns<Load, 8, reading>(x, row_stride, rows, cols, begin, end);
  else over_columns<Load, 0, reading>(x, row_stride, rows, cols, begin, end);
}

template <class Load, Reading reading>
LL_INLINE void add_few_to(DType out_type, const void* x, ptrdiff_t row_stride, ptrdiff_t rows, ptrdiff_t cols,
                          double scale, void* out) {
  if (out_type == DType::f32) add_few<Load, float, reading>(x, row_stride, rows, cols, scale, out);
  else add_few<Load, double, reading>(x, row_stride, rows, cols, scale, out);
}

template <class Load>
LL_INLINE void add_few_by(Reading reading, DType out_type, const void* x, ptrdiff_t row_stride, ptrdiff_t rows,
                          ptrdiff_t cols, double scale, void* out) {
  switch (reading) {
    case Reading::hardware:
      return add_few_to<Load, Reading::hardware>(out_type, x, row_stride, rows, cols, scale, out);
    case Reading::second_cache:
      return add_few_to<Load, Reading::second_cache>(out_type, x, row_stride, rows, cols, scale, out);
    default:
      return add_few_to<Load, Reading::page_ahead>(out_type, x, row_stride, rows, cols, scale, out);
  }
}

// Calls act(Load{}) with the reader of this type.
template <class Act>
LL_INLINE void with_reader(DType dtype, const Act& act) {
  switch (dtype) {
    case DType::f64:
      return act(WidenF64{});
    case DType::bf16:
      return act(WidenBF16{});
    case DType::f16:
      return act(WidenF16{});
    default:
      return act(WidenF32{});
  }
}

}  // namespace
}  // namespace layerlens

#define LAYERLENS_DEFINE_FISHER(isa)                                                                                   \
  namespace layerlens {                                                                                                \
  void add_tile_squares_##isa(DType dtype, const void* x, std::ptrdiff_t row_stride, std::ptrdiff_t rows,              \
                              std::ptrdiff_t cols, double* squares) noexcept {                                         \
    with_reader(dtype, [&](auto load) __attribute__((always_inline)) {                                                 \
      add_tile<decltype(load)>(x, row_stride, rows, cols, squares);                                                    \
    });                                                                                                                \
  }                                                                                                                    \
  void add_few_rows_##isa(Reading reading, DType dtype, const void* x, std::ptrdiff_t row_stride, std::ptrdiff_t rows, \
                          std::ptrdiff_t cols, double scale, DType out_type, void* out) noexcept {                     \
    with_reader(dtype, [&](auto load) __attribute__((always_inline)) {                                                 \
      add_few_by<decltype(load)>(reading, out_type, x, row_stride, rows, cols, scale, out);                            \
    });                                                                                                                \
  }                                                                                                                    \
  }
