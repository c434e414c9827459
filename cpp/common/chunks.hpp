// Cutting rows into chunks and sharing them among threads: what the reductions have in common.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>

#include "layerlens/arrays.hpp"

#ifdef _OPENMP
#include <omp.h>
#endif

namespace layerlens {

// Below this much input a second thread costs more than it brings (waking one takes some microseconds).
constexpr std::ptrdiff_t parallel_minimum_bytes = 128 * 1024;

inline int threads_for(std::ptrdiff_t bytes, std::ptrdiff_t tasks, int threads) noexcept {
  if (bytes < parallel_minimum_bytes || tasks < 2) return 1;
  return tasks < threads ? static_cast<int>(tasks) : threads;
}

// Calls body(task, worker) for every task in [0, tasks), in runs of neighbours that the workers fetch as they get to them.
// Equal shares would wait for a worker that slept and comes late: with dozing workers they mostly took 1.3 to 1.5 times
// as long as one thread alone, runs 0.9 to 1.1 times. The body must not throw.
template <class Body>
void for_each_task(std::ptrdiff_t tasks, int threads, const Body& body) {
  if (threads <= 1) {
    for (std::ptrdiff_t task = 0; task < tasks; ++task) body(task, 0);
    return;
  }
#ifdef _OPENMP
  constexpr std::ptrdiff_t runs_per_worker = 16;
  const std::ptrdiff_t run = tasks / (runs_per_worker * threads) + 1;
#pragma omp parallel num_threads(threads)
  {
    const int worker = omp_get_thread_num();
#pragma omp for schedule(dynamic, run) nowait
    for (std::ptrdiff_t task = 0; task < tasks; ++task) body(task, worker);
  }
#else
  for (std::ptrdiff_t task = 0; task < tasks; ++task) body(task, 0);
#endif
}

// Elements begin .. begin+n of row `row` as contiguous memory: in place if they are, else copied to `scratch`.
inline const void* contiguous_run(const MatrixView& x, std::ptrdiff_t row, std::ptrdiff_t begin, std::ptrdiff_t n,
                                  unsigned char* scratch) noexcept {
  const std::ptrdiff_t size = item_size(x.dtype);
  const unsigned char* from = static_cast<const unsigned char*>(x.data) + row * x.row_stride + begin * x.col_stride;
  if (x.col_stride == size || n <= 1) return from;
  const auto gather = [&](auto element) {
    for (std::ptrdiff_t i = 0; i < n; ++i) {
      std::memcpy(&element, from + i * x.col_stride, sizeof element);
      std::memcpy(scratch + i * sizeof element, &element, sizeof element);
    }
  };
  if (size == 8) gather(double{});
  else if (size == 4) gather(float{});
  else gather(static_cast<unsigned short>(0));
  return scratch;
}

// A buffer that each calling thread keeps from call to call, aligned to a cache line, not initialised.
inline unsigned char* thread_scratch(std::size_t bytes) {
  constexpr std::size_t line = 64;
  thread_local std::unique_ptr<unsigned char[]> buffer;
  thread_local std::size_t capacity = 0;
  if (capacity < bytes + line) {
    buffer.reset();
    capacity = 0;
    buffer.reset(new unsigned char[bytes + line]);
    capacity = bytes + line;
  }
  const std::size_t misaligned = reinterpret_cast<std::uintptr_t>(buffer.get()) % line;
  return buffer.get() + (line - misaligned) % line;
}

}  // namespace layerlens
