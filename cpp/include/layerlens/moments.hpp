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
#include <cstdint>

#include "layerlens/arrays.hpp"
#include "layerlens/dispatch.hpp"

namespace layerlens {

constexpr std::ptrdiff_t moments_chunk = 32768;
constexpr std::ptrdiff_t moments_flush = 8;

// Where results go, one value per row or array. Null pointers are skipped.
struct StatisticsOut {
  double* sum;
  double* sum_of_squares;
  double* max_abs;           // exact; NaN if there is a NaN, 0 if there is no element
  std::int64_t* non_finite;  // how many NaN and infinities
  std::int64_t* zeros;       // how many +0 and -0
};

// All five for every row of x, in one read. May throw std::bad_alloc, as all of these.
void row_statistics(Isa isa, const MatrixView& x, const StatisticsOut& out, int threads);

// out: [rows]; bitwise what row_statistics gives as sum_of_squares, faster.
void row_sum_of_squares(Isa isa, const MatrixView& x, double* out, int threads);

// Ragged forms: one value per array, of any number of arrays in one call. Array a is made of the matrices
// pieces[starts[a]] to pieces[starts[a + 1] - 1]; the sums of its rows are joined by the same tree as chunks are.
void array_statistics(Isa isa, const MatrixView* pieces, const std::ptrdiff_t* starts, std::ptrdiff_t arrays,
                      const StatisticsOut& out, int threads);
void array_sum_of_squares(Isa isa, const MatrixView* pieces, const std::ptrdiff_t* starts, std::ptrdiff_t arrays,
                          double* out, int threads);

}  // namespace layerlens
