"""Models of sound: statistics against one backward pass for each clip, masks of positions, and what is offered."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from brute_force import assert_equal, profile, sample_gradients, weight_statistics

from benchmarks.audio_models import AUDIO, ctc_tokenizer, whisper_tokenizer
from layerlens.config import DataConfig
from layerlens.data.dataset import Dataset
from layerlens.data.sounds import StoredSound
from layerlens.integrations.audio_input import audio_input, mask_of_frames
from layerlens.integrations.layers import model_spec
from layerlens.integrations.pretrained import PretrainedModel
from layerlens.registry import TASKS
from layerlens.tasks import Batch, make_batches

TASK = TASKS["audio-classification"]
RATE = 16_000
CONFIG = DataConfig(source="clips")


def noise(seconds: float, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 0.3, round(seconds * RATE)).astype(np.float32)


SPEECH = {
    "ctc": ("wav2vec2", "ForCTC"),
    "ctc, spectra": ("wav2vec2-bert", "ForCTC"),
    "ctc, without a mask": ("hubert", "ForCTC"),
    "seq2seq": ("whisper", "ForConditionalGeneration"),
    "seq2seq, with a mask": ("speech2text", "ForConditionalGeneration"),
}


@pytest.mark.parametrize("kind", SPEECH)
def test_statistics_of_speech_equal_one_backward_pass_for_each_clip(kind: str, tmp_path: Path):
    name, ending = SPEECH[kind]
    task = TASKS[f"speech-{kind.partition(',')[0]}"]
    tokenizer = ctc_tokenizer(tmp_path) if ending == "ForCTC" else whisper_tokenizer()
    model = AUDIO[name].make(ending, vocab_size=len(tokenizer)).double()
    pretrained = PretrainedModel(model, tokenizer, "", (), audio=audio_input(AUDIO[name].extractor))
    clips = tuple(StoredSound(f"{n}", samples=noise(0.4 + 0.05 * n, n), rate=RATE) for n in range(4))
    dataset = Dataset({"audio": clips}, ("told", "roar told", "a toad", "toll"))
    (batch,) = make_batches(task, pretrained, dataset, CONFIG, batch_size=4)
    spec = model_spec(pretrained, "tiny", inputs=batch.inputs)
    measured = profile(pretrained.model, spec, [batch], task.loss, everything=True)
    assert_equal(measured, sample_gradients(pretrained.model, batch, task.loss), 1e-9)


def of(kind: str) -> tuple[PretrainedModel, Batch]:
    """The classifier in float64, and four clips of different lengths for it."""
    model: Any = AUDIO[kind].make(num_labels=2).double()
    pretrained = PretrainedModel(model, None, "", (), ("a", "b"), audio=audio_input(AUDIO[kind].extractor))
    clips = tuple(StoredSound(f"{n}", samples=noise(0.2 + 0.05 * n, n), rate=RATE) for n in range(4))
    (batch,) = make_batches(TASK, pretrained, Dataset({"audio": clips}, (0, 1, 1, 0), ("a", "b")), CONFIG, batch_size=4)
    return pretrained, batch


@pytest.mark.parametrize("kind", [name for name, one in AUDIO.items() if one.classifier])
def test_statistics_equal_one_backward_pass_for_each_clip(kind: str):
    pretrained, batch = of(kind)
    spec = model_spec(pretrained, "tiny", inputs=batch.inputs)
    measured = profile(pretrained.model, spec, [batch], TASK.loss, everything=True)
    # Both routes are float64, as in test_odd_layers.py.
    assert_equal(measured, sample_gradients(pretrained.model, batch, TASK.loss), 1e-9)
    found = set(weight_statistics(measured))
    ends = ("fc1.weight", "intermediate_dense.weight", "intermediate.dense.weight")
    assert any(name.endswith(ends) for name in found)
    assert any("pos_conv_embed" in name for name in found) == (kind == "data2vec")  # which norms no weight
    if kind == "wavlm":  # whose code reads the weights of its projections without calling them, as it would LoRA's
        why = {name: reason for name, reason in spec.left_out.items() if "q_proj" in name}
        assert why
        assert all("does not call it as a module" in reason for reason in why.values())


def test_convolutions_of_the_front_end_are_offered_where_they_are_named():
    pretrained, batch = of("hubert")
    spec = model_spec(pretrained, "tiny", inputs=batch.inputs, only=["conv_layers.*.conv", "pos_conv_embed.conv"])
    assert [layer.layer_type for layer in spec.layers if "conv_layers" in layer.name] == ["conv"] * 3
    assert "normalisation" in spec.left_out["hubert.encoder.pos_conv_embed.conv"]
    measured = profile(pretrained.model, spec, [batch], TASK.loss, everything=False)
    assert_equal(measured, sample_gradients(pretrained.model, batch, TASK.loss), 1e-9)


def test_masks_are_of_positions():
    pretrained, batch = of("wav2vec2")
    model: Any = pretrained.model
    lengths = [
        int(model._get_feat_extract_output_lengths(torch.tensor(round((0.2 + 0.05 * n) * RATE)))) for n in range(4)
    ]
    assert batch.masks[0].sum(1).tolist() == lengths
    assert batch.n_tokens == sum(lengths)
    assert batch.halves_apart().masks[0].sum(1).tolist() == [lengths[n] for n in (0, 2, 1, 3)]
    seen: list[torch.Tensor] = []
    query = "wav2vec2.encoder.layers.0.attention.q_proj"
    handle = model.get_submodule(query).register_forward_hook(lambda module, args, output: seen.append(args[0]))
    model(**batch.inputs)
    handle.remove()
    measured = profile(model, model_spec(pretrained, "tiny", inputs=batch.inputs), [batch], TASK.loss, everything=False)
    own = measured.by_name()[query].by_method["lora"].input_mean_square
    assert own == pytest.approx(float(seen[0][batch.masks[0].bool()].square().mean()), rel=1e-9)
    # A clip that is shorter than one mask of SpecAugment is padded so far that transformers trains on it.
    way = pretrained.audio
    assert way is not None
    short = way.inputs(model, [noise(0.05, 0)])
    model.train()(**short)
    found = mask_of_frames(model, short)
    assert found is not None
    assert found.shape[1] >= model.config.mask_time_length


def test_positions_are_counted_without_weights(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("layerlens.integrations.pretrained.weights_fingerprint", lambda *of: "")
    pretrained, batch = of("wav2vec2")
    spec = model_spec(pretrained, "tiny", inputs=batch.inputs)
    empty = replace(pretrained, model=pretrained.model.to("meta"))
    found = model_spec(empty, "tiny", inputs=batch.inputs)
    assert [layer.positions for layer in found.layers] == [layer.positions for layer in spec.layers]
