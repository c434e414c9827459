// The statistics of one contiguous chunk: the functions that exist once per instruction set.
#pragma once

#include <cstddef>
#include <cstdint>

#include "common/readings.hpp"
#include "layerlens/arrays.hpp"

namespace layerlens {

struct Statistics {
  double sum;
  double sum_of_squares;
  double max_abs;
  std::int64_t non_finite;
  std::int64_t zeros;
};

// x: n contiguous elements of any alignment, 0 <= n <= moments_chunk. The same bits for every reading.
#define LAYERLENS_DECLARE_MOMENTS(isa)                                                                       \
  Statistics chunk_statistics_##isa(Reading reading, DType dtype, const void* x, std::ptrdiff_t n) noexcept; \
  double chunk_sum_of_squares_##isa(Reading reading, DType dtype, const void* x, std::ptrdiff_t n) noexcept;

LAYERLENS_DECLARE_MOMENTS(scalar)
LAYERLENS_DECLARE_MOMENTS(avx2)
LAYERLENS_DECLARE_MOMENTS(avx512)

#undef LAYERLENS_DECLARE_MOMENTS

}  // namespace layerlens
