#include "fisher/fisher_tile.hpp"

LAYERLENS_DEFINE_FISHER(avx2)
