#include "layerlens/aggregate.hpp"

#include <algorithm>
#include <cmath>

namespace layerlens {

std::ptrdiff_t aggregate_scores(const double* metrics, const double* weights, std::ptrdiff_t count,
                                std::ptrdiff_t layers, double* out) noexcept {
  for (std::ptrdiff_t i = 0; i < count * layers; ++i) {
    if (!std::isfinite(metrics[i])) return i;
  }
  double total = 0.0;
  for (std::ptrdiff_t m = 0; m < count; ++m) total += weights[m];
  std::fill(out, out + layers, 0.0);
  for (std::ptrdiff_t m = 0; m < count; ++m) {
    const double* x = metrics + m * layers;
    double largest = 0.0;
    for (std::ptrdiff_t l = 0; l < layers; ++l) largest = std::max(largest, std::fabs(x[l]));
    if (largest == 0.0) continue;
    const double share = weights[m] / total;
    for (std::ptrdiff_t l = 0; l < layers; ++l) out[l] += share * (x[l] / largest);
  }
  return -1;
}

}  // namespace layerlens
