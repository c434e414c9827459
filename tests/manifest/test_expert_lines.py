"""What a manifest says of the experts of a mixture."""

from __future__ import annotations

from dataclasses import replace

from layerlens.manifest.summary import expert_lines
from layerlens.models import Manifest


def test_tokens_of_experts_and_those_that_saw_none(manifest: Manifest) -> None:
    assert expert_lines(manifest) == []
    tokens = {"model.layers.0.mlp.experts": [40, 0, 60, 0], "model.layers.1.mlp.experts": [20, 30, 10, 40]}
    statistics = {**(manifest.provenance.statistics or {}), "expert_tokens": tokens}
    found = expert_lines(replace(manifest, provenance=replace(manifest.provenance, statistics=statistics)))
    assert found[0] == "Experts: 8 in 2 blocks; 0 to 60 calibration tokens each, median 30."
    assert "2 experts got no token, so they were not measured (model.layers.0.mlp.experts: 1, 3)" in found[1]
