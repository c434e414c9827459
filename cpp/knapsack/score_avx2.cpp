#ifdef LAYERLENS_X86
#include <immintrin.h>

#include "knapsack/score_kernels.hpp"

namespace layerlens::knapsack {

Favourite score_group_avx2(const Instance& instance, const double* price, std::int64_t begin, std::int64_t end) {
  const double infinity = __builtin_inf();
  __m256d best_f64x4 = _mm256_set1_pd(-infinity);
  __m256i where_i64x4 = _mm256_set1_epi64x(begin);
  __m256i option_i64x4 = _mm256_add_epi64(where_i64x4, _mm256_setr_epi64x(0, 1, 2, 3));
  std::int64_t option = begin;
  for (; option + 4 <= end; option += 4) {
    __m256d score_f64x4 = _mm256_loadu_pd(instance.value + option);
    for (int r = 0; r < instance.n_resources; ++r)
      score_f64x4 = _mm256_sub_pd(score_f64x4,
                                  _mm256_mul_pd(_mm256_set1_pd(price[r]), _mm256_loadu_pd(instance.cost[r] + option)));
    const __m256d better = _mm256_cmp_pd(score_f64x4, best_f64x4, _CMP_GT_OQ);
    best_f64x4 = _mm256_blendv_pd(best_f64x4, score_f64x4, better);
    where_i64x4 = _mm256_castpd_si256(
        _mm256_blendv_pd(_mm256_castsi256_pd(where_i64x4), _mm256_castsi256_pd(option_i64x4), better));
    option_i64x4 = _mm256_add_epi64(option_i64x4, _mm256_set1_epi64x(4));
  }
  alignas(32) double score[4];
  alignas(32) long long where[4];
  _mm256_store_pd(score, best_f64x4);
  _mm256_store_si256(reinterpret_cast<__m256i*>(where), where_i64x4);
  Favourite favourite{begin, -infinity};
  for (int lane = 0; lane < 4; ++lane)
    if (score[lane] > favourite.score || (score[lane] == favourite.score && where[lane] < favourite.option))
      favourite = {where[lane], score[lane]};
  for (; option < end; ++option) {
    double rest = instance.value[option];
    for (int r = 0; r < instance.n_resources; ++r) rest -= price[r] * instance.cost[r][option];
    if (rest > favourite.score) favourite = {option, rest};
  }
  return favourite;
}

}  // namespace layerlens::knapsack
#endif
