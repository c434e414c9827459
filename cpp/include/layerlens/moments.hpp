// Sums over the rows of a matrix, in one read, accurate and reproducible.
//
// A row is cut into chunks of `moments_chunk` elements. Inside a chunk element i goes to virtual lane i mod 64 (i mod 32
// for f64), whatever the width of the machine's registers; f32 lanes hold at most `moments_flush` terms before they are
// folded into f64 ones; the chunks of a row are added by a fixed binary tree. The order of the operations is therefore
// a function of the shape alone, and results are bitwise equal for every thread count and instruction set.
//
// Relative error of a sum of squares (and of a sum, relative to the sum of |x|), with u = 2^-24 for f32, bf16 and f16
// input: one rounding for the square, `moments_flush` - 1 for the lane, 2 for folding 64 lanes to 16, so at most
// (moments_flush + 2) u = 6e-7, whatever the length; f64 input: chunk / 32 + 60 roundings of 2^-53 at most.
// A chunk whose squares leave the range of f32 is done again in f64, where a product of two f32 is exact.
#pragma once

#include <cstddef>

#include "layerlens/arrays.hpp"
#include "layerlens/dispatch.hpp"

namespace layerlens {

constexpr std::ptrdiff_t moments_chunk = 32768;
constexpr std::ptrdiff_t moments_flush = 8;

// sum, sum_of_squares, max_abs: [rows] each. max_abs is NaN if the row holds a NaN, and 0 if it is empty.
// May throw std::bad_alloc.
void row_moments(Isa isa, const MatrixView& x, double* sum, double* sum_of_squares, double* max_abs, int threads);

// out: [rows]; bitwise what row_moments gives as sum_of_squares. May throw std::bad_alloc.
void row_sum_of_squares(Isa isa, const MatrixView& x, double* out, int threads);

// The sum of squares of the whole matrix: the rows' sums, joined by tree_sum. May throw std::bad_alloc.
double sum_of_squares(Isa isa, const MatrixView& x, int threads);

// The sum of n values by the fixed binary tree that joins chunks and rows; overwrites them. 0 if n is 0.
double tree_sum(double* values, std::ptrdiff_t n) noexcept;

}  // namespace layerlens
