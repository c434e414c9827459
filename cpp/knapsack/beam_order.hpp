// In which order a beam search takes the groups, and what the groups still open can do at each depth of it.
//
// Groups whose runner-up is far behind come first, the ambiguous ones are kept for the end, where they fit the last bit
// of slack. The favourites of the groups still open react to prices; how much, is the curvature H of their dual, and
// Q = H^-1 says what steering slack to 0 costs.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <numeric>
#include <vector>

#include "knapsack/beam_core.hpp"
#include "layerlens/knapsack.hpp"

namespace layerlens::knapsack {

namespace {

// SplitMix64 (Steele, Lea & Flood 2014).
std::uint64_t split_mix(std::uint64_t& state) {
  std::uint64_t z = (state += 0x9e3779b97f4a7c15u);
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  return z ^ (z >> 31);
}

// Inverse of a positive semi-definite matrix, scaled to unit diagonal, with a small ridge, by Cholesky's method.
template <int M>
void invert_curvature(int m, const Matrix<M>& matrix, Matrix<M>& inverse) {
  double scale[M], lower[M][M], column[M];
  for (int r = 0; r < m; ++r) scale[r] = matrix[r * M + r] > 0.0 ? 1.0 / std::sqrt(matrix[r * M + r]) : 0.0;
  for (int i = 0; i < m; ++i) {
    for (int j = 0; j <= i; ++j) {
      double sum = matrix[i * M + j] * scale[i] * scale[j] + (i == j ? (scale[i] > 0.0 ? 0.02 : 1.0) : 0.0);
      for (int k = 0; k < j; ++k) sum -= lower[i][k] * lower[j][k];
      lower[i][j] = i == j ? std::sqrt(std::max(sum, 1e-6)) : sum / lower[j][j];
    }
  }
  for (int c = 0; c < m; ++c) {
    for (int i = 0; i < m; ++i) {
      double sum = i == c ? 1.0 : 0.0;
      for (int k = 0; k < i; ++k) sum -= lower[i][k] * column[k];
      column[i] = sum / lower[i][i];
    }
    for (int i = m - 1; i >= 0; --i) {
      double sum = column[i];
      for (int k = i + 1; k < m; ++k) sum -= lower[k][i] * column[k];
      column[i] = sum / lower[i][i];
    }
    for (int i = 0; i < m; ++i) inverse[i * M + c] = column[i] * scale[i] * scale[c];
  }
}

template <int M>
struct GroupOrder {
  GroupOrder(const RelativeCore<M>& core, const std::int64_t* favourite, const BeamSettings& settings) {
    const std::int64_t n = core.n;
    const int m = core.m;
    // The regret at which about softness * m alternatives lie.
    std::vector<double> sorted;
    for (std::int64_t g = 0; g < n; ++g)
      for (std::int64_t c = core.offset[g]; c < core.offset[g + 1]; ++c)
        if (c != favourite[g]) sorted.push_back(core.regret[c]);
    const auto rank = std::min<std::size_t>(sorted.size() - 1, static_cast<std::size_t>(settings.softness * m));
    std::nth_element(sorted.begin(), sorted.begin() + static_cast<std::ptrdiff_t>(rank), sorted.end());
    const double soft = std::max(sorted[rank], 1e-12 * core.size);

    // Ambiguity of each group and its share of the curvature: the covariance of the cost under weights that fall with
    // the regret. (1 + x)^-4 stands for exp(-x), which libm would round differently from machine to machine.
    std::vector<double> ambiguity(static_cast<std::size_t>(n));
    std::vector<Matrix<M>> curvature(static_cast<std::size_t>(n), Matrix<M>{});
    for (std::int64_t g = 0; g < n; ++g) {
      double weights = 0.0;
      Vector<M> mean{};
      for (int pass = 0; pass < 2; ++pass) {
        for (std::int64_t c = core.offset[g]; c < core.offset[g + 1]; ++c) {
          const double x = 1.0 + core.regret[c] / soft, weight = 1.0 / ((x * x) * (x * x));
          if (pass == 0) {
            weights += weight;
            for (int r = 0; r < m; ++r) mean[r] += weight * core.extra[c][r];
            continue;
          }
          for (int r = 0; r < m; ++r)
            for (int q = 0; q < m; ++q)
              curvature[g][r * M + q] +=
                  weight * (core.extra[c][r] - mean[r]) * (core.extra[c][q] - mean[q]) / (weights * soft);
        }
        if (pass == 0)
          for (int r = 0; r < m; ++r) mean[r] /= weights;
      }
      ambiguity[g] = weights;
    }
    // Other seeds, other orders: each ambiguity is multiplied by a number between 1/2 and 3/2.
    if (settings.seed != 0) {
      std::uint64_t state = settings.seed;
      for (double& weight : ambiguity) weight *= 0.5 + static_cast<double>(split_mix(state) >> 11) * 0x1p-53;
    }
    group.resize(static_cast<std::size_t>(n));
    std::iota(group.begin(), group.end(), std::int64_t{0});
    std::sort(group.begin(), group.end(), [&](std::int64_t a, std::int64_t b) {
      return ambiguity[a] != ambiguity[b] ? ambiguity[a] < ambiguity[b] : a < b;
    });

    // From the end: what the open groups can still save of each resource, and the inverse of their curvature.
    steer.assign(static_cast<std::size_t>(n + 1), Matrix<M>{});
    savable.assign(static_cast<std::size_t>(n + 1), Vector<M>{});
    Matrix<M> sum{};
    for (std::int64_t d = n - 1; d >= 0; --d) {
      const std::int64_t g = group[d];
      for (int r = 0; r < m; ++r) {
        double most = 0.0;
        for (std::int64_t c = core.offset[g]; c < core.offset[g + 1]; ++c) most = std::max(most, -core.extra[c][r]);
        savable[d][r] = savable[d + 1][r] + most;
      }
      for (int i = 0; i < M * M; ++i) sum[i] += curvature[g][i];
      invert_curvature<M>(m, sum, steer[d]);
    }
  }

  // The group at each depth.
  std::vector<std::int64_t> group;
  // What the groups from a depth on can save of each resource against their favourites, and their Q.
  std::vector<Vector<M>> savable;
  std::vector<Matrix<M>> steer;
};

// The quadratic part of a state's score: what the groups still open lose by steering its slack to 0.

// What steering this slack away costs: slack' Q slack / 2; spare room in a resource without a price costs nothing.
template <int M>
double steering_cost(const RelativeCore<M>& core, const double* slack, const Matrix<M>& q) {
  double felt[M], total = 0.0;
  for (int r = 0; r < M; ++r) felt[r] = core.active[r] ? slack[r] : std::min(slack[r], 0.0);
  for (int r = 0; r < M; ++r) total += felt[r] * dot<M>(&q[r * M], felt);
  return 0.5 * total;
}

// Half of e'Qe over the resources that have a price.
template <int M>
double own_toll(const RelativeCore<M>& core, const double* extra, const Matrix<M>& q) {
  double total = 0.0;
  for (int r = 0; r < core.m; ++r) {
    if (!core.active[r]) continue;
    double row = 0.0;
    for (int k = 0; k < core.m; ++k)
      if (core.active[k]) row += q[r * M + k] * extra[k];
    total += extra[r] * row;
  }
  return 0.5 * total;
}

// steering_cost where no resource without a price has run out; slope = Q slack over those with a price, and spare is
// the least slack of those without.
template <int M>
double steering(const RelativeCore<M>& core, const double* slack, const Matrix<M>& q, double* slope, double& spare) {
  double felt[M], total = 0.0;
  for (int r = 0; r < M; ++r) {
    felt[r] = core.active[r] ? slack[r] : 0.0;
    if (!core.active[r]) spare = std::min(spare, slack[r]);
    slope[r] = 0.0;
  }
  // Column by column: Q is symmetric but for rounding.
  for (int k = 0; k < M; ++k)
    for (int r = 0; r < M; ++r) slope[r] += q[k * M + r] * felt[k];
  for (int r = 0; r < M; ++r) total += felt[r] * slope[r];
  return 0.5 * total;
}

}  // namespace

}  // namespace layerlens::knapsack
