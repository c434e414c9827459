// A core as the beam search sees it: every candidate relative to its group's favourite.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "layerlens/knapsack.hpp"

namespace layerlens::knapsack {

namespace {

constexpr double kUnitRoundoff = 0x1p-53;

// M is the number of resources, rounded up to one that is compiled; the resources that are not there stay 0.
template <int M>
using Vector = std::array<double, M>;
template <int M>
using Matrix = std::array<double, M * M>;

template <int M>
double dot(const double* a, const double* b) {
  double sum = 0.0;
  for (int r = 0; r < M; ++r) sum += a[r] * b[r];
  return sum;
}

// gain and extra: value and cost of each candidate against those of its group's favourite. loss: what it loses at the
// prices, which rounding may put below 0, and regret without that. extra_rc has the extra costs resource by resource.
template <int M>
struct RelativeCore {
  RelativeCore(const Core& core, const double* core_price, const std::int64_t* favourite)
      : n(core.n_groups), m(core.n_resources), offset(core.offset) {
    std::copy(core_price, core_price + m, price);
    const std::int64_t total = offset[n];
    gain.resize(static_cast<std::size_t>(total));
    extra.assign(static_cast<std::size_t>(total), Vector<M>{});
    regret.resize(static_cast<std::size_t>(total));
    loss.resize(static_cast<std::size_t>(total));
    extra_rc.resize(static_cast<std::size_t>(total * m));
    for (int r = 0; r < m; ++r) root_slack[r] = core.capacity[r];
    for (std::int64_t g = 0; g < n; ++g) {
      const std::int64_t f = favourite[g];
      favourites_value += core.value[f];
      double widest = 0.0;
      for (int r = 0; r < m; ++r) root_slack[r] -= core.cost__cr[f * m + r];
      for (std::int64_t c = offset[g]; c < offset[g + 1]; ++c) {
        gain[c] = core.value[c] - core.value[f];
        for (int r = 0; r < m; ++r) extra[c][r] = core.cost__cr[c * m + r] - core.cost__cr[f * m + r];
        const double priced = dot<M>(price, extra[c].data());
        loss[c] = priced - gain[c];
        regret[c] = std::max(0.0, loss[c]);
        for (int r = 0; r < m; ++r) extra_rc[static_cast<std::size_t>(r * total + c)] = extra[c][r];
        widest = std::max(widest, std::fabs(core.value[c]) + std::fabs(gain[c]) + std::fabs(priced));
      }
      size += widest;
    }
    for (int r = 0; r < m; ++r) size += price[r] * std::fabs(root_slack[r]);
    // Each value and priced slack is a sum of at most n + m terms of this total size.
    margin = 8.0 * static_cast<double>(n + m + 8) * kUnitRoundoff * size;
    for (int r = 0; r < m; ++r) active[r] = price[r] * core.capacity[r] > 1e-9 * size;
  }

  const std::int64_t n;
  const int m;
  const std::int64_t* const offset;
  double price[M] = {}, root_slack[M] = {};
  // Of each resource, whether it has a price worth the name.
  bool active[M] = {};
  // size bounds what is summed up in any value, margin what rounding can do to such a sum.
  double favourites_value = 0.0, size = 0.0, margin = 0.0;
  std::vector<double> gain, regret, loss, extra_rc;
  std::vector<Vector<M>> extra;
};

}  // namespace

}  // namespace layerlens::knapsack
