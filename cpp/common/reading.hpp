// Which cache lines a kernel asks for before it needs them. Results are the same bits; which way is the fastest depends
// on the processor, so a call that reads much finds out while it works.
#pragma once

#include <algorithm>
#include <chrono>
#include <cstddef>

#include "common/readings.hpp"

namespace layerlens {

// Finds the fastest way of one worker. Its first turns of `turn_bytes` go to all ways in rotating order; everything
// after them goes to the way whose median time for a byte is the least. That is 3.4 MiB at mixed speed and costs 27
// readings of the clock. In a call that reads less than `worth_bytes` for each worker it takes the lines a page ahead, as
// was best on most processors: most of the data may be in a cache, and the trial would be too much of the call (6 % of
// the time at 16 MiB on a Xeon).
class alignas(64) ReadingTrial {
 public:
  static constexpr std::ptrdiff_t worth_bytes = 32 << 20;

  ReadingTrial(std::ptrdiff_t bytes, int workers) noexcept : turn_(bytes < workers * worth_bytes ? turns : -1) {}

  // The way of the next task, which reads so many bytes. The time from one call to the next is that of the task.
  Reading next(std::ptrdiff_t bytes) noexcept {
    if (turn_ == turns) return chosen_;
    if (turn_ < 0 || read_ >= turn_bytes) end_turn();
    read_ += bytes;
    return turn_ == turns ? chosen_ : way(turn_);
  }

 private:
  using Clock = std::chrono::steady_clock;
  static constexpr int rounds = 9, turns = rounds * reading_count;
  static constexpr std::ptrdiff_t turn_bytes = 128 << 10;

  // Each round begins with another way, so that each follows each.
  static Reading way(int turn) noexcept { return static_cast<Reading>((turn + turn / reading_count) % reading_count); }

  void end_turn() noexcept {
    const Clock::time_point now = Clock::now();
    if (turn_ >= 0) {
      const double seconds = std::chrono::duration<double>(now - start_).count();
      seconds_per_byte_[static_cast<int>(way(turn_))][turn_ / reading_count] = seconds / static_cast<double>(read_);
    }
    start_ = now;
    read_ = 0;
    if (++turn_ == turns) choose();
  }

  void choose() noexcept {
    double least = 0.0;
    for (int candidate = 0; candidate < reading_count; ++candidate) {
      double* const times = seconds_per_byte_[candidate];
      std::nth_element(times, times + rounds / 2, times + rounds);
      if (candidate == 0 || times[rounds / 2] < least) {
        least = times[rounds / 2];
        chosen_ = static_cast<Reading>(candidate);
      }
    }
  }

  int turn_;  // -1 before the first; `turns` when the way is chosen
  Reading chosen_ = Reading::page_ahead;
  std::ptrdiff_t read_ = 0;
  Clock::time_point start_;
  double seconds_per_byte_[reading_count][rounds];
};

}  // namespace layerlens
