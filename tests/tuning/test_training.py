"""Fine-tuning through transformers' Trainer: what it computes, what it keeps, and how it ends when things go wrong."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from layerlens.config import TrainingConfig
from layerlens.exceptions import ConfigurationError, OutputError, TrainingError
from layerlens.integrations.transformers import blocks_of
from layerlens.tuning import apply
from layerlens.tuning.checkpoints import trained_tensors
from layerlens.tuning.fine_tune import TrainingHook
from layerlens.tuning.samples import SeededOrder, TrainingData
from layerlens.tuning.steps import total_steps
from layerlens.tuning.training import fine_tune

CLASSIFICATION = "sequence-classification"


def samples(n: int, seed: int = 0) -> list[dict[str, torch.Tensor]]:
    """Token ids of uneven length, labelled by the first token."""
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randint(1, 50, (3 + index % 5,), generator=generator) for index in range(n)]
    return [{"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row[0] % 3} for row in rows]


@pytest.fixture
def data() -> TrainingData:
    return TrainingData(samples(22), samples(10, seed=1), fingerprint="f")


@pytest.fixture
def mixed_model(tiny: Callable[..., Any], manifest_of: Any, mixed: Any) -> Callable[[], torch.nn.Module]:
    def build(architecture: str = "bert") -> torch.nn.Module:
        made = tiny(architecture)
        return apply(made.model, manifest_of(made.spec, mixed(made.spec)))

    return build


def names_of(model: torch.nn.Module) -> list[str]:
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def state(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in trained_tensors(model, names_of(model)).items()}


def assert_equal(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    for name in left:
        assert torch.equal(left[name], right[name]), name


@pytest.mark.parametrize("architecture", ["bert", "gpt2"])
def test_trains_what_the_manifest_chose_and_nothing_else(
    architecture: str, mixed_model: Any, data: TrainingData, tmp_path: Path
):
    model = mixed_model(architecture)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    config = TrainingConfig(epochs=6, learning_rate=2e-2, batch_size=4, save_every=36, eval_every=36)
    result = fine_tune(model, data, config, task=CLASSIFICATION, checkpoints=tmp_path)
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved == set(names_of(model))
    # Without the head's own noise: the trained model has learned something of its 22 samples.
    assert sum(result.losses[-6:]) < 0.8 * sum(result.losses[:6])
    assert result.steps == len(result.losses) == 36
    assert result.trained_parameters == sum(model.get_parameter(name).numel() for name in names_of(model))
    assert result.tokens == 6 * sum(len(sample["input_ids"]) for sample in data.train)
    assert result.peak_memory_gb > 0.0
    assert result.tokens_per_second == pytest.approx(result.tokens / result.train_seconds)


@pytest.mark.parametrize("task", [CLASSIFICATION, "causal-lm"])
def test_accumulated_batches_are_one_large_batch(task: str, data: TrainingData, tmp_path: Path, tiny: Any):
    """One SGD step on 2 × 3 samples of uneven length against one on 6: the same mean over samples or tokens.

    Both add up 6 terms of order 1 in another order: float32 differs by a few 2^-24; 1e-5 leaves room.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    moved = []
    for accumulation in (1, 2):
        model = tiny("bert").model
        if task == "causal-lm":
            torch.manual_seed(0)
            model = LlamaForCausalLM(
                LlamaConfig(
                    vocab_size=50, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
                )
            )
        model.eval().requires_grad_(False)
        name = next(name for name, _ in model.named_parameters() if name.endswith(("query.weight", "q_proj.weight")))
        model.get_parameter(name).requires_grad_(True)
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        before = model.get_parameter(name).detach().clone()
        train = [
            {**sample, "labels": sample["input_ids"]} if task == "causal-lm" else sample for sample in data.train[:6]
        ]
        config = TrainingConfig(
            max_steps=1, learning_rate=1.0, schedule="constant", warmup_ratio=0, optimizer="sgd", max_grad_norm=0,
            batch_size=6 // accumulation, gradient_accumulation=accumulation,
        )  # fmt: skip
        result = fine_tune(model, TrainingData(train, []), config, task=task, checkpoints=tmp_path / f"{accumulation}")
        moved.append((model.get_parameter(name) - before, result.losses[0]))
    (one, one_loss), (two, two_loss) = moved
    torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-5 * float(one.detach().abs().max()))
    assert one_loss == pytest.approx(two_loss, rel=1e-5)


def test_same_seed_same_bits(mixed_model: Any, data: TrainingData, tmp_path: Path):
    states = []
    for name in ("a", "b"):
        model = mixed_model()
        torch.rand(7)  # the caller's random state does not matter
        fine_tune(model, data, TrainingConfig(max_steps=4), task=CLASSIFICATION, checkpoints=tmp_path / name)
        states.append(state(model))
    assert_equal(*states)


def test_order_is_a_permutation_of_its_own_for_every_epoch():
    order, seen = SeededOrder(50, seed=3), []
    for epoch in range(3):
        order.set_epoch(epoch)
        seen.append(tuple(order))
        assert sorted(seen[-1]) == list(range(50))
        assert tuple(order) == seen[-1]
    assert len(set(seen)) == 3


class Interrupt(TrainingHook):
    """Ends the run before a step, as a crash would, and counts what it was told."""

    def __init__(self, at: int = -1) -> None:
        self.at, self.calls = at, 0

    def before_step(self, model: torch.nn.Module, step: int) -> None:
        if step == self.at:
            raise KeyboardInterrupt

    def after_step(self, model: torch.nn.Module, step: int) -> None:
        self.calls += 1

    def state_dict(self) -> dict[str, Any]:
        return {"calls": self.calls}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        self.calls = saved["calls"]


@pytest.mark.parametrize("interrupt_at", [1, 11])
def test_an_interrupted_run_goes_on_to_the_same_bits(
    interrupt_at: int, mixed_model: Any, data: TrainingData, tmp_path: Path
):
    """Before the first checkpoint, and within a later epoch; with accumulation, evaluations and hooks."""
    config = TrainingConfig(
        epochs=4, batch_size=3, gradient_accumulation=2, eval_every=3, save_every=4, learning_rate=1e-2,
        early_stopping_patience=9, schedule="cosine",
    )  # fmt: skip
    model = mixed_model()
    whole_hook = Interrupt()
    whole = fine_tune(model, data, config, task=CLASSIFICATION, checkpoints=tmp_path / "whole", hooks=[whole_hook])
    with pytest.raises(KeyboardInterrupt):
        fine_tune(
            mixed_model(), data, config, task=CLASSIFICATION, checkpoints=tmp_path / "cut",
            hooks=[Interrupt(interrupt_at)],
        )  # fmt: skip
    again, hook = mixed_model(), Interrupt()
    result = fine_tune(again, data, config, task=CLASSIFICATION, checkpoints=tmp_path / "cut", hooks=[hook])
    assert result.resumed_from == (None if interrupt_at < 4 else 4 * (interrupt_at // 4))
    assert (result.losses, result.evaluations) == (whole.losses, whole.evaluations)
    assert (result.metrics, result.best_step, result.tokens) == (whole.metrics, whole.best_step, whole.tokens)
    assert hook.calls == whole_hook.calls == total_steps(len(data.train), config) == 16
    assert_equal(state(model), state(again))


def test_a_finished_run_is_not_trained_again(mixed_model: Any, data: TrainingData, tmp_path: Path):
    config = TrainingConfig(max_steps=3)
    first, second = mixed_model(), mixed_model()
    fine_tune(first, data, config, task=CLASSIFICATION, checkpoints=tmp_path)
    hook = Interrupt()
    hook.at = 0
    result = fine_tune(second, data, config, task=CLASSIFICATION, checkpoints=tmp_path)
    assert result.steps == 3
    assert_equal(state(first), state(second))


def test_a_half_written_checkpoint_is_not_gone_on_from(mixed_model: Any, data: TrainingData, tmp_path: Path):
    config = TrainingConfig(max_steps=4, save_every=2)
    with pytest.raises(KeyboardInterrupt):
        fine_tune(mixed_model(), data, config, task=CLASSIFICATION, checkpoints=tmp_path, hooks=[Interrupt(3)])
    half = tmp_path / "checkpoint-3"
    half.mkdir()
    (half / "trained.safetensors").write_bytes(b"")
    result = fine_tune(mixed_model(), data, config, task=CLASSIFICATION, checkpoints=tmp_path, hooks=[Interrupt()])
    assert result.resumed_from == 2
    assert not half.exists()


def test_early_stopping_hands_back_the_best_weights(mixed_model: Any, data: TrainingData, tmp_path: Path):
    """A learning rate that breaks the model: the first evaluation stays the best."""
    config = TrainingConfig(
        epochs=50, learning_rate=30.0, warmup_ratio=0, eval_every=1, metric="loss", early_stopping_patience=2
    )
    model = mixed_model()
    result = fine_tune(model, data, config, task=CLASSIFICATION, checkpoints=tmp_path)
    losses = [each["loss"] for each in result.evaluations]
    assert result.stopped_early
    assert result.best_step == 1 + losses.index(min(losses))
    assert result.steps == result.best_step + 2
    assert result.metrics["loss"] == min(losses)
    assert_equal(state(model), load_file(tmp_path / f"best-{result.best_step}.safetensors"))
    # and it stays stopped
    assert fine_tune(mixed_model(), data, config, task=CLASSIFICATION, checkpoints=tmp_path).steps == result.steps


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_checkpoint(
    mixed_model: Any, data: TrainingData, tmp_path: Path
):
    def loss(model: torch.nn.Module, batch: Any) -> torch.Tensor:
        value = model(**batch).loss
        return value / 0.0 if bool((batch["input_ids"] == data.train[7]["input_ids"][1]).any()) and bad else value

    bad = False
    config = TrainingConfig(epochs=2, batch_size=2, save_every=1)
    order = SeededOrder(22, seed=0)
    order.set_epoch(1)
    assert 7 in tuple(order)

    class Break(TrainingHook):
        def after_step(self, model: torch.nn.Module, step: int) -> None:
            nonlocal bad
            bad = step >= 11

    with pytest.raises(TrainingError, match=r"the loss is inf at step \d+ \(training samples [\d, ]+\)") as caught:
        fine_tune(mixed_model(), data, config, task=CLASSIFICATION, checkpoints=tmp_path, loss=loss, hooks=[Break()])
    kept = sorted(tmp_path.glob("checkpoint-*"))
    assert len(kept) == 1
    assert f"the last good checkpoint is {kept[0]}" in str(caught.value)
    assert all(tensor.isfinite().all() for tensor in load_file(kept[0] / "trained.safetensors").values())


def test_a_gradient_that_is_not_finite_is_found_before_the_step(mixed_model: Any, data: TrainingData, tmp_path: Path):
    """sqrt has an infinite slope at 0, so a finite loss gives gradients that are not."""

    def loss(model: torch.nn.Module, batch: Any) -> torch.Tensor:
        return torch.sqrt(model(**batch).loss * 0.0)

    model = mixed_model()
    before = state(model)
    with pytest.raises(TrainingError, match=r"the gradient of .* is not finite at step 1 .*no checkpoint had been"):
        fine_tune(model, data, TrainingConfig(max_grad_norm=0), task=CLASSIFICATION, checkpoints=tmp_path, loss=loss)
    assert_equal(before, state(model))


def test_checkpoints_of_another_job_are_refused_by_name(mixed_model: Any, data: TrainingData, tmp_path: Path):
    fine_tune(mixed_model(), data, TrainingConfig(max_steps=1), task=CLASSIFICATION, checkpoints=tmp_path)
    other = TrainingConfig(max_steps=1, learning_rate=1e-3)
    with pytest.raises(TrainingError, match=r"another job \(config: .*--restart"):
        fine_tune(mixed_model(), data, other, task=CLASSIFICATION, checkpoints=tmp_path)
    result = fine_tune(mixed_model(), data, other, task=CLASSIFICATION, checkpoints=tmp_path, restart=True)
    assert result.resumed_from is None


def test_a_full_disk_stops_with_the_checkpoint_before_it(mixed_model: Any, data: TrainingData, tmp_path: Path):
    """A file size limit stands for the disk: the kernel refuses to write on, after some bytes were written."""
    import resource

    config = TrainingConfig(max_steps=6, save_every=2)

    class Fill(Interrupt):
        def after_step(self, model: torch.nn.Module, step: int) -> None:
            super().after_step(model, step)
            if step == 4:
                resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))

    _, hard = limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        with pytest.raises(OutputError, match=r"cannot write .*checkpoint-4"):
            fine_tune(mixed_model(), data, config, task=CLASSIFICATION, checkpoints=tmp_path, hooks=[Fill()])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, previous)
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]
    model = mixed_model()
    result = fine_tune(model, data, config, task=CLASSIFICATION, checkpoints=tmp_path, hooks=[Interrupt()])
    assert (result.resumed_from, result.steps) == (2, 6)


def test_refusals(mixed_model: Any, data: TrainingData, tmp_path: Path):
    model = mixed_model()
    with pytest.raises(TrainingError, match="no metrics for the task 'poetry'"):
        fine_tune(model, data, TrainingConfig(), task="poetry", checkpoints=tmp_path)
    with pytest.raises(TrainingError, match="no training samples"):
        fine_tune(model, TrainingData([], []), TrainingConfig(), task=CLASSIFICATION, checkpoints=tmp_path)
    with pytest.raises(ConfigurationError, match=r"'acuracy' is not a metric .* known: loss, accuracy"):
        fine_tune(model, data, TrainingConfig(metric="acuracy", max_steps=1), task=CLASSIFICATION, checkpoints=tmp_path)
    with pytest.raises(TrainingError, match="no parameter of the model requires a gradient"):
        fine_tune(model.requires_grad_(False), data, TrainingConfig(), task=CLASSIFICATION, checkpoints=tmp_path)


def test_bfloat16_and_gradient_checkpointing_train(mixed_model: Any, data: TrainingData, tmp_path: Path):
    config = TrainingConfig(max_steps=2, precision="bfloat16", gradient_checkpointing=True)
    model = mixed_model("llama")
    result = fine_tune(model, data, config, task=CLASSIFICATION, checkpoints=tmp_path)
    assert result.steps == 2
    assert {model.get_parameter(name).dtype for name in names_of(model)} == {torch.float32}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("architecture", ["bert", "llama"])
def test_no_gradient_goes_below_the_lowest_adapted_layer(
    tiny: Callable[..., Any], manifest_of: Any, data: TrainingData, tmp_path: Path, architecture: str,
    checkpointing: bool,
):  # fmt: skip
    made = tiny(architecture)
    last = [layer.name for layer in made.spec.layers if layer.role == "ffn_down"][-1]
    tuned = apply(made.model, manifest_of(made.spec, {last: ("lora", 2)}))
    seen: list[bool] = []
    for block in blocks_of(made.model):
        made.model.get_submodule(block).register_forward_pre_hook(
            lambda _, args, kwargs: seen.append(
                any(x.requires_grad for x in (*args, *kwargs.values()) if torch.is_tensor(x))
            ),
            with_kwargs=True,
        )
    config = TrainingConfig(max_steps=2, gradient_checkpointing=checkpointing, batch_size=4)
    before = state(tuned)
    fine_tune(tuned, data, config, task=CLASSIFICATION, checkpoints=tmp_path)
    assert seen
    assert not any(seen)
    assert any(not torch.equal(before[name], tensor) for name, tensor in state(tuned).items() if "lora_B" in name)


def test_a_float16_model_does_not_lose_small_gradients(mixed_model: Any, data: TrainingData, tmp_path: Path):
    """The same SGD step for a loss of a 100,000th: its gradients are below float16's smallest number, 6e-8."""
    config = TrainingConfig(
        max_steps=1, learning_rate=1.0, schedule="constant", warmup_ratio=0, optimizer="sgd", max_grad_norm=0,
        batch_size=22,
    )  # fmt: skip
    moved = []
    for factor in (1.0, 1e-5):

        def loss(model: torch.nn.Module, batch: Any, factor: float = factor) -> torch.Tensor:
            return factor * model(**batch).loss.float()

        model = half(mixed_model())
        before = state(model)
        fine_tune(model, data, config, task=CLASSIFICATION, checkpoints=tmp_path / f"{factor}", loss=loss)
        moved.append({name: (tensor - before[name]) / factor for name, tensor in state(model).items()})
        assert not any(model.get_parameter(name)._backward_hooks for name in names_of(model))
    assert sum(float(one.abs().max()) > 0.0 for one in moved[0].values()) >= 4  # B of LoRA, gates and up-projections
    for name in names_of(model):
        # Some 20 roundings of 2^-11 in a row, of numbers of the parameter's own size: 1 %.
        one, small = moved[0][name], moved[1][name]
        torch.testing.assert_close(small, one, rtol=0.05, atol=0.05 * float(one.abs().max()))


def half(model: torch.nn.Module) -> torch.nn.Module:
    """The frozen weights in float16, the head among them, without dropout."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter.requires_grad and "classifier" not in name)
        if not parameter.requires_grad:
            parameter.data = parameter.data.half()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model


def test_float16_is_refused_where_it_cannot_be(mixed_model: Any, data: TrainingData, tiny: Any, tmp_path: Path):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    config = TrainingConfig(max_steps=1, precision="float16")
    with pytest.raises(ConfigurationError, match=r"training\.precision: float16 needs a GPU"):
        fine_tune(mixed_model(), data, config, task=CLASSIFICATION, checkpoints=tmp_path)
    whole = tiny("bert").model.half().requires_grad_(True)
    with pytest.raises(ConfigurationError, match=r"model\.dtype: .* would be trained in float16"):
        fine_tune(whole, data, TrainingConfig(max_steps=1), task=CLASSIFICATION, checkpoints=tmp_path / "t")
