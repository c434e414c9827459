// The empirical Fisher information of a parameter vector from per-sample gradients g [samples, parameters].
#pragma once

#include "layerlens/arrays.hpp"
#include "layerlens/dispatch.hpp"

namespace layerlens {

// mean_n |g_n|^2, the trace of the empirical Fisher; g.rows must be at least 1. Error bound as for moments.
double fisher_trace(Isa isa, const MatrixView& g, int threads);

// out[p] += scale * sum_n g[n, p]^2 with out [cols], contiguous f64 or f32 and aligned as its type. Each column is added
// in the order of the samples in f64, where the square of an f32, bf16 or f16 is exact: at most samples + 2 roundings of
// 2^-53 (one more for f64 input). For an f32 output the scaled sum is rounded to f32 and added in f32: K calls on zeros
// err by at most K roundings of 2^-24. Bitwise equal for every thread count and instruction set. May throw
// std::bad_alloc.
void add_column_sum_of_squares(Isa isa, const MatrixView& g, double scale, DType out_type, void* out, int threads);

}  // namespace layerlens
