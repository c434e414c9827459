#include "layerlens/moments.hpp"

#include <algorithm>
#include <vector>

#include "moments/moments_isa.hpp"
#include "common/chunks.hpp"

namespace layerlens {
namespace {

// Runs chunk_of(x, n) over every chunk and add(row, partials, count) over the partials of every row.
template <class Partial, class ChunkOf, class Join>
void reduce_rows(const MatrixView& x, int threads, const ChunkOf& chunk_of, const Join& join) {
    const std::ptrdiff_t per_row = std::max<std::ptrdiff_t>(1, (x.cols + moments_chunk - 1) / moments_chunk);
    const std::ptrdiff_t tasks = x.rows * per_row, size = item_size(x.dtype);
    const int workers = threads_for(x.rows * x.cols * size, tasks, threads);
    const std::size_t gather_bytes = x.col_stride == size ? 0 : moments_chunk * size;
    unsigned char* scratch = thread_scratch(gather_bytes * workers);
    std::vector<Partial> partials(per_row > 1 ? tasks : 0);

    for_each_task(tasks, workers, [&](std::ptrdiff_t task, int worker) {
        const std::ptrdiff_t row = task / per_row, begin = (task % per_row) * moments_chunk;
        const std::ptrdiff_t n = std::min(moments_chunk, x.cols - begin);
        Partial partial = chunk_of(x.dtype, contiguous_run(x, row, begin, n, scratch + gather_bytes * worker), n);
        if (per_row > 1) partials[task] = partial;
        else join(row, &partial, 1);
    });
    if (per_row > 1) {
        for (std::ptrdiff_t row = 0; row < x.rows; ++row) join(row, partials.data() + row * per_row, per_row);
    }
}

// As tree_sum, for one field of the partials.
template <class Partial, class Field>
double tree_sum_of(Partial* values, std::ptrdiff_t n, const Field& field) {
    for (std::ptrdiff_t gap = 1; gap < n; gap *= 2) {
        for (std::ptrdiff_t i = 0; i + gap < n; i += 2 * gap) field(values[i]) += field(values[i + gap]);
    }
    return n > 0 ? field(values[0]) : 0.0;
}

double larger_or_nan(double a, double b) { return (a != a || a > b) ? a : b; }

}  // namespace

double tree_sum(double* values, std::ptrdiff_t n) noexcept {
    return tree_sum_of(values, n, [](double& value) -> double& { return value; });
}

void row_moments(Isa isa, const MatrixView& x, double* sum, double* sum_of_squares, double* max_abs, int threads) {
    auto chunk_of = chunk_moments_scalar;
#ifdef LAYERLENS_X86
    if (isa == Isa::avx2) chunk_of = chunk_moments_avx2;
    if (isa == Isa::avx512) chunk_of = chunk_moments_avx512;
#endif
    reduce_rows<Moments>(x, threads, chunk_of, [&](std::ptrdiff_t row, Moments* partials, std::ptrdiff_t count) {
        double top = 0.0;
        for (std::ptrdiff_t i = 0; i < count; ++i) top = larger_or_nan(top, partials[i].max_abs);
        max_abs[row] = top;
        sum[row] = tree_sum_of(partials, count, [](Moments& m) -> double& { return m.sum; });
        sum_of_squares[row] = tree_sum_of(partials, count, [](Moments& m) -> double& { return m.sum_of_squares; });
    });
}

void row_sum_of_squares(Isa isa, const MatrixView& x, double* out, int threads) {
    auto chunk_of = chunk_sum_of_squares_scalar;
#ifdef LAYERLENS_X86
    if (isa == Isa::avx2) chunk_of = chunk_sum_of_squares_avx2;
    if (isa == Isa::avx512) chunk_of = chunk_sum_of_squares_avx512;
#endif
    reduce_rows<double>(x, threads, chunk_of, [&](std::ptrdiff_t row, double* partials, std::ptrdiff_t count) {
        out[row] = tree_sum(partials, count);
    });
}

double sum_of_squares(Isa isa, const MatrixView& x, int threads) {
    if (x.rows <= 0) return 0.0;
    std::vector<double> rows(x.rows);
    row_sum_of_squares(isa, x, rows.data(), threads);
    return tree_sum(rows.data(), x.rows);
}

}  // namespace layerlens
