#include "layerlens/dispatch.hpp"

#include <pthread.h>

#include <atomic>

#ifdef LAYERLENS_X86
#include <cpuid.h>
#endif

namespace layerlens {
namespace {

#ifdef LAYERLENS_X86
bool has_f16c() noexcept {
  unsigned eax, ebx, ecx, edx;
  return __get_cpuid(1, &eax, &ebx, &ecx, &edx) != 0 && (ecx & bit_F16C) != 0;
}

// __builtin_cpu_supports also asks whether the operating system saves the registers (XGETBV).
bool has_avx2() noexcept {
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
}

bool has_avx512() noexcept {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
#else
bool has_avx2() noexcept { return false; }
bool has_avx512() noexcept { return false; }
#endif

std::atomic<bool> forked_child{false};

}  // namespace

const char* isa_name(Isa isa) noexcept {
  switch (isa) {
    case Isa::avx2:
      return "avx2";
    case Isa::avx512:
      return "avx512";
    default:
      return "scalar";
  }
}

bool isa_available(Isa isa) noexcept {
  switch (isa) {
    case Isa::avx2:
      return has_avx2();
    case Isa::avx512:
      return has_avx512();
    default:
      return true;
  }
}

Isa best_isa() noexcept {
  if (has_avx512()) return Isa::avx512;
  return has_avx2() ? Isa::avx2 : Isa::scalar;
}

void watch_forks() noexcept {
  static const int registered =
      pthread_atfork(nullptr, nullptr, [] { forked_child.store(true, std::memory_order_relaxed); });
  static_cast<void>(registered);
}

bool in_forked_child() noexcept { return forked_child.load(std::memory_order_relaxed); }

}  // namespace layerlens
