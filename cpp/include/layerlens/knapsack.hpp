// Kernels for the multiple-choice multidimensional knapsack problem (MMKP): one option in each group, the largest sum of
// values, every resource within its capacity.
//
// Every function is deterministic to the bit whatever the thread count and instruction set: additions happen in a fixed
// order, products are rounded before they are added (-ffp-contract=off), nothing of libm is called.
//
// Words: a *price* is a Lagrange multiplier in value per unit of a resource; a *score* is value minus priced cost; the
// *favourite* of a group is its option with the highest score; the *regret* of an option is how far its score lies below
// the favourite's. For any prices p >= 0 every allocation x within the capacities C obeys
//     value(x) = bound(p) - p.(C - use(x)) - sum of regrets(x),    bound(p) = p.C + sum of the favourites' scores,
// which is all that the algorithms here rest on.
#pragma once

#include <cstdint>

#include "layerlens/dispatch.hpp"

namespace layerlens::knapsack {

constexpr int kMaxResources = 64;

// Group g owns the options offset[g] .. offset[g+1]-1; cost[r][o] is what option o uses of resource r.
// A value of -infinity marks an option that may not be chosen; each group has at least one finite value.
struct Instance {
  std::int64_t n_groups;
  int n_resources;
  const std::int64_t* offset;
  const double* value;
  const double* const* cost;
  const double* capacity;
};

// Least and greatest number of a row, the sums of each group's least and greatest (plainly rounded), and not_finite,
// which is NaN if any number is NaN or infinite, else 0.
struct RowSummary {
  double lowest;
  double highest;
  double sum_of_lowest;
  double sum_of_highest;
  double not_finite;
};

RowSummary summarise_row(std::int64_t n_groups, const std::int64_t* offset, const double* row, int threads);

// choice[g] = the favourite (the first among equals), best[g] = its score, computed as ((v - p0 c0) - p1 c1) - ...
// totals[0] = sum of best, totals[1] = sum of values, totals[2 + r] = use of resource r, of the favourites; the sums run
// within blocks of groups first, and the blocks are fixed.
void score_groups(Isa isa, const Instance& instance, const double* price, std::int64_t* choice, double* best,
                  double* totals, int threads);

// Options that can be a group's favourite at prices within `reach` of `price`, given the favourites there: those whose
// regret is at most reach . |difference of costs|. Writes them to `option` (room for all options is needed) in ascending
// order, and how many each group has to `count`; returns how many there are.
std::int64_t select_reachable(const Instance& instance, const double* price, const double* reach,
                              const std::int64_t* choice, const double* best, std::int64_t* option, std::int64_t* count,
                              int threads);

// Options whose regret is at most `limit`, in ascending order, with their regrets; favourites have 0. Writes at most
// `room` of them and returns how many there are.
std::int64_t select_core(const Instance& instance, const double* price, const double* best, double limit,
                         std::int64_t room, std::int64_t* option, double* regret);

// The master of the cutting-plane method (Dantzig & Wolfe 1960) within a box:
//   minimise  theta + sum(lambda)  subject to  theta + lambda . use_k >= value_k for every cut k, low <= lambda <= high,
// by the revised simplex method on its dual, with a basis of n_resources + 1 columns. `basis` starts and ends as a
// feasible basis: entries >= 0 are cuts, -1 - r the lower and -1 - n_resources - r the upper side of the box.
// Returns the optimum; on a numerical breakdown (singular basis) -infinity.
double solve_master(int n_resources, int n_cuts, const double* value, const double* use__kr, const double* low,
                    const double* high, int* basis, double* lambda, double* weight);

// A feasible first basis for one cut: the convexity row holds the cut, each resource the side of the box that its slack
// needs.
void first_basis(int n_resources, int cut, const double* use, int* basis);

// The part of an instance that a search may change. Group g of the core owns candidates offset[g] .. offset[g+1]-1, cost
// lies option by option (cost[c * n_resources + r]), and everything outside the core is fixed.
struct Core {
  std::int64_t n_groups;
  int n_resources;
  const std::int64_t* offset;
  const double* value;
  const double* cost__cr;
  const double* capacity;
};

// Use of a resource as an unevaluated sum high + low with |low| <= ulp(high)/2 (Dekker 1971): exact enough that
// high is the correctly rounded total, which is what a budget is compared with.
struct Use {
  double high;
  double low;
};

void add_use(Use& use, double amount);
// total of amount[0..n-1], correctly rounded in all but contrived cases
Use sum_use(std::int64_t n, const double* amount);

// Takes `choice` (a candidate for each core group) and the use of the whole allocation. First repairs: while a capacity
// is exceeded, moves go by least score lost for violation removed. Then improves: one-option moves and pairs of moves
// that raise the value and fit, until there are none (pairs among the `pair_limit` most promising moves).
// Returns whether the allocation now fits; `choice` and `use` are updated.
bool repair(const Core& core, const double* price, std::int64_t* choice, Use* use);
void improve(const Core& core, const double* price, std::int64_t pair_limit, std::int64_t* choice, Use* use);

// The options of each group on the upper concave hull of value over cost, from the cheapest (the best of them) on, as far
// as the value rises; points on a line between others are left out. Writes length[g] options for each group g to `hull`,
// group after group (room for all options is needed), and returns how many there are. The allocations that maximise
// value - price * cost for some price >= 0 are made of these.
std::int64_t group_hulls(std::int64_t n_groups, const std::int64_t* offset, const double* value, const double* cost,
                         std::int64_t* hull, std::int64_t* length, int threads);

// Costs that are paid once. An *item* is a group of an Instance: options of a layer that cause the same charges, or a
// single option that stands for a charge or for the depth of the backward pass. Which items a choice is made of, is an
// and-or graph: a node takes one of its rows, and a row takes all of its children. Children are items (numbers below
// n_items) or earlier nodes (n_items + node); node n owns the rows node_begin[n] .. node_begin[n+1]-1, row k the children
// row_begin[k] .. row_begin[k+1]-1. Nodes share items between rows, never within one.
//
// A *part* is what no charge joins to the rest. Its root depends on which switches (charges that join many parts) are on,
// and on whether the backward pass reaches its stage or ends above it: root[(part * n_switches + switches) * 2 + below].
// stage[part] is -1 for parts outside the chain of stages, whose root does not depend on it. stage_item[s] is the item
// of the lowest stage s, switch_root[w] a node with all switches that are on (-1: none).
// A *mode* s * n_switches + w is a lowest stage and a set of switches; s = n_stages where no stage is reached.
struct Charges {
  std::int64_t n_items, n_nodes, n_parts, n_stages, n_switches;
  const std::int64_t* node_begin;
  const std::int64_t* row_begin;
  const std::int64_t* child;
  const std::int64_t* stage;
  const std::int64_t* root;
  const std::int64_t* stage_item;
  const std::int64_t* switch_root;
};

// best[i] is the best score of each item. Writes the value of every item and node to value [n_items + n_nodes] and the
// best sum of each mode to mode_score [(n_stages + 1) * n_switches]; by_stage [2 * (n_stages + 1)] is room to work in.
void score_modes(const Charges& charges, const double* best, double* value, double* by_stage, double* mode_score);

// The items of the best choice in a mode, given what score_modes wrote to value; returns how many. stack and item have
// room for n_items + n_nodes.
std::int64_t items_of_mode(const Charges& charges, const double* value, std::int64_t mode, std::int64_t* stack,
                           std::int64_t* item);

// totals[0] = value, totals[1 + r] = use of resource r of the items' favourites `choice`.
void item_totals(const Instance& instance, const std::int64_t* choice, const std::int64_t* item, std::int64_t n_items,
                 double* totals);

// How a beam search goes. width: states kept for each group. softness: times n_resources, the number of alternatives
// thought of as open; the order of the groups and the score depend on it. seed: 0 orders the groups by ambiguity, others
// disturb that order, for another search of the same core.
struct BeamSettings {
  std::int64_t width;
  double softness;
  std::uint64_t seed;
};

// Beam search over the groups of a core whose costs and capacities are integers in doubles (sums below 2^53).
//
// `favourite` holds the candidate of each group with the highest score at `price`. Looks for an allocation worth more
// than `threshold` (a sum of values of the core).
//
// value: of the best allocation found, written to `choice`; -infinity (and `choice` untouched) if none beats `threshold`.
// bound: no allocation of the core is worth more, rounding included; with truncations = 0 it is
//   max(value, threshold) up to rounding: the search was exhaustive.
// work: about how many multiplications it took, a measure of time that is the same on every machine.
struct BeamResult {
  double value;
  double bound;
  std::int64_t truncations;
  std::int64_t work;
};

BeamResult beam_search(const Core& core, const BeamSettings& settings, const double* price,
                       const std::int64_t* favourite, double threshold, std::int64_t* choice);

}  // namespace layerlens::knapsack
