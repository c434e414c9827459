// How arrays come into the kernels: an element type, a pointer and byte strides. Nothing is owned.
#pragma once

#include <cstddef>

namespace layerlens {

enum class DType : int { f32 = 0, f64 = 1, bf16 = 2, f16 = 3 };

constexpr std::ptrdiff_t item_size(DType dtype) noexcept {
  return dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2;
}

// A matrix [rows, cols] of `dtype`. Strides are in bytes and may be anything, negative or zero included; elements need
// no alignment.
struct MatrixView {
  const void* data;
  DType dtype;
  std::ptrdiff_t rows;
  std::ptrdiff_t cols;
  std::ptrdiff_t row_stride;
  std::ptrdiff_t col_stride;
};

}  // namespace layerlens
