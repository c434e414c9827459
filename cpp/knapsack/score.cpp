// Scores of all options at given prices: the inner loop of the Lagrangian dual, and the only pass over all the data.
#include <algorithm>
#include <vector>

#include "knapsack/score_kernels.hpp"
#include "layerlens/knapsack.hpp"

namespace layerlens::knapsack {

namespace {

// Totals are summed within blocks of this many groups: a fixed number, so that threads do not change the result.
constexpr std::int64_t kBlock = 64;
// Below so many numbers (about 2 ms) waking a second thread costs more than it saves where the machine is busy.
constexpr std::int64_t kParallelNumbers = 1 << 22;

ScoreGroup kernel_for([[maybe_unused]] Isa isa) {
#ifdef LAYERLENS_X86
  if (isa == Isa::avx512) return score_group_avx512;
  if (isa == Isa::avx2) return score_group_avx2;
#endif
  return score_group_scalar;
}

}  // namespace

Favourite score_group_scalar(const Instance& instance, const double* price, std::int64_t begin, std::int64_t end) {
  Favourite favourite{begin, -__builtin_inf()};
  for (std::int64_t option = begin; option < end; ++option) {
    double score = instance.value[option];
    for (int r = 0; r < instance.n_resources; ++r) score -= price[r] * instance.cost[r][option];
    if (score > favourite.score) favourite = {option, score};
  }
  return favourite;
}

void score_groups(Isa isa, const Instance& instance, const double* price, std::int64_t* choice, double* best,
                  double* totals, int threads) {
  const ScoreGroup score_group = kernel_for(isa);
  const int width = 2 + instance.n_resources;
  const std::int64_t n_blocks = (instance.n_groups + kBlock - 1) / kBlock;
  std::vector<double> sums(static_cast<std::size_t>(n_blocks * width), 0.0);
  const bool parallel = threads > 1 && instance.offset[instance.n_groups] * width >= kParallelNumbers;
#pragma omp parallel for schedule(static) num_threads(threads) if (parallel)
  for (std::int64_t block = 0; block < n_blocks; ++block) {
    double* sum = sums.data() + block * width;
    const std::int64_t last = std::min(instance.n_groups, (block + 1) * kBlock);
    for (std::int64_t group = block * kBlock; group < last; ++group) {
      const Favourite favourite = score_group(instance, price, instance.offset[group], instance.offset[group + 1]);
      choice[group] = favourite.option;
      best[group] = favourite.score;
      sum[0] += favourite.score;
      sum[1] += instance.value[favourite.option];
      for (int r = 0; r < instance.n_resources; ++r) sum[2 + r] += instance.cost[r][favourite.option];
    }
  }
  std::fill(totals, totals + width, 0.0);
  for (std::int64_t block = 0; block < n_blocks; ++block)
    for (int i = 0; i < width; ++i) totals[i] += sums[static_cast<std::size_t>(block * width + i)];
}

std::int64_t select_core(const Instance& instance, const double* price, const double* best, double limit,
                         std::int64_t room, std::int64_t* option, double* regret) {
  std::int64_t found = 0;
  for (std::int64_t group = 0; group < instance.n_groups; ++group) {
    for (std::int64_t o = instance.offset[group]; o < instance.offset[group + 1]; ++o) {
      double score = instance.value[o];
      for (int r = 0; r < instance.n_resources; ++r) score -= price[r] * instance.cost[r][o];
      const double lost = best[group] - score;
      if (!(lost <= limit)) continue;
      if (found < room) {
        option[found] = o;
        regret[found] = lost;
      }
      ++found;
    }
  }
  return found;
}

std::int64_t select_reachable(const Instance& instance, const double* price, const double* reach,
                              const std::int64_t* choice, const double* best, std::int64_t* option, std::int64_t* count,
                              int threads) {
  const int m = instance.n_resources;
  // Each group writes to its own place first, then the places are closed up.
  const bool parallel = threads > 1 && instance.offset[instance.n_groups] * (1 + m) >= kParallelNumbers;
#pragma omp parallel for schedule(static) num_threads(threads) if (parallel)
  for (std::int64_t group = 0; group < instance.n_groups; ++group) {
    std::int64_t* out = option + instance.offset[group];
    const std::int64_t favourite = choice[group];
    for (std::int64_t o = instance.offset[group]; o < instance.offset[group + 1]; ++o) {
      double score = instance.value[o], lead = 0.0;
      for (int r = 0; r < m; ++r) {
        const double more = instance.cost[r][o] - instance.cost[r][favourite];
        score -= price[r] * instance.cost[r][o];
        lead += reach[r] * (more < 0.0 ? -more : more);
      }
      if (best[group] - score <= lead) *out++ = o;
    }
    count[group] = out - (option + instance.offset[group]);
  }
  std::int64_t total = 0;
  for (std::int64_t group = 0; group < instance.n_groups; ++group) {
    std::copy(option + instance.offset[group], option + instance.offset[group] + count[group], option + total);
    total += count[group];
  }
  return total;
}

}  // namespace layerlens::knapsack
