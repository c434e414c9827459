// From the favourites to a good allocation that fits: repair, then moves of one option and of pairs of options.
#include <algorithm>
#include <cmath>
#include <vector>

#include "layerlens/knapsack.hpp"

namespace layerlens::knapsack {

void add_use(Use& use, double amount) {
  // TwoSum (Knuth) of high and amount, then renormalise.
  const double sum = use.high + amount;
  const double part = sum - use.high;
  const double error = (use.high - (sum - part)) + (amount - part);
  const double low = use.low + error;
  use.high = sum + low;
  use.low = low - (use.high - sum);
}

Use sum_use(std::int64_t n, const double* amount) {
  Use use{0.0, 0.0};
  for (std::int64_t i = 0; i < n; ++i) add_use(use, amount[i]);
  return use;
}

namespace {

// A move below this share of the largest value is rounding, and moves on rounding could go round in circles.
constexpr double kSmallestGain = 1e-13;

struct Move {
  std::int64_t group;
  std::int64_t candidate;
  double key;
};

bool earlier(const Move& a, const Move& b) { return a.key != b.key ? a.key > b.key : a.candidate < b.candidate; }

class Search {
 public:
  Search(const Core& core, const double* price, std::int64_t* choice, Use* use)
      : core_(core), price_(price), choice_(choice), use_(use), m_(core.n_resources) {
    for (std::int64_t c = 0; c < core.offset[core.n_groups]; ++c)
      smallest_gain_ = std::max(smallest_gain_, kSmallestGain * std::fabs(core.value[c]));
  }

  double violation() const {
    double total = 0.0;
    for (int r = 0; r < m_; ++r) total += excess(r, use_[r].high);
    return total;
  }

  // Sorted rounds of repairing moves, until nothing is exceeded or no move lowers the violation.
  bool repair() {
    while (violation() > 0.0) {
      std::vector<Move> moves;
      for_each_move([&](std::int64_t group, std::int64_t candidate) {
        const double removed = removed_violation(group, candidate);
        if (removed <= 0.0) return;
        const double lost = std::max(0.0, score(choice_[group]) - score(candidate));
        moves.push_back({group, candidate, removed / (lost + smallest_gain_)});
      });
      std::sort(moves.begin(), moves.end(), earlier);
      bool moved = false;
      for (const Move& move : moves) {
        if (move.candidate == choice_[move.group] || removed_violation(move.group, move.candidate) <= 0.0) continue;
        apply(move.group, move.candidate);
        moved = true;
        if (violation() == 0.0) break;
      }
      if (!moved) return false;
    }
    return true;
  }

  // Sorted rounds of moves that raise the value and fit.
  void fill() {
    for (bool moved = true; moved;) {
      moved = false;
      std::vector<Move> moves;
      for_each_move([&](std::int64_t group, std::int64_t candidate) {
        const double gain = core_.value[candidate] - core_.value[choice_[group]];
        if (gain > smallest_gain_ && fits(group, candidate)) moves.push_back({group, candidate, gain});
      });
      std::sort(moves.begin(), moves.end(), earlier);
      for (const Move& move : moves) {
        if (core_.value[move.candidate] - core_.value[choice_[move.group]] <= smallest_gain_) continue;
        if (!fits(move.group, move.candidate)) continue;
        apply(move.group, move.candidate);
        moved = true;
      }
    }
  }

  // The best pair of moves in two groups; the moves with the least regret are tried, most valuable first.
  bool swap_pair(std::int64_t limit) {
    std::vector<Move> moves;
    for_each_move([&](std::int64_t group, std::int64_t candidate) {
      moves.push_back({group, candidate, score(candidate) - score(choice_[group])});
    });
    if (static_cast<std::int64_t>(moves.size()) > limit) {
      std::nth_element(moves.begin(), moves.begin() + limit, moves.end(), earlier);
      moves.resize(static_cast<std::size_t>(limit));
    }
    for (Move& move : moves) move.key = core_.value[move.candidate] - core_.value[choice_[move.group]];
    std::sort(moves.begin(), moves.end(), earlier);

    double best = smallest_gain_;
    std::size_t first = 0, second = 0;
    for (std::size_t a = 0; a < moves.size(); ++a) {
      if (moves[a].key * 2 <= best) break;
      for (std::size_t b = a + 1; b < moves.size(); ++b) {
        const double gain = moves[a].key + moves[b].key;
        if (gain <= best) break;
        if (moves[a].group == moves[b].group || !fits_pair(moves[a], moves[b])) continue;
        best = gain;
        first = a;
        second = b;
      }
    }
    if (best <= smallest_gain_) return false;
    apply(moves[first].group, moves[first].candidate);
    apply(moves[second].group, moves[second].candidate);
    return true;
  }

 private:
  template <class Visit>
  void for_each_move(Visit visit) const {
    for (std::int64_t group = 0; group < core_.n_groups; ++group)
      for (std::int64_t c = core_.offset[group]; c < core_.offset[group + 1]; ++c)
        if (c != choice_[group]) visit(group, c);
  }

  double score(std::int64_t candidate) const {
    double total = core_.value[candidate];
    for (int r = 0; r < m_; ++r) total -= price_[r] * core_.cost__cr[candidate * m_ + r];
    return total;
  }

  double cost(std::int64_t candidate, int r) const { return core_.cost__cr[candidate * m_ + r]; }

  double excess(int r, double used) const {
    const double capacity = core_.capacity[r];
    return used > capacity ? (used - capacity) / capacity : 0.0;
  }

  double removed_violation(std::int64_t group, std::int64_t candidate) const {
    double removed = 0.0;
    for (int r = 0; r < m_; ++r) removed += excess(r, use_[r].high) - excess(r, moved_use(r, group, candidate).high);
    return removed;
  }

  Use moved_use(int r, std::int64_t group, std::int64_t candidate) const {
    Use use = use_[r];
    add_use(use, cost(candidate, r));
    add_use(use, -cost(choice_[group], r));
    return use;
  }

  bool fits(std::int64_t group, std::int64_t candidate) const {
    for (int r = 0; r < m_; ++r)
      if (moved_use(r, group, candidate).high > core_.capacity[r]) return false;
    return true;
  }

  bool fits_pair(const Move& a, const Move& b) const {
    for (int r = 0; r < m_; ++r) {
      Use use = moved_use(r, a.group, a.candidate);
      add_use(use, cost(b.candidate, r));
      add_use(use, -cost(choice_[b.group], r));
      if (use.high > core_.capacity[r]) return false;
    }
    return true;
  }

  void apply(std::int64_t group, std::int64_t candidate) {
    for (int r = 0; r < m_; ++r) use_[r] = moved_use(r, group, candidate);
    choice_[group] = candidate;
  }

  const Core& core_;
  const double* price_;
  std::int64_t* choice_;
  Use* use_;
  int m_;
  double smallest_gain_ = 0.0;
};

}  // namespace

bool repair(const Core& core, const double* price, std::int64_t* choice, Use* use) {
  return Search(core, price, choice, use).repair();
}

void improve(const Core& core, const double* price, std::int64_t pair_limit, std::int64_t* choice, Use* use) {
  Search search(core, price, choice, use);
  if (search.violation() > 0.0) return;
  do {
    search.fill();
  } while (search.swap_pair(pair_limit));
}

}  // namespace layerlens::knapsack
