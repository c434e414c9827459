// Rademacher probes for Hutchinson's trace estimate: z_i = +1 or -1, E[z^T A z] = tr A.
//
// The generator is SplitMix64 (Steele, Lea, Flood 2014) addressed by counter: word w of probe p is a pure function of
// (seed, p, w) and gives the signs of elements 64 w ... 64 w + 63. Any part of any probe can be had at any time, on any
// thread, in any order, and nothing needs to be stored.
#pragma once

#include <cstddef>
#include <cstdint>

#include "layerlens/arrays.hpp"

namespace layerlens {

// Bit i of the word is 1 where z is -1.
std::uint64_t rademacher_word(std::uint64_t seed, std::uint64_t probe, std::uint64_t word) noexcept;

void fill_rademacher(std::uint64_t seed, std::uint64_t probe, float* out, std::ptrdiff_t n) noexcept;
void fill_rademacher(std::uint64_t seed, std::uint64_t probe, double* out, std::ptrdiff_t n) noexcept;

// sum_i z_i y_i in f64, for y of n f32 or f64 elements `stride` bytes apart: 64 lanes, then a tree; error at most
// (n / 64 + 7) 2^-53 sum |y|.
double rademacher_dot(std::uint64_t seed, std::uint64_t probe, const void* y, DType dtype, std::ptrdiff_t n,
                      std::ptrdiff_t stride) noexcept;

}  // namespace layerlens
