"""The vision families of ``vision_models`` through a whole job: their part of the matrix in docs/architectures.md.

Beside the cells of ``architectures``, which runs this:

- statistics: in float64, every layer's mean square of sample gradients and mean gradient equal those of one backward
  pass for each sample, to rounding.
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.vision_models import make, side_of
from layerlens.config import RunConfig
from layerlens.exceptions import ModelSpecError, ProfilingError
from layerlens.integrations.layers import model_spec
from layerlens.integrations.pretrained import PretrainedModel
from layerlens.jobs.result import RunResult
from layerlens.jobs.run import run_config
from layerlens.profiling.measure import measure
from layerlens.profiling.request import StatisticsRequest
from layerlens.sources.factory import first_argument
from layerlens.tasks.batches import Batch
from layerlens.tasks.losses import classification_loss
from layerlens.utils.progress import silent

CELLS = ("run", "statistics", "PEFT", "step 0", "3 steps")
RIGHT, LEFT_OUT, UNEXPECTED = "right", "left out: ", "unexpected: "
N_SAMPLES, N_BRUTE = 24, 3
RELATIVE = 1e-6
"""float64 rounds at 1e-16, and some thousand sums and a hundred layers lie between both routes; models that go down to
float32 inside (norms, attention) round at 6e-8."""
ROUNDING = 1e-6
"""The products of the same numbers, elsewhere in memory, differ by some 6e-8 of the largest."""
PROJECT = """\
import torch
from benchmarks.vision_models import N_CLASSES, make, side_of


def build():
    return make({key!r})


def dataset():
    g = torch.Generator().manual_seed(1)
    side = side_of({key!r})
    images = torch.randn({n}, 3, side, side, generator=g)
    return torch.utils.data.TensorDataset(images, torch.randint(0, N_CLASSES, ({n},), generator=g))


def loss(output, y):
    return torch.nn.functional.cross_entropy(output, y, reduction="none")
"""


def tried(key: str) -> dict[str, Any]:
    """What every cell says, and the reasons of what was left out."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return cells_of(key, Path(place))


def cells_of(key: str, directory: Path) -> dict[str, Any]:
    """The cells of one model; ``directory`` is empty."""
    name = "project_" + "".join(letter if letter.isalnum() else "_" for letter in key)
    (directory / f"{name}.py").write_text(PROJECT.format(key=key, n=N_SAMPLES))
    try:
        found: dict[str, Any] = {"class": type(make(key)).__name__, "left_out": {}}
    except Exception as error:  # sizes that do not agree: the recipe, not the product
        return {"class": "", "left_out": {}} | dict.fromkeys(CELLS, f"{UNEXPECTED}not made: {_line(error, directory)}")
    config = RunConfig.model_validate(
        {
            "model": {"factory": f"{name}:build", "task": "custom", "loss": f"{name}:loss", "head": []},
            "data": {"source": f"{name}:dataset", "calibration_samples": 8, "batch_size": 4},
            "optimization": {
                "max_trainable_params": 3000,
                "methods": ["lora"],
                "refine": False,
                "latency_profile": {"device_type": "cpu", "batch_size": 2},
            },
            "runtime": {"threads": 1},
        }
    )
    try:
        result = run_config(config, base_dir=directory, use_cache=False)
    except (ModelSpecError, ProfilingError) as error:
        return found | dict.fromkeys(CELLS, LEFT_OUT + _line(error, directory))
    except Exception as error:
        return found | dict.fromkeys(CELLS, UNEXPECTED + _line(error, directory))
    for layer, reason in (result.manifest.model.left_out or {}).items():
        found["left_out"].setdefault(reason, []).append(layer)
    cells = {"run": RIGHT}
    for kind, check in (("statistics", _statistics), ("PEFT", _with_peft)):
        try:
            cells |= check(key, result)
        except Exception as error:
            cells |= dict.fromkeys(
                CELLS[1:2] if kind == "statistics" else CELLS[2:], UNEXPECTED + _line(error, directory)
            )
    return found | cells


def _statistics(key: str, result: RunResult) -> dict[str, str]:
    """The cell "statistics": every layer of the model, and every other weight that is measured."""
    model = make(key).double().requires_grad_(False)
    side = side_of(key)
    images = torch.randn(N_BRUTE, 3, side, side, generator=torch.Generator().manual_seed(2)).double()
    batch = Batch({first_argument(model): images}, torch.arange(N_BRUTE) % 2, torch.arange(N_BRUTE))
    spec = model_spec(PretrainedModel(model, None, "", ()), "", inputs=batch.inputs, methods=("lora",))
    found = measure(
        model, spec, [batch], request=StatisticsRequest.of(("fisher", "gradient")), sequence_length=8, threads=1,
        progress=silent, loss=classification_loss,
    )  # fmt: skip
    groups = {layer.name: layer.groups for layer in spec.layers}
    modules = {x.layer: model.get_submodule(x.layer) for x in found.layers if groups[x.layer] == 1}
    traces, sums = dict.fromkeys(modules, 0.0), {}
    weights: list[Any] = [module.weight.requires_grad_(True) for module in modules.values()]
    for place in range(N_BRUTE):
        one = batch.taken(torch.tensor([place]))
        loss = classification_loss(model(**one.inputs), one).sum()
        for name, gradient in zip(modules, torch.autograd.grad(loss, weights), strict=True):
            traces[name] += float(gradient.square().sum()) / N_BRUTE
            sums[name] = sums[name] + gradient if name in sums else gradient
    for layer in found.layers:
        if layer.layer not in modules:
            continue
        of = layer.by_method["lora"]
        energy = float((sums[layer.layer] / N_BRUTE).square().sum())
        for kind, ours, theirs in (("trace", of.trace, traces[layer.layer]), ("energy", of.energy, energy)):
            if ours is None or abs(ours - theirs) > RELATIVE * max(traces[layer.layer], 1e-200):
                return {"statistics": f"{UNEXPECTED}{layer.layer}: {kind} {ours} and not {theirs:.6g}"}
    return {"statistics": RIGHT}


def _with_peft(key: str, result: RunResult) -> dict[str, str]:
    from peft import PeftModel

    from layerlens.integrations.peft import injected_ranks

    base = make(key)
    side = side_of(key)
    images = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        before = base(images)
    tuned: Any = PeftModel.from_pretrained(base, result.directory / "peft", is_trainable=True).eval()
    wanted = {row.layer: row.rank for row in result.manifest.allocations if row.method == "lora"}
    if injected_ranks(tuned) != wanted:
        return dict.fromkeys(CELLS[2:], UNEXPECTED + "PEFT gave other layers a rank, or another one")
    with torch.no_grad():
        change = float((tuned(images) - before).abs().max())
    rounding = ROUNDING * float(before.abs().max())
    step = RIGHT if change <= rounding else f"{UNEXPECTED}a change of {change:.2g}"
    return {"PEFT": RIGHT, "step 0": step, "3 steps": _three_steps(tuned, images)}


def _three_steps(tuned: nn.Module, images: torch.Tensor) -> str:
    trained = {name: weight for name, weight in tuned.named_parameters() if weight.requires_grad}
    tuned.train()
    for module in tuned.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()  # two images have no statistics to speak of
    optimizer = torch.optim.AdamW(list(trained.values()), lr=1e-2)
    for _ in range(3):
        loss = nn.functional.cross_entropy(tuned(images), torch.tensor([0, 1]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    if not torch.isfinite(loss):
        return f"{UNEXPECTED}a loss of {float(loss)}"
    still = [name for name, weight in trained.items() if "lora_B" in name and not weight.any()]
    return f"{UNEXPECTED}{still[0]} does not move" if still else RIGHT


def _line(error: BaseException, directory: Path) -> str:
    text = " ".join(str(error).replace(str(directory), ".").split())
    return (
        text[:300] if isinstance(error, (ModelSpecError, ProfilingError)) else f"{type(error).__name__}: {text}"[:300]
    )


def table(results: dict[str, dict[str, Any]]) -> list[str]:
    """The section of docs/architectures.md."""
    right = sum(all(row[cell] == RIGHT for cell in CELLS) for row in results.values())
    others = len(results) - right
    lines = [
        "## Vision families of timm and torchvision", "",
        f"{len(results)} families, a small configuration of each with random weights, built by a factory and measured "
        "on random images. The cells are those above (step 0 to rounding, 1e-6 of the largest output), and",
        "",
        "- **statistics**: in float64 the statistics of every layer equal those of one backward pass for each sample.",
        "",
        f"{right} families are right in every cell; of {others} some cell is not, and says what came.", "",
        "| family | class | " + " | ".join(CELLS) + " | layers left out |",
        "|---|---|" + "---|" * (len(CELLS) + 1),
    ]  # fmt: skip
    return [*lines, *rows(results, CELLS)]


def rows(results: Mapping[str, Any], cells: Sequence[str]) -> Iterator[str]:
    """The rows of a table: what was tried, its class, its cells, and the layers left out by reason."""
    for key in sorted(results):
        row = results[key]
        reasons = "; ".join(f"{len(layers)}: {reason}" for reason, layers in row["left_out"].items())
        shown = [row[cell].replace("|", "\\|") for cell in cells]
        yield f"| {key} | {row['class']} | {' | '.join(shown)} | {reasons.replace('|', chr(92) + '|')} |"
