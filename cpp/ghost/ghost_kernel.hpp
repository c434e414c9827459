// The ghost forms on registers; included once per instruction set.
#pragma once

#include "common/registers.hpp"
#include "ghost/ghost_isa.hpp"

namespace layerlens {
namespace {

// --- Gram form: tiles of dot products between tokens ----------------------------------------------------------------

// A tile of tile_left x tile_right = `width` dot products: one register once its lanes are summed. 4 x 4 for AVX-512
// needs 8 loads for 16 multiply-adds, so the FMA units are the limit, not the load ports.
template <class Scalar>
constexpr int tile_left = width<Scalar> >= 8 ? 4 : 2;
template <class Scalar>
constexpr int tile_right = width<Scalar> / tile_left<Scalar>;

template <class Scalar>
LL_INLINE const Scalar* row(const Rows<Scalar>& x, ptrdiff_t t, ptrdiff_t tokens) {
  return x.data + (t < tokens ? t : tokens - 1) * x.stride;  // a row beyond the last is masked out by its weight
}

// Lane r * tile_right + c: left row r . right row c.
template <class Scalar>
LL_INLINE Register<Scalar> dot_tile(const Rows<Scalar>& left, ptrdiff_t t, const Rows<Scalar>& right, ptrdiff_t s,
                                    ptrdiff_t tokens) {
  constexpr int R = tile_left<Scalar>, C = tile_right<Scalar>, L = width<Scalar>;
  const Scalar *a[R], *b[C];
  for (int r = 0; r < R; ++r) a[r] = row(left, t + r, tokens);
  for (int c = 0; c < C; ++c) b[c] = row(right, s + c, tokens);
  Register<Scalar> sums[R * C];
  for (int i = 0; i < R * C; ++i) sums[i] = Register<Scalar>{};

  const ptrdiff_t n = left.n;
  ptrdiff_t k = 0;
  for (; k + L <= n; k += L) {
    Register<Scalar> bk[C];
    for (int c = 0; c < C; ++c) bk[c] = load(b[c] + k);
    for (int r = 0; r < R; ++r) {
      const Register<Scalar> ak = load(a[r] + k);
      for (int c = 0; c < C; ++c) sums[r * C + c] = fused(ak, bk[c], sums[r * C + c]);
    }
  }
  if (k < n) {
    const size_t rest = static_cast<size_t>(n - k) * sizeof(Scalar);
    Scalar padded_a[R][L] = {}, padded_b[C][L] = {};
    for (int r = 0; r < R; ++r) __builtin_memcpy(padded_a[r], a[r] + k, rest);
    for (int c = 0; c < C; ++c) __builtin_memcpy(padded_b[c], b[c] + k, rest);
    for (int r = 0; r < R; ++r) {
      for (int c = 0; c < C; ++c) sums[r * C + c] = fused(load(padded_a[r]), load(padded_b[c]), sums[r * C + c]);
    }
  }
  return sums_of_lanes<Scalar, L>(sums);
}

template <class Scalar>
struct Tile {
  Scalar h[width<Scalar>], d[width<Scalar>];

  LL_INLINE Tile(const Rows<Scalar>& h1, const Rows<Scalar>& d1, ptrdiff_t t, const Rows<Scalar>& h2,
                 const Rows<Scalar>& d2, ptrdiff_t s, ptrdiff_t tokens) {
    const Register<Scalar> dots_h = dot_tile(h1, t, h2, s, tokens), dots_d = dot_tile(d1, t, d2, s, tokens);
    __builtin_memcpy(h, &dots_h, sizeof h);
    __builtin_memcpy(d, &dots_d, sizeof d);
  }
  LL_INLINE double product(int i) const { return static_cast<double>(h[i]) * static_cast<double>(d[i]); }
  LL_INLINE double sum() const {
    double total = 0.0;
    for (int i = 0; i < width<Scalar>; ++i) total += product(i);
    return total;
  }
};

// Symmetric: only tiles on and above the diagonal.
template <class Scalar>
LL_INLINE GramSum gram(const Rows<Scalar>& h, const Rows<Scalar>& d, ptrdiff_t tokens) {
  constexpr int R = tile_left<Scalar>, C = tile_right<Scalar>;
  double above = 0.0, diagonal = 0.0, largest_h = 0.0, largest_d = 0.0;
  for (ptrdiff_t t = 0; t < tokens; t += R) {
    for (ptrdiff_t s = t / C * C; s < tokens; s += C) {
      const Tile<Scalar> tile(h, d, t, h, d, s, tokens);
      if (s >= t + R && t + R <= tokens && s + C <= tokens) {
        above += tile.sum();
        continue;
      }
      for (int i = 0; i < R * C; ++i) {
        const ptrdiff_t left = t + i / C, right = s + i % C;
        if (left >= tokens || right >= tokens || right < left) continue;
        if (right > left) {
          above += tile.product(i);
        } else {
          diagonal += tile.product(i);
          largest_h = tile.h[i] > largest_h ? tile.h[i] : largest_h;
          largest_d = tile.d[i] > largest_d ? tile.d[i] : largest_d;
        }
      }
    }
  }
  return {diagonal + 2.0 * above, largest_h, largest_d};
}

template <class Scalar>
LL_INLINE double cross(const Rows<Scalar>& h1, const Rows<Scalar>& d1, const Rows<Scalar>& h2, const Rows<Scalar>& d2,
                       ptrdiff_t tokens) {
  constexpr int R = tile_left<Scalar>, C = tile_right<Scalar>;
  double total = 0.0;
  for (ptrdiff_t t = 0; t < tokens; t += R) {
    for (ptrdiff_t s = 0; s < tokens; s += C) {
      const Tile<Scalar> tile(h1, d1, t, h2, d2, s, tokens);
      if (t + R <= tokens && s + C <= tokens) {
        total += tile.sum();
      } else {
        for (int i = 0; i < R * C; ++i) {
          if (t + i / C < tokens && s + i % C < tokens) total += tile.product(i);
        }
      }
    }
  }
  return total;
}

// --- Direct form: tiles of the gradient, accumulated over the tokens in registers -----------------------------------

// rows x cols of the gradient. 12 x 2 registers of sums (AVX-512: 24 of 32), 6 x 2 where there are 16 registers: more
// independent chains than 2 FMA ports * 4 cycles of latency, and fewer loads than multiply-adds.
constexpr int direct_rows = register_bytes == 64 ? 12 : 6;
template <class Scalar>
constexpr int direct_cols = 2 * width<Scalar>;

// Squares are added in f64: exact for f32, and out of reach of its range.
LL_INLINE void add_squares(f32_register g, f64_register (&energy)[2]) {
  const f64_register low = widen_low(g), high = widen_high(g);
  energy[0] = fused(low, low, energy[0]);
  energy[1] = fused(high, high, energy[1]);
}
LL_INLINE void add_squares(f64_register g, f64_register (&energy)[2]) { energy[0] = fused(g, g, energy[0]); }

template <class Scalar>
LL_INLINE double direct(const Scalar* h_panels, const Scalar* d_panels, ptrdiff_t d_in, ptrdiff_t d_out,
                        ptrdiff_t tokens) {
  constexpr int R = direct_rows, L = width<Scalar>, C = direct_cols<Scalar>;
  f64_register energy[2][2] = {};
  for (ptrdiff_t j = 0; j < d_in; j += C) {
    const Scalar* const h = h_panels + j * tokens;
    for (ptrdiff_t i = 0; i < d_out; i += R) {
      const Scalar* const d = d_panels + i * tokens;
      Register<Scalar> g[R][2];
      for (int r = 0; r < R; ++r) g[r][0] = g[r][1] = Register<Scalar>{};
      for (ptrdiff_t t = 0; t < tokens; ++t) {
        const Register<Scalar> h0 = load(h + t * C), h1 = load(h + t * C + L);
        for (int r = 0; r < R; ++r) {
          const Register<Scalar> dr = broadcast(d + t * R + r);
          g[r][0] = fused(dr, h0, g[r][0]);
          g[r][1] = fused(dr, h1, g[r][1]);
        }
      }
      for (int r = 0; r < R; ++r) {
        add_squares(g[r][0], energy[0]);
        add_squares(g[r][1], energy[1]);
      }
    }
  }
  const f64_register sum = (energy[0][0] + energy[0][1]) + (energy[1][0] + energy[1][1]);
  double total = 0.0;
  for (int lane = 0; lane < width<double>; ++lane) total += sum[lane];
  return total;
}

// --- 16-bit input ---------------------------------------------------------------------------------------------------

LL_INLINE void widen_row(DType dtype, const void* data, ptrdiff_t n, float* out) {
  const uint16_t* x = static_cast<const uint16_t*>(data);
  for (ptrdiff_t i = 0; i < n; i += 16) {
    uint16_t padded[16] = {};
    const uint16_t* from = x + i;
    if (i + 16 > n) {
      __builtin_memcpy(padded, from, static_cast<size_t>(n - i) * sizeof(uint16_t));
      from = padded;
    }
    const f32x16 values = dtype == DType::bf16 ? load_bf16x16(from) : load_f16x16(from);
    if (i + 16 <= n) {
      values.store(out + i);
    } else {
      float rest[16];
      values.store(rest);
      __builtin_memcpy(out + i, rest, static_cast<size_t>(n - i) * sizeof(float));
    }
  }
}

}  // namespace
}  // namespace layerlens

#define LAYERLENS_DEFINE_GHOST(isa)                                                                                   \
  namespace layerlens {                                                                                               \
  DirectTile direct_tile_##isa(bool wide) noexcept {                                                                  \
    return {direct_rows, wide ? direct_cols<double> : direct_cols<float>};                                            \
  }                                                                                                                   \
  GramSum gram_f32_##isa(Rows<float> h, Rows<float> d, std::ptrdiff_t tokens) noexcept { return gram(h, d, tokens); } \
  GramSum gram_f64_##isa(Rows<double> h, Rows<double> d, std::ptrdiff_t tokens) noexcept {                            \
    return gram(h, d, tokens);                                                                                        \
  }                                                                                                                   \
  double cross_f32_##isa(Rows<float> h1, Rows<float> d1, Rows<float> h2, Rows<float> d2,                              \
                         std::ptrdiff_t tokens) noexcept {                                                            \
    return cross(h1, d1, h2, d2, tokens);                                                                             \
  }                                                                                                                   \
  double cross_f64_##isa(Rows<double> h1, Rows<double> d1, Rows<double> h2, Rows<double> d2,                          \
                         std::ptrdiff_t tokens) noexcept {                                                            \
    return cross(h1, d1, h2, d2, tokens);                                                                             \
  }                                                                                                                   \
  double direct_f32_##isa(const float* h_panels, const float* d_panels, std::ptrdiff_t d_in, std::ptrdiff_t d_out,    \
                          std::ptrdiff_t tokens) noexcept {                                                           \
    return direct(h_panels, d_panels, d_in, d_out, tokens);                                                           \
  }                                                                                                                   \
  double direct_f64_##isa(const double* h_panels, const double* d_panels, std::ptrdiff_t d_in, std::ptrdiff_t d_out,  \
                          std::ptrdiff_t tokens) noexcept {                                                           \
    return direct(h_panels, d_panels, d_in, d_out, tokens);                                                           \
  }                                                                                                                   \
  void widen_row_##isa(DType dtype, const void* x, std::ptrdiff_t n, float* out) noexcept {                           \
    widen_row(dtype, x, n, out);                                                                                      \
  }                                                                                                                   \
  }
