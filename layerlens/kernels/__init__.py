"""The compiled kernels, and beside each its plain NumPy twin (`reference.py`), which is its specification.

Nothing here imports torch; CPU tensors come in through DLPack without a copy, bfloat16 included.
"""

from layerlens.kernels._dispatch import available_isas, isa

__all__ = ["available_isas", "isa"]
