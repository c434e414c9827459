// Rademacher signs, +1 or -1, for random projections.
//
// The generator is SplitMix64 (Steele, Lea, Flood 2014) addressed by counter: word w of probe p is a pure function of
// (seed, p, w) and gives the signs of elements 64 w ... 64 w + 63. Any part of any probe can be had at any time, on any
// thread, in any order, and nothing needs to be stored.
#pragma once

#include <cstddef>
#include <cstdint>

namespace layerlens {

void fill_rademacher(std::uint64_t seed, std::uint64_t probe, float* out, std::ptrdiff_t n) noexcept;
void fill_rademacher(std::uint64_t seed, std::uint64_t probe, double* out, std::ptrdiff_t n) noexcept;

}  // namespace layerlens
