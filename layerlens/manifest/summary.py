"""What a manifest says in a few sentences and figures: for the report, a plan in a program, and the command line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from layerlens.manifest.formats import UNITS, in_sentence, method_name, number, percent, quantity, resource_name
from layerlens.models import Manifest, ManifestRow, ResourceUse, Saving
from layerlens.registry import METHODS


def share_of_model(manifest: Manifest) -> str:
    """Trainable parameters in percent of the base model's; "" where these are not known."""
    total = manifest.model.total_params
    return percent(manifest.trainable_params / total, digits=2) if total else ""


def counts(rows: Sequence[ManifestRow]) -> dict[str, int]:
    """Adapted layers by method, of methods that the choice has."""
    found = {method: sum(row.method == method for row in rows) for method in METHODS}
    return {method: count for method, count in found.items() if count}


def peft_holds(manifest: Manifest) -> str:
    """How much of the choice PEFT's directory holds; "" where it holds all, or nothing is chosen.

    >>> from layerlens.models import ModelFacts
    >>> def row(method, cost):
    ...     return ManifestRow(method, method, 4, 0.0, cost, 0.0, 0.0, 0.0, 0.0)
    >>> found = Manifest(ModelFacts(), (row("lora", 81), row("adapter", 19)), (), 0.0, 0.0, 0.0, "optimal", "", "", "")
    >>> peft_holds(found)
    'LoRA: peft/ holds 81 % of the chosen parameters; the adapters are in layerlens_modules.safetensors.'
    """
    share, found = manifest.peft_share, counts(manifest.allocations)
    others = [name for name in found if not METHODS[name].wraps]
    if not others:
        return ""
    names = " and ".join(METHODS[name].plural for name in others)
    if not share:
        return f"No LoRA is chosen, so there is no peft/; the {names} are in layerlens_modules.safetensors."
    held = percent(share, digits=0) if share < 0.995 else "> 99 %"
    label = next(METHODS[name].label for name in found if METHODS[name].wraps)
    return f"{label}: peft/ holds {held} of the chosen parameters; the {names} are in layerlens_modules.safetensors."


def left_out_lines(manifest: Manifest, most: int = 3) -> list[str]:
    """Where all parameters are, and a line for each reason why layers are offered nothing.

    Of more than ``most`` layers the first ones are named.
    """
    by_reason: dict[str, list[str]] = {}
    for layer, reason in (manifest.model.left_out or {}).items():
        by_reason.setdefault(reason, []).append(layer)
    lines = [account] if (account := account_line(manifest)) else []
    for reason, layers in by_reason.items():
        more = f" and {len(layers) - most} more" if len(layers) > most else ""
        lines.append(f"Left out: {', '.join(layers[:most])}{more}: {reason}.")
    return lines


def expert_lines(manifest: Manifest, most: int = 5) -> list[str]:
    """How many calibration tokens went to each expert, and which experts saw none; nothing without experts."""
    by_block: dict[str, list[int]] = (manifest.provenance.statistics or {}).get("expert_tokens") or {}
    counts = sorted(count for block in by_block.values() for count in block)
    if not counts:
        return []
    lines = [
        f"Experts: {len(counts):,} in {len(by_block):,} blocks; {counts[0]:,} to {counts[-1]:,} calibration tokens "
        f"each, median {counts[len(counts) // 2]:,}."
    ]
    unseen = {block: [str(i) for i, count in enumerate(each) if not count] for block, each in by_block.items()}
    unseen = {block: experts for block, experts in unseen.items() if experts}
    if unseen:
        shown = "; ".join(f"{block}: {', '.join(experts)}" for block, experts in list(unseen.items())[:most])
        more = f" and experts of {len(unseen) - most} more blocks" if len(unseen) > most else ""
        total = sum(map(len, unseen.values()))
        lines.append(
            f"{total:,} experts got no token, so they were not measured ({shown}{more}). More or other calibration "
            "samples may reach them."
        )
    return lines


def account_line(manifest: Manifest, most: int = 4) -> str:
    """Where the base model's parameters are, as a sentence with sums; "" if it is not known.

    >>> from layerlens.models import ModelFacts
    >>> facts = ModelFacts(parameters={"offered": 90, "head": 4, "left_out": {"a norm": 4, "an embedding": 2}})
    >>> account_line(Manifest(facts, (), (), 0.0, 0.0, 0.0, "optimal", "", "", ""))
    'Parameters: 100 = 90 in layers on offer + 4 in the head + 6 left out (4: a norm; 2: an embedding).'
    """
    found = manifest.model.parameters
    if not found:
        return ""
    by_reason = sorted(found["left_out"].items(), key=lambda one: -one[1])
    left_out, total = sum(found["left_out"].values()), found["offered"] + found["head"]
    parts = [f"{found['offered']:,} in layers on offer"]
    parts += [f"{found['head']:,} in the head"] if found["head"] else []
    said = [f"{n:,}: {reason}" for reason, n in by_reason[:most]]
    said += [f"{sum(n for _, n in by_reason[most:]):,} for other reasons"] if len(by_reason) > most else []
    parts += [f"{left_out:,} left out ({'; '.join(said)})"] if left_out else []
    return f"Parameters: {total + left_out:,} = {' + '.join(parts)}."


def proof(manifest: Manifest) -> str:
    """How good the choice provably is, as a sentence."""
    if manifest.predicted.cheapest is not None:
        return cheapest_proof(manifest, manifest.predicted.cheapest)
    gap = percent(manifest.gap, digits=4)
    how = f"proved optimal (gap {gap})" if manifest.status == "optimal" else f"proved within {gap} of the optimum"
    score, bound = f"{manifest.score:.6g}", f"{manifest.upper_bound:.6g}"
    return f"The choice is {how}: score {score}, and none within the budgets exceeds {bound}."


def cheapest_proof(manifest: Manifest, saving: Saving) -> str:
    """What is proved of the least cost, as a sentence."""
    what = " and ".join(in_sentence(resource_name(name)) for name in saving.minimised)
    least = percent(saving.least_cost_share, digits=2)
    return (
        f"Proved: no choice within the budgets that keeps {percent(saving.asked_share)} of uniform LoRA's predicted "
        f"improvement needs less than {least} of its {what}; the cheapest that was found needs "
        f"{percent(saving.cost_share, digits=2)}."
    )


def saved(manifest: Manifest, saving: Saving) -> str:
    """What the cheapest choice keeps and saves, or why there is nothing to save, as sentences."""
    if not saving.saves:
        return f"Nothing to save: {saving.reason}."
    measured, predicted = saving.measured, percent(saving.kept_share, digits=0)
    if measured is None:
        kept = (
            f"is predicted to keep {predicted} of uniform LoRA's improvement; at least {percent(saving.asked_share)} "
            f"was required{_in_our_study(saving)}"
        )
    else:
        low, high = (percent(measured[end], digits=0) for end in ("kept_low", "kept_high"))
        kept = (
            f"kept {percent(measured['kept'], digits=0)} of uniform LoRA's held-out loss drop when both were trained "
            f"(95 %: {low} to {high}; at least {percent(measured['asked'])} was required, {predicted} was predicted)"
        )
    against = _against(manifest, saving.uniform_lora)
    return (
        f"The cheapest choice {kept}. Compared with uniform LoRA within the same budgets: {against or 'as much'} "
        "(predicted)."
    )


def _in_our_study(saving: Saving) -> str:
    if saving.kept_interval is None:
        return ""
    low, high = (percent(end, digits=0) for end in saving.kept_interval)
    return f" (choices with this prediction kept {low} to {high} in nine of ten cases of our study)"


def predicted_gain(manifest: Manifest) -> str:
    """The predicted gain as a sentence, with what it rests on; "" where a manifest does not say it."""
    predicted = manifest.predicted
    if predicted.gain is None:
        return ""
    value = f"Predicted gain: {number(predicted.gain)}, {predicted.unit or manifest.utility_unit}"
    if predicted.gain_interval is not None:
        low, high = predicted.gain_interval
        return f"{value} (95 %: {number(low)} to {number(high)}), calibrated by short trainings."
    return f"{value}; it ranks layers and is not calibrated by training."


def proved_by(manifest: Manifest) -> str:
    """Which figures of other choices the proof goes by, where a budget is on a recorded step; "" else."""
    names = [
        resource_name(use.resource).lower()
        for use in manifest.resources
        if use.budget is not None and use.resource in ("vram_gb", "step_ms") and "recorded" in use.source
    ]
    if not names:
        return ""
    return f"The proof covers every choice by its own predicted {' and '.join(names)}."


def checkpointed(manifest: Manifest) -> str:
    """Which blocks are checkpointed, as a sentence; "" for none.

    >>> from layerlens.models import ModelFacts
    >>> found = Manifest(ModelFacts(), (), (), 0.0, 0.0, 0.0, "optimal", "", "", "", checkpointed=("h.0", "h.1", "h.2"))
    >>> checkpointed(found).partition(".")[0]
    'Activations of 3 blocks (h'
    >>> "(h.0 to h.2) are checkpointed to save memory." in checkpointed(found)
    True
    """
    names = manifest.checkpointed
    if not names:
        return ""
    which = names[0] if len(names) == 1 else f"{names[0]} to {names[-1]}"
    blocks = "1 block" if len(names) == 1 else f"{len(names)} blocks"
    return (
        f"Activations of {blocks} ({which}) are checkpointed to save memory. `layerlens train` does this; for other "
        "trainers, call layerlens.load(DIRECTORY).checkpoint(model)."
    )


def worth(manifest: Manifest) -> str:
    """What is checkpointed, and step time and memory against uniform LoRA; "" where nothing is to say."""
    return " ".join(sentence for sentence in (checkpointed(manifest), against_uniform(manifest)) if sentence)


def against_uniform(manifest: Manifest) -> str:
    """Step time and memory against uniform LoRA of as many parameters, as a sentence; "" where they are not predicted.

    Memory is what comes on top of the frozen model's weights and of its forward pass, which every step needs.
    """
    if manifest.predicted.cheapest is not None:
        return saved(manifest, manifest.predicted.cheapest)
    parts = _against(manifest, manifest.predicted.uniform_lora or {})
    return f"Compared with uniform LoRA of the same number of parameters: {parts} (predicted)." if parts else ""


def _against(manifest: Manifest, other: Mapping[str, float]) -> str:
    """ "20 % less time a step and 40 % less memory beyond the frozen model" than uniform LoRA; "" without a step."""
    uses = {use.resource: use for use in manifest.resources}
    if not other or "step_ms" not in uses:
        return ""
    parts = []
    for resource, what, base in (
        ("step_ms", "time a step", 0.0), ("vram_gb", "memory beyond the frozen model", uses["vram_gb"].base),
    ):  # fmt: skip
        own, uniform = uses[resource].total - base, other.get(resource, 0.0) - base
        if uniform > 0.0:
            share = 1.0 - own / uniform
            parts.append(f"{percent(abs(share), digits=0)} {'less' if share >= 0.0 else 'more'} {what}")
    return " and ".join(parts)


def score_in_words(manifest: Manifest) -> str:
    """The predicted gain beside LoRA of rank 32 on every layer, as a sentence; "" if it is not known.

    >>> from layerlens.models import Predicted
    >>> rank_32 = {"share": 0.84, "trainable_params": 1000, "low": 0.71, "high": 0.92}
    >>> predicted = Predicted(rank_32=rank_32)
    >>> score_in_words(Manifest(None, (), (), 0.0, 0.0, 0.0, "optimal", "", "", "", predicted=predicted))
    'The choice has 84 % (95 %: 71 % to 92 %) of the score of rank 32 on every layer, with 0 % of its parameters.'
    """
    found = manifest.predicted.rank_32
    if not found:
        return ""
    interval = ""
    if found.get("low") is not None and found.get("high") is not None:
        interval = f" (95 %: {percent(found['low'], digits=0)} to {percent(found['high'], digits=0)})"
    size = percent(manifest.trainable_params / found["trainable_params"], digits=1)
    share = percent(found["share"], digits=0)
    return f"The choice has {share}{interval} of the score of rank 32 on every layer, with {size} of its parameters."


def budget_facts(use: ResourceUse) -> dict[str, Any]:
    """A budget as text, with the widths of a bar's parts in percent of it."""
    text = {key: quantity(use.resource, getattr(use, key)) for key in ("base", "added", "total")}
    entry: dict[str, Any] = {
        **text,
        "name": resource_name(use.resource),
        "source": use.source,
        "limited": False,
        "price": f"{number(use.multiplier)} score per {UNITS.get(use.resource, 'unit')}" if use.multiplier else "",
    }
    if use.budget is not None and use.budget > 0:
        free = use.budget - use.total
        entry |= {
            "limited": True,
            "budget": quantity(use.resource, use.budget),
            "free": quantity(use.resource, max(free, 0.0)),
            "used": percent(use.total / use.budget),
            "base_width": round(100 * min(use.base / use.budget, 1.0), 3),
            "added_width": round(100 * min(use.added / use.budget, 1.0), 3),
            "has_base": use.base > 0,
        }
    return entry


def option_name(row: ManifestRow) -> str:
    """ "LoRA 8"; "none" of a layer that is left alone."""
    return f"{method_name(row.method)} {row.rank}" if row.rank else method_name(row.method)
