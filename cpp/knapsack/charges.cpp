// Costs that are paid once: the best choice of items by an and-or graph, for every lowest stage at once.
#include <algorithm>

#include "layerlens/knapsack.hpp"

namespace layerlens::knapsack {

namespace {

std::int64_t part_root(const Charges& charges, std::int64_t part, std::int64_t switches, bool below) {
  return charges.root[(part * charges.n_switches + switches) * 2 + (below ? 1 : 0)];
}

// The sum of a row's children, from left to right.
double row_sum(const Charges& charges, std::int64_t row, const double* value) {
  double sum = 0.0;
  for (std::int64_t k = charges.row_begin[row]; k < charges.row_begin[row + 1]; ++k) sum += value[charges.child[k]];
  return sum;
}

void set_nodes(const Charges& charges, const double* best, double* value) {
  std::copy(best, best + charges.n_items, value);
  for (std::int64_t node = 0; node < charges.n_nodes; ++node) {
    double most = -__builtin_inf();
    for (std::int64_t row = charges.node_begin[node]; row < charges.node_begin[node + 1]; ++row)
      most = std::max(most, row_sum(charges, row, value));
    value[charges.n_items + node] = most;
  }
}

}  // namespace

void score_modes(const Charges& charges, const double* best, double* value, double* by_stage, double* mode_score) {
  set_nodes(charges, best, value);
  const std::int64_t n_stages = charges.n_stages, n_switches = charges.n_switches;
  double* const reached = by_stage;
  double* const below = by_stage + n_stages + 1;
  for (std::int64_t w = 0; w < n_switches; ++w) {
    std::fill(by_stage, by_stage + 2 * (n_stages + 1), 0.0);
    double outside = charges.switch_root[w] < 0 ? 0.0 : value[charges.switch_root[w]];
    for (std::int64_t part = 0; part < charges.n_parts; ++part) {
      const std::int64_t stage = charges.stage[part];
      const double here = value[part_root(charges, part, w, false)];
      if (stage < 0) {
        outside += here;
      } else {
        reached[stage] += here;
        below[stage + 1] += value[part_root(charges, part, w, true)];
      }
    }
    for (std::int64_t s = n_stages - 1; s >= 0; --s) reached[s] += reached[s + 1];
    for (std::int64_t s = 1; s <= n_stages; ++s) below[s] += below[s - 1];
    for (std::int64_t s = 0; s <= n_stages; ++s) {
      const double depth = s < n_stages ? value[charges.stage_item[s]] : 0.0;
      mode_score[s * n_switches + w] = ((outside + reached[s]) + below[s]) + depth;
    }
  }
}

std::int64_t items_of_mode(const Charges& charges, const double* value, std::int64_t mode, std::int64_t* stack,
                           std::int64_t* item) {
  const std::int64_t s = mode / charges.n_switches, w = mode % charges.n_switches;
  std::int64_t found = 0;
  const auto collect = [&](std::int64_t root) {
    std::int64_t depth = 0;
    stack[depth++] = root;
    while (depth > 0) {
      const std::int64_t at = stack[--depth];
      if (at < charges.n_items) {
        item[found++] = at;
        continue;
      }
      const std::int64_t node = at - charges.n_items;
      std::int64_t row = charges.node_begin[node];
      while (row + 1 < charges.node_begin[node + 1] && row_sum(charges, row, value) != value[at]) ++row;
      for (std::int64_t k = charges.row_begin[row + 1] - 1; k >= charges.row_begin[row]; --k)
        stack[depth++] = charges.child[k];
    }
  };
  if (charges.switch_root[w] >= 0) collect(charges.switch_root[w]);
  if (s < charges.n_stages) item[found++] = charges.stage_item[s];
  for (std::int64_t part = 0; part < charges.n_parts; ++part)
    collect(part_root(charges, part, w, charges.stage[part] >= 0 && charges.stage[part] < s));
  return found;
}

void item_totals(const Instance& instance, const std::int64_t* choice, const std::int64_t* item, std::int64_t n_items,
                 double* totals) {
  std::fill(totals, totals + 1 + instance.n_resources, 0.0);
  for (std::int64_t i = 0; i < n_items; ++i) {
    const std::int64_t option = choice[item[i]];
    totals[0] += instance.value[option];
    for (int r = 0; r < instance.n_resources; ++r) totals[1 + r] += instance.cost[r][option];
  }
}

}  // namespace layerlens::knapsack
