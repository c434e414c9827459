#include "layerlens/fisher.hpp"

#include <algorithm>
#include <vector>

#include "common/chunks.hpp"
#include "common/reading.hpp"
#include "fisher/fisher_isa.hpp"
#include "layerlens/moments.hpp"

namespace layerlens {
namespace {

// The same roundings as in add_few_rows.
template <class Sum>
void add_scaled(const double* squares, std::ptrdiff_t cols, double scale, Sum* out) {
  for (std::ptrdiff_t c = 0; c < cols; ++c) out[c] += static_cast<Sum>(scale * squares[c]);
}

}  // namespace

double fisher_trace(Isa isa, const MatrixView& g, int threads) {
  const std::ptrdiff_t starts[] = {0, 1};
  double total = 0.0;
  array_sum_of_squares(isa, &g, starts, 1, &total, threads);
  return total / static_cast<double>(g.rows);
}

void add_column_sum_of_squares(Isa isa, const MatrixView& g, double scale, DType out_type, void* out, int threads) {
  auto add_tile_squares = add_tile_squares_scalar;
  auto add_few_rows = add_few_rows_scalar;
#ifdef LAYERLENS_X86
  if (isa == Isa::avx2) {
    add_tile_squares = add_tile_squares_avx2;
    add_few_rows = add_few_rows_avx2;
  }
  if (isa == Isa::avx512) {
    add_tile_squares = add_tile_squares_avx512;
    add_few_rows = add_few_rows_avx512;
  }
#endif
  const std::ptrdiff_t tiles = (g.cols + fisher_tile - 1) / fisher_tile, size = item_size(g.dtype);
  const std::ptrdiff_t column_bytes = g.rows * size + item_size(out_type);
  const int workers = threads_for(column_bytes * g.cols, tiles, threads);
  const bool gather = g.col_stride != size;
  const std::size_t gather_bytes = gather ? fisher_few * fisher_tile * size : 0;
  unsigned char* scratch = thread_scratch(gather_bytes * workers);
  std::vector<ReadingTrial> trials(workers, ReadingTrial(column_bytes * g.cols, workers));

  for_each_task(tiles, workers, [&](std::ptrdiff_t tile, int worker) {
    const std::ptrdiff_t begin = tile * fisher_tile, cols = std::min(fisher_tile, g.cols - begin);
    const void* from = static_cast<const unsigned char*>(g.data) + begin * size;
    void* out_tile = static_cast<unsigned char*>(out) + begin * item_size(out_type);
    if (!gather && g.rows <= fisher_few) {
      const Reading reading = trials[worker].next(column_bytes * cols);
      add_few_rows(reading, g.dtype, from, g.row_stride, g.rows, cols, scale, out_type, out_tile);
      return;
    }
    double squares[fisher_tile] = {};
    if (!gather) {
      add_tile_squares(g.dtype, from, g.row_stride, g.rows, cols, squares);
    } else {
      unsigned char* block = scratch + gather_bytes * worker;
      for (std::ptrdiff_t n = 0; n < g.rows; n += fisher_few) {
        const std::ptrdiff_t rows = std::min(fisher_few, g.rows - n);
        for (std::ptrdiff_t row = 0; row < rows; ++row) {
          unsigned char* to = block + row * fisher_tile * size;
          const void* row_from = contiguous_run(g, n + row, begin, cols, to);
          if (row_from != to) std::memcpy(to, row_from, cols * size);
        }
        add_tile_squares(g.dtype, block, fisher_tile * size, rows, cols, squares);
      }
    }
    if (out_type == DType::f32) add_scaled(squares, cols, scale, static_cast<float*>(out_tile));
    else add_scaled(squares, cols, scale, static_cast<double*>(out_tile));
  });
}

}  // namespace layerlens
