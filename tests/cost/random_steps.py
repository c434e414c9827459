"""Random recorded steps of few choices, with spans and causes that no model has."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np

from layerlens.cost.causes import Paid
from layerlens.methods import enumerate_options
from layerlens.models import NONE, CostTable, LayerSpec, ModelSpec, UtilityTable
from layerlens.models.step_use import Checkpoints, StepUse

MIB = 2.0**20


def random_use(rng: np.random.Generator, layer__o: np.ndarray, n_layers: int) -> StepUse:
    """A step of a chain of layers; some causes, storages and readers are anything at all."""
    starts = np.sort(rng.choice(np.arange(1, 3 * n_layers + 2), n_layers, replace=False))
    count = int(starts[-1] + rng.integers(2, 5))
    after = np.minimum(starts + rng.integers(1, 4, n_layers), count)
    some = rng.random() < 0.5
    head = rng.random() < 0.3

    def layers_below(at: int) -> np.ndarray:
        below = np.append(after <= at, head and at >= count - 2)
        return rng.random(n_layers + 1) < 0.4 if some and rng.random() < 0.3 else below

    cause__cl = np.array([layers_below(at) for at in range(count)])
    step_cause = np.where(cause__cl.any(axis=1), np.arange(count), -1).astype(np.int32)
    n_storages = int(rng.integers(3, 3 * count))
    born = rng.integers(0, count, n_storages)
    gone = np.minimum(born + 1 + rng.integers(0, 4, n_storages), count)
    released = np.minimum(born + rng.integers(0, 3, n_storages), count - 1)
    cause__s = np.where(rng.random(n_storages) < 0.7, step_cause[released], -1)
    scale = rng.choice([1.0, MIB, 0.1 * MIB])

    def amounts(*shape: int) -> np.ndarray:
        drawn = rng.integers(0, 9, shape) * scale if rng.random() < 0.5 else rng.random(shape) * 8.0 * scale
        return np.asarray(drawn, dtype=np.float64)

    n_options = len(layer__o)
    adapts = layer__o >= 0
    # a layer that was not recorded has the whole pass as its span
    recorded = np.append(rng.random(n_layers) < 0.9, False)
    place__o = np.where(recorded[layer__o], layer__o, -1)
    span__ot = np.where((place__o >= 0)[:, None], np.stack((starts, after), axis=1)[layer__o], [0, count])
    readers = {
        entry: np.unique(rng.integers(0, n_storages, int(rng.integers(1, 4))))
        for entry in np.flatnonzero(adapts & (rng.random(n_options) < 0.8)).tolist()
    }
    changed = {
        entry: np.unique(rng.integers(0, n_storages, 2))
        for entry in np.flatnonzero(adapts & (rng.random(n_options) < 0.2)).tolist()
    }
    alive = amounts(count)
    found = None
    if rng.random() < 0.5:
        found = _checkpoints(rng, count, cause__cl, np.stack((born, gone)), place__o, span__ot, alive, amounts)
    return StepUse(
        base_bytes=10.0 * scale,
        base_ms=float(rng.random()),
        cause__cl=cause__cl,
        cause_ms=rng.integers(0, 5, count).astype(float),
        storage_bytes=amounts(n_storages),
        storage_cause=cause__s.astype(np.int32),
        storage_span__st=np.stack((born, gone, released), axis=1),
        alive=alive,
        held=amounts(count),
        passing=amounts(count),
        step_cause=step_cause,
        layer__o=place__o,
        span__ot=span__ot,
        fixed__o=amounts(n_options) * adapts,
        gradient__o=amounts(n_options) * adapts,
        kept__o=amounts(n_options) * adapts,
        passing__ox=amounts(n_options, 3) * adapts[:, None],
        ms__o=rng.random(n_options) * adapts,
        readers=readers,
        changed=changed,
        accumulates=bool(rng.random() < 0.3),
        checkpoints=found,
    )


def _checkpoints(rng, count, cause__cl, spans, place__o, span__ot, alive, amounts) -> Checkpoints:
    """Calls of blocks one after the other; what they compute again ends where they do, or before."""
    cuts = np.unique(np.append(rng.integers(0, count + 1, 3), 0))
    span__gt = np.array([(a, b, rng.integers(a + 1, b + 1)) for a, b in itertools.pairwise(cuts)]).reshape(-1, 3)
    if not len(span__gt):
        span__gt = np.array([[0, count, count]])
    born, gone = spans
    call__s, call__o = np.full(len(born), -1), np.full(len(place__o), -1)
    layers__gl = np.zeros((len(span__gt), cause__cl.shape[1]), dtype=bool)
    late__o = np.zeros(len(place__o), dtype=bool)
    for call, (first, after, stop) in enumerate(span__gt.tolist()):
        call__s[(born >= first) & (born < after) & (gone <= after)] = call
        inside = (place__o >= 0) & (span__ot[:, 0] >= first) & (span__ot[:, 1] <= after)
        call__o[inside] = call
        layers__gl[call] = cause__cl[first:after].any(axis=0)
        layers__gl[call, place__o[inside]] = True
        late__o[inside & (span__ot[:, 1] > stop)] = True
    given = rng.integers(0, [len(span__gt), len(born)], (len(span__gt), 2))
    return Checkpoints(
        layers__gl=layers__gl,
        span__gt=span__gt,
        call__s=call__s,
        call__o=call__o,
        given__ns=given,
        around=alive * rng.random(count),
        again_ms__g=rng.random(len(span__gt)),
        again_ms__o=rng.random(len(place__o)) * (place__o >= 0),
        late__o=late__o,
    )


def random_case(seed: int) -> tuple[ModelSpec, UtilityTable, CostTable]:
    """A model of two to four layers with gains and with costs whose sums are above or below what its steps need."""
    rng = np.random.default_rng([22, seed])
    n_layers = int(rng.integers(2, 5))
    layers = [LayerSpec(f"layer.{index}", hidden_size=8, methods=("lora", "adapter")) for index in range(n_layers)]
    spec = ModelSpec("small", total_params=1000, layers=layers)
    options = enumerate_options(spec, {"lora": (1, 4), **({"adapter": (2,)} if rng.random() < 0.5 else {})})
    layer__o = np.array([-1 if o.method == NONE else int(o.layer[-1]) for o in options])
    use = random_use(rng, layer__o, n_layers)
    adapts = layer__o >= 0
    cost__ro = np.zeros((5, len(options)))
    cost__ro[0] = rng.integers(1, 20, len(options)) * adapts
    paid = Paid(options, [layer.name for layer in layers], use.layer__o, n_layers, len(cost__ro))
    paid.own = cost__ro
    paid.own[2] = 1e-9 * (use.fixed__o + use.gradient__o + use.kept__o)
    paid.own[4] = use.ms__o
    for cause, ms in zip(use.cause__cl, use.cause_ms.tolist(), strict=True):
        paid.add(paid.of(cause), np.array([0.0, 0.0, 0.0, 0.0, ms]))
    for storage, cause in enumerate(use.storage_cause.tolist()):
        keeps = paid.of(use.cause__cl[cause]) if cause >= 0 else 0
        for entry, storages in use.readers.items():
            keeps |= 1 << entry if storage in storages else 0
        paid.add(keeps, np.array([0.0, 0.0, 1e-9 * use.storage_bytes[storage], 0.0, 0.0]))
    charges, depth = paid.charges()
    base = {"trainable_params": 0.0, "flops": 0.0, "vram_gb": 0.0, "latency_ms": 0.0, "step_ms": 0.0}
    if use.checkpoints is not None:
        base["step_ms"] = float(use.checkpoints.again_ms__g.sum() + use.checkpoints.again_ms__o.sum())
    base["step_ms"] += use.base_ms + float(paid.base[4])
    source = dict.fromkeys(base, "made up")
    gains = rng.integers(-1, 8, len(options)) if rng.random() < 0.5 else rng.random(len(options))
    table = CostTable(options, paid.own, base, source, charges, depth, step=use)
    over = [use.gb(entries) - table.bound(entries)["vram_gb"] for entries in all_choices(table)]
    table = replace(table, base=base | {"vram_gb": max(0.0, float(rng.choice([max(over), np.median(over)])))})
    return spec, UtilityTable(options, gains * adapts * 1.0, "gradient", ""), table


def all_choices(table: CostTable) -> list[np.ndarray]:
    """Every choice of one option for each layer, as entries of the table."""
    names = list(dict.fromkeys(option.layer for option in table.options))
    by_layer = [[n for n, option in enumerate(table.options) if option.layer == name] for name in names]
    return [np.array(each) for each in itertools.product(*by_layer)]


def sums__rk(floor: CostTable, choices: list[np.ndarray]) -> np.ndarray:
    """float64 [rows, choices]: what lower bounds add up to, bases left out."""
    added = [
        [math.fsum(row) for row in np.concatenate((floor.cost__ro[:, each], floor.paid_once__r(each)[:, None]), axis=1)]
        for each in choices
    ]
    return np.array(added).T
