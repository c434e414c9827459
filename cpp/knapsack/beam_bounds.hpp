// What the states of a beam search can still become: bounds by weak duality at prices taken where the states are.
//
// For any prices q, value + q.slack + sum over open groups of max(value - q.cost) bounds what a state can become.
// Prices are taken for a sample of the states, by Newton steps from those of the whole core.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

#include "knapsack/beam_core.hpp"
#include "knapsack/beam_order.hpp"
#include "knapsack/beam_states.hpp"

namespace layerlens::knapsack {

namespace {

// States whose best prices bound all others, for each group of the order, and Newton steps to those prices: more of
// them pay where many states are to be proved hopeless.
constexpr std::size_t kSamples = 6, kWideSamples = 16;
constexpr int kSteps = 2, kWideSteps = 3;

template <int M>
class StateBounds {
 public:
  StateBounds(const RelativeCore<M>& core, const GroupOrder<M>& order) : core_(core), order_(order) {}

  // Tightens the bounds with prices that suit a sample of the states, and drops states that cannot beat `best`. depth
  // is that of the next group; wide takes more prices. Returns whether so many were hopeless that it is worth holding
  // more states until they are bounded.
  bool tighten(std::vector<State<M>>& states, std::int64_t depth, bool wide, double best) {
    const std::size_t n = states.size();
    const std::size_t samples = std::min<std::size_t>(wide ? kWideSamples : kSamples, n);
    const int steps = wide ? kWideSteps : kSteps;
    prices_.clear();
    for (std::size_t k = 0; k < samples; ++k) {
      const double* slack = states[k * n / samples].slack;
      Vector<M> price, left;
      std::copy(core_.price, core_.price + M, price.begin());
      std::copy(slack, slack + M, left.begin());
      for (int step = 0; step < steps; ++step) {
        // A Newton step on the dual of the open groups, whose gradient is what their favourites leave of the slack.
        for (int r = 0; r < M; ++r)
          price[r] = std::max(0.0, price[r] - dot<M>(&order_.steer[depth][r * M], left.data()));
        std::copy(slack, slack + M, left.begin());
        double open = 0.0;
        for (std::int64_t d = depth; d < core_.n; ++d) {
          const std::int64_t begin = core_.offset[order_.group[d]], end = core_.offset[order_.group[d] + 1];
          std::int64_t favourite = begin;
          double most = -HUGE_VAL;
          for (std::int64_t c = begin; c < end; ++c) {
            const double score = core_.gain[c] - dot<M>(price.data(), core_.extra[c].data());
            if (score > most) {
              most = score;
              favourite = c;
            }
          }
          open += most;
          for (int r = 0; r < M; ++r) left[r] -= core_.extra[favourite][r];
        }
        prices_.emplace_back(price, open);
      }
    }
    std::size_t kept = 0;
    for (std::size_t i = 0; i < n; ++i) {
      State<M>& state = states[i];
      for (std::size_t k = 0; k < prices_.size() && state.bound + core_.margin > best; ++k) {
        const auto& [price, open] = prices_[k];
        state.bound = std::min(state.bound, state.value + dot<M>(price.data(), state.slack) + open);
      }
      if (state.bound + core_.margin > best) states[kept++] = state;
    }
    states.resize(kept);
    return kept < n - n / 16;
  }

 private:
  const RelativeCore<M>& core_;
  const GroupOrder<M>& order_;
  std::vector<std::pair<Vector<M>, double>> prices_;
};

}  // namespace

}  // namespace layerlens::knapsack
