// The states of a beam search, and how their number is cut down: equal ones are merged, the lowest scores dropped.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <vector>

#include "layerlens/knapsack.hpp"

namespace layerlens::knapsack {

namespace {

// bound: no completion of the state is worth more, rounding aside. parent and candidate are the way back.
template <int M>
struct State {
  double value;
  double score;
  double bound;
  double slack[M];
  std::int32_t parent;
  std::int32_t candidate;
};

template <int M>
class Thinning {
 public:
  // Of states with the same slack only the most valuable can matter. Returns whether so many were equal that it is
  // worth holding more states until they are merged.
  bool merge_equal(std::vector<State<M>>& states) {
    std::size_t buckets = 64;
    while (buckets < 2 * states.size()) buckets *= 2;
    table_.assign(buckets, -1);
    std::size_t kept = 0;
    for (std::size_t i = 0; i < states.size(); ++i) {
      std::uint64_t hash = 0x9e3779b97f4a7c15u;
      for (int r = 0; r < M; ++r) {
        std::uint64_t bits;
        std::memcpy(&bits, &states[i].slack[r], sizeof bits);
        hash = (hash ^ bits) * 0xbf58476d1ce4e5b9u;
        hash ^= hash >> 29;
      }
      std::size_t slot = hash & (buckets - 1);
      while (table_[slot] >= 0 && !same_slack(states[static_cast<std::size_t>(table_[slot])], states[i]))
        slot = (slot + 1) & (buckets - 1);
      if (table_[slot] < 0) {
        table_[slot] = static_cast<std::int32_t>(kept);
        states[kept++] = states[i];
      } else if (State<M>& rival = states[static_cast<std::size_t>(table_[slot])]; states[i].value > rival.value) {
        rival = states[i];
      }
    }
    const bool many = kept < states.size() - states.size() / 16;
    states.resize(kept);
    return many;
  }

  // Keeps the `room` states of the highest scores, in their order; what is dropped leaves its bound behind. Returns
  // the lowest score kept, or -infinity if nothing was dropped.
  double truncate(std::vector<State<M>>& states, std::int64_t room, double margin, BeamResult& result) {
    if (static_cast<std::int64_t>(states.size()) <= room) return -HUGE_VAL;
    scores_.resize(states.size());
    for (std::size_t i = 0; i < states.size(); ++i) scores_[i] = states[i].score;
    std::nth_element(scores_.begin(), scores_.begin() + room - 1, scores_.end(), std::greater<double>());
    const double cut = scores_[static_cast<std::size_t>(room - 1)];
    auto equals = room - std::count_if(scores_.begin(), scores_.begin() + room, [&](double x) { return x > cut; });
    std::size_t kept = 0;
    for (const State<M>& state : states) {
      if (state.score > cut || (state.score == cut && equals-- > 0)) states[kept++] = state;
      else result.bound = std::max(result.bound, state.bound + margin);
    }
    states.resize(kept);
    ++result.truncations;
    return cut;
  }

 private:
  static bool same_slack(const State<M>& a, const State<M>& b) {
    for (int r = 0; r < M; ++r)
      if (a.slack[r] != b.slack[r]) return false;
    return true;
  }

  std::vector<std::int32_t> table_;
  std::vector<double> scores_;
};

}  // namespace

}  // namespace layerlens::knapsack
