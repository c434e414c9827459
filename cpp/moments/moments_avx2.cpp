#include "moments/moments_chunk.hpp"

LAYERLENS_DEFINE_MOMENTS(avx2)
