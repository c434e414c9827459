"""Tiny models with random weights of every language architecture of the installed transformers that a recipe can make.

The names come from transformers' own tables of model classes, the sizes from ``SMALL``: every field of it that a
configuration class has is set. What a family needs beside these (widths that must agree with others) is in ``FIELDS``.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from layerlens.integrations.torchvision_import import make_torchvision_importable

make_torchvision_importable()
import transformers as hf  # noqa: E402
from tokenizers import Tokenizer, models, pre_tokenizers, processors  # noqa: E402
from transformers.models.auto import modeling_auto as auto  # noqa: E402

WORDS = [
    "item",
    "was",
    "great",
    "lovely",
    "superb",
    "fine",
    "awful",
    "bad",
    "poor",
    "dull",
    "and",
    "today",
    "more",
    "so",
    "very",
]
SPECIALS = ("<s>", "</s>", "<unk>", "<mask>", "<pad>")
VOCABULARY = 64
EXPERTS = {
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "moe_num_experts": 4, "num_experts_per_tok": 2,
    "num_experts_per_token": 2, "moe_topk": 2, "moe_k": 2, "moe_intermediate_size": 16, "n_shared_experts": 1,
    "shared_expert_intermediate_size": 32, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1,
}  # fmt: skip
SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "d_model": 32, "n_embd": 32, "dim": 32, "embedding_size": 32,
    "emb_dim": 32, "intermediate_size": 64, "ffn_dim": 64, "d_ff": 64, "n_inner": 64, "hidden_dim": 64, "d_inner": 64,
    "num_hidden_layers": 2, "n_layer": 2, "n_layers": 2, "num_layers": 2, "num_decoder_layers": 2, "encoder_layers": 2,
    "decoder_layers": 2, "num_attention_heads": 4, "n_head": 4, "n_heads": 4, "num_heads": 4,
    "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64,
    "num_key_value_heads": 2, "head_dim": 8, "d_kv": 8, "d_head": 8, "max_position_embeddings": 128,
    "n_positions": 128, "max_seq_len": 128, "context_length": 128, "sliding_window": 8, "pad_token_id": 4,
    "bos_token_id": 0, "eos_token_id": 1, "word_embed_proj_dim": 32, "layerdrop": 0.0,
    **EXPERTS,
}  # fmt: skip
MLA = {
    "num_key_value_heads": 4, "kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8,
    "v_head_dim": 8, "head_dim": 4,
}  # fmt: skip
MAMBA2 = {
    "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 8, "mamba_chunk_size": 16,
}  # fmt: skip
LINEAR_ATTENTION = {
    "num_hidden_layers": 4, "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}  # fmt: skip
LEFT_ALONE = object()
"""A field that a family computes itself."""
SEQ2SEQ = {"decoder_start_token_id": 1, "forced_eos_token_id": None}
FIELDS: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1], **MAMBA2},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"], **MAMBA2},
    "falcon_h1": {"mamba_d_ssm": 64, **MAMBA2},
    "mamba": {"state_size": 4},
    "falcon_mamba": {"state_size": 4},
    "mamba2": {"state_size": 8, "num_heads": 8, "head_dim": 8, "n_groups": 1, "chunk_size": 16},
    "jamba": {
        "num_hidden_layers": 4, "num_experts": 2, "attn_layer_period": 2, "attn_layer_offset": 1,
        "expert_layer_period": 2, "expert_layer_offset": 1, "mamba_d_state": 4,
    },
    "deepseek_v2": MLA, "deepseek_v3": MLA, "glm4_moe_lite": MLA, "longcat_flash": MLA,
    "llama4_text": {"intermediate_size_mlp": 64, "attention_chunk_size": 16, "num_experts_per_tok": 1},
    "lfm2": {"layer_types": ["conv", "full_attention"], "block_multiple_of": 8},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "qwen3_next": LINEAR_ATTENTION, "qwen3_5_text": LINEAR_ATTENTION, "qwen3_5_moe_text": LINEAR_ATTENTION,
    "olmo_hybrid": LINEAR_ATTENTION,
    "rwkv": {"attention_hidden_size": 32},
    "gptj": {"rotary_dim": 4}, "codegen": {"rotary_dim": 4, "n_head": 4, "n_embd": 64, "head_dim": 16},
    "gemma2": {"query_pre_attn_scalar": 8}, "gemma3_text": {"query_pre_attn_scalar": 8},
    "vaultgemma": {"query_pre_attn_scalar": 8}, "t5gemma": {},
    "gemma3n_text": {
        "num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2, "num_kv_shared_layers": 0,
        "vocab_size_per_layer_input": VOCABULARY, "hidden_size_per_layer_input": 8, "laurel_rank": 4,
        "activation_sparsity_pattern": [0.0] * 4,
    },
    "gemma4_text": {
        "layer_types": ["sliding_attention", "full_attention"], "global_head_dim": 8, "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": VOCABULARY, "num_kv_shared_layers": 0,
    },
    "deberta-v2": {
        "relative_attention": True, "position_buckets": 16, "pos_att_type": ["p2c", "c2p"], "share_att_key": True,
        "max_relative_positions": -1, "position_biased_input": False, "norm_rel_ebd": "layer_norm",
    },
    "modernbert": {"global_attn_every_n_layers": 2, "local_attention": 8, "cls_token_id": 0, "sep_token_id": 1},
    "modernbert-decoder": {"global_attn_every_n_layers": 2, "local_attention": 8},
    "phi": {"partial_rotary_factor": 0.5}, "falcon": {"multi_query": True, "head_dim": LEFT_ALONE},
    "bart": SEQ2SEQ, "mbart": SEQ2SEQ, "m2m_100": SEQ2SEQ, "pegasus": SEQ2SEQ, "marian": SEQ2SEQ, "plbart": SEQ2SEQ,
    "blenderbot": SEQ2SEQ, "blenderbot-small": SEQ2SEQ, "nllb-moe": {**SEQ2SEQ, "router_z_loss_coef": 0.0},
    "pegasus_x": {**SEQ2SEQ, "block_size": 8, "num_global_tokens": 4}, "mvp": SEQ2SEQ,
    "t5": {"decoder_start_token_id": 4}, "mt5": {"decoder_start_token_id": 4}, "umt5": {"decoder_start_token_id": 4},
    "longt5": {"decoder_start_token_id": 4, "local_radius": 7}, "switch_transformers": {"decoder_start_token_id": 4},
    "led": {**SEQ2SEQ, "attention_window": 8, "max_encoder_position_embeddings": 128,
            "max_decoder_position_embeddings": 128},
    "longformer": {"attention_window": [8, 8]}, "big_bird": {"attention_type": "original_full"},
    "funnel": {"block_sizes": [1, 1], "d_head": 8, "num_hidden_layers": LEFT_ALONE},
    "mobilebert": {"embedding_size": 32, "intra_bottleneck_size": 32},
    "mpt": {"d_model": 32}, "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 8},
    "prophetnet": {
        "num_hidden_layers": LEFT_ALONE, "num_encoder_layers": 2, "num_encoder_attention_heads": 4,
        "num_decoder_attention_heads": 4, **SEQ2SEQ,
    },
    "xlnet": {"max_position_embeddings": LEFT_ALONE}, "zaya": {"num_experts_per_tok": 1},
    "dbrx": {
        "num_key_value_heads": LEFT_ALONE, "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "esmc": {"num_key_value_heads": 4}, "dots3_note_text": MLA, "neomme": {"head_dim": 16},
    "openai-gpt": {"afn": "gelu"}, "xlm": {"emb_dim": 32}, "flaubert": {"emb_dim": 32},
}  # fmt: skip
TASKS = {
    "causal-lm": ("AutoModelForCausalLM", auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
    "masked-lm": ("AutoModelForMaskedLM", auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES),
    "seq2seq": ("AutoModelForSeq2SeqLM", auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES),
    "sequence-classification": (
        "AutoModelForSequenceClassification",
        {name: auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES[name] for name in ("bart", "t5", "bert", "llama")},
    ),
}
"""Task -> the automatic class, and transformers' table of the classes of each kind of model."""
OTHER_INPUTS = ("whisper", "seamless_m4t", "seamless_m4t_v2", "trocr", "moshi", "musicgen", "musicgen_melody", "tapas")
"""Kinds of model whose inputs are sounds, pictures or tables."""
MOST_PARAMETERS = 4_000_000
"""Anything larger has sizes that no recipe here lowers."""


@dataclass(frozen=True)
class Architecture:
    """A kind of model with a head: ``name`` is transformers' name of it, ``task`` what it is loaded for."""

    name: str
    task: str

    @property
    def key(self) -> str:
        return f"{self.name} {self.task}"

    @property
    def class_name(self) -> str:
        found: Any = TASKS[self.task][1][self.name]
        return found if isinstance(found, str) else found[0]


def architectures() -> list[Architecture]:
    """Each kind of model that reads text, for the first task that transformers has a class for."""
    found: dict[str, Architecture] = {}
    for task in ("seq2seq", "masked-lm", "causal-lm"):
        for name in TASKS[task][1]:
            if name not in OTHER_INPUTS:
                found.setdefault(name, Architecture(name, task))
    heads = [Architecture(name, "sequence-classification") for name in TASKS["sequence-classification"][1]]
    return sorted([*found.values(), *heads], key=lambda one: (one.name, one.task))


def build(one: Architecture, directory: Path) -> None:
    """Write a tiny model and its tokenizer into ``directory``.

    Raises:
        Exception: see ``model_of``; or the model does not run on two samples.
    """
    torch.manual_seed(0)
    model = model_of(one).eval()
    ids = torch.arange(5, 29).reshape(2, 12)
    if one.task == "sequence-classification":  # BART's and T5's classifiers read the state of the end of the text
        ids[:, -1] = 1
    decoder = {"decoder_input_ids": ids} if one.task == "seq2seq" else {}
    with torch.no_grad():
        model(input_ids=ids, attention_mask=torch.ones_like(ids), **decoder)
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and "norm" not in name and 0 < float(parameter.std()) < 0.05:
                parameter.mul_(0.08 / parameter.std())
    model.save_pretrained(directory)
    tokenizer().save_pretrained(directory)


def model_of(one: Architecture) -> Any:
    """A tiny model as transformers initialises it.

    Raises:
        Exception: of transformers, where the recipe does not fit; ValueError where the model is not small.
    """
    config = configuration(one.name)
    if one.task == "sequence-classification":
        config.num_labels = 2
    auto_class = getattr(hf, TASKS[one.task][0])
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in auto_class.from_config(config).parameters())
    if size > MOST_PARAMETERS:
        raise ValueError(f"{size:,} parameters")
    return auto_class.from_config(config)


def configuration(name: str) -> Any:
    """A small configuration of one kind of model."""
    config_class = type(hf.AutoConfig.for_model(name))
    own = config_class()
    fields = {field: value for field, value in SMALL.items() if _has(own, field)} | FIELDS.get(name, {})
    return config_class(**{field: value for field, value in fields.items() if value is not LEFT_ALONE})


def _has(config: Any, field: str) -> bool:
    try:
        return hasattr(config, field)
    except Exception:  # a field that is different for each layer
        return True


def tokenizer() -> Any:
    """Of words, with the special tokens that any of the models needs."""
    vocabulary = {word: index for index, word in enumerate([*SPECIALS, *WORDS, *map(str, range(10))])}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> $B </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    named = dict(zip(("bos_token", "eos_token", "unk_token", "mask_token", "pad_token"), SPECIALS, strict=True))
    return hf.PreTrainedTokenizerFast(tokenizer_object=made, **named)
