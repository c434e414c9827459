"""Every language architecture of the installed transformers, and the vision families of timm and torchvision, through a
whole job: the matrix in docs/architectures.md.

    python -m benchmarks.architectures                    try all, write the results and the page
    python -m benchmarks.architectures opt mamba2         try these, keep the results of the others
    python -m benchmarks.architectures torchvision levit  try one library, or one of a library
    python -m benchmarks.architectures --page             write the page from the results

Each is a tiny model with random weights (``tiny_models``, ``vision_models``). What is asked of it:

- run: ``layerlens run`` ends with a choice; what could not be measured or adapted is left out with its reason;
- PEFT: stock ``PeftModel.from_pretrained`` loads the adapter directory, and every chosen layer has its rank;
- step 0: the loaded model puts out exactly what the base model does, bit by bit;
- 3 steps: three steps of AdamW on the loaded model change every B, and the loss stays finite.

A refusal in one sentence is "left out: ...". Anything else that goes wrong is "unexpected", and the exit status 1.
"""

from __future__ import annotations

import json
import sys
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from benchmarks import vision_architectures as vision
from benchmarks.tiny_models import TASKS, WORDS, Architecture, architectures, build
from benchmarks.vision_models import KEYS
from layerlens.config.loader import load_run_config
from layerlens.exceptions import LayerLensError, ModelSpecError, ProfilingError
from layerlens.integrations.quantized import keep_weights
from layerlens.integrations.quantized_loading import quantization_arguments, saved_quantization
from layerlens.jobs.result import RunResult
from layerlens.jobs.run import run_config

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "architectures.json"
VISION_RESULTS = ROOT / "benchmarks" / "results" / "vision_architectures.json"
PAGE = ROOT / "docs" / "architectures.md"
CELLS = ("run", "PEFT", "step 0", "3 steps")
RIGHT, LEFT_OUT, UNEXPECTED = "right", "left out: ", "unexpected: "
N_SAMPLES = 24
WORKERS = 2
CONFIGURATION = """\
model: {{name_or_path: ./model, task: {task}, dtype: {dtype}, quantization: {quantization}}}
data: {{source: data.jsonl, calibration_samples: 8, max_length: 24, batch_size: 4}}
optimization:
  max_trainable_params: 3000
  methods: [lora]
  latency_profile: {{device_type: cpu, batch_size: 2, sequence_length: 16}}
runtime: {{threads: 1}}
"""


def tried(one: Architecture) -> dict[str, Any] | None:
    """What every cell says, and the reasons of what was left out; None where no tiny model can be made."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place, _quiet():
        directory = Path(place)
        try:
            build(one, directory / "model")
        except Exception as error:  # sizes that do not agree: the recipe, not the product
            print(f"{one.key}: not made: {type(error).__name__}: {str(error)[:100]}", file=sys.stderr)
            return None
        return cells_of(one, directory)


def cells_of(
    one: Architecture, directory: Path, dtype: str = "float32", asked: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The cells of the model in ``directory``/model, loaded in ``dtype`` and quantized as ``asked``."""
    found: dict[str, Any] = {"class": one.class_name, "task": one.task, "left_out": {}}
    rows = [_row(one.task, number) for number in range(N_SAMPLES)]
    (directory / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (directory / "config.yaml").write_text(
        CONFIGURATION.format(task=one.task, dtype=dtype, quantization=json.dumps(asked))
    )
    try:
        config = load_run_config(directory / "config.yaml")
        result = run_config(config, base_dir=directory, use_cache=False)
    except (ModelSpecError, ProfilingError) as error:
        return found | dict.fromkeys(CELLS, LEFT_OUT + _line(error, directory))
    except Exception as error:
        return found | dict.fromkeys(CELLS, UNEXPECTED + _line(error, directory))
    found |= {"run": RIGHT, "notes": [line for line in result.warnings if line.startswith("model: ")]}
    for layer, reason in (result.manifest.model.left_out or {}).items():
        found["left_out"].setdefault(reason, []).append(layer)
    return found | _with_peft(one, directory, result, dtype, asked)


def _with_peft(
    one: Architecture, directory: Path, result: RunResult, dtype: str, asked: Mapping[str, Any] | None
) -> dict[str, str]:
    import transformers as hf
    from peft import PeftModel

    from layerlens.integrations.peft import injected_ranks

    auto_class: Any = getattr(hf, TASKS[one.task][0])
    labels_of = {"num_labels": 2} if one.task == "sequence-classification" else {}  # BART's default is another number
    saved = saved_quantization(hf.AutoConfig.from_pretrained(directory / "model"))
    base = auto_class.from_pretrained(
        directory / "model", dtype=getattr(torch, dtype), **labels_of, **quantization_arguments(asked, saved)
    ).eval()  # fmt: skip
    keep_weights(base)
    inputs, labels = _batch(one, directory)
    try:
        with torch.no_grad():
            before = base(**inputs).logits
        tuned: Any = PeftModel.from_pretrained(base, result.directory / "peft", is_trainable=True).eval()
        wanted = {row.layer: row.rank for row in result.manifest.allocations if row.method == "lora"}
        if injected_ranks(tuned) != wanted:
            return dict.fromkeys(CELLS[1:], UNEXPECTED + "PEFT gave other layers a rank, or another one")
        with torch.no_grad():
            after = tuned(**inputs).logits
        change = float((after - before).abs().max())
        cells = {"PEFT": RIGHT, "step 0": RIGHT if change == 0 else f"{UNEXPECTED}a change of {change:.2g}"}
    except Exception as error:
        return dict.fromkeys(CELLS[1:], UNEXPECTED + _line(error, directory))
    try:
        return cells | {"3 steps": _three_steps(tuned, inputs, labels)}
    except Exception as error:
        return cells | {"3 steps": UNEXPECTED + _line(error, directory)}


def _three_steps(tuned: Any, inputs: dict[str, Any], labels: torch.Tensor) -> str:
    trained = {name: weight for name, weight in tuned.named_parameters() if weight.requires_grad}
    tuned.train()
    optimizer = torch.optim.AdamW(list(trained.values()), lr=1e-2)
    for _ in range(3):
        logits = tuned(**inputs).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, -2).float(), labels.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    if not torch.isfinite(loss):
        return f"{UNEXPECTED}a loss of {float(loss)}"
    still = [name for name, weight in trained.items() if "lora_B" in name and not weight.any()]
    return f"{UNEXPECTED}{still[0]} does not move" if still else RIGHT


def _row(task: str, number: int) -> dict[str, Any]:
    words = [WORDS[(number * 7 + place * place) % len(WORDS)] for place in range(6 + number % 3)]
    text = " ".join([*words, str(number % 10)])
    if task == "seq2seq":
        return {"source": text, "target": " ".join(reversed(words))}
    return {"text": text, "label": number % 2} if task == "sequence-classification" else {"text": text}


def _batch(one: Architecture, directory: Path) -> tuple[dict[str, Any], torch.Tensor]:
    """Inputs of two samples, and labels for the logits."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory / "model")
    rows = [_row(one.task, number) for number in (0, 3)]  # of one length
    texts = [row["source"] if one.task == "seq2seq" else row["text"] for row in rows]
    inputs = dict(tokenizer(texts, return_tensors="pt"))
    inputs = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    if one.task == "seq2seq":
        inputs["decoder_input_ids"] = inputs["input_ids"]
    return inputs, torch.tensor([0, 1]) if one.task == "sequence-classification" else inputs["input_ids"]


def _line(error: BaseException, directory: Path) -> str:
    text = " ".join(str(error).replace(str(directory), ".").split())
    return (text if isinstance(error, LayerLensError) else f"{type(error).__name__}: {text}")[:300]


@contextmanager
def _quiet() -> Iterator[None]:
    import transformers as hf

    hf.logging.set_verbosity_error()
    hf.logging.disable_progress_bar()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def page(results: dict[str, dict[str, Any]], of_vision: dict[str, dict[str, Any]]) -> str:
    """docs/architectures.md."""
    right = sum(all(row[cell] == RIGHT for cell in CELLS) for row in results.values())
    lines = [
        "# Architectures", "",
        "<!-- Made by python -m benchmarks.architectures; change it there. -->", "",
        f"{len(results)} transformers architectures, each as a tiny model with random weights. The columns "
        "show whether", "",
        "- **run**: `layerlens run` ends with a choice;",
        "- **PEFT**: stock PEFT loads the adapter directory, and every chosen layer has its rank;",
        "- **step 0**: the loaded model computes exactly what the base model computes, bit for bit;",
        "- **3 steps**: three steps of training move every layer.", "",
        "LayerLens leaves out layers that cannot be measured, or that PEFT cannot adapt, and continues. The "
        "manifest, the summary and the report name them with the reason. The last column counts them.", "",
        "A change of a few 1e-7 at step 0 is rounding: the same product computed at another place in memory "
        "(seen in Mamba's `x_proj`, whose input is equal bit for bit).", "",
        f"{right} kinds are right in every cell; of {len(results) - right} some cell is not, and says what came.", "",
        "| architecture | class | " + " | ".join(CELLS) + " | layers left out |",
        "|---|---|" + "---|" * (len(CELLS) + 1),
    ]  # fmt: skip
    return "\n".join([*lines, *vision.rows(results, CELLS), "", *vision.table(of_vision)]) + "\n"


def main(arguments: Sequence[str]) -> int:
    """Try, write, and say what was unexpected."""
    results, of_vision = _read(RESULTS), _read(VISION_RESULTS)
    names = [name for name in arguments if not name.startswith("--")]
    if "--page" not in arguments:
        wanted = [one for one in architectures() if not names or one.name in names]
        wanted.sort(key=lambda one: names.index(one.name) if names else 0)
        images = [key for key in KEYS if not names or set(names) & {key, *key.split()}]
        with ProcessPoolExecutor(WORKERS, mp_context=get_context("spawn"), max_tasks_per_child=60) as pool:
            waiting = {pool.submit(tried, one): (one.key, CELLS, results, RESULTS) for one in wanted}
            waiting |= {
                pool.submit(vision.tried, key): (key, vision.CELLS, of_vision, VISION_RESULTS) for key in images
            }
            for done in as_completed(waiting):
                (key, cells, into, file), found = waiting[done], done.result()
                into.pop(key, None)
                if found is not None:
                    into[key] = found
                    print(f"{key}: {', '.join(found[cell] for cell in cells)}", flush=True)
                    file.write_text(json.dumps(into, indent=1, sort_keys=True) + "\n")
    PAGE.write_text(page(results, of_vision))
    bad = [f"{key}: {row[cell]}" for key, row in results.items() for cell in CELLS if row[cell].startswith(UNEXPECTED)]
    for key, row in of_vision.items():
        bad += [f"{key}: {row[cell]}" for cell in vision.CELLS if row[cell].startswith(UNEXPECTED)]
    print("\n".join(bad) or f"{len(results) + len(of_vision)} architectures, nothing unexpected")
    return 1 if bad else 0


def _read(file: Path) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = json.loads(file.read_text()) if file.is_file() else {}
    return found


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
