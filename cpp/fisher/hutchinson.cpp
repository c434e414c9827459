#include "layerlens/hutchinson.hpp"

#include <algorithm>
#include <cstring>

namespace layerlens {
namespace {

std::uint64_t mix(std::uint64_t z) noexcept {
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
}

constexpr std::uint64_t golden = 0x9e3779b97f4a7c15u;

template <class Scalar>
void fill(std::uint64_t seed, std::uint64_t probe, Scalar* out, std::ptrdiff_t n) noexcept {
    for (std::ptrdiff_t begin = 0; begin < n; begin += 64) {
        const std::uint64_t word = rademacher_word(seed, probe, static_cast<std::uint64_t>(begin / 64));
        const std::ptrdiff_t count = std::min<std::ptrdiff_t>(64, n - begin);
        for (std::ptrdiff_t i = 0; i < count; ++i) out[begin + i] = Scalar(1) - Scalar(2) * Scalar((word >> i) & 1);
    }
}

template <class Scalar>
double dot(std::uint64_t seed, std::uint64_t probe, const unsigned char* y, std::ptrdiff_t n,
           std::ptrdiff_t stride) noexcept {
    double lane[64] = {};
    for (std::ptrdiff_t begin = 0; begin < n; begin += 64) {
        const std::uint64_t word = rademacher_word(seed, probe, static_cast<std::uint64_t>(begin / 64));
        const std::ptrdiff_t count = std::min<std::ptrdiff_t>(64, n - begin);
        for (std::ptrdiff_t i = 0; i < count; ++i) {
            Scalar value;
            std::memcpy(&value, y + (begin + i) * stride, sizeof value);
            lane[i] += ((word >> i) & 1) != 0 ? -static_cast<double>(value) : static_cast<double>(value);
        }
    }
    for (int gap = 32; gap > 0; gap /= 2) {
        for (int i = 0; i < gap; ++i) lane[i] += lane[i + gap];
    }
    return lane[0];
}

}  // namespace

std::uint64_t rademacher_word(std::uint64_t seed, std::uint64_t probe, std::uint64_t word) noexcept {
    const std::uint64_t stream = mix(mix(seed + golden) + (probe + 1) * golden);
    return mix(stream + (word + 1) * golden);
}

void fill_rademacher(std::uint64_t seed, std::uint64_t probe, float* out, std::ptrdiff_t n) noexcept {
    fill(seed, probe, out, n);
}

void fill_rademacher(std::uint64_t seed, std::uint64_t probe, double* out, std::ptrdiff_t n) noexcept {
    fill(seed, probe, out, n);
}

double rademacher_dot(std::uint64_t seed, std::uint64_t probe, const void* y, DType dtype, std::ptrdiff_t n,
                      std::ptrdiff_t stride) noexcept {
    const unsigned char* bytes = static_cast<const unsigned char*>(y);
    return dtype == DType::f64 ? dot<double>(seed, probe, bytes, n, stride) : dot<float>(seed, probe, bytes, n, stride);
}

}  // namespace layerlens
