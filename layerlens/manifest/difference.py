"""Two manifests side by side: what they are of, which layers differ, and what both use, cost and score."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from html import escape
from typing import Any

from layerlens.manifest.formats import method_name, number, quantity, resource_name, signed_percent
from layerlens.manifest.tables import html_table, text_table
from layerlens.models import NONE, Manifest, ManifestRow

SHOWN = 60
"""Longer values of settings are cut."""


@dataclass(frozen=True)
class Changed:
    """Something that both manifests say, and say differently; None where one does not say it.

    Args:
        name: "base model", "data", or a key of the configuration.
        first, second: what each says.
    """

    name: str
    first: Any
    second: Any

    def __str__(self) -> str:
        return f"{self.name}: {_said(self.first)} → {_said(self.second)}"


@dataclass(frozen=True)
class ChangedLayer:
    """A layer that does not have the same option in both; None where a manifest does not have the layer.

    Args:
        layer: module path.
        first, second: (method, rank).
    """

    layer: str
    first: tuple[str, int] | None
    second: tuple[str, int] | None


@dataclass(frozen=True)
class Figure:
    """A figure of both manifests: use of a resource (base model and choice together), or the score.

    Args:
        name: of the resource, or "score".
        first, second: None where a manifest does not have it.
        source: how each was found: ("exact", "exact").
    """

    name: str
    first: float | None
    second: float | None
    source: tuple[str, str] = ("", "")


@dataclass(frozen=True)
class Difference:
    """How ``second`` differs from ``first``. True where it does; ``str`` and a notebook show it as tables.

    Args:
        names: what the two are called.
        subject: other base model, task, precision, classes or data.
        settings: other settings, by their keys in the configuration.
        layers: other methods or ranks on layers that both have.
        only_first, only_second: layers that the other does not have, with their options.
        figures: parameters, FLOPs, memory, latency and score of both, equal ones too.
        n_layers: layers that both have.
    """

    names: tuple[str, str]
    subject: tuple[Changed, ...]
    settings: tuple[Changed, ...]
    layers: tuple[ChangedLayer, ...]
    only_first: tuple[ChangedLayer, ...]
    only_second: tuple[ChangedLayer, ...]
    figures: tuple[Figure, ...]
    n_layers: int

    @classmethod
    def of(cls, first: Manifest, second: Manifest, names: tuple[str, str] = ("first", "second")) -> Difference:
        """What differs between two manifests, of one model or of two.

        >>> from layerlens.models import ModelFacts
        >>> nothing = dict(resources=(), score=0.0, upper_bound=0.0, gap=0.0, status="optimal", solver="",
        ...                utility_model="auto", utility_unit="")
        >>> def one(rank):
        ...     row = ManifestRow("encoder.0.query", "lora", rank, 0.0, 0, 0.0, 0.0, 0.0, 0.0)
        ...     return Manifest(ModelFacts(name_or_path="m"), (row,), **nothing)
        >>> Difference.of(one(4), one(8)).layers
        (ChangedLayer(layer='encoder.0.query', first=('lora', 4), second=('lora', 8)),)
        >>> bool(Difference.of(one(4), one(4)))
        False
        """
        a, b = _options(first.allocations), _options(second.allocations)
        shared = [layer for layer in a if layer in b]
        return cls(
            names=names,
            subject=tuple(_subject(first, second)),
            settings=tuple(_settings(first.provenance.config or {}, second.provenance.config or {})),
            layers=tuple(ChangedLayer(x, a[x], b[x]) for x in shared if a[x] != b[x]),
            only_first=tuple(ChangedLayer(x, a[x], None) for x in a if x not in b),
            only_second=tuple(ChangedLayer(x, None, b[x]) for x in b if x not in a),
            figures=tuple(_figures(first, second)),
            n_layers=len(shared),
        )

    def __bool__(self) -> bool:
        parts = (self.subject, self.settings, self.layers, self.only_first, self.only_second)
        return any(parts) or any(one.first != one.second for one in self.figures)

    @property
    def notes(self) -> tuple[str, ...]:
        """What a reader has to know to read the figures: a sentence each."""
        said = []
        named = {one.name for one in (*self.subject, *self.settings)}
        if named & {"base model", "weights", "data", "task", "utility model"}:
            said.append("The scores are not comparable, because models, data or utility models differ.")
        if any(name.startswith("optimization.latency_profile") for name in named):
            said.append("FLOPs, memory and latency are predictions for different batches or devices.")
        return tuple(said)

    def __str__(self) -> str:
        if not self:
            return f"{self.names[0]} and {self.names[1]} are the same choice ({self.n_layers} layers)."
        parts = ["\n".join(map(str, (*self.subject, *self.settings))), self._summary()]
        for changes in (self.layers, self.only_first, self.only_second):
            if changes:
                parts.append(text_table(*self._layer_table(changes)))
        parts += [text_table(*self._figure_table()), "\n".join(self.notes)]
        return "\n\n".join(part for part in parts if part)

    def _repr_html_(self) -> str:
        told = "".join(f"<p>{escape(str(one))}</p>" for one in (*self.subject, *self.settings))
        tables = [
            html_table(*self._layer_table(changes))
            for changes in (self.layers, self.only_first, self.only_second)
            if changes
        ]
        notes = "".join(f"<p>{escape(one)}</p>" for one in self.notes)
        return told + f"<p>{escape(self._summary())}</p>" + "".join(tables) + html_table(*self._figure_table()) + notes

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON values; "different" says whether anything is."""
        return {
            "different": bool(self),
            "names": list(self.names),
            **{name: [asdict(one) for one in getattr(self, name)] for name in (
                "subject", "settings", "layers", "only_first", "only_second", "figures")},
            "shared_layers": self.n_layers,
            "notes": list(self.notes),
        }  # fmt: skip

    def _summary(self) -> str:
        changed = len(self.layers)
        said = [f"{changed} of {self.n_layers} common layers differ." if changed else
                f"All {self.n_layers} common layers have the same option." if self.n_layers else
                "They have no layer in common."]  # fmt: skip
        for name, only in zip(self.names, (self.only_first, self.only_second), strict=True):
            if only:
                said.append(f"{len(only)} are only in {name}.")
        return " ".join(said)

    def _layer_table(self, changes: tuple[ChangedLayer, ...]) -> tuple[list[str], list[list[str]]]:
        return ["layer", *self.names], [[one.layer, _option(one.first), _option(one.second)] for one in changes]

    def _figure_table(self) -> tuple[list[str], list[list[str]]]:
        rows = []
        for one in self.figures:
            shown = ["–" if x is None else quantity(one.name, x) for x in (one.first, one.second)]
            rows.append([resource_name(one.name), *shown, _change(one)])
        return ["", *self.names, "change"], rows


def _options(rows: tuple[ManifestRow, ...]) -> dict[str, tuple[str, int]]:
    return {row.layer: (row.method, row.rank) for row in rows}


def _subject(first: Manifest, second: Manifest) -> Iterator[Changed]:
    """What the choices are of."""
    a, b = first.model, second.model
    if a.name_or_path != b.name_or_path:
        yield Changed("base model", a.name_or_path, b.name_or_path)
    if a.fingerprint != b.fingerprint:
        yield Changed("weights", a.fingerprint, b.fingerprint)
    for name, key in (("task", "task"), ("precision", "dtype"), ("classes", "labels")):
        if getattr(a, key) != getattr(b, key):
            yield Changed(name, getattr(a, key), getattr(b, key))
    one, other = (x.provenance.statistics or {} for x in (first, second))
    if one.get("source") != other.get("source"):
        yield Changed("data", one.get("source"), other.get("source"))
    keys = ("calibration", "calibration_samples", "head", "head_samples")
    if any(one.get(key) != other.get(key) for key in keys):
        counted = [f"{x.get('calibration_samples', '?')} ({x['calibration'][:12]}…)" if "calibration" in x else None
                   for x in (one, other)]  # fmt: skip
        yield Changed("measured samples", *counted)
    if first.utility_model != second.utility_model:
        yield Changed("utility model", first.utility_model, second.utility_model)


def _settings(first: Mapping[str, Any], second: Mapping[str, Any], place: str = "") -> Iterator[Changed]:
    """Settings that differ, apart from those that ``_subject`` says."""
    for key in dict.fromkeys((*first, *second)):
        name, a, b = f"{place}{key}", first.get(key), second.get(key)
        if a == b or name in ("model.name_or_path", "model.task", "model.dtype", "data.source"):
            continue
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            yield from _settings(a, b, f"{name}.")
        else:
            yield Changed(name, a, b)


def _figures(first: Manifest, second: Manifest) -> Iterator[Figure]:
    uses = [{use.resource: use for use in manifest.resources} for manifest in (first, second)]
    for name in dict.fromkeys((*uses[0], *uses[1])):
        a, b = (use.get(name) for use in uses)
        source = (a.source if a else "", b.source if b else "")
        yield Figure(name, a.total if a else None, b.total if b else None, source)
    yield Figure("score", first.score, second.score)


def _option(option: tuple[str, int] | None) -> str:
    if option is None:
        return "–"
    method, rank = option
    return NONE if method == NONE else f"{method_name(method)} {rank}"


def _said(value: Any) -> str:
    if value is None:
        return "not given"
    text = ", ".join(map(str, value)) if isinstance(value, (tuple, list)) else str(value)
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 1]}…"


def _change(figure: Figure) -> str:
    first, second = figure.first, figure.second
    if first is None or second is None:
        return ""
    if first == second:
        return "the same"
    if first <= 0.0:
        return f"{'+' if second > first else '−'}{number(abs(second - first))}"
    return signed_percent((second - first) / first)
