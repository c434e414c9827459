"""Pictures and models for trying out the detection pipeline where no hub can be reached; no part of the package.

Plates are drawn from a seed, and a small detector and a tiny language model are trained on them, once for each cache.
"""
