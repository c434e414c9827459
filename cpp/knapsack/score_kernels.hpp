// The inner kernels behind score_groups and select_core, one for each instruction set. All return the same bits: a lane
// does what the scalar loop does for its option, and the first of the best options wins.
#pragma once

#include "layerlens/knapsack.hpp"

namespace layerlens::knapsack {

struct Favourite {
  std::int64_t option;
  double score;
};

using ScoreGroup = Favourite (*)(const Instance&, const double* price, std::int64_t begin, std::int64_t end);

Favourite score_group_scalar(const Instance&, const double* price, std::int64_t begin, std::int64_t end);
#ifdef LAYERLENS_X86
Favourite score_group_avx2(const Instance&, const double* price, std::int64_t begin, std::int64_t end);
Favourite score_group_avx512(const Instance&, const double* price, std::int64_t begin, std::int64_t end);
#endif

}  // namespace layerlens::knapsack
