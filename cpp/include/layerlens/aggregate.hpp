// One score per layer from several metrics.
#pragma once

#include <cstddef>

namespace layerlens {

// out[l] = sum_m weights[m] * metrics[m, l] / max_l |metrics[m, l]| / sum_m weights[m], metrics row-major
// [count, layers]; a metric that is zero everywhere adds zero. Added in the order of the metrics, so NumPy gives the
// same bits. Weights must be finite, not negative, and not all zero.
//
// Returns -1, or, leaving `out` alone, the index into `metrics` of the first NaN or infinity.
std::ptrdiff_t aggregate_scores(const double* metrics, const double* weights, std::ptrdiff_t count,
                                std::ptrdiff_t layers, double* out) noexcept;

}  // namespace layerlens
