// Norms and inner products of the per-sample gradients of a Linear, without forming them.
//
// For sample n with inputs h [T, d_in] and output gradients d [T, d_out] the gradient of the weight is
// g_n = sum_t d_t h_t^T. Then
//     <g_n, g_m> = sum_{t,s} (d_nt . d_ms) (h_nt . h_ms)       (Gram form: no product of size d_out x d_in)
//     |g_n|^2    = sum_{i,j} (sum_t d_nti h_ntj)^2              (direct form, tile by tile, never written to memory)
// which cost about T^2 (d_in + d_out) / 2 and T d_in d_out multiply-adds for a norm (Goodfellow 2015, arXiv:1510.01799;
// Li et al. 2022, arXiv:2110.05679).
//
// Products and short sums are in f32 (f64 if either input is f64), sums of squares in f64. With u the unit roundoff the
// error is at most about (max(d_in + d_out, 2 T) + 8) u | |D|^T |H| |_F^2, without cancellation below 1e-6 relative.
// Bitwise equal for every thread count; instruction sets differ (FMA), within the bound.
#pragma once

#include <cstddef>

#include "layerlens/arrays.hpp"
#include "layerlens/dispatch.hpp"

namespace layerlens {

// A batch of sequences [batch, tokens, features] in memory; strides in bytes, as in MatrixView.
struct SequenceView {
  const void* data;
  DType dtype;
  std::ptrdiff_t batch, tokens, features;
  std::ptrdiff_t batch_stride, token_stride, feature_stride;
};

enum class GhostForm : int { automatic = 0, gram = 1, direct = 2 };

// The form that `automatic` takes.
GhostForm cheaper_ghost_form(std::ptrdiff_t tokens, std::ptrdiff_t d_in, std::ptrdiff_t d_out) noexcept;

// out[n] = |g_n|^2, [batch]. h and d have the same batch and tokens. May throw std::bad_alloc.
void ghost_norms(Isa isa, const SequenceView& h, const SequenceView& d, GhostForm form, double* out, int threads);

// out[n, m] = <g_n, g_m>, [batch, batch], symmetric. May throw std::bad_alloc.
void ghost_gram(Isa isa, const SequenceView& h, const SequenceView& d, double* out, int threads);

}  // namespace layerlens
