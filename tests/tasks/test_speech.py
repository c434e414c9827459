"""Speech with transcripts: how these become tokens, what is left out, losses, error rates, and the whole job."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from sounds import RATE, tone, write

from benchmarks.audio_models import AUDIO, BEFORE, LETTERS, ctc_tokenizer, whisper_tokenizer
from layerlens.config import DataConfig, RunConfig
from layerlens.data import load_dataset
from layerlens.exceptions import ConfigurationError
from layerlens.integrations.audio_input import audio_input
from layerlens.integrations.pretrained import PretrainedModel
from layerlens.jobs.train import train_manifest
from layerlens.manifest import read_manifest
from layerlens.pipeline import run_config
from layerlens.registry import TASKS
from layerlens.sources import LoadRequest, load_pretrained
from layerlens.tasks import make_batches
from layerlens.tasks.encoded import notes_of
from layerlens.tasks.transcripts import finish_texts, record_texts
from layerlens.tuning.merged import export_merged

CTC, SEQ2SEQ = TASKS["speech-ctc"], TASKS["speech-seq2seq"]
OPTIMIZATION = {"max_trainable_params": 600, "methods": ["lora"], "latency_profile": {"batch_size": 2}}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Recordings as corpora have them: transcripts in small letters with marks, clips in a folder beside the table."""
    root = tmp_path_factory.mktemp("corpus")
    rng = np.random.default_rng(0)
    with (root / "train.tsv").open("w", newline="") as file:
        rows = csv.writer(file, delimiter="\t")
        rows.writerow(["path", "sentence"])
        for number in range(18):
            words = ["told" if low else "roar" for low in rng.integers(0, 2, 2)]
            parts = [tone(300.0 if word == "told" else 2_000.0, 0.25, 22_050, number) for word in words]
            write(root / f"clips/{number}.wav", np.concatenate(parts), 22_050)
            rows.writerow([f"{number}.wav", f"{' '.join(words).capitalize()}!"])
        write(root / "clips/brief.wav", tone(300.0, 0.05))
        rows.writerow(["brief.wav", "told told told told told"])
        write(root / "clips/marks.wav", tone(300.0, 0.4))
        rows.writerow(["marks.wav", "?!"])
        rows.writerow(["0.wav", ""])
        rows.writerow(["1.wav", "éclair"])
        rows.writerow(["missing.wav", "roar"])
        write(root / "clips/long.wav", tone(300.0, 1.2))
        rows.writerow(["long.wav", "told"])
    return root


def test_ctc_is_measured_trained_and_judged(corpus: Path, tmp_path: Path):
    AUDIO["wav2vec2"].save(tmp_path / "model")
    ctc_tokenizer(tmp_path / "model").save_pretrained(tmp_path / "model")
    config = RunConfig.model_validate({
        "model": {"name_or_path": "model", "head_fit_samples": 4},
        "data": {"source": str(corpus / "train.tsv"), "calibration_samples": 8, "batch_size": 4, "max_seconds": 1.0},
        "optimization": OPTIMIZATION,
        "training": {"max_steps": 8, "batch_size": 8, "learning_rate": 2e-2},
        "runtime": {"threads": 1},
    })  # fmt: skip
    done = run_config(config, base_dir=tmp_path)
    assert done.manifest.model.task == "speech-ctc"
    assert done.manifest.model.head_modules == ("lm_head",)
    said = " ".join(done.warnings)
    for words in (
        "transcripts are written in capitals", "'!'", "no text in column 'sentence'", "has no file of sound at",
        "resampled to 16,000 Hz, from 22,050 Hz",
    ):  # fmt: skip
        assert words in said, said
    tuned = train_manifest(tmp_path / "out/manifest.json", config, base_dir=tmp_path, output=tmp_path / "tuned")
    assert tuned.after["loss"] < tuned.before["loss"]
    assert {"wer", "cer"} < set(tuned.after)
    told = " ".join(tuned.warnings)
    assert "long.wav is longer than data.max_seconds (1 s)" in told
    assert "brief.wav is too short for the transcript" in told
    assert "without a letter of the vocabulary in the transcript" in told
    export_merged(
        tmp_path / "tuned",
        read_manifest(tmp_path / "tuned/manifest.json"),
        str(tmp_path / "model"),
        tmp_path / "merged",
    )
    whole = load_pretrained(str(tmp_path / "merged"), CTC.name, ())
    assert whole.new_parameters == ()
    assert whole.audio is not None
    assert len(whole.tokenizer) == 21
    from peft import PeftModel

    request = LoadRequest("model", CTC.name, base_dir=tmp_path)
    assert request.source.snippet(request)[1].endswith(", vocab_size=21, pad_token_id=0)")
    base = hf.AutoModelForCTC.from_pretrained(tmp_path / "model", vocab_size=21, pad_token_id=0)
    stock = PeftModel.from_pretrained(base, tmp_path / "tuned")
    inputs = AUDIO["wav2vec2"].extractor(tone(300.0, 0.3), sampling_rate=RATE, return_tensors="pt")
    assert stock.eval()(**inputs).logits.shape[-1] == 21


def test_a_vocabulary_is_made_of_the_letters_of_the_data(corpus: Path, tmp_path: Path):
    """A pretrained model has no tokenizer; transformers' guides make one of the transcripts."""
    AUDIO["wav2vec2"].save(tmp_path / "model")
    config = RunConfig.model_validate({
        "model": {"name_or_path": "model", "task": CTC.name, "head_fit_samples": 4},
        "data": {"source": str(corpus / "train.tsv"), "calibration_samples": 6, "batch_size": 3},
        "profiling": {"statistics": ["fisher"]},
        "optimization": {**OPTIMIZATION, "check_predictions": False},
        "training": {"max_steps": 2, "batch_size": 4},
        "runtime": {"threads": 1},
    })  # fmt: skip
    done = run_config(config, base_dir=tmp_path)
    assert done.manifest.model.labels == tuple("acdilort\u00e9")  # small letters, without marks
    assert "a vocabulary of 14 tokens is made of the 9 characters of the transcripts" in " ".join(done.warnings)
    train_manifest(tmp_path / "out/manifest.json", config, base_dir=tmp_path, output=tmp_path / "tuned")
    for folder in ("out/peft", "tuned"):
        processor = hf.AutoProcessor.from_pretrained(tmp_path / folder)
        assert processor.decode(processor.tokenizer("told \u00e9clair")["input_ids"], group_tokens=False) == (
            "told \u00e9clair"
        )
        assert processor.feature_extractor.sampling_rate == RATE
    tuned = read_manifest(tmp_path / "tuned/manifest.json")
    export_merged(tmp_path / "tuned", tuned, str(tmp_path / "model"), tmp_path / "merged")
    whole = load_pretrained(str(tmp_path / "merged"), CTC.name, ())
    assert whole.new_parameters == ()
    assert len(whole.tokenizer) == whole.model.config.vocab_size == 14


def test_a_trained_head_stays_unless_a_new_one_is_wanted(tmp_path: Path):
    AUDIO["wav2vec2"].save(tmp_path / "model", "ForCTC", vocab_size=30)
    letters = ("a", "b")
    kept = load_pretrained(str(tmp_path / "model"), CTC.name, letters, new_head=False)
    assert (kept.tokenizer, kept.labels, kept.model.config.vocab_size) == (None, (), 30)
    for given in (True, None):  # None: the manifest has letters, so that the head of its run was new
        new = load_pretrained(str(tmp_path / "model"), CTC.name, letters, new_head=given)
        assert (len(new.tokenizer), new.labels, new.model.config.vocab_size) == (7, letters, 7)
    ctc_tokenizer(tmp_path / "model").save_pretrained(tmp_path / "model")
    own = load_pretrained(str(tmp_path / "model"), CTC.name, ("l", "o"), new_head=True)
    assert (len(own.tokenizer), own.model.config.vocab_size) == (21, 21)  # which has these letters, in capitals
    lacking = load_pretrained(str(tmp_path / "model"), CTC.name, ("l", "z"), new_head=True)
    assert (len(lacking.tokenizer), lacking.labels) == (7, ("l", "z"))


def of_ctc(corpus: Path, tmp_path: Path, letters: str = LETTERS, ending: str = "ForCTC", **more: Any) -> Any:
    """(model with a trained head, its encoded clips)."""
    tokenizer = ctc_tokenizer(tmp_path / "tokenizer", letters, **more)
    model = AUDIO["wav2vec2"].make(ending, vocab_size=len(tokenizer), pad_token_id=0, ctc_loss_reduction="mean")
    pretrained = PretrainedModel(model, tokenizer, "", (), audio=audio_input(AUDIO["wav2vec2"].extractor))
    dataset = load_dataset(DataConfig(source=str(corpus / "train.tsv")), task=CTC.name)
    return pretrained, dataset, DataConfig(source="corpus", max_seconds=1.0)


def test_the_loss_of_a_clip_is_that_of_transformers_for_it_alone(corpus: Path, tmp_path: Path):
    pretrained, dataset, config = of_ctc(corpus, tmp_path)
    (batch,) = make_batches(CTC, pretrained, dataset.select(range(4)), config, batch_size=4)
    losses = CTC.loss(pretrained.model(**batch.inputs), batch)
    for n in range(4):
        length = int(batch.inputs["attention_mask"][n].sum())
        labels = batch.labels.labels[n][batch.labels.labels[n] >= 0]
        alone = pretrained.model(
            batch.inputs["input_values"][n : n + 1, :length], batch.inputs["attention_mask"][n : n + 1, :length],
            labels=labels[None],
        )  # fmt: skip
        # float32 through 2 blocks and a sum over some 30 frames: relative 1e-5 leaves a factor of ten.
        assert float(losses[n].detach()) == pytest.approx(float(alone.loss), rel=1e-5)


@pytest.mark.parametrize(
    ("letters", "more", "said"),
    [
        (LETTERS.lower(), {}, "in small letters"),
        (LETTERS, {"do_lower_case": True}, "letters that the vocabulary lacks become the unknown token: 'é' (1)"),
        ("told!", {}, "letters that the vocabulary lacks become the unknown token: 'r'"),
    ],
)
def test_transcripts_follow_the_vocabulary(corpus: Path, tmp_path: Path, letters: str, more: Any, said: str):
    pretrained, dataset, config = of_ctc(corpus, tmp_path, letters, **more)
    found = CTC.encode(pretrained, dataset, config, 0)
    assert said in " ".join(notes_of(found))
    if len(letters) > 5:  # the é of one transcript
        assert sum(one["labels"].count(pretrained.tokenizer.unk_token_id) for one in found) == 1


def test_a_tokenizer_that_the_model_has_no_outputs_for_is_refused(corpus: Path, tmp_path: Path):
    pretrained, dataset, config = of_ctc(corpus, tmp_path)
    pretrained.model.config.vocab_size = 9
    with pytest.raises(ConfigurationError, match=r"token 19 .* and the model has 9 outputs"):
        CTC.encode(pretrained, dataset, config, 0)
    without = PretrainedModel(pretrained.model, None, "", (), audio=pretrained.audio)
    with pytest.raises(ConfigurationError, match=r"needs a tokenizer .*vocab\.json"):
        CTC.encode(without, dataset, config, 0)


def test_repeated_letters_are_kept_and_blanks_are_not(corpus: Path, tmp_path: Path):
    pretrained, dataset, config = of_ctc(corpus, tmp_path)
    (batch,) = make_batches(CTC, pretrained, dataset.select([0]), config, batch_size=1)
    ids = {name: n for n, name in enumerate((*BEFORE, *LETTERS))}
    written = "TTO_OLL_LD|||ROAR"  # of each frame; the transcript of sample 0 is two of the words
    frames = [ids["<pad>" if one == "_" else one] for one in written]
    logits = torch.nn.functional.one_hot(torch.tensor([frames]), len(pretrained.tokenizer)).float()
    targets = type(batch.labels)(
        torch.tensor([pretrained.tokenizer("TOLD ROAR")["input_ids"]]), torch.tensor([len(frames)]), 0, False,
        pretrained.tokenizer,
    )  # fmt: skip
    record = CTC.metrics.record(_Output(logits), {"targets": targets}, None)
    # TOOLLD ROAR for TOLD ROAR: one word of two, two letters more of nine characters.
    assert CTC.metrics.finish([record], ()) == {"wer": 1 / 2, "cer": pytest.approx(2 / 9)}


class _Output:
    def __init__(self, logits: torch.Tensor) -> None:
        self.logits, self.loss = logits, torch.zeros(())


def test_error_rates_are_of_all_texts_together():
    records = [record_texts(["a b c d"], ["a x c d"]), record_texts(["a"], [""]), record_texts([""], ["noise"])]
    assert finish_texts(records, ()) == {"wer": 2 / 5, "cer": 2 / 8}


def test_whisper_is_measured_trained_and_judged_by_what_it_writes(corpus: Path, tmp_path: Path):
    tokenizer = whisper_tokenizer()
    AUDIO["whisper"].save(tmp_path / "model", "ForConditionalGeneration", vocab_size=len(tokenizer))
    tokenizer.save_pretrained(tmp_path / "model")
    config = RunConfig.model_validate({
        "model": {"name_or_path": "model"},
        "data": {"source": str(corpus), "calibration_samples": 8, "batch_size": 4, "max_seconds": 1.0},
        "optimization": OPTIMIZATION,
        "training": {"max_steps": 8, "batch_size": 8, "learning_rate": 2e-2},
        "runtime": {"threads": 1},
    })  # fmt: skip
    done = run_config(config, base_dir=tmp_path)
    assert done.manifest.model.task == "speech-seq2seq"
    assert any(".decoder." in one.layer for one in done.manifest.allocations)
    tuned = train_manifest(tmp_path / "out/manifest.json", config, base_dir=tmp_path, output=tmp_path / "tuned")
    assert tuned.after["loss"] < tuned.before["loss"]
    assert {"wer", "cer", "perplexity", "token_accuracy"} < set(tuned.after)


def test_labels_of_whisper_begin_after_the_token_that_its_decoder_starts_with(corpus: Path):
    tokenizer = whisper_tokenizer()
    model = AUDIO["whisper"].make("ForConditionalGeneration", vocab_size=len(tokenizer), max_target_positions=14)
    pretrained = PretrainedModel(model, tokenizer, "", (), audio=audio_input(AUDIO["whisper"].extractor))
    dataset = load_dataset(DataConfig(source=str(corpus)), task=SEQ2SEQ.name)
    found = SEQ2SEQ.encode(pretrained, dataset, DataConfig(source="corpus"), 0)
    assert all(tokenizer.decode(one["labels"]).startswith("<|notimestamps|>") for one in found)
    assert "brief.wav is of a transcript of more than 13 tokens (data.max_target_length)" in " ".join(notes_of(found))
    inputs, labels = SEQ2SEQ.collate(pretrained, found[:3])
    assert inputs["decoder_input_ids"][:, 0].tolist() == [1, 1, 1]
    assert inputs["decoder_input_ids"][0, 1:].tolist()[:5] == labels[0, :-1].tolist()[:5]


FACTORY = """
import transformers
from benchmarks.audio_models import AUDIO, ctc_tokenizer
from pathlib import Path

def build():
    tokenizer = ctc_tokenizer(Path(__file__).parent / "tokenizer")
    processor = transformers.Wav2Vec2Processor(AUDIO["hubert"].extractor, tokenizer)
    return AUDIO["hubert"].make("ForCTC", vocab_size=len(tokenizer)), processor

def plain():
    return AUDIO["hubert"].make(num_labels=2), lambda clips: pad(clips)

def pad(clips):
    import numpy
    longest = max(map(len, clips))
    return numpy.stack([numpy.pad(one, (0, longest - len(one))) for one in clips])
"""


def test_models_of_a_factory_and_in_memory(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "own_sound.py").write_text(FACTORY)
    monkeypatch.syspath_prepend(tmp_path)
    settings: dict[str, Any] = {
        "model": {"factory": "own_sound:build", "task": CTC.name, "head": ["lm_head"]},
        "data": {"source": str(corpus), "calibration_samples": 6, "batch_size": 3},
        "optimization": OPTIMIZATION,
        "runtime": {"threads": 1},
    }
    config = RunConfig.model_validate(settings)
    done = run_config(config, base_dir=tmp_path)
    assert done.manifest.model.head_modules == ("lm_head",)

    import own_sound

    import layerlens

    model, processor = own_sound.build()
    found = layerlens.plan(
        model, str(corpus), task=CTC.name, tokenizer=processor, max_trainable_params=600, calibration_samples=6
    )
    assert found.manifest.model.task == CTC.name

    classes = TASKS["audio-classification"]
    own = load_pretrained("factory:own_sound:plain", classes.name, ("a", "b"), base_dir=tmp_path)
    clips = load_dataset(config.data, tmp_path, CTC.name).select([0, 1])
    (batch,) = make_batches(classes, own, replace(clips, labels=(0, 1)), config.data, batch_size=2)
    assert own.model(**batch.inputs).logits.shape == (2, 2)
