// The arithmetic of the ghost forms on one sample (or pair) in contiguous memory: once per instruction set.
#pragma once

#include <cstddef>

#include "layerlens/arrays.hpp"

namespace layerlens {

// T rows of n contiguous values, `stride` values apart.
template <class Scalar>
struct Rows {
  const Scalar* data;
  std::ptrdiff_t stride, n;
};

// A sum over token pairs, and the largest squared norms of a token on either side (0 unless the two sides are the same
// sample): outside the range of f32 the sum cannot be trusted.
struct GramSum {
  double sum, largest_h, largest_d;
};

// The direct form reads d in panels of `tile_rows` features and h in panels of `tile_cols`: panel p holds, for each
// token, features p * width ... + width - 1, zeros beyond the last.
struct DirectTile {
  int rows, cols;
};

#define LAYERLENS_DECLARE_GHOST(isa)                                                                                 \
  DirectTile direct_tile_##isa(bool wide) noexcept;                                                                  \
  GramSum gram_f32_##isa(Rows<float> h, Rows<float> d, std::ptrdiff_t tokens) noexcept;                              \
  GramSum gram_f64_##isa(Rows<double> h, Rows<double> d, std::ptrdiff_t tokens) noexcept;                            \
  double cross_f32_##isa(Rows<float> h1, Rows<float> d1, Rows<float> h2, Rows<float> d2,                             \
                         std::ptrdiff_t tokens) noexcept;                                                            \
  double cross_f64_##isa(Rows<double> h1, Rows<double> d1, Rows<double> h2, Rows<double> d2,                         \
                         std::ptrdiff_t tokens) noexcept;                                                            \
  double direct_f32_##isa(const float* h_panels, const float* d_panels, std::ptrdiff_t d_in, std::ptrdiff_t d_out,   \
                          std::ptrdiff_t tokens) noexcept;                                                           \
  double direct_f64_##isa(const double* h_panels, const double* d_panels, std::ptrdiff_t d_in, std::ptrdiff_t d_out, \
                          std::ptrdiff_t tokens) noexcept;                                                           \
  void widen_row_##isa(DType dtype, const void* x, std::ptrdiff_t n, float* out) noexcept;

LAYERLENS_DECLARE_GHOST(scalar)
LAYERLENS_DECLARE_GHOST(avx2)
LAYERLENS_DECLARE_GHOST(avx512)

#undef LAYERLENS_DECLARE_GHOST

}  // namespace layerlens
