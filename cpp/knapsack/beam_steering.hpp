// The quadratic part of a state's score: what the groups still open lose by steering its slack to 0.
#pragma once

#include <algorithm>

#include "knapsack/beam_core.hpp"

namespace layerlens::knapsack {

namespace {

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
