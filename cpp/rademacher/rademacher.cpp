#include "layerlens/rademacher.hpp"

#include <algorithm>

namespace layerlens {
namespace {

std::uint64_t mix(std::uint64_t z) noexcept {
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  return z ^ (z >> 31);
}

constexpr std::uint64_t golden = 0x9e3779b97f4a7c15u;

// Bit i of word w is 1 where the sign of element 64 w + i is -1.
template <class Scalar>
void fill(std::uint64_t seed, std::uint64_t probe, Scalar* out, std::ptrdiff_t n) noexcept {
  const std::uint64_t stream = mix(mix(seed + golden) + (probe + 1) * golden);
  for (std::ptrdiff_t begin = 0; begin < n; begin += 64) {
    const std::uint64_t word = mix(stream + (static_cast<std::uint64_t>(begin / 64) + 1) * golden);
    const std::ptrdiff_t count = std::min<std::ptrdiff_t>(64, n - begin);
    for (std::ptrdiff_t i = 0; i < count; ++i) out[begin + i] = Scalar(1) - Scalar(2) * Scalar((word >> i) & 1);
  }
}

}  // namespace

void fill_rademacher(std::uint64_t seed, std::uint64_t probe, float* out, std::ptrdiff_t n) noexcept {
  fill(seed, probe, out, n);
}

void fill_rademacher(std::uint64_t seed, std::uint64_t probe, double* out, std::ptrdiff_t n) noexcept {
  fill(seed, probe, out, n);
}

}  // namespace layerlens
