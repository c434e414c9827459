"""The profile of a model whose weights stay on disk: the statistics that ``measure`` finds, with the same bits."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from layerlens.exceptions import ConfigurationError, ProfilingError
from layerlens.integrations.torch_modules import frozen_without_dropout
from layerlens.integrations.transformers import without_cache
from layerlens.models import LayerStatistics, MethodStatistics, ModelSpec, ModelStatistics
from layerlens.profiling.accumulators import LayerRows
from layerlens.profiling.capture import Capture, refuse_bad_loss
from layerlens.profiling.finite import refuse_non_finite
from layerlens.profiling.footprint import dense_inputs
from layerlens.profiling.measure import left_out_of, model_results
from layerlens.profiling.pass_sums import BatchRecord, Key, record_of
from layerlens.profiling.request import StatisticsRequest
from layerlens.profiling.streamed.forward import ForwardSweep, StreamedFootprint, check_arguments
from layerlens.profiling.streamed.on_disk import Journal, stream_directory
from layerlens.profiling.streamed.parts import cannot_stream, refuse_non_finite_activations, taken_call
from layerlens.profiling.streamed.residency import Weights
from layerlens.profiling.trial import Trial, tried_on
from layerlens.tasks import Batch, Batches, Loss
from layerlens.tasks.losses import classification_loss
from layerlens.utils.progress import Advance, Progress

log = logging.getLogger(__name__)


def measure_streamed(
    model: torch.nn.Module,
    weights: Weights,
    spec: ModelSpec,
    batches: Sequence[Batch],
    *,
    request: StatisticsRequest,
    sequence_length: int,
    threads: int,
    progress: Progress,
    loss: Loss = classification_loss,
    other_modules: Sequence[str] = (),
    directory: Path | None = None,
    device: torch.device | None = None,
    figures: dict[str, float] | None = None,
) -> ModelStatistics:
    """As ``measure``, one block of the model in memory at a time.

    Args:
        model: the skeleton, its weights on the meta device, in evaluation mode.
        weights: where they are.
        spec, batches, request, sequence_length, threads, progress, loss, other_modules: see ``measure``. A batch is
            made three times: for the front, for the tail, and once more where weights of the front are measured.
        directory: where the activations at block boundaries are kept, and what is finished; an interrupted profile
            continues from there, a finished one removes it. None for a temporary one.
        device: where the blocks run; main memory unless given.
        figures: filled with what streaming cost: bytes_read, reading_s, waited_s, boundary_bytes, argument_bytes.

    Raises:
        ProfilingError: see ``measure``; or the model cannot be streamed.
        ConfigurationError: a statistic cannot be had by streaming.
        OutputError: the disk has no room for the activations.
    """
    refuse_whole_model_statistics(request)
    n_samples = batches.n_samples if isinstance(batches, Batches) else sum(len(batch.index) for batch in batches)
    request = dataclasses.replace(request, ntk_samples=min(request.ntk_samples, n_samples))
    with stream_directory(directory) as place, frozen_without_dropout(model, checkpointing=False), without_cache(model):
        typical = batches.typical if isinstance(batches, Batches) else batches[0]
        footprint = StreamedFootprint(dense_inputs(typical.inputs, sequence_length))
        sweep = ForwardSweep(model, weights, _HalvesApart(batches), place, device or torch.device("cpu"), footprint)
        try:
            one_pass = _Pass(sweep, Journal(place), spec, request, threads, loss, tuple(other_modules), n_samples)
            statistics = one_pass.run(progress)
        finally:
            sweep.residency.close()
        used = {
            "bytes_read": sweep.residency.bytes_read,
            "reading_s": sweep.residency.reading_s,
            "waited_s": sweep.residency.waited_s,
            "boundary_bytes": sweep.boundaries.total_bytes,
            "argument_bytes": sweep.arguments.file.end,
        }
    log.info(
        "streamed: %.3g GB of weights read in %.3g s, of which computation waited %.3g s",
        1e-9 * used["bytes_read"], used["reading_s"], used["waited_s"],
    )  # fmt: skip
    if figures is not None:
        figures |= used
    refuse_non_finite(statistics)
    return statistics


def refuse_whole_model_statistics(request: StatisticsRequest) -> None:
    """Raise ConfigurationError for statistics that need the whole model in memory."""
    for statistic in request.of_modules:
        raise ConfigurationError(
            f"profiling.statistics: {statistic.name} is measured on the whole model in memory, not on one that is "
            "streamed; leave it out, or set profiling.memory_mode: plain"
        )


class _HalvesApart(Sequence[Batch]):
    """Batches with the samples of each half of the calibration set together, as ``measure`` takes them."""

    def __init__(self, batches: Sequence[Batch]) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: Any) -> Any:
        return self.batches[index].halves_apart()


class _Pass:
    """One profile: tail, blocks backward, front."""

    def __init__(
        self, sweep: ForwardSweep, journal: Journal, spec: ModelSpec, request: StatisticsRequest, threads: int,
        loss: Loss, other_modules: tuple[str, ...], n_samples: int,
    ) -> None:  # fmt: skip
        self.sweep = sweep
        self.journal = journal
        self.spec = spec
        self.request = request
        self.threads = threads
        self.loss = loss
        self.other_modules = other_modules
        self.n_samples = n_samples
        self.batches: list[BatchRecord] = []
        self.rows = LayerRows()
        self.found: dict[str, ModelStatistics] = {}

    def run(self, progress: Progress) -> ModelStatistics:
        """Everything, from where an earlier profile was interrupted."""
        sweep, journal, footprint = self.sweep, self.journal, self.sweep.footprint
        n_batches, n_blocks = len(sweep.batches), sweep.n_blocks
        with progress.stage("Running embeddings", total=n_batches) as advance:
            sweep.run_front(lambda batch: self.batches.append(record_of(batch, torch.zeros(0))), advance)
        self._divide()
        if self.front_modules:
            self._check_front()
        facts = {"shapes": [list(one.shape) for one in sweep.boundaries.first], "blocks": n_blocks}
        assert footprint is not None
        if journal.fits(**facts):
            footprint.restore(journal.state["footprint"])
        with progress.stage("Running blocks", total=n_blocks * n_batches) as advance:
            done = int(journal.state["forward"])
            advance(done * n_batches)
            sweep.run_forward(done, self._after_forward, advance)
        with progress.stage("Measuring gradients", total=(n_blocks + 1) * n_batches) as advance:
            losses = self._tail(advance)
            if self.request.backward:
                self._blocks(advance)
                self._front(advance)
        return self._result(losses)

    def _divide(self) -> None:
        """Which of the other modules are in the front, in each block and in the tail, and which share a weight."""
        parts = self.sweep.parts
        where: dict[str, str] = {}
        for name in self.other_modules:
            places = (*parts.blocks, *parts.units)
            where[name] = next((x for x in places if name == x or name.startswith(f"{x}.")), "")
            if not where[name]:
                raise cannot_stream(parts.model, f"has weights of its own in {name}")
        self.in_block = [[name for name in self.other_modules if where[name] == block] for block in parts.blocks]
        front = [name for name in self.other_modules if where[name] in parts.front]
        tail = [name for name in self.other_modules if where[name] in parts.tail]
        weight_of: dict[str, Any] = {
            name: self.sweep.residency.identity(f"{name}.weight") for name in self.other_modules
        }
        self.tied_tail = [name for name in tail if weight_of[name] in {weight_of[one] for one in front}]
        self.tail_modules = [name for name in tail if name not in self.tied_tail]
        self.front_modules = [name for name in self.other_modules if name in front or name in self.tied_tail]
        groups = [*self.in_block, self.tail_modules, self.front_modules]
        owners: dict[Any, int] = {}
        for group, names in enumerate(groups):
            for name in names:
                if owners.setdefault(weight_of[name], group) != group:
                    raise cannot_stream(parts.model, f"has the weight of {name} in several blocks")

    def _check_front(self) -> None:
        """Refuse gradients that reach the front by another way than the activations."""
        sweep = self.sweep
        sweep.residency.only(sweep.front_names())
        capture = self._capture([], [name for name in self.front_modules if name not in self.tied_tail])
        batch = sweep.batch(0)
        with capture.open():
            capture.begin(batch)
            check_arguments(sweep.model, sweep.parts.run_front(batch.inputs).calls)

    def _capture(self, layers: Sequence[str], others: Sequence[str]) -> Capture:
        wanted = set(layers)
        spec = dataclasses.replace(self.spec, layers=[layer for layer in self.spec.layers if layer.name in wanted])
        capture = Capture(self.sweep.model, spec, self.request, self.threads, others)
        capture.sums.rows = self.rows
        return capture

    def _after_forward(self, done: int) -> None:
        self.sweep.boundaries.file.sync()
        assert self.sweep.footprint is not None
        self.journal.write(forward=done, footprint=self.sweep.footprint.state)

    def _tail(self, advance: Advance) -> list[torch.Tensor]:
        """Losses of all batches; the gradients at the last boundary."""
        sweep, n_batches, n_blocks = self.sweep, len(self.sweep.batches), self.sweep.n_blocks
        kept = self.journal.tensors("losses") if self.journal.state.get("tail") else None
        part = self.journal.part("tail")
        assert sweep.footprint is not None
        if kept is not None and part is not None:
            advance(n_batches)
            self.found["tail"] = part
            return [kept[str(number)] for number in range(n_batches)]
        sweep.residency.only(sweep.tail_names())
        if self.request.backward:
            sweep.residency.read_ahead(sweep.block_names(n_blocks - 1))
        capture = self._capture([], self.tail_modules)
        losses = []
        with capture.open():
            for number in range(n_batches):
                losses.append(self._tail_batch(capture, number))
                advance(1)
        sweep.footprint.run_tail(sweep.parts, sweep.boundaries.read(n_blocks, n_batches))
        self._finish("tail", capture)
        self._keep_rows(n_blocks)
        self.journal.keep_tensors("losses", {str(number): loss for number, loss in enumerate(losses)})
        sweep.boundaries.file.sync()
        self.journal.write(tail=True, footprint=sweep.footprint.state)
        return losses

    def _tail_batch(self, capture: Capture, number: int) -> torch.Tensor:
        sweep = self.sweep
        batch = sweep.batch(number)
        hidden = sweep.boundaries.read(sweep.n_blocks, number).requires_grad_(self.request.backward)
        capture.begin(batch)
        with torch.set_grad_enabled(self.request.backward):
            output = sweep.parts.run_tail(batch.inputs, hidden, sweep.outlines[number].shapes)
            loss__b = self.loss(output, batch)
        if number == 0:
            refuse_non_finite_activations(sweep.model, loss__b[:1], "the loss", int(batch.index[0]))
        refuse_bad_loss(loss__b.detach(), batch, sweep.model)
        if self.request.backward:
            capture.backward(loss__b.sum() * capture.loss_scale)
            if hidden.grad is None:
                raise ProfilingError("no gradient reached the blocks; the loss does not depend on them")
            sweep.boundaries.write(sweep.boundaries.gradient_slot(sweep.n_blocks), number, hidden.grad)
        return loss__b.detach().cpu()

    def _blocks(self, advance: Advance) -> None:
        """Every block again with the taps on it, from the last to the first."""
        sweep, n_batches, n_blocks = self.sweep, len(self.sweep.batches), self.sweep.n_blocks
        done = self._restore_blocks()
        advance(done * n_batches)
        for number in range(n_blocks - 1 - done, -1, -1):
            sweep.residency.only(sweep.block_names(number))
            sweep.residency.read_ahead(sweep.block_names(number - 1) if number else ())
            block = f"{sweep.parts.blocks[number]}."
            layers = [layer.name for layer in self.spec.layers if f"{layer.name}.".startswith(block)]
            capture = self._capture(layers, self.in_block[number])
            one_by_one = self._tried(capture, number).apply_to(capture, sharded=False)
            with capture.open():
                for batch in range(n_batches):
                    self._block_batch(capture, number, batch, one_by_one=one_by_one)
                    advance(1)
            self._finish(str(number), capture)
            self._keep_rows(number)
            sweep.boundaries.file.sync()
            self.journal.write(backward=n_blocks - number)
            self.journal.forget(f"rows-{number + 1}")

    def _restore_blocks(self) -> int:
        """How many blocks are done; their results are taken up."""
        n_blocks = self.sweep.n_blocks
        done = 0
        for number in range(n_blocks - 1, n_blocks - 1 - int(self.journal.state["backward"]), -1):
            part = self.journal.part(str(number))
            if part is None:
                break
            self.found[str(number)] = part
            done += 1
        if done < int(self.journal.state["backward"]):
            raise ProfilingError(
                f"{self.journal.directory} is damaged: the results of block {n_blocks - 1 - done} are gone; remove it "
                "and profile again"
            )
        for key, rows in (self.journal.tensors(f"rows-{n_blocks - done}") or {}).items():
            name, _, before = key.partition("\t")
            self.rows.done.setdefault(name, {})[int(before)] = rows
        return done

    def _keep_rows(self, number: int) -> None:
        """Keep what is added up over layers, from the tail down to block ``number``; nothing where nothing is."""
        rows = {f"{name}\t{before}": x for name, done in self.rows.done.items() for before, x in done.items()}
        if rows:
            self.journal.keep_tensors(f"rows-{number}", rows)

    def _tried(self, capture: Capture, number: int) -> Trial:
        """What two samples show of a block."""
        sweep = self.sweep
        several = (batch for batch, outline in enumerate(sweep.outlines) if len(outline.index) > 1)
        batch = next(several, None)
        if batch is None:
            return Trial()
        call, hidden, outline = sweep.call(batch, number), sweep.boundaries.read(number, batch), sweep.outlines[batch]

        def run(order: Sequence[int]) -> list[torch.Tensor]:
            rows = _rows_of(order, outline.rows)
            return [sweep.parts.run_block(number, hidden[rows], taken_call(call, rows, len(hidden)))]

        with torch.no_grad():
            return tried_on(
                sweep.model, capture.spec, capture.other_modules, run, (0, len(outline.index) - 1), outline.rows
            )

    def _block_batch(self, capture: Capture, number: int, batch: int, *, one_by_one: bool) -> None:
        """A batch through a block; sample by sample where samples of a batch cannot be told apart there."""
        sweep = self.sweep
        boundaries, outlined = sweep.boundaries, sweep.outline_batch(batch)
        before = sum(len(outline.index) for outline in sweep.outlines[:batch])
        passes_on = number > 0 or bool(self.front_modules)
        whole, call = boundaries.read(number, batch), sweep.call(batch, number)
        wanted = boundaries.read(boundaries.gradient_slot(number + 1), batch)
        places = range(len(outlined.index))
        found = []
        for part in [[place] for place in places] if one_by_one else [list(places)]:
            rows = _rows_of(part, outlined.rows)
            hidden = (whole[rows] if one_by_one else whole).requires_grad_(passes_on)
            capture.begin(outlined.taken(torch.tensor(part)) if one_by_one else outlined, before=before + part[0])
            with torch.enable_grad():
                given = hidden.clone() if passes_on else hidden  # a block may write into what it is given
                of_part = taken_call(call, rows, len(whole)) if one_by_one else call
                output = sweep.parts.run_block(number, given, of_part)
            capture.backward(output, wanted[rows] if one_by_one else wanted)
            found.append(hidden.grad if hidden.grad is not None else torch.zeros_like(hidden))
        if passes_on:
            boundaries.write(boundaries.gradient_slot(number), batch, torch.cat(found))

    def _front(self, advance: Advance) -> None:
        """Weights of the front, where they are measured; with those of the tail that they share, which runs again."""
        if not self.front_modules:
            return
        sweep = self.sweep
        tied = sweep.tail_names() if self.tied_tail else ()
        sweep.residency.let_go_of_spare_memory()
        sweep.residency.only((*sweep.front_names(), *tied))
        capture = self._capture([], self.front_modules)
        with capture.open():
            for number in range(len(sweep.batches)):
                batch = sweep.batch(number)
                gradient = sweep.boundaries.read(sweep.boundaries.gradient_slot(0), number)
                capture.begin(batch)
                with torch.enable_grad():
                    outputs = [sweep.parts.run_front(batch.inputs).hidden]
                    gradients = [gradient]
                    if self.tied_tail:
                        hidden = sweep.boundaries.read(sweep.n_blocks, number)
                        shapes = sweep.outlines[number].shapes
                        loss__b = self.loss(sweep.parts.run_tail(batch.inputs, hidden, shapes), batch)
                        outputs.insert(0, loss__b.sum() * capture.loss_scale)
                        gradients.insert(0, torch.ones_like(outputs[0]))
                capture.backward(outputs, gradients)
        self._finish("front", capture)

    def _finish(self, name: str, capture: Capture) -> None:
        """What a part's sums say; the sums are let go."""
        parts = capture.sums.parts(capture.spec.layers)
        part = ModelStatistics(
            layers=capture.result(),
            n_samples=self.n_samples,
            n_tokens=0,
            mean_loss=0.0,
            activation_bytes=0.0,
            forward_flops=0.0,
            provenance={"covered": capture.covered_weights()},
            other_weights=capture.other_weights(),
            unmeasured=capture.unmeasured_layers(),
            extra={"\t".join((statistic, *key)): x for statistic, of in parts.items() for key, x in of.items()} or None,
        )
        self.found[name] = part
        if name != "front":
            self.journal.keep_part(name, capture.spec, part)

    def _result(self, losses: list[torch.Tensor]) -> ModelStatistics:
        sweep, model = self.sweep, self.sweep.model
        assert sweep.footprint is not None
        activation_bytes, forward_flops = sweep.footprint.per_sample()
        by_name: dict[str, LayerStatistics] = {}
        others: dict[str, MethodStatistics] = {}
        covered: dict[str, str] = {}
        parts: dict[str, np.ndarray | float] = {}
        unmeasured: dict[str, str] = {}
        for part in self.found.values():
            by_name |= part.by_name()
            others |= part.other_weights
            covered |= part.provenance["covered"]
            parts |= part.extra or {}
            unmeasured |= part.unmeasured
        if not self.request.backward:
            empty = [LayerStatistics(x.name, {m: MethodStatistics() for m in x.methods}) for x in self.spec.layers]
            by_name = {layer.layer: layer for layer in empty}
        of_model = model_results(self.request, self._parts_in_order(parts), self.rows, self.batches)
        sweep.residency.close()  # what is left out is found by which parameters are the same, on the skeleton
        left_out, coverage = left_out_of(model, covered)
        return ModelStatistics(
            layers=tuple(by_name[layer.name] for layer in self.spec.layers if layer.name in by_name),
            n_samples=self.n_samples,
            n_tokens=sum(record.n_tokens for record in self.batches),
            mean_loss=float(torch.cat(losses).double().mean()),
            activation_bytes=activation_bytes,
            forward_flops=forward_flops,
            other_weights=others,
            left_out=left_out | {f"{name}.weight": reason for name, reason in unmeasured.items()},
            unmeasured=unmeasured,
            coverage=coverage,
            **of_model,
        )

    def _parts_in_order(self, parts: dict[str, Any]) -> dict[str, dict[Key, np.ndarray]]:
        """What layers say about statistics of the model, in the order of the model's layers."""
        found: dict[str, dict[Key, np.ndarray]] = {}
        for statistic in self.request.names:
            for key in ((layer.name, method) for layer in self.spec.layers for method in layer.methods):
                name = "\t".join((statistic, *key))
                if name in parts:
                    found.setdefault(statistic, {})[key] = parts[name]
        return found


def _rows_of(samples: Sequence[int], rows: int) -> torch.Tensor:
    """Rows of the model's batch that the samples at these places have, int64."""
    return (torch.tensor(list(samples))[:, None] * rows + torch.arange(rows)).flatten()
