"""Small models of sound with random weights, one configuration of each family of transformers, with its extractor."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers as hf

WIDTHS: dict[str, Any] = {
    "hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2, "intermediate_size": 24,
    "initializer_range": 0.2,
}  # fmt: skip
WAVES: dict[str, Any] = {
    **WIDTHS, "conv_dim": (8, 8, 8), "conv_kernel": (10, 8, 4), "conv_stride": (8, 8, 4), "num_feat_extract_layers": 3,
    "num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2, "classifier_proj_size": 8, "layerdrop": 0.0,
    "hidden_dropout": 0.0, "attention_dropout": 0.0, "final_dropout": 0.0, "feat_proj_dropout": 0.0,
    "activation_dropout": 0.0,
}  # fmt: skip
"""Of waves: a position for every 256 samples."""
NORMED: dict[str, Any] = {**WAVES, "feat_extract_norm": "layer", "do_stable_layer_norm": True, "conv_bias": True}
"""The same with layer norms in the convolutions, which models that take a mask of padding have."""
WHISPER: dict[str, Any] = {
    "d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
    "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "num_mel_bins": 8, "max_source_positions": 50,
    "classifier_proj_size": 8, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0, "decoder_start_token_id": 1,
    "vocab_size": 40, "init_std": 0.2,
}  # fmt: skip


SPEECH_TO_TEXT: dict[str, Any] = {
    **{name: value for name, value in WHISPER.items() if name not in ("num_mel_bins", "max_source_positions")},
    "input_feat_per_channel": 8, "max_source_positions": 200, "conv_channels": 16, "max_target_positions": 60,
}  # fmt: skip
LETTERS = "ABCDEFGHIKLNORT'"
BEFORE = ("<pad>", "<s>", "</s>", "<unk>", "|")
"""Tokens of a vocabulary of CTC before its letters."""


def ctc_tokenizer(folder: Path, letters: str = LETTERS, **more: Any) -> Any:
    """A tokenizer of wav2vec2 with these letters; its vocabulary lies in ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({name: n for n, name in enumerate((*BEFORE, *letters))}))
    return hf.Wav2Vec2CTCTokenizer(folder / "vocab.json", **more)


def whisper_tokenizer(letters: str = "abcdefghiklnort!") -> Any:
    """A tokenizer of Whisper that knows these letters: a token for each."""
    vocabulary = {name: n for n, name in enumerate(("<|endoftext|>", "<|startoftranscript|>", "<|notimestamps|>"))}
    vocabulary |= {name: n for n, name in enumerate(("\u0120", *letters), len(vocabulary))}
    made = hf.WhisperTokenizer(vocab=vocabulary, merges=[], pad_token="<|endoftext|>")
    made.add_special_tokens({"extra_special_tokens": ["<|startoftranscript|>", "<|notimestamps|>"]})
    return made


@dataclass(frozen=True)
class AudioModel:
    """One family.

    Args:
        name: of its classes, without what they end with.
        settings: of its configuration.
        extractor: of sound.
        classifier: how its classifier's name ends.
    """

    name: str
    settings: dict[str, Any]
    extractor: Any = field(default_factory=lambda: hf.Wav2Vec2FeatureExtractor(return_attention_mask=True))
    classifier: str = "ForSequenceClassification"

    def make(self, ending: str = "", **more: Any) -> Any:
        """A model with random weights: of the class with this ending, else of the classifier."""
        torch.manual_seed(0)
        kind = getattr(hf, self.name + (ending or self.classifier))
        return kind(kind.config_class(**(self.settings | more))).eval().requires_grad_(False)

    def save(self, folder: Path, ending: str = "Model", **more: Any) -> Path:
        """One of them, by default without a head, as a checkpoint with its feature extractor."""
        self.make(ending, **more).save_pretrained(folder)
        self.extractor.save_pretrained(folder)
        return folder


AUDIO: dict[str, AudioModel] = {
    "wav2vec2": AudioModel("Wav2Vec2", NORMED),
    "hubert": AudioModel("Hubert", WAVES, hf.Wav2Vec2FeatureExtractor(return_attention_mask=False)),
    "wavlm": AudioModel("WavLM", {**NORMED, "num_buckets": 8}),
    "sew": AudioModel("SEW", {**WAVES, "squeeze_factor": 2}),
    "sew-d": AudioModel(
        "SEWD", {**WAVES, "squeeze_factor": 2, "max_position_embeddings": 64, "position_buckets": 8}
    ),
    "unispeech": AudioModel("UniSpeech", NORMED),
    "unispeech-sat": AudioModel("UniSpeechSat", NORMED),
    "data2vec": AudioModel(
        "Data2VecAudio", {**WAVES, "conv_bias": True, "conv_pos_kernel_size": 5, "num_conv_pos_embeddings": 2}
    ),
    "conformer": AudioModel("Wav2Vec2Conformer", {**NORMED, "conv_depthwise_kernel_size": 5}),
    "wav2vec2-bert": AudioModel(
        "Wav2Vec2Bert",
        {**WIDTHS, "feature_projection_input_dim": 16, "classifier_proj_size": 8, "conv_depthwise_kernel_size": 5},
        hf.SeamlessM4TFeatureExtractor(feature_size=8, num_mel_bins=8),
    ),
    "ast": AudioModel(
        "AST", {**WIDTHS, "num_mel_bins": 16, "max_length": 40}, hf.ASTFeatureExtractor(num_mel_bins=16, max_length=40),
        "ForAudioClassification",
    ),
    "speech2text": AudioModel(
        "Speech2Text", SPEECH_TO_TEXT, hf.Speech2TextFeatureExtractor(num_mel_bins=8, feature_size=8), ""
    ),
    "whisper": AudioModel(
        "Whisper", WHISPER, hf.WhisperFeatureExtractor(feature_size=8, chunk_length=1), "ForAudioClassification"
    ),
}  # fmt: skip
