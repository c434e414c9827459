"""What checkpointing some blocks changes in a recorded step."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np

from layerlens.models.step import StepRecord
from layerlens.models.step_use import Checkpoints


def checkpoints(
    record: StepRecord,
    blocks: Collection[str],
    layer__o: np.ndarray,
    span__ot: np.ndarray,
    forward_ms__f: np.ndarray,
    forward_ms__o: np.ndarray,
    scale: float,
) -> Checkpoints | None:
    """The calls of these blocks; None where there are none.

    Args:
        record: the recorded step.
        blocks: names of the checkpointed blocks; the others of the record are left out.
        layer__o, span__ot: see ``StepUse``.
        forward_ms__f: milliseconds of each operation of the frozen forward pass.
        forward_ms__o: of each option's forward pass.
        scale: samples of the batch, as ``StepRecord.at`` takes them.
    """
    of_block = np.array([name in blocks for name in record.blocks], dtype=bool)
    calls = np.flatnonzero(of_block[record.block_call__g]) if len(of_block) else np.zeros(0, dtype=np.int64)
    if not len(calls):
        return None
    span__gt = record.block_span__gt[calls].astype(np.int64)
    born, gone, _ = record.storage_span__st.T
    call__s, call__o = np.full(len(born), -1), np.full(len(layer__o), -1)
    layers__gl = np.zeros((len(calls), record.cause__cl.shape[1]), dtype=bool)
    again_ms__g, again_ms__o = np.zeros(len(calls)), np.zeros(len(layer__o))
    late__o = np.zeros(len(layer__o), dtype=bool)
    first__o, after__o = span__ot.T
    for call, (first, after, stop) in enumerate(span__gt.tolist()):
        call__s[(born >= first) & (born < after) & (gone <= after)] = call
        inside = (layer__o >= 0) & (first__o >= first) & (after__o <= after)
        call__o[inside] = call
        causes = record.step_cause[first:after]
        layers__gl[call] = record.cause__cl[causes[causes >= 0]].any(axis=0)
        layers__gl[call, layer__o[inside]] = True
        again_ms__g[call] = forward_ms__f[first:stop].sum()
        late__o[inside & (after__o > stop)] = True
        again_ms__o[inside] = forward_ms__o[inside] + late__o[inside] * forward_ms__f[stop:after].sum()
    place = {number: position for position, number in enumerate(calls.tolist())}
    given = [(place[call], storage) for call, storage in record.block_input__ns.tolist() if call in place]
    return Checkpoints(
        layers__gl=layers__gl,
        span__gt=span__gt,
        call__s=call__s,
        call__o=call__o,
        given__ns=np.array(given, dtype=np.int64).reshape(-1, 2),
        around=record.at("around__bf", scale),
        again_ms__g=again_ms__g,
        again_ms__o=again_ms__o,
        late__o=late__o,
    )
