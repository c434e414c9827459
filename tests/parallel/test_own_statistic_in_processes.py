"""What two processes sum up of a statistic from outside is what one does."""

from __future__ import annotations

from typing import Any

import numpy as np
import own_statistic_job
from comparison import statistics_in

NAME = "output_gradients"


def test_its_sums_are_added_up(start, settings: dict[str, Any], tmp_path):
    settings["profiling"]["statistics"] = [NAME, "fisher_diagonal"]
    for size in (1, 2):
        job = settings | {"runtime": settings["runtime"] | {"cache_dir": f"cache of {size}"},
                          "output": {"directory": f"out{size}"}}  # fmt: skip
        outcomes = start(size, own_statistic_job.run, lambda rank, job=job: (job, tmp_path))
        assert [outcome.error for outcome in outcomes] == [""] * size
    one, two = (statistics_in(tmp_path / f"out{size}") for size in (1, 2))
    assert one.extra is not None
    assert two.extra is not None
    for name, value in one.extra.items():
        np.testing.assert_array_equal(two.extra[name], value)  # of single samples, in the order of the batches
    for first, second in zip(one.layers, two.layers, strict=True):
        for method, measured in first.by_method.items():
            for name, value in (measured.extra or {}).items():
                other = second.by_method[method].value(name)
                if name == f"{NAME}.square":  # a number of every batch, added in their order
                    assert other == value
                np.testing.assert_allclose(other, value, rtol=1e-5, atol=1e-6 * float(np.max(np.abs(value))))
