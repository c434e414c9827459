"""Manifests on disk: a golden file guards the format, reading returns what was written, and bad fields are named."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
from pathlib import Path
from typing import get_args

import jsonschema
import numpy as np
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from layerlens import registry
from layerlens.exceptions import ManifestError, OutputError
from layerlens.manifest import manifest_schema, read_document, read_manifest, write_manifest
from layerlens.manifest.schema import AllocationEntry, ManifestDocument, ResourceEntry
from layerlens.models import (
    LoraSettings,
    Manifest,
    ManifestRow,
    ModelFacts,
    Predicted,
    Provenance,
    ResourceUse,
)
from layerlens.models.manifest import SCHEMA_VERSION

GOLDEN = Path(__file__).parent / "golden"
SCHEMA = Path(__file__).parents[2] / "docs" / "manifest.schema.json"


@pytest.mark.parametrize("name", ["manifest.json", "manifest.yaml"])
def test_bytes_are_those_of_the_golden_file(manifest, created_at, tmp_path, name):
    write_manifest(manifest, tmp_path, created_at=created_at)
    assert (tmp_path / name).read_bytes() == (GOLDEN / name).read_bytes()


@pytest.mark.parametrize("name", ["manifest.json", "manifest.yaml"])
def test_the_golden_file_reads_as_the_manifest(manifest, created_at, name):
    assert read_document(GOLDEN / name) == (manifest, created_at)


def test_only_the_timestamp_tells_two_writes_apart(manifest, tmp_path):
    first = write_manifest(manifest, tmp_path / "a", created_at="2026-01-31T12:00:00Z")
    second = write_manifest(manifest, tmp_path / "b", created_at="2027-02-28T00:00:00.5+00:00")
    for kind in ("manifest_json", "manifest_yaml"):
        lines = zip(first[kind].read_text().splitlines(), second[kind].read_text().splitlines(), strict=True)
        assert [one.split(":")[0].strip(' "') for one, other in lines if one != other] == ["created_at"]


def test_json_and_yaml_hold_the_same_in_the_same_order(manifest, created_at, tmp_path):
    paths = write_manifest(manifest, tmp_path, created_at=created_at)
    from_json = json.loads(paths["manifest_json"].read_text())
    from_yaml = yaml.safe_load(paths["manifest_yaml"].read_text())
    assert json.dumps(from_json) == json.dumps(from_yaml)
    origin = ["layer", "method", "rank", "utility", "cost", "flops", "vram", "latency", "total_score"]
    assert list(from_json["allocations"][0]) == origin
    names = [field.name for field in dataclasses.fields(Manifest)]
    assert list(from_json)[2:] == [name for name in names if name != "checkpointed"]  # where no block is
    paths = write_manifest(dataclasses.replace(manifest, checkpointed=("h.0",)), tmp_path, created_at=created_at)
    assert list(json.loads(paths["manifest_json"].read_text()))[2:] == names
    assert read_document(paths["manifest_yaml"])[0].checkpointed == ("h.0",)


finite = st.floats(allow_nan=False, allow_infinity=False)
text = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63) | finite | text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3),
    max_leaves=5,
)
METHODS = ("none", *registry.METHODS)
sizes = st.sampled_from(METHODS).flatmap(
    lambda method: st.tuples(st.just(method), st.just(0) if method == "none" else st.integers(1, 999))
)
rows = st.lists(
    st.builds(lambda layer, size, cost, rest: ManifestRow(layer, *size, rest[0], cost, *rest[1:]),
              text, sizes, st.integers(0, 2**62), st.lists(finite, min_size=5, max_size=5)),
    min_size=1, max_size=3, unique_by=lambda row: row.layer,
)  # fmt: skip


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=rows, values=st.lists(finite, min_size=4, max_size=4), free=st.dictionaries(text, json_values, max_size=3),
       words=text)  # fmt: skip
def test_whatever_is_written_reads_back_equal(manifest, created_at, tmp_path, rows, values, free, words):
    # Scores that cannot overflow in a sum, and what must agree agrees.
    rows = [dataclasses.replace(row, total_score=row.total_score / 4) for row in rows]
    added = float(sum(row.cost for row in rows))
    uses = (
        ResourceUse("trainable_params", None, 0.0, added, added, 0.0, "exact"),
        *(ResourceUse(name, None, *values[:4], source=words) for name in ("flops", "vram_gb", "latency_ms", "joules")),
    )
    written = dataclasses.replace(
        manifest,
        allocations=tuple(rows),
        resources=uses,
        score=math.fsum(row.total_score for row in rows),
        model=ModelFacts(extra=free),
        provenance=Provenance(seed=3, extra=free),
        solver=words,
    )
    for path in write_manifest(written, tmp_path, created_at=created_at).values():
        assert read_manifest(path) == written


def test_numpy_values_are_written_as_plain_ones(manifest, created_at, tmp_path):
    row = dataclasses.replace(manifest.allocations[0], rank=np.int64(4), utility=np.float64(0.1) + 0.2)
    provenance = dataclasses.replace(manifest.provenance, seed=np.int32(0))
    arrays = dataclasses.replace(
        manifest, allocations=(row, *manifest.allocations[1:]), provenance=provenance, score=np.float64(0.75)
    )
    path = write_manifest(arrays, tmp_path, created_at=created_at)["manifest_json"]
    assert path.read_bytes() == (GOLDEN / "manifest.json").read_bytes()


def set_in(document, place, value):
    changed = copy.deepcopy(document)
    *parents, last = place
    target = changed
    for key in parents:
        target = target[key]
    if value is KeyError:
        del target[last]
    else:
        target[last] = value
    return changed


QUERY = "bert.encoder.layer.0.attention.self.query"
WRONG = [
    (("schema_version",), "2.0", "schema_version: this LayerLens reads version '1.0', got '2.0'"),
    (("schema_version",), KeyError, "schema_version: .* got none"),
    (("created_at",), "yesterday", "created_at: .*ISO 8601"),
    (("created_at",), "2026-01-31T12:00:00+01:00", "created_at: .*UTC"),
    (("created_at",), "2026-13-31T12:00:00Z", "created_at: .*month"),
    (("allocations", 0, "method"), "loha", r"allocations\[0\].method: .*'lora'.* got 'loha'"),
    (("allocations", 0, "rank"), 0, r"allocations\[0\]: rank 0 does not fit method 'lora'"),
    (("allocations", 1, "rank"), 3, r"allocations\[1\]: rank 3 does not fit method 'none'"),
    (("allocations", 0, "rank"), -1, r"allocations\[0\].rank"),
    (("allocations", 0, "rank"), 4.0, r"allocations\[0\].rank: must be a whole number, got 4.0"),
    (("allocations", 0, "rank"), True, r"allocations\[0\].rank"),
    (("allocations", 0, "cost"), "many", r"allocations\[0\].cost"),
    (("allocations", 0, "cost"), KeyError, r"allocations\[0\].cost: is missing"),
    (("allocations", 1, "layer"), QUERY, f"allocations: layer '{QUERY}' appears twice"),
    (("allocations", 0, "layer"), "", r"allocations\[0\].layer"),
    (("allocations", 0, "speed"), 1, r"allocations\[0\].speed: unknown key; known here: layer, method, rank"),
    (("allocations", 0, "latencies"), 1, r"allocations\[0\].latencies: unknown key, did you mean 'latency'\?"),
    (("allocations", 2, "vram"), float("nan"), r"allocations\[2\].vram: .*finite"),
    (("allocations", 2, "vram"), False, r"allocations\[2\].vram: .*number"),
    (("allocations",), {}, "allocations: .*list"),
    (("allocations",), [], r"allocations: must not be empty, got \[\]"),
    (("allocations", 0, "cost"), 3073, "resources: trainable_params adds 7311, but the costs .* sum to 7312"),
    (("resources", 1, "resource"), "joules", "resources: no row for flops"),
    (("resources",), [], "resources: no row for trainable_params, flops, vram_gb, latency_ms"),
    (("resources",), KeyError, "resources: is missing"),
    (("resorces",), [], "resorces: unknown key, did you mean 'resources'"),
    (("score",), 0.7500009, "score: 0.7500009 is not the sum of total_score"),
    (("provenance", "seed"), KeyError, "provenance.seed: is missing"),
    (("provenance", "seed"), 1.5, "provenance.seed: must be a whole number, got 1.5"),
    (("provenance",), 5, "provenance: must be a mapping, got 5"),
    (("lora", "alpha_over_r"), KeyError, "lora.alpha_over_r: is missing"),
    (("lora", "alpha_over_r"), 0, "lora.alpha_over_r: must be greater than 0, got 0"),
    (("lora", "note"), [float("inf")], "lora.note.0 is inf"),
    (("model", "labels"), 5, "model.labels: must be a list, got 5"),
    (("model", "labels", 0), 5, r"model.labels\[0\]: must be text, got 5"),
    (("model", "task"), None, "model.task: must be text, got None"),
    (("model", "num_labels"), "three", "model.num_labels: must be a whole number, got 'three'"),
    (("resources", 1, "resource"), "vram_gb", "resources: resource 'vram_gb' appears twice"),
    (("upper_bound",), float("inf"), "upper_bound: .*finite"),
    (("gap",), -0.1, "gap"),
    (("status",), "good", "status: .*'optimal'"),
    (("provenance", "config", "ranks"), [1, float("nan")], "provenance.config.ranks.1 is nan"),
    (("solver",), KeyError, "solver: is missing"),
]


@pytest.mark.parametrize("kind", ["json", "yaml"])
@pytest.mark.parametrize(("place", "value", "message"), WRONG)
def test_a_wrong_field_is_named(tmp_path, place, value, message, kind):
    document = set_in(json.loads((GOLDEN / "manifest.json").read_text()), place, value)
    path = tmp_path / f"bad.{kind}"
    path.write_text(json.dumps(document) if kind == "json" else yaml.safe_dump(document))
    with pytest.raises(ManifestError, match=message) as refusal:
        read_manifest(path)
    assert str(path) in str(refusal.value)


def test_a_manifest_that_was_made_without_the_model_reads_back(manifest, created_at, tmp_path):
    """As ``run_pipeline`` writes it; nothing is filled in for what the writer did not know."""
    known = {"name_or_path": "m", "task": "", "num_labels": 0, "labels": (), "head_modules": ()}
    model = ModelFacts(**known, extra={"note": {"by": "hand"}})
    written = dataclasses.replace(manifest, model=model)
    for path in write_manifest(written, tmp_path, created_at=created_at).values():
        assert read_manifest(path) == written


def test_a_manifest_that_adapts_nothing_needs_no_seed_and_no_scale(manifest, created_at, tmp_path):
    rows = [dataclasses.replace(row, method="none", rank=0, cost=0, total_score=0.0) for row in manifest.allocations]
    uses = [dataclasses.replace(manifest.resources[0], added=0.0, total=0.0), *manifest.resources[1:]]
    none = dataclasses.replace(
        manifest,
        allocations=tuple(rows),
        resources=tuple(uses),
        score=0.0,
        lora=LoraSettings(),
        provenance=Provenance(),
    )
    assert read_manifest(write_manifest(none, tmp_path, created_at=created_at)["manifest_json"]) == none


def test_every_wrong_field_is_named_at_once(tmp_path):
    document = json.loads((GOLDEN / "manifest.json").read_text())
    document.update(status="good", score="high")
    (tmp_path / "bad.json").write_text(json.dumps(document))
    with pytest.raises(ManifestError, match=r"score: (.|\n)*status: "):
        read_manifest(tmp_path / "bad.json")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("m.json", "{", r"m\.json:1:2: not JSON"),
        ("m.json", "[1]", "a mapping of fields, got list"),
        ("m.json", '{"a": 1, "a": 2}', "key 'a' appears twice"),
        ("m.json", "[" * 100_000, "nested too deeply"),
        ("m.json", "9" * 5000, "m.json: .*digits"),
        ("m.yaml", "a: [", r"m\.yaml:2:1: not YAML"),
        ("m.yaml", "a: &x 1\nb: *x\n", "aliases"),
        ("m.yaml", "a: !!python/object/apply:os.getcwd []", "not YAML"),
        ("m.yaml", "\x00", "not YAML"),
        ("m.yml", "", "m.yml: is empty; `layerlens run` writes a manifest"),
        ("m.yml", "- a", "a mapping of fields, got list"),
        ("m.toml", "", "ends in .json, .yaml or .yml"),
        ("m.json", b"\xff", "not UTF-8"),
    ],
)
def test_files_that_are_no_manifests_are_refused(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ManifestError, match=message):
        read_manifest(path)


def test_missing_and_oversized_files_are_refused(tmp_path, monkeypatch):
    with pytest.raises(ManifestError, match="no such file"):
        read_manifest(tmp_path / "manifest.json")
    with pytest.raises(ManifestError, match=r"is a directory; give the manifest\.json in it"):
        read_manifest(tmp_path)
    monkeypatch.setattr("layerlens.manifest.files.MAX_BYTES", 100)
    with pytest.raises(ManifestError, match="larger than"):
        read_manifest(GOLDEN / "manifest.json")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"score": float("nan")}, "score"),
        ({"status": "unknown"}, "status"),
        ({"predicted": Predicted(float("inf"))}, "predicted.gain"),
        ({"provenance": Provenance(extra={"path": {1, 2}})}, "provenance.path: set cannot be written"),
    ],
)
def test_what_could_not_be_read_back_is_not_written(manifest, created_at, tmp_path, change, message):
    with pytest.raises(ManifestError, match=message):
        write_manifest(dataclasses.replace(manifest, **change), tmp_path / "out", created_at=created_at)
    assert not (tmp_path / "out").exists()


def test_an_unwritable_place_is_named(manifest, created_at, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OutputError, match=r"cannot write .*file"):
        write_manifest(manifest, tmp_path / "file", created_at=created_at)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file"]


def test_the_schema_speaks_of_the_same_nouns():
    assert AllocationEntry.model_json_schema()["properties"]["method"]["enum"] == list(METHODS)
    assert get_args(ManifestDocument.model_fields["schema_version"].annotation) == (SCHEMA_VERSION,)
    for noun, entry in ((ManifestRow, AllocationEntry), (ResourceUse, ResourceEntry)):
        assert [field.name for field in dataclasses.fields(noun)] == list(entry.model_fields)


@pytest.mark.parametrize("counts", [{"offered": "3", "head": 0, "left_out": {}}, {"offered": 3, "head": 0}, {}])
def test_sums_of_parameters_are_whole_numbers(counts):
    with pytest.raises(ManifestError, match=r"model\.parameters: must have whole numbers"):
        ModelFacts(parameters=counts)
    assert ModelFacts(parameters={"offered": 3, "head": 0, "left_out": {"a norm": 4}}).parameters is not None


def test_the_published_schema_is_current():
    assert json.loads(SCHEMA.read_text()) == manifest_schema()


def test_manifests_validate_with_the_published_schema():
    validator = jsonschema.Draft202012Validator(json.loads(SCHEMA.read_text()))
    document = json.loads((GOLDEN / "manifest.json").read_text())
    validator.validate(document)
    wrong = [(("allocations", 0, "rank"), 0), (("status",), "good"), (("solver",), KeyError), (("model", "labels"), 5)]
    wrong += [(("allocations",), []), (("resources", 1, "resource"), "joules"), (("provenance", "seed"), "x")]
    for place, value in wrong:
        assert not validator.is_valid(set_in(document, place, value))
