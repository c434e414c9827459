// What presolve must know of a row of costs or values, in one pass over it.
#include <algorithm>
#include <vector>

#include "layerlens/knapsack.hpp"

namespace layerlens::knapsack {

namespace {

// Sums run within blocks of this many groups first, so that threads do not change them.
constexpr std::int64_t kBlock = 1024;
constexpr std::int64_t kParallelNumbers = 1 << 22;

}  // namespace

RowSummary summarise_row(std::int64_t n_groups, const std::int64_t* offset, const double* row, int threads) {
  const std::int64_t n_blocks = (n_groups + kBlock - 1) / kBlock;
  std::vector<RowSummary> blocks(static_cast<std::size_t>(n_blocks));
  const bool parallel = threads > 1 && offset[n_groups] >= kParallelNumbers;
#pragma omp parallel for schedule(static) num_threads(threads) if (parallel)
  for (std::int64_t block = 0; block < n_blocks; ++block) {
    RowSummary sum{__builtin_inf(), -__builtin_inf(), 0.0, 0.0, 0.0};
    const std::int64_t last = std::min(n_groups, (block + 1) * kBlock);
    for (std::int64_t group = block * kBlock; group < last; ++group) {
      // Several lanes, which the compiler can keep in one register, because minimum and maximum have latency.
      double low[4], high[4], zero[4] = {0.0, 0.0, 0.0, 0.0};
      for (int lane = 0; lane < 4; ++lane) low[lane] = high[lane] = row[offset[group]];
      std::int64_t option = offset[group];
      for (; option + 4 <= offset[group + 1]; option += 4) {
        for (int lane = 0; lane < 4; ++lane) {
          const double x = row[option + lane];
          low[lane] = x < low[lane] ? x : low[lane];
          high[lane] = x > high[lane] ? x : high[lane];
          zero[lane] += x - x;  // NaN where x is not finite, else 0
        }
      }
      for (; option < offset[group + 1]; ++option) {
        const double x = row[option];
        low[0] = x < low[0] ? x : low[0];
        high[0] = x > high[0] ? x : high[0];
        zero[0] += x - x;
      }
      const double least = std::min(std::min(low[0], low[1]), std::min(low[2], low[3]));
      const double most = std::max(std::max(high[0], high[1]), std::max(high[2], high[3]));
      sum.lowest = std::min(sum.lowest, least);
      sum.highest = std::max(sum.highest, most);
      sum.sum_of_lowest += least;
      sum.sum_of_highest += most;
      sum.not_finite += (zero[0] + zero[1]) + (zero[2] + zero[3]);
    }
    blocks[static_cast<std::size_t>(block)] = sum;
  }
  RowSummary total = blocks[0];
  for (std::size_t block = 1; block < blocks.size(); ++block) {
    total.lowest = std::min(total.lowest, blocks[block].lowest);
    total.highest = std::max(total.highest, blocks[block].highest);
    total.sum_of_lowest += blocks[block].sum_of_lowest;
    total.sum_of_highest += blocks[block].sum_of_highest;
    total.not_finite += blocks[block].not_finite;
  }
  return total;
}

}  // namespace layerlens::knapsack
