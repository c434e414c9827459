// Which instruction set the kernels run on, and whether this process may start threads.
//
// The kernels keep no state: every entry point takes the Isa to use. The one place that remembers a choice is the
// Python module layerlens.kernels._dispatch, so that all extension modules, each linked with its own copy of this
// archive, agree.
#pragma once

namespace layerlens {

// In order of preference; `scalar` is the baseline of the machine the compiler targets (SSE2 on x86-64).
enum class Isa : int { scalar = 0, avx2 = 1, avx512 = 2 };

constexpr int isa_count = 3;

// The name that LAYERLENS_ISA and reports use.
const char* isa_name(Isa isa) noexcept;

// True if this build holds the code and this processor and operating system can run it. A few cpuid reads, no state.
bool isa_available(Isa isa) noexcept;

// The fastest available one.
Isa best_isa() noexcept;

// From the first call on, remembers whether this process was forked from the one that called it.
void watch_forks() noexcept;

// True in a child forked after watch_forks(): libgomp's worker threads do not survive a fork, and entering a parallel
// region there waits for them for ever.
bool in_forked_child() noexcept;

}  // namespace layerlens
