// Beam search over the groups of a core, in regret space; a proof of optimality where the beam is wide enough.
//
// A state is a choice for the first groups of an order, with the others at their favourites: the value against that of
// all favourites, and the slack left in each resource (which may be negative: later groups can repair it). Three things
// make it strong:
//  - the order: groups whose runner-up is far behind come first, the ambiguous ones are kept for the end, where they
//    fit the last bit of slack;
//  - the score: value + p.slack - slack' Q slack / 2. The favourites of the groups still open react to prices; how
//    much, is the curvature H of the dual of the open groups, and Q = H^-1 is what steering the slack to 0 costs;
//  - the bounds: by weak duality, for any prices q, value + q.slack + sum over open groups of max(value - q.cost)
//    bounds what a state can become. Prices are taken where the states are: for a sample, by Newton steps from p.
// Slacks are integers in doubles below 2^53, so their sums are exact and equal states are recognised.
#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

#include "knapsack/beam_bounds.hpp"
#include "knapsack/beam_core.hpp"
#include "knapsack/beam_order.hpp"
#include "knapsack/beam_states.hpp"
#include "layerlens/knapsack.hpp"

namespace layerlens::knapsack {

namespace {

// From this width on, tighter bounds are worth their time.
constexpr std::int64_t kWideBeam = 10000;
// The last groups are searched wider, because no more groups multiply the states: widths for 1, 2, 3, ... groups left,
// as far as there is not plenty of width anyway.
constexpr std::int64_t kTailFactor[] = {64, 32, 16, 8, 4, 2};
constexpr std::int64_t kTailPlenty = 20000;
// States beyond the width that are held until they are merged and bounded.
constexpr std::int64_t kSpareStates = 200000;

template <int M>
class Beam {
 public:
  Beam(const Core& core, const BeamSettings& settings, const double* price, const std::int64_t* favourite,
       double threshold)
      : core_(core, price, favourite),
        order_(core_, favourite, settings),
        bounds_(core_, order_),
        settings_(settings),
        best_(threshold - core_.favourites_value) {}
  Beam(const Beam&) = delete;

  BeamResult run(std::int64_t* choice) {
    // The way back: parent and candidate of each state kept at each depth.
    std::vector<std::vector<std::pair<std::int32_t, std::int32_t>>> trace(static_cast<std::size_t>(core_.n));
    states_.clear();
    states_.push_back(root());
    BeamResult result{-HUGE_VAL, -HUGE_VAL, 0, 0};
    std::int32_t best_leaf = -1;
    for (std::int64_t depth = 0; depth < core_.n && !states_.empty(); ++depth) {
      const std::int64_t left = core_.n - depth - 1;
      const std::int64_t width = width_with(left);
      expand(depth, width, result);
      if (left == 0) {
        for (std::size_t i = 0; i < next_.size(); ++i) {
          if (next_[i].value <= best_) continue;
          best_ = next_[i].value;
          best_leaf = static_cast<std::int32_t>(i);
        }
      } else {
        // The bounds cost more than the score, so far too many states are thinned by score first; before they are
        // merged, too, while few are equal.
        const std::int64_t spare = std::min((many_hopeless_ ? 4 : 2) * width, width + kSpareStates);
        if (!many_equal_) truncate(spare, result);
        many_equal_ = thinning_.merge_equal(next_);
        truncate(spare, result);
        many_hopeless_ = bounds_.tighten(next_, depth + 1, settings_.width >= kWideBeam, best_);
        truncate(width, result);
      }
      auto& here = trace[static_cast<std::size_t>(depth)];
      here.reserve(next_.size());
      for (const State<M>& state : next_) here.emplace_back(state.parent, state.candidate);
      std::swap(states_, next_);
    }
    if (best_leaf >= 0) {
      result.value = core_.favourites_value + best_;
      for (std::int64_t depth = core_.n - 1; depth >= 0; --depth) {
        const auto step = trace[static_cast<std::size_t>(depth)][static_cast<std::size_t>(best_leaf)];
        choice[order_.group[static_cast<std::size_t>(depth)]] = step.second;
        best_leaf = step.first;
      }
    }
    result.bound = std::max(result.bound, best_ + core_.margin) + core_.favourites_value;
    return result;
  }

 private:
  std::int64_t width_with(std::int64_t left) const {
    if (left < 1 || left > 6) return settings_.width;
    return std::max(settings_.width, std::min(settings_.width * kTailFactor[left - 1], kTailPlenty));
  }

  State<M> root() const {
    State<M> state{};
    std::copy(core_.root_slack, core_.root_slack + M, state.slack);
    state.bound = dot<M>(core_.price, core_.root_slack);
    return state;
  }

  // All children of a state at once, candidates side by side so that the compiler can use vectors; the additions of
  // each child have a fixed order. The steering cost is quadratic, so a child's follows from its parent's by one
  // product, but for resources without a price that run out.
  void expand(std::int64_t depth, std::int64_t width, BeamResult& result) {
    const std::int64_t g = order_.group[depth], begin = core_.offset[g], n_children = core_.offset[g + 1] - begin;
    const Vector<M>& savable = order_.savable[depth + 1];
    const Matrix<M>& steer = order_.steer[depth + 1];
    const bool last = depth + 1 == core_.n;
    const auto crowd =
        static_cast<std::size_t>(std::min((many_equal_ || many_hopeless_ ? 16 : 6) * width, 4 * width + kSpareStates));
    double cut = -HUGE_VAL;
    next_.clear();
    own_toll_.resize(static_cast<std::size_t>(n_children));
    toll_.resize(static_cast<std::size_t>(n_children));
    room_.resize(static_cast<std::size_t>(n_children));
    spare_.resize(static_cast<std::size_t>(n_children));
    double* const __restrict tolls = toll_.data();
    double* const __restrict rooms = room_.data();
    double* const __restrict spares = spare_.data();
    for (std::int64_t c = 0; c < n_children; ++c) own_toll_[c] = own_toll<M>(core_, &core_.extra[begin + c][0], steer);
    State<M> child{};
    result.work += static_cast<std::int64_t>(states_.size()) * core_.m * (core_.m + 2 * n_children);
    for (std::size_t i = 0; i < states_.size(); ++i) {
      const State<M>& state = states_[i];
      const double linear = state.value + dot<M>(core_.price, state.slack);
      double slope[M], toll = 0.0, lowest_spare = 0.0;
      if (!last) toll = steering<M>(core_, state.slack, steer, slope, lowest_spare);
      for (std::int64_t c = 0; c < n_children; ++c) {
        tolls[c] = toll + own_toll_[c];
        rooms[c] = HUGE_VAL;
        spares[c] = HUGE_VAL;
      }
      for (int r = 0; r < core_.m; ++r) {
        const double* const __restrict extra =
            &core_.extra_rc[static_cast<std::size_t>(r) * core_.extra.size()] + begin;
        const double left = state.slack[r] + savable[r], slack = state.slack[r];
        if (core_.active[r])
          for (std::int64_t c = 0; c < n_children; ++c) {
            tolls[c] -= slope[r] * extra[c];
            rooms[c] = std::min(rooms[c], left - extra[c]);
          }
        else
          for (std::int64_t c = 0; c < n_children; ++c) {
            spares[c] = std::min(spares[c], slack - extra[c]);
            rooms[c] = std::min(rooms[c], left - extra[c]);
          }
      }
      for (std::int64_t c = 0; c < n_children; ++c) {
        if (rooms[c] < 0.0) continue;
        const double bound = linear - core_.loss[begin + c];
        if (bound + core_.margin <= best_) continue;
        child.value = state.value + core_.gain[begin + c];
        child.bound = std::min(bound, state.bound);
        const bool quadratic = lowest_spare >= 0.0 && spares[c] >= 0.0;
        if (last || !quadratic)
          for (int r = 0; r < M; ++r) child.slack[r] = state.slack[r] - core_.extra[begin + c][r];
        child.score = last ? child.value : bound - (quadratic ? tolls[c] : steering_cost<M>(core_, child.slack, steer));
        if (child.score < cut) {
          result.bound = std::max(result.bound, child.bound + core_.margin);
          continue;
        }
        if (!last && quadratic)
          for (int r = 0; r < M; ++r) child.slack[r] = state.slack[r] - core_.extra[begin + c][r];
        child.parent = static_cast<std::int32_t>(i);
        child.candidate = static_cast<std::int32_t>(begin + c);
        next_.push_back(child);
        if (!last && next_.size() >= crowd) cut = truncate(static_cast<std::int64_t>(crowd / 2), result);
      }
    }
  }

  double truncate(std::int64_t room, BeamResult& result) {
    return thinning_.truncate(next_, room, core_.margin, result);
  }

  const RelativeCore<M> core_;
  const GroupOrder<M> order_;
  StateBounds<M> bounds_;
  Thinning<M> thinning_;
  const BeamSettings settings_;
  double best_;
  std::vector<State<M>> states_, next_;
  // Of the children of a state: their own part of the steering cost, all of it, the least slack that is left of any
  // resource after all that can be saved, and the least slack of those without a price.
  std::vector<double> own_toll_, toll_, room_, spare_;
  // Whether merging and bounding were worth their time at the last depth: then more states are held for them.
  bool many_equal_ = true, many_hopeless_ = true;
};

}  // namespace

BeamResult beam_search(const Core& core, const BeamSettings& settings, const double* price,
                       const std::int64_t* favourite, double threshold, std::int64_t* choice) {
  const int m = core.n_resources;
  const auto run = [&](auto beam) { return beam.run(choice); };
  if (m == 1) return run(Beam<1>(core, settings, price, favourite, threshold));
  if (m == 2) return run(Beam<2>(core, settings, price, favourite, threshold));
  if (m == 3) return run(Beam<3>(core, settings, price, favourite, threshold));
  if (m == 4) return run(Beam<4>(core, settings, price, favourite, threshold));
  if (m <= 6) return run(Beam<6>(core, settings, price, favourite, threshold));
  if (m <= 8) return run(Beam<8>(core, settings, price, favourite, threshold));
  if (m <= 10) return run(Beam<10>(core, settings, price, favourite, threshold));
  if (m <= 16) return run(Beam<16>(core, settings, price, favourite, threshold));
  if (m <= 20) return run(Beam<20>(core, settings, price, favourite, threshold));
  if (m <= 30) return run(Beam<30>(core, settings, price, favourite, threshold));
  if (m <= 40) return run(Beam<40>(core, settings, price, favourite, threshold));
  return run(Beam<kMaxResources>(core, settings, price, favourite, threshold));
}

}  // namespace layerlens::knapsack
