// Upper concave hulls of value over cost, one for each group: the steps that the optimum takes as one budget grows.
#include <algorithm>
#include <cmath>
#include <vector>

#include "layerlens/knapsack.hpp"

namespace layerlens::knapsack {

namespace {

// Fewer options are sorted before a second thread is awake.
constexpr std::int64_t kParallelOptions = 1 << 14;

struct Point {
  double cost;
  double value;
  std::int64_t option;
};

// Whether b lies on or below the line from a to c, all of whose costs and values rise from a to b and to c.
bool below(const Point& a, const Point& b, const Point& c) {
  const double rise_b = b.value - a.value, run_b = b.cost - a.cost, rise_c = c.value - a.value, run_c = c.cost - a.cost;
  const double left = rise_b * run_c, right = rise_c * run_b;
  if (std::isnormal(left) && std::isnormal(right)) return left <= right;
  // A product overflowed or lost digits to underflow: fractions in [1/4, 1) and exponents apart.
  int exponent[4] = {0, 0, 0, 0};
  const double left_part = std::frexp(rise_b, &exponent[0]) * std::frexp(run_c, &exponent[1]);
  const double right_part = std::frexp(rise_c, &exponent[2]) * std::frexp(run_b, &exponent[3]);
  return std::ldexp(left_part, exponent[0] + exponent[1] - exponent[2] - exponent[3]) <= right_part;
}

}  // namespace

std::int64_t group_hulls(std::int64_t n_groups, const std::int64_t* offset, const double* value, const double* cost,
                         std::int64_t* hull, std::int64_t* length, int threads) {
#pragma omp parallel num_threads(threads) if (threads > 1 && offset[n_groups] >= kParallelOptions)
  {
    std::vector<Point> points;
#pragma omp for schedule(static)
    for (std::int64_t group = 0; group < n_groups; ++group) {
      const std::int64_t begin = offset[group], end = offset[group + 1];
      points.clear();
      for (std::int64_t option = begin; option < end; ++option) points.push_back({cost[option], value[option], option});
      std::sort(points.begin(), points.end(), [](const Point& a, const Point& b) {
        if (a.cost != b.cost) return a.cost < b.cost;
        return a.value != b.value ? a.value > b.value : a.option < b.option;
      });
      std::size_t kept = 1;
      for (std::size_t i = 1; i < points.size(); ++i) {
        if (points[i].value <= points[kept - 1].value) continue;  // dearer and not better
        while (kept > 1 && below(points[kept - 2], points[kept - 1], points[i])) --kept;
        points[kept++] = points[i];
      }
      length[group] = static_cast<std::int64_t>(kept);
      for (std::size_t i = 0; i < kept; ++i) hull[begin + static_cast<std::int64_t>(i)] = points[i].option;
    }
  }
  std::int64_t total = 0;
  for (std::int64_t group = 0; group < n_groups; ++group) {
    std::copy(hull + offset[group], hull + offset[group] + length[group], hull + total);
    total += length[group];
  }
  return total;
}

}  // namespace layerlens::knapsack
