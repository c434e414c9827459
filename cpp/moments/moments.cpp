#include "layerlens/moments.hpp"

#include <algorithm>
#include <vector>

#include "common/chunks.hpp"
#include "common/reading.hpp"
#include "moments/moments_isa.hpp"

namespace layerlens {
namespace {

std::ptrdiff_t chunks_in_row(const MatrixView& x) {
  return std::max<std::ptrdiff_t>(1, (x.cols + moments_chunk - 1) / moments_chunk);
}

// Reduces every row of every piece: chunk_of(reading, dtype, x, n) on each of its chunks, then join(partials, count). Returns
// one Partial per row, the rows of all pieces one after another.
template <class Partial, class ChunkOf, class Join>
std::vector<Partial> reduce_rows(const MatrixView* pieces, std::ptrdiff_t count, int threads, const ChunkOf& chunk_of,
                                 const Join& join) {
  std::vector<std::ptrdiff_t> first_task(count + 1, 0);
  std::ptrdiff_t bytes = 0, rows = 0, gather_bytes = 0;
  for (std::ptrdiff_t p = 0; p < count; ++p) {
    const std::ptrdiff_t size = item_size(pieces[p].dtype);
    first_task[p + 1] = first_task[p] + pieces[p].rows * chunks_in_row(pieces[p]);
    rows += pieces[p].rows;
    bytes += pieces[p].rows * pieces[p].cols * size;
    if (pieces[p].col_stride != size) gather_bytes = std::max(gather_bytes, moments_chunk * size);
  }
  const std::ptrdiff_t tasks = first_task[count];
  const int workers = threads_for(bytes, tasks, threads);
  unsigned char* scratch = thread_scratch(static_cast<std::size_t>(gather_bytes) * workers);
  std::vector<Partial> partials(tasks);
  std::vector<ReadingTrial> trials(workers, ReadingTrial(bytes, workers));

  for_each_task(tasks, workers, [&](std::ptrdiff_t task, int worker) {
    const std::ptrdiff_t p =
        count == 1 ? 0 : std::upper_bound(first_task.begin(), first_task.end(), task) - first_task.begin() - 1;
    const MatrixView& x = pieces[p];
    const std::ptrdiff_t per_row = chunks_in_row(x), local = task - first_task[p];
    const std::ptrdiff_t row = local / per_row, begin = (local % per_row) * moments_chunk;
    const std::ptrdiff_t n = std::min(moments_chunk, x.cols - begin);
    const Reading reading = trials[worker].next(n * item_size(x.dtype));
    partials[task] = chunk_of(reading, x.dtype, contiguous_run(x, row, begin, n, scratch + gather_bytes * worker), n);
  });
  if (tasks == rows) return partials;  // one chunk per row

  std::vector<Partial> results;
  results.reserve(rows);
  for (std::ptrdiff_t p = 0; p < count; ++p) {
    const std::ptrdiff_t per_row = chunks_in_row(pieces[p]);
    for (std::ptrdiff_t row = 0; row < pieces[p].rows; ++row) {
      results.push_back(join(partials.data() + first_task[p] + row * per_row, per_row));
    }
  }
  return results;
}

// The fixed binary tree that joins chunks into rows and rows into arrays; overwrites the values.
template <class Partial, class Add>
Partial tree(Partial* values, std::ptrdiff_t n, const Add& add) {
  for (std::ptrdiff_t gap = 1; gap < n; gap *= 2) {
    for (std::ptrdiff_t i = 0; i + gap < n; i += 2 * gap) add(values[i], values[i + gap]);
  }
  return n > 0 ? values[0] : Partial{};
}

double join_sums(double* values, std::ptrdiff_t n) {
  return tree(values, n, [](double& a, double b) { a += b; });
}

Statistics join_statistics(Statistics* values, std::ptrdiff_t n) {
  return tree(values, n, [](Statistics& a, const Statistics& b) {
    a.sum += b.sum;
    a.sum_of_squares += b.sum_of_squares;
    a.max_abs = (a.max_abs != a.max_abs || a.max_abs > b.max_abs) ? a.max_abs : b.max_abs;  // NaN stays
    a.non_finite += b.non_finite;
    a.zeros += b.zeros;
  });
}

void write(const StatisticsOut& out, std::ptrdiff_t at, const Statistics& value) {
  if (out.sum) out.sum[at] = value.sum;
  if (out.sum_of_squares) out.sum_of_squares[at] = value.sum_of_squares;
  if (out.max_abs) out.max_abs[at] = value.max_abs;
  if (out.non_finite) out.non_finite[at] = value.non_finite;
  if (out.zeros) out.zeros[at] = value.zeros;
}

auto chunk_statistics(Isa isa) {
#ifdef LAYERLENS_X86
  if (isa == Isa::avx512) return chunk_statistics_avx512;
  if (isa == Isa::avx2) return chunk_statistics_avx2;
#endif
  return chunk_statistics_scalar;
}

auto chunk_sum_of_squares(Isa isa) {
#ifdef LAYERLENS_X86
  if (isa == Isa::avx512) return chunk_sum_of_squares_avx512;
  if (isa == Isa::avx2) return chunk_sum_of_squares_avx2;
#endif
  return chunk_sum_of_squares_scalar;
}

// Calls take(array, rows, count) with the rows' results of each array.
template <class Partial, class Take>
void for_each_array(const MatrixView* pieces, const std::ptrdiff_t* starts, std::ptrdiff_t arrays,
                    std::vector<Partial>& rows, const Take& take) {
  Partial* at = rows.data();
  for (std::ptrdiff_t a = 0; a < arrays; ++a) {
    std::ptrdiff_t count = 0;
    for (std::ptrdiff_t p = starts[a]; p < starts[a + 1]; ++p) count += pieces[p].rows;
    take(a, at, count);
    at += count;
  }
}

}  // namespace

void row_statistics(Isa isa, const MatrixView& x, const StatisticsOut& out, int threads) {
  const auto rows = reduce_rows<Statistics>(&x, 1, threads, chunk_statistics(isa), join_statistics);
  for (std::ptrdiff_t row = 0; row < x.rows; ++row) write(out, row, rows[row]);
}

void row_sum_of_squares(Isa isa, const MatrixView& x, double* out, int threads) {
  const auto rows = reduce_rows<double>(&x, 1, threads, chunk_sum_of_squares(isa), join_sums);
  std::copy(rows.begin(), rows.end(), out);
}

void array_statistics(Isa isa, const MatrixView* pieces, const std::ptrdiff_t* starts, std::ptrdiff_t arrays,
                      const StatisticsOut& out, int threads) {
  auto rows = reduce_rows<Statistics>(pieces, starts[arrays], threads, chunk_statistics(isa), join_statistics);
  for_each_array(pieces, starts, arrays, rows, [&](std::ptrdiff_t a, Statistics* values, std::ptrdiff_t count) {
    write(out, a, join_statistics(values, count));
  });
}

void array_sum_of_squares(Isa isa, const MatrixView* pieces, const std::ptrdiff_t* starts, std::ptrdiff_t arrays,
                          double* out, int threads) {
  auto rows = reduce_rows<double>(pieces, starts[arrays], threads, chunk_sum_of_squares(isa), join_sums);
  for_each_array(pieces, starts, arrays, rows,
                 [&](std::ptrdiff_t a, double* values, std::ptrdiff_t count) { out[a] = join_sums(values, count); });
}

}  // namespace layerlens
