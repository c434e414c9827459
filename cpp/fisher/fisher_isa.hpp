// The diagonal Fisher of one tile of columns: the functions that exist once per instruction set.
#pragma once

#include <cstddef>

#include "common/readings.hpp"
#include "layerlens/arrays.hpp"

namespace layerlens {

// A tile's sums (8 KiB) stay in the first-level cache while the samples stream past.
constexpr std::ptrdiff_t fisher_tile = 1024;

// squares[c] += sum_n x[n, c]^2 for 0 <= c < cols <= fisher_tile. Columns are contiguous, row_stride is in bytes;
// `squares` has room for cols rounded up to 16 and its padding may be written.
//
// And, for at most `fisher_few` rows, out[c] += scale * sum_n x[n, c]^2 without a detour over `squares`: the same bits.
// `out` is f64 or f32; for f32 the scaled sum is rounded, then added in f32. The same bits for every reading.
constexpr std::ptrdiff_t fisher_few = 8;

#define LAYERLENS_DECLARE_FISHER(isa)                                                                                  \
  void add_tile_squares_##isa(DType dtype, const void* x, std::ptrdiff_t row_stride, std::ptrdiff_t rows,              \
                              std::ptrdiff_t cols, double* squares) noexcept;                                          \
  void add_few_rows_##isa(Reading reading, DType dtype, const void* x, std::ptrdiff_t row_stride, std::ptrdiff_t rows, \
                          std::ptrdiff_t cols, double scale, DType out_type, void* out) noexcept;

LAYERLENS_DECLARE_FISHER(scalar)
LAYERLENS_DECLARE_FISHER(avx2)
LAYERLENS_DECLARE_FISHER(avx512)

#undef LAYERLENS_DECLARE_FISHER

}  // namespace layerlens
