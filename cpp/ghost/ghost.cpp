#include "layerlens/ghost.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <type_traits>
#include <vector>

#include "common/chunks.hpp"
#include "ghost/ghost_isa.hpp"
#include "layerlens/moments.hpp"

namespace layerlens {
namespace {

using std::ptrdiff_t;

// The functions of one instruction set and one accumulation type.
template <class Scalar>
struct Kernels {
  GramSum (*gram)(Rows<Scalar>, Rows<Scalar>, ptrdiff_t) noexcept;
  double (*cross)(Rows<Scalar>, Rows<Scalar>, Rows<Scalar>, Rows<Scalar>, ptrdiff_t) noexcept;
  double (*direct)(const Scalar*, const Scalar*, ptrdiff_t, ptrdiff_t, ptrdiff_t) noexcept;
  DirectTile tile;
  void (*widen_row)(DType, const void*, ptrdiff_t, float*) noexcept;
};

#define LAYERLENS_GHOST_KERNELS(isa)                                                                       \
  if constexpr (std::is_same_v<Scalar, float>) {                                                           \
    return {gram_f32_##isa, cross_f32_##isa, direct_f32_##isa, direct_tile_##isa(false), widen_row_##isa}; \
  } else {                                                                                                 \
    return {gram_f64_##isa, cross_f64_##isa, direct_f64_##isa, direct_tile_##isa(true), widen_row_##isa};  \
  }

template <class Scalar>
Kernels<Scalar> kernels_for(Isa isa) {
#ifdef LAYERLENS_X86
  if (isa == Isa::avx512) LAYERLENS_GHOST_KERNELS(avx512)
  if (isa == Isa::avx2) LAYERLENS_GHOST_KERNELS(avx2)
#endif
  static_cast<void>(isa);
  LAYERLENS_GHOST_KERNELS(scalar)
}

ptrdiff_t round_up(ptrdiff_t n, ptrdiff_t multiple) { return (n + multiple - 1) / multiple * multiple; }

template <class Scalar>
bool readable_in_place(const SequenceView& x) {
  constexpr DType wanted = std::is_same_v<Scalar, float> ? DType::f32 : DType::f64;
  return x.dtype == wanted && x.feature_stride == static_cast<ptrdiff_t>(sizeof(Scalar)) &&
         x.token_stride % static_cast<ptrdiff_t>(sizeof(Scalar)) == 0;
}

MatrixView sample_of(const SequenceView& x, ptrdiff_t n) {
  const unsigned char* data = static_cast<const unsigned char*>(x.data) + n * x.batch_stride;
  return {data, x.dtype, x.tokens, x.features, x.token_stride, x.feature_stride};
}

// Space to turn one row of anything into Scalars.
struct RowSpace {
  static std::size_t bytes(ptrdiff_t features) { return round_up(features * 8, 64) + round_up(features * 4, 64); }
  unsigned char* gathered;
  float* narrow;
  RowSpace(unsigned char* at, ptrdiff_t features)
      : gathered(at), narrow(reinterpret_cast<float*>(at + round_up(features * 8, 64))) {}
};

template <class Scalar>
void copy_row(const Kernels<Scalar>& kernels, const MatrixView& x, ptrdiff_t t, RowSpace space, Scalar* out) {
  const void* from = contiguous_run(x, t, 0, x.cols, space.gathered);
  constexpr bool narrow = std::is_same_v<Scalar, float>;
  if (x.dtype == DType::f64) {  // then Scalar is double
    std::memcpy(out, from, x.cols * sizeof(double));
  } else if (narrow && x.dtype == DType::f32) {
    std::memcpy(out, from, x.cols * sizeof(float));
  } else {
    float* floats = space.narrow;
    if constexpr (narrow) floats = out;
    if (x.dtype == DType::f32) std::memcpy(floats, from, x.cols * sizeof(float));
    else kernels.widen_row(x.dtype, from, x.cols, floats);
    if constexpr (!narrow) std::copy(floats, floats + x.cols, out);
  }
}

// The rows of one sample, in place if they can be read so, else copied to `space`.
template <class Scalar>
Rows<Scalar> rows_of(const Kernels<Scalar>& kernels, const SequenceView& x, ptrdiff_t n, RowSpace row_space,
                     Scalar* space) {
  const MatrixView sample = sample_of(x, n);
  if (readable_in_place<Scalar>(x)) {
    return {static_cast<const Scalar*>(sample.data), x.token_stride / static_cast<ptrdiff_t>(sizeof(Scalar)),
            x.features};
  }
  for (ptrdiff_t t = 0; t < x.tokens; ++t) copy_row(kernels, sample, t, row_space, space + t * x.features);
  return {space, x.features, x.features};
}

// Copies the rows times the power of two that brings their largest magnitude to [1, 2); its exponent in `exponent`.
// False, and nothing is copied, if the largest magnitude is zero or not finite.
template <class Scalar>
bool scale_rows(Rows<Scalar>& rows, ptrdiff_t tokens, Scalar* space, int& exponent) {
  double largest = 0.0;
  for (ptrdiff_t t = 0; t < tokens; ++t) {
    for (ptrdiff_t i = 0; i < rows.n; ++i) {
      Scalar value;
      std::memcpy(&value, rows.data + t * rows.stride + i, sizeof value);
      if (!(std::fabs(value) <= largest)) largest = std::fabs(value);
    }
  }
  if (largest == 0.0 || !std::isfinite(largest)) return false;
  exponent = std::ilogb(largest);
  for (ptrdiff_t t = 0; t < tokens; ++t) {
    for (ptrdiff_t i = 0; i < rows.n; ++i) {
      Scalar value;
      std::memcpy(&value, rows.data + t * rows.stride + i, sizeof value);
      // In two steps: 2^-exponent alone may be infinite.
      const double half = std::ldexp(static_cast<double>(value), -exponent / 2);
      space[t * rows.n + i] = static_cast<Scalar>(std::ldexp(half, -exponent - -exponent / 2));
    }
  }
  rows = {space, rows.n, rows.n};
  return true;
}

template <class Scalar>
void pack_panels(const Rows<Scalar>& rows, ptrdiff_t tokens, ptrdiff_t width, Scalar* panels) {
  for (ptrdiff_t begin = 0; begin < rows.n; begin += width) {
    const ptrdiff_t count = std::min(width, rows.n - begin);
    for (ptrdiff_t t = 0; t < tokens; ++t, panels += width) {
      std::memcpy(panels, rows.data + t * rows.stride + begin, count * sizeof(Scalar));
      std::fill(panels + count, panels + width, Scalar(0));
    }
  }
}

// Bounds of the largest squared token norm between which f32 (f64) neither overflows nor loses small products.
template <class Scalar>
bool trusted(double largest) {
  return std::is_same_v<Scalar, float> ? largest >= 0x1p-60 && largest <= 0x1p60
                                       : largest >= 0x1p-500 && largest <= 0x1p500;
}

// One worker's memory: rows, scaled rows and panels of one sample.
template <class Scalar>
struct Workspace {
  RowSpace row;
  Scalar *h_rows, *d_rows, *h_panels, *d_panels;

  static std::size_t bytes(const SequenceView& h, const SequenceView& d, DirectTile tile) {
    const ptrdiff_t values =
        h.features + d.features + round_up(h.features, tile.cols) + round_up(d.features, tile.rows);
    return RowSpace::bytes(std::max(h.features, d.features)) + round_up(values * h.tokens * sizeof(Scalar), 64);
  }
  Workspace(unsigned char* at, const SequenceView& h, const SequenceView& d, DirectTile tile)
      : row(at, std::max(h.features, d.features)) {
    h_rows = reinterpret_cast<Scalar*>(at + RowSpace::bytes(std::max(h.features, d.features)));
    d_rows = h_rows + h.features * h.tokens;
    h_panels = d_rows + d.features * d.tokens;
    d_panels = h_panels + round_up(h.features, tile.cols) * h.tokens;
  }
};

template <class Scalar>
double norm_of_rows(const Kernels<Scalar>& kernels, const Rows<Scalar>& h, const Rows<Scalar>& d, ptrdiff_t tokens,
                    GhostForm form, const Workspace<Scalar>& space, bool& in_range) {
  if (form == GhostForm::gram) {
    const GramSum sum = kernels.gram(h, d, tokens);
    in_range = trusted<Scalar>(sum.largest_h) && trusted<Scalar>(sum.largest_d);
    return sum.sum < 0.0 ? 0.0 : sum.sum;  // rounding can bring a vanishing norm below zero
  }
  pack_panels(h, tokens, kernels.tile.cols, space.h_panels);
  pack_panels(d, tokens, kernels.tile.rows, space.d_panels);
  const double sum = kernels.direct(space.h_panels, space.d_panels, h.n, d.n, tokens);
  in_range = trusted<Scalar>(sum);
  return sum;
}

template <class Scalar>
double norm_of_sample(const Kernels<Scalar>& kernels, const SequenceView& h, const SequenceView& d, ptrdiff_t n,
                      GhostForm form, const Workspace<Scalar>& space) {
  Rows<Scalar> h_rows = rows_of(kernels, h, n, space.row, space.h_rows);
  Rows<Scalar> d_rows = rows_of(kernels, d, n, space.row, space.d_rows);
  bool in_range = false;
  const double norm = norm_of_rows(kernels, h_rows, d_rows, h.tokens, form, space, in_range);
  if (in_range) return norm;
  int h_exponent = 0, d_exponent = 0;
  if (!scale_rows(h_rows, h.tokens, space.h_rows, h_exponent)) return norm;
  if (!scale_rows(d_rows, h.tokens, space.d_rows, d_exponent)) return norm;
  const double scaled = norm_of_rows(kernels, h_rows, d_rows, h.tokens, form, space, in_range);
  return std::ldexp(scaled, 2 * (h_exponent + d_exponent));
}

template <class Scalar>
void norms(Isa isa, const SequenceView& h, const SequenceView& d, GhostForm form, double* out, int threads) {
  const Kernels<Scalar> kernels = kernels_for<Scalar>(isa);
  const ptrdiff_t bytes = h.batch * h.tokens * (h.features + d.features) * sizeof(Scalar);
  const int workers = threads_for(bytes, h.batch, threads);
  const std::size_t each = Workspace<Scalar>::bytes(h, d, kernels.tile);
  unsigned char* scratch = thread_scratch(each * workers);
  for_each_task(h.batch, workers, [&](ptrdiff_t n, int worker) {
    const Workspace<Scalar> space(scratch + each * worker, h, d, kernels.tile);
    out[n] = norm_of_sample(kernels, h, d, n, form, space);
  });
}

// All pairs of samples; returns whether every token norm was in the trusted range.
template <class Scalar>
bool pairs(const Kernels<Scalar>& kernels, const std::vector<Rows<Scalar>>& h, const std::vector<Rows<Scalar>>& d,
           ptrdiff_t tokens, double* out, int threads) {
  const ptrdiff_t count = static_cast<ptrdiff_t>(h.size());
  std::vector<unsigned char> in_range(count, 0);
  const auto sample_row = [&](ptrdiff_t n) {
    const GramSum own = kernels.gram(h[n], d[n], tokens);
    in_range[n] = trusted<Scalar>(own.largest_h) && trusted<Scalar>(own.largest_d);
    out[n * count + n] = own.sum < 0.0 ? 0.0 : own.sum;
    for (ptrdiff_t m = n + 1; m < count; ++m) {
      out[n * count + m] = out[m * count + n] = kernels.cross(h[n], d[n], h[m], d[m], tokens);
    }
  };
  // The n-th row of the triangle with the n-th last: all tasks have the same work.
  for_each_task((count + 1) / 2, threads, [&](ptrdiff_t n, int) {
    sample_row(n);
    if (count - 1 - n != n) sample_row(count - 1 - n);
  });
  return std::all_of(in_range.begin(), in_range.end(), [](unsigned char right) { return right != 0; });
}

template <class Scalar>
void gram_matrix(Isa isa, const SequenceView& h, const SequenceView& d, double* out, int threads) {
  const Kernels<Scalar> kernels = kernels_for<Scalar>(isa);
  const ptrdiff_t count = h.batch, h_size = h.tokens * h.features, d_size = d.tokens * d.features;
  const ptrdiff_t bytes = count * count * h.tokens * (h.features + d.features) * sizeof(Scalar);
  const int workers = threads_for(bytes, (count + 1) / 2, threads);
  std::vector<Scalar> h_copy(readable_in_place<Scalar>(h) ? 0 : count * h_size);
  std::vector<Scalar> d_copy(readable_in_place<Scalar>(d) ? 0 : count * d_size);
  const ptrdiff_t widest = std::max(h.features, d.features);
  const RowSpace row_space(thread_scratch(RowSpace::bytes(widest)), widest);
  std::vector<Rows<Scalar>> h_rows(count), d_rows(count);
  for (ptrdiff_t n = 0; n < count; ++n) {
    h_rows[n] = rows_of(kernels, h, n, row_space, h_copy.data() + (h_copy.empty() ? 0 : n * h_size));
    d_rows[n] = rows_of(kernels, d, n, row_space, d_copy.data() + (d_copy.empty() ? 0 : n * d_size));
  }
  if (pairs(kernels, h_rows, d_rows, h.tokens, out, workers)) return;

  // Some token is outside the range: every sample times its own power of two, then back.
  h_copy.resize(count * h_size);
  d_copy.resize(count * d_size);
  std::vector<int> exponents(count, 0);
  for (ptrdiff_t n = 0; n < count; ++n) {
    int h_exponent = 0, d_exponent = 0;
    const bool scaled_h = scale_rows(h_rows[n], h.tokens, h_copy.data() + n * h_size, h_exponent);
    const bool scaled_d = scale_rows(d_rows[n], d.tokens, d_copy.data() + n * d_size, d_exponent);
    exponents[n] = (scaled_h ? h_exponent : 0) + (scaled_d ? d_exponent : 0);
  }
  pairs(kernels, h_rows, d_rows, h.tokens, out, workers);
  for (ptrdiff_t n = 0; n < count; ++n) {
    for (ptrdiff_t m = 0; m < count; ++m) {
      out[n * count + m] = std::ldexp(out[n * count + m], exponents[n] + exponents[m]);
    }
  }
}

}  // namespace

GhostForm cheaper_ghost_form(ptrdiff_t tokens, ptrdiff_t d_in, ptrdiff_t d_out) noexcept {
  // Multiply-adds; 1.15 is what a dot product costs more than its share of an outer product (docs/decisions/kernels.md).
  const double gram = 0.5 * static_cast<double>(tokens + 1) * static_cast<double>(d_in + d_out) * 1.15;
  return gram < static_cast<double>(d_in) * static_cast<double>(d_out) ? GhostForm::gram : GhostForm::direct;
}

void ghost_norms(Isa isa, const SequenceView& h, const SequenceView& d, GhostForm form, double* out, int threads) {
  if (h.tokens == 0 || h.features == 0 || d.features == 0) {
    std::fill(out, out + h.batch, 0.0);
    return;
  }
  if (h.tokens == 1 && form == GhostForm::automatic) {  // |d h^T|^2 = |d|^2 |h|^2
    std::vector<double> h_squares(h.batch);
    row_sum_of_squares(isa, {h.data, h.dtype, h.batch, h.features, h.batch_stride, h.feature_stride}, h_squares.data(),
                       threads);
    row_sum_of_squares(isa, {d.data, d.dtype, d.batch, d.features, d.batch_stride, d.feature_stride}, out, threads);
    for (ptrdiff_t n = 0; n < h.batch; ++n) out[n] *= h_squares[n];
    return;
  }
  if (form == GhostForm::automatic) form = cheaper_ghost_form(h.tokens, h.features, d.features);
  if (h.dtype == DType::f64 || d.dtype == DType::f64) norms<double>(isa, h, d, form, out, threads);
  else norms<float>(isa, h, d, form, out, threads);
}

void ghost_gram(Isa isa, const SequenceView& h, const SequenceView& d, double* out, int threads) {
  if (h.tokens == 0 || h.features == 0 || d.features == 0) {
    std::fill(out, out + h.batch * h.batch, 0.0);
    return;
  }
  if (h.dtype == DType::f64 || d.dtype == DType::f64) gram_matrix<double>(isa, h, d, out, threads);
  else gram_matrix<float>(isa, h, d, out, threads);
}

}  // namespace layerlens
