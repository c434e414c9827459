#include "ghost/ghost_kernel.hpp"

LAYERLENS_DEFINE_GHOST(avx512)
