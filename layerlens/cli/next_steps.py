"""What to type next: after a run or a choice, and after a training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.text import Text

from layerlens.cli.output import command, short
from layerlens.models import LORA, Manifest

if TYPE_CHECKING:
    from layerlens.jobs.train import TrainedModel
    from layerlens.pipeline import RunResult

CAUSAL_LM = "causal-lm"
Steps = list[tuple[str, str]]
"""What is done, and the line to copy."""


def show_next(console: Console, steps: Sequence[tuple[str, str]]) -> None:
    """Write the lines below ``Next:``; none is wrapped, so that each can be copied."""
    if not steps:
        return
    console.print("Next:")
    width = max(len(what) for what, _ in steps)
    for what, line in steps:
        console.print(Text.assemble(f"  {what:{width}}  ", (line, "bold")), soft_wrap=True)


def after_choice(result: RunResult) -> Steps:
    """The report, training here, the files of other trainers with a line for each, and another budget."""
    manifest, path = result.manifest, short(result.files["manifest_json"])
    steps = [("report", command("open", short(result.directory)))] if "report" in result.files else []
    choice = manifest.choice
    if choice.chosen:
        written = "peft" in result.files or "modules" in result.files
        if not written:
            steps.append(("adapter", command("show", path, "--output", short(result.directory))))
        steps.append(("train", command("train", path)))
        steps += _trainers(manifest, path, short(result.files["peft"]) if "peft" in result.files else "")
    if "statistics" in result.files:
        steps.append(("other budget", f"{command('optimize', short(result.directory))} --max-params 20k"))
    return steps


def _trainers(manifest: Manifest, path: str, peft: str) -> Steps:
    """A line for each trainer that can hold the choice, or its part that PEFT has."""
    choice = manifest.choice
    if not choice.peft_method:
        return []
    part = ["--lora-part"] if choice.other_options else []
    steps = [("export", command("export", path, "--to", "peft", *part))]
    if peft and not part:
        steps.append(("PEFT, Trainer", f"PeftModel.from_pretrained(model, {peft!r}, is_trainable=True)"))
    if manifest.model.task == CAUSAL_LM:
        of_lora = choice.peft_method == LORA
        tools = [("TRL", "trl"), *([("axolotl", "axolotl"), ("LLaMA-Factory", "llama-factory")] if of_lora else [])]
        steps += [(name, command("export", path, "--to", tool, *part)) for name, tool in tools]
    return steps


def after_training(result: TrainedModel) -> Steps:
    """The curve, and where the adapter goes from here: an engine, a merged checkpoint, a hub."""
    directory = short(result.directory)
    steps = [("curve", command("open", directory))] if "report" in result.files else []
    manifest = result.manifest
    if manifest is not None:
        choice = manifest.choice
        if choice.peft_method == LORA and not choice.other_options:
            if manifest.model.task == CAUSAL_LM:
                steps.append(("serve", command("export", directory, "--serve", "vllm")))
            steps.append(("merge", command("export", directory, "--merge")))
    steps.append(("push", f"hf upload YOUR-NAME/YOUR-MODEL {_quoted(directory)}"))
    return steps


def _quoted(directory: str) -> str:
    import shlex

    return shlex.quote(directory)
