"""Profiling: statistics of every layer from one pass over the calibration data, and the cache that keeps them.

::

    texts -> Batch ... -> Capture (taps on every module) -> MatrixAccumulator -> MethodStatistics -> ModelStatistics
"""
