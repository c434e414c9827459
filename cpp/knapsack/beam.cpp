// Beam search over the groups of a core, in regret space; a proof of optimality where the beam is wide enough.
//
// A state is a choice for the first groups of an order, with the others at their favourites: the value against that of
// all favourites, and the slack left in each resource (which may be negative: later groups can repair it). Three things
// make it strong:
//  - the order: groups whose runner-up is far behind come first, the ambiguous ones are kept for the end, where they
//    fit the last bit of slack;
//  - the score: value + p.slack - slack' Q slack / 2. The favourites of the groups still open react to prices; how much,
//    is the curvature H of the dual of the open groups, and Q = H^-1 is what steering the slack to 0 costs;
//  - the bounds: by weak duality, for any prices q, value + q.slack + sum over open groups of max(value - q.cost) bounds
//    what a state can become. Prices are taken where the states are: for a sample of them, by Newton steps from p.
// Slacks are integers in doubles below 2^53, so their sums are exact and equal states are recognised.
#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <functional>
#include <numeric>
#include <utility>
#include <vector>

#include "layerlens/knapsack.hpp"

namespace layerlens::knapsack {

namespace {

constexpr double kUnitRoundoff = 0x1p-53;
// States whose best prices bound all others, for each group of the order, and Newton steps to those prices: more of them
// pay where many states are to be proved hopeless.
constexpr std::size_t kSamples = 6, kWideSamples = 16;
constexpr int kSteps = 2, kWideSteps = 3;
constexpr std::int64_t kWideBeam = 10000;
// The last groups are searched wider, because no more groups multiply the states: widths for 1, 2, 3, ... groups left,
// as far as there is not plenty of width anyway.
constexpr std::int64_t kTailFactor[] = {64, 32, 16, 8, 4, 2};
constexpr std::int64_t kTailPlenty = 20000;
// States beyond the width that are held until they are merged and bounded.
constexpr std::int64_t kSpareStates = 200000;

// M is the number of resources, rounded up to one that is compiled; the resources that are not there stay 0.
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
class Beam {
 public:
  Beam(const Core& core, const BeamSettings& settings, const double* price, const std::int64_t* favourite,
       double threshold)
      : core_(core), n_(core.n_groups), m_(core.n_resources), favourite_(favourite), settings_(settings) {
    std::copy(price, price + m_, price_);
    read_core();
    order_groups();
    best_ = threshold - favourites_value_;
  }

  BeamResult run(std::int64_t* choice) {
    // The way back: parent and candidate of each state kept at each depth.
    std::vector<std::vector<std::pair<std::int32_t, std::int32_t>>> trace(static_cast<std::size_t>(n_));
    states_.clear();
    states_.push_back(root());
    BeamResult result{-HUGE_VAL, -HUGE_VAL, 0, 0};
    std::int32_t best_leaf = -1;
    for (std::int64_t depth = 0; depth < n_ && !states_.empty(); ++depth) {
      const std::int64_t left = n_ - depth - 1;
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
        merge_equal();
        truncate(spare, result);
        tighten_bounds(depth + 1);
        truncate(width, result);
      }
      auto& here = trace[static_cast<std::size_t>(depth)];
      here.reserve(next_.size());
      for (const State<M>& state : next_) here.emplace_back(state.parent, state.candidate);
      std::swap(states_, next_);
    }
    if (best_leaf >= 0) {
      result.value = favourites_value_ + best_;
      for (std::int64_t depth = n_ - 1; depth >= 0; --depth) {
        const auto step = trace[static_cast<std::size_t>(depth)][static_cast<std::size_t>(best_leaf)];
        choice[order_[static_cast<std::size_t>(depth)]] = step.second;
        best_leaf = step.first;
      }
    }
    result.bound = std::max(result.bound, best_ + margin_) + favourites_value_;
    return result;
  }

 private:
  using Vector = std::array<double, M>;
  using Matrix = std::array<double, M * M>;

  static double dot(const double* a, const double* b) {
    double sum = 0.0;
    for (int r = 0; r < M; ++r) sum += a[r] * b[r];
    return sum;
  }

  std::int64_t width_with(std::int64_t left) const {
    if (left < 1 || left > 6) return settings_.width;
    return std::max(settings_.width, std::min(settings_.width * kTailFactor[left - 1], kTailPlenty));
  }

  State<M> root() const {
    State<M> state{};
    std::copy(root_slack_, root_slack_ + M, state.slack);
    state.bound = dot(price_, root_slack_);
    return state;
  }

  // Everything relative to the favourites.
  void read_core() {
    const std::int64_t total = core_.offset[n_];
    gain_.resize(static_cast<std::size_t>(total));
    extra_.assign(static_cast<std::size_t>(total), Vector{});
    regret_.resize(static_cast<std::size_t>(total));
    loss_.resize(static_cast<std::size_t>(total));
    extra_rc_.resize(static_cast<std::size_t>(total * m_));
    for (int r = 0; r < m_; ++r) root_slack_[r] = core_.capacity[r];
    for (std::int64_t g = 0; g < n_; ++g) {
      const std::int64_t f = favourite_[g];
      favourites_value_ += core_.value[f];
      double widest = 0.0;
      for (int r = 0; r < m_; ++r) root_slack_[r] -= core_.cost__cr[f * m_ + r];
      for (std::int64_t c = core_.offset[g]; c < core_.offset[g + 1]; ++c) {
        gain_[c] = core_.value[c] - core_.value[f];
        for (int r = 0; r < m_; ++r) extra_[c][r] = core_.cost__cr[c * m_ + r] - core_.cost__cr[f * m_ + r];
        const double priced = dot(price_, extra_[c].data());
        loss_[c] = priced - gain_[c];
        regret_[c] = std::max(0.0, loss_[c]);
        for (int r = 0; r < m_; ++r) extra_rc_[static_cast<std::size_t>(r * total + c)] = extra_[c][r];
        widest = std::max(widest, std::fabs(core_.value[c]) + std::fabs(gain_[c]) + std::fabs(priced));
      }
      size_ += widest;
    }
    for (int r = 0; r < m_; ++r) size_ += price_[r] * std::fabs(root_slack_[r]);
    // Each value and priced slack is a sum of at most n + m terms of this total size.
    margin_ = 8.0 * static_cast<double>(n_ + m_ + 8) * kUnitRoundoff * size_;
    for (int r = 0; r < m_; ++r) active_[r] = price_[r] * core_.capacity[r] > 1e-9 * size_;
  }

  void order_groups() {
    // The regret at which about softness * m alternatives lie.
    std::vector<double> sorted;
    for (std::int64_t g = 0; g < n_; ++g)
      for (std::int64_t c = core_.offset[g]; c < core_.offset[g + 1]; ++c)
        if (c != favourite_[g]) sorted.push_back(regret_[c]);
    const auto rank = std::min<std::size_t>(sorted.size() - 1, static_cast<std::size_t>(settings_.softness * m_));
    std::nth_element(sorted.begin(), sorted.begin() + static_cast<std::ptrdiff_t>(rank), sorted.end());
    const double soft = std::max(sorted[rank], 1e-12 * size_);

    // Ambiguity of each group and its share of the curvature: the covariance of the cost under weights that fall with
    // the regret. (1 + x)^-4 stands for exp(-x), which libm would round differently from machine to machine.
    std::vector<double> ambiguity(static_cast<std::size_t>(n_));
    std::vector<Matrix> curvature(static_cast<std::size_t>(n_), Matrix{});
    for (std::int64_t g = 0; g < n_; ++g) {
      double weights = 0.0;
      Vector mean{};
      for (int pass = 0; pass < 2; ++pass) {
        for (std::int64_t c = core_.offset[g]; c < core_.offset[g + 1]; ++c) {
          const double x = 1.0 + regret_[c] / soft, weight = 1.0 / ((x * x) * (x * x));
          if (pass == 0) {
            weights += weight;
            for (int r = 0; r < m_; ++r) mean[r] += weight * extra_[c][r];
            continue;
          }
          for (int r = 0; r < m_; ++r)
            for (int q = 0; q < m_; ++q)
              curvature[g][r * M + q] +=
                  weight * (extra_[c][r] - mean[r]) * (extra_[c][q] - mean[q]) / (weights * soft);
        }
        if (pass == 0)
          for (int r = 0; r < m_; ++r) mean[r] /= weights;
      }
      ambiguity[g] = weights;
    }
    // Other seeds, other orders: each ambiguity is multiplied by a number between 1/2 and 3/2.
    if (settings_.seed != 0) {
      std::uint64_t state = settings_.seed;
      for (double& weight : ambiguity) weight *= 0.5 + static_cast<double>(split_mix(state) >> 11) * 0x1p-53;
    }
    order_.resize(static_cast<std::size_t>(n_));
    std::iota(order_.begin(), order_.end(), std::int64_t{0});
    std::sort(order_.begin(), order_.end(), [&](std::int64_t a, std::int64_t b) {
      return ambiguity[a] != ambiguity[b] ? ambiguity[a] < ambiguity[b] : a < b;
    });

    // From the end: what the open groups can still save of each resource, and the inverse of their curvature.
    steer_.assign(static_cast<std::size_t>(n_ + 1), Matrix{});
    savable_.assign(static_cast<std::size_t>(n_ + 1), Vector{});
    Matrix sum{};
    for (std::int64_t d = n_ - 1; d >= 0; --d) {
      const std::int64_t g = order_[d];
      for (int r = 0; r < m_; ++r) {
        double most = 0.0;
        for (std::int64_t c = core_.offset[g]; c < core_.offset[g + 1]; ++c) most = std::max(most, -extra_[c][r]);
        savable_[d][r] = savable_[d + 1][r] + most;
      }
      for (int i = 0; i < M * M; ++i) sum[i] += curvature[g][i];
      invert_curvature(sum, steer_[d]);
    }
  }

  // SplitMix64 (Steele, Lea & Flood 2014).
  static std::uint64_t split_mix(std::uint64_t& state) {
    std::uint64_t z = (state += 0x9e3779b97f4a7c15u);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
  }

  // Inverse of a positive semi-definite matrix, scaled to unit diagonal, with a small ridge, by Cholesky's method.
  void invert_curvature(const Matrix& matrix, Matrix& inverse) const {
    double scale[M], lower[M][M], column[M];
    for (int r = 0; r < m_; ++r) scale[r] = matrix[r * M + r] > 0.0 ? 1.0 / std::sqrt(matrix[r * M + r]) : 0.0;
    for (int i = 0; i < m_; ++i) {
      for (int j = 0; j <= i; ++j) {
        double sum = matrix[i * M + j] * scale[i] * scale[j] + (i == j ? (scale[i] > 0.0 ? 0.02 : 1.0) : 0.0);
        for (int k = 0; k < j; ++k) sum -= lower[i][k] * lower[j][k];
        lower[i][j] = i == j ? std::sqrt(std::max(sum, 1e-6)) : sum / lower[j][j];
      }
    }
    for (int c = 0; c < m_; ++c) {
      for (int i = 0; i < m_; ++i) {
        double sum = i == c ? 1.0 : 0.0;
        for (int k = 0; k < i; ++k) sum -= lower[i][k] * column[k];
        column[i] = sum / lower[i][i];
      }
      for (int i = m_ - 1; i >= 0; --i) {
        double sum = column[i];
        for (int k = i + 1; k < m_; ++k) sum -= lower[k][i] * column[k];
        column[i] = sum / lower[i][i];
      }
      for (int i = 0; i < m_; ++i) inverse[i * M + c] = column[i] * scale[i] * scale[c];
    }
  }

  // What steering this slack away costs: slack' Q slack / 2; spare room in a resource without a price costs nothing.
  double steering_cost(const double* slack, const Matrix& q) const {
    double felt[M], total = 0.0;
    for (int r = 0; r < M; ++r) felt[r] = active_[r] ? slack[r] : std::min(slack[r], 0.0);
    for (int r = 0; r < M; ++r) total += felt[r] * dot(&q[r * M], felt);
    return 0.5 * total;
  }

  // All children of a state at once, candidates side by side so that the compiler can use vectors; the additions of each
  // child have a fixed order. The steering cost is quadratic, so a child's follows from its parent's by one product,
  // but for resources without a price that run out.
  void expand(std::int64_t depth, std::int64_t width, BeamResult& result) {
    const std::int64_t g = order_[depth], begin = core_.offset[g], n_children = core_.offset[g + 1] - begin;
    const Vector& savable = savable_[depth + 1];
    const Matrix& steer = steer_[depth + 1];
    const bool last = depth + 1 == n_;
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
    for (std::int64_t c = 0; c < n_children; ++c) own_toll_[c] = own_toll(&extra_[begin + c][0], steer);
    State<M> child{};
    result.work += static_cast<std::int64_t>(states_.size()) * m_ * (m_ + 2 * n_children);
    for (std::size_t i = 0; i < states_.size(); ++i) {
      const State<M>& state = states_[i];
      const double linear = state.value + dot(price_, state.slack);
      double slope[M], toll = 0.0, lowest_spare = 0.0;
      if (!last) toll = steering(state.slack, steer, slope, lowest_spare);
      for (std::int64_t c = 0; c < n_children; ++c) {
        tolls[c] = toll + own_toll_[c];
        rooms[c] = HUGE_VAL;
        spares[c] = HUGE_VAL;
      }
      for (int r = 0; r < m_; ++r) {
        const double* const __restrict extra = &extra_rc_[static_cast<std::size_t>(r) * extra_.size()] + begin;
        const double left = state.slack[r] + savable[r], slack = state.slack[r];
        if (active_[r])
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
        const double bound = linear - loss_[begin + c];
        if (bound + margin_ <= best_) continue;
        child.value = state.value + gain_[begin + c];
        child.bound = std::min(bound, state.bound);
        const bool quadratic = lowest_spare >= 0.0 && spares[c] >= 0.0;
        if (last || !quadratic)
          for (int r = 0; r < M; ++r) child.slack[r] = state.slack[r] - extra_[begin + c][r];
        child.score = last ? child.value : bound - (quadratic ? tolls[c] : steering_cost(child.slack, steer));
        if (child.score < cut) {
          result.bound = std::max(result.bound, child.bound + margin_);
          continue;
        }
        if (!last && quadratic)
          for (int r = 0; r < M; ++r) child.slack[r] = state.slack[r] - extra_[begin + c][r];
        child.parent = static_cast<std::int32_t>(i);
        child.candidate = static_cast<std::int32_t>(begin + c);
        next_.push_back(child);
        if (!last && next_.size() >= crowd) {
          truncate(static_cast<std::int64_t>(crowd / 2), result);
          cut = lowest_score_;
        }
      }
    }
  }

  // Half of e'Qe over the resources that have a price.
  double own_toll(const double* extra, const Matrix& q) const {
    double total = 0.0;
    for (int r = 0; r < m_; ++r) {
      if (!active_[r]) continue;
      double row = 0.0;
      for (int k = 0; k < m_; ++k)
        if (active_[k]) row += q[r * M + k] * extra[k];
      total += extra[r] * row;
    }
    return 0.5 * total;
  }

  // steering_cost where no resource without a price has run out; slope = Q slack over those with a price, and spare is
  // the least slack of those without.
  double steering(const double* slack, const Matrix& q, double* slope, double& spare) const {
    double felt[M], total = 0.0;
    for (int r = 0; r < M; ++r) {
      felt[r] = active_[r] ? slack[r] : 0.0;
      if (!active_[r]) spare = std::min(spare, slack[r]);
      slope[r] = 0.0;
    }
    // Column by column: Q is symmetric but for rounding.
    for (int k = 0; k < M; ++k)
      for (int r = 0; r < M; ++r) slope[r] += q[k * M + r] * felt[k];
    for (int r = 0; r < M; ++r) total += felt[r] * slope[r];
    return 0.5 * total;
  }

  // Of states with the same slack only the most valuable can matter.
  void merge_equal() {
    std::size_t buckets = 64;
    while (buckets < 2 * next_.size()) buckets *= 2;
    table_.assign(buckets, -1);
    std::size_t kept = 0;
    for (std::size_t i = 0; i < next_.size(); ++i) {
      std::uint64_t hash = 0x9e3779b97f4a7c15u;
      for (int r = 0; r < M; ++r) {
        std::uint64_t bits;
        std::memcpy(&bits, &next_[i].slack[r], sizeof bits);
        hash = (hash ^ bits) * 0xbf58476d1ce4e5b9u;
        hash ^= hash >> 29;
      }
      std::size_t slot = hash & (buckets - 1);
      while (table_[slot] >= 0 && !same_slack(next_[static_cast<std::size_t>(table_[slot])], next_[i]))
        slot = (slot + 1) & (buckets - 1);
      if (table_[slot] < 0) {
        table_[slot] = static_cast<std::int32_t>(kept);
        next_[kept++] = next_[i];
      } else if (State<M>& rival = next_[static_cast<std::size_t>(table_[slot])]; next_[i].value > rival.value) {
        rival = next_[i];
      }
    }
    many_equal_ = kept < next_.size() - next_.size() / 16;
    next_.resize(kept);
  }

  static bool same_slack(const State<M>& a, const State<M>& b) {
    for (int r = 0; r < M; ++r)
      if (a.slack[r] != b.slack[r]) return false;
    return true;
  }

  // Keeps the `room` states of the highest scores, in their order; what is dropped leaves its bound behind.
  void truncate(std::int64_t room, BeamResult& result) {
    if (static_cast<std::int64_t>(next_.size()) <= room) return;
    scores_.resize(next_.size());
    for (std::size_t i = 0; i < next_.size(); ++i) scores_[i] = next_[i].score;
    std::nth_element(scores_.begin(), scores_.begin() + room - 1, scores_.end(), std::greater<double>());
    const double cut = scores_[static_cast<std::size_t>(room - 1)];
    auto equals = room - std::count_if(scores_.begin(), scores_.begin() + room, [&](double x) { return x > cut; });
    std::size_t kept = 0;
    for (const State<M>& state : next_) {
      if (state.score > cut || (state.score == cut && equals-- > 0))
        next_[kept++] = state;
      else
        result.bound = std::max(result.bound, state.bound + margin_);
    }
    next_.resize(kept);
    ++result.truncations;
    lowest_score_ = cut;
  }

  // Tightens the bounds with prices that suit a sample of the states, and drops states that cannot win.
  void tighten_bounds(std::int64_t depth) {
    const std::size_t n = next_.size();
    const bool wide = settings_.width >= kWideBeam;
    const std::size_t samples = std::min<std::size_t>(wide ? kWideSamples : kSamples, n);
    const int steps = wide ? kWideSteps : kSteps;
    bound_prices_.clear();
    for (std::size_t k = 0; k < samples; ++k) {
      const double* slack = next_[k * n / samples].slack;
      Vector price, left;
      std::copy(price_, price_ + M, price.begin());
      std::copy(slack, slack + M, left.begin());
      for (int step = 0; step < steps; ++step) {
        // A Newton step on the dual of the open groups, whose gradient is what their favourites leave of the slack.
        for (int r = 0; r < M; ++r) price[r] = std::max(0.0, price[r] - dot(&steer_[depth][r * M], left.data()));
        std::copy(slack, slack + M, left.begin());
        double open = 0.0;
        for (std::int64_t d = depth; d < n_; ++d) {
          const std::int64_t begin = core_.offset[order_[d]], end = core_.offset[order_[d] + 1];
          std::int64_t favourite = begin;
          double most = -HUGE_VAL;
          for (std::int64_t c = begin; c < end; ++c) {
            const double score = gain_[c] - dot(price.data(), extra_[c].data());
            if (score > most) {
              most = score;
              favourite = c;
            }
          }
          open += most;
          for (int r = 0; r < M; ++r) left[r] -= extra_[favourite][r];
        }
        bound_prices_.emplace_back(price, open);
      }
    }
    std::size_t kept = 0;
    for (std::size_t i = 0; i < n; ++i) {
      State<M>& state = next_[i];
      for (std::size_t k = 0; k < bound_prices_.size() && state.bound + margin_ > best_; ++k) {
        const auto& [price, open] = bound_prices_[k];
        state.bound = std::min(state.bound, state.value + dot(price.data(), state.slack) + open);
      }
      if (state.bound + margin_ > best_) next_[kept++] = state;
    }
    many_hopeless_ = kept < n - n / 16;
    next_.resize(kept);
  }

  const Core& core_;
  const std::int64_t n_;
  const int m_;
  const std::int64_t* favourite_;
  const BeamSettings settings_;
  double price_[M] = {}, root_slack_[M] = {};
  bool active_[M] = {};
  double favourites_value_ = 0.0, size_ = 0.0, margin_ = 0.0, best_ = 0.0;
  // Of each candidate against its group's favourite; loss is the regret with the rounding that may put it below 0, and
  // extra_rc_ has the extra costs resource by resource.
  std::vector<double> gain_, regret_, loss_, extra_rc_;
  // Of the children of a state: their own part of the steering cost, all of it, the least slack that is left of any
  // resource after all that can be saved, and the least slack of those without a price.
  std::vector<double> own_toll_, toll_, room_, spare_;
  std::vector<Vector> extra_, savable_;
  std::vector<Matrix> steer_;
  std::vector<std::int64_t> order_;
  std::vector<State<M>> states_, next_;
  std::vector<std::pair<Vector, double>> bound_prices_;
  std::vector<std::int32_t> table_;
  std::vector<double> scores_;
  double lowest_score_ = 0.0;
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
