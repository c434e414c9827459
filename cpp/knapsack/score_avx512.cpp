#ifdef LAYERLENS_X86
#include <immintrin.h>

#include "knapsack/score_kernels.hpp"

namespace layerlens::knapsack {

Favourite score_group_avx512(const Instance& instance, const double* price, std::int64_t begin, std::int64_t end) {
  const double infinity = __builtin_inf();
  __m512d best_f64x8 = _mm512_set1_pd(-infinity);
  __m512i where_i64x8 = _mm512_set1_epi64(begin);
  __m512i option_i64x8 = _mm512_add_epi64(where_i64x8, _mm512_setr_epi64(0, 1, 2, 3, 4, 5, 6, 7));
  for (std::int64_t option = begin; option < end; option += 8) {
    const __mmask8 live = end - option >= 8 ? __mmask8(0xff) : static_cast<__mmask8>((1u << (end - option)) - 1u);
    __m512d score_f64x8 = _mm512_maskz_loadu_pd(live, instance.value + option);
    for (int r = 0; r < instance.n_resources; ++r)
      score_f64x8 = _mm512_sub_pd(
          score_f64x8, _mm512_mul_pd(_mm512_set1_pd(price[r]), _mm512_maskz_loadu_pd(live, instance.cost[r] + option)));
    const __mmask8 better = _mm512_mask_cmp_pd_mask(live, score_f64x8, best_f64x8, _CMP_GT_OQ);
    best_f64x8 = _mm512_mask_mov_pd(best_f64x8, better, score_f64x8);
    where_i64x8 = _mm512_mask_mov_epi64(where_i64x8, better, option_i64x8);
    option_i64x8 = _mm512_add_epi64(option_i64x8, _mm512_set1_epi64(8));
  }
  alignas(64) double score[8];
  alignas(64) long long where[8];
  _mm512_store_pd(score, best_f64x8);
  _mm512_store_si512(where, where_i64x8);
  Favourite favourite{begin, -infinity};
  for (int lane = 0; lane < 8; ++lane)
    if (score[lane] > favourite.score || (score[lane] == favourite.score && where[lane] < favourite.option))
      favourite = {where[lane], score[lane]};
  return favourite;
}

}  // namespace layerlens::knapsack
#endif
