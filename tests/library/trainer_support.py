"""Tiny real trainers: random models, a tokenizer of words with a chat template, a handful of samples."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
)

WORDS = ["the", "a", "cat", "dog", "bird", "sat", "ran", "flew", "on", "over", "mat", "tree", "good", "bad", "great"]
WORDS += ["awful", "thing", "user", "assistant", "is", "what"]
SPECIAL = ["<pad>", "<eos>", "<unk>", "<user>", "<assistant>"]
TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'user' %}<user> {{ message['content'] }} "
    "{% else %}<assistant> {% generation %}{{ message['content'] }} <eos> {% endgeneration %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)
ARGUMENTS: dict[str, Any] = {
    "per_device_train_batch_size": 2, "report_to": [], "use_cpu": True, "disable_tqdm": True, "max_steps": 2,
    "learning_rate": 1e-2, "save_strategy": "no", "logging_steps": 1, "seed": 3,
}  # fmt: skip


def tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(SPECIAL + WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.add_special_tokens(SPECIAL)
    made = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", chat_template=TEMPLATE
    )
    made.model_input_names = ["input_ids", "attention_mask"]
    return made


def config(**more: Any) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64, pad_token_id=0, eos_token_id=1, **more,
    )  # fmt: skip


def bert_config(**more: Any) -> BertConfig:
    return BertConfig(
        vocab_size=32, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=64, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **more,
    )  # fmt: skip


def louder(model: Any) -> Any:
    """The default initialisation (0.02) makes all gradients tiny."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(8.0)
    return model


def causal_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return louder(LlamaForCausalLM(config()))


def sentences(n: int = 12) -> list[str]:
    return [" ".join(WORDS[(i * 7 + k * (i + 1)) % len(WORDS)] for k in range(3 + i % 5)) for i in range(n)]


def classifier(folder: Path, **more: Any) -> Trainer:
    torch.manual_seed(0)
    model = louder(BertForSequenceClassification(bert_config(num_labels=2)))
    words = tokenizer()
    rows = Dataset.from_dict({"text": sentences(), "labels": [i % 2 for i in range(12)]})
    rows = rows.map(lambda row: words(row["text"]))
    arguments = TrainingArguments(str(folder), **{**ARGUMENTS, **more})
    return Trainer(model, arguments, train_dataset=rows, processing_class=words)


def language_model(folder: Path, **more: Any) -> Trainer:
    from transformers import DataCollatorForLanguageModeling

    words = tokenizer()
    rows = Dataset.from_dict(dict(words(sentences())))
    arguments = TrainingArguments(str(folder), **{**ARGUMENTS, **more})
    collator = DataCollatorForLanguageModeling(words, mlm=False)
    return Trainer(causal_model(), arguments, train_dataset=rows, processing_class=words, data_collator=collator)


def sft(folder: Path, model: Any = None, data: Any = None, peft_config: Any = None, **more: Any) -> Any:
    from trl import SFTConfig, SFTTrainer

    data = data or Dataset.from_dict({"text": sentences()})
    arguments = SFTConfig(str(folder), **{**ARGUMENTS, "max_length": 16, "bf16": False, **more})
    return SFTTrainer(
        model or causal_model(), arguments, train_dataset=data, processing_class=tokenizer(), peft_config=peft_config
    )


def chats() -> Dataset:
    turns = [
        [{"role": "user", "content": "what is the cat"}, {"role": "assistant", "content": text}] for text in sentences()
    ]
    return Dataset.from_dict({"messages": turns})


def completions() -> Dataset:
    return Dataset.from_dict({"prompt": ["what is the cat "] * 12, "completion": sentences()})


def pairs() -> Dataset:
    texts = sentences(24)
    return Dataset.from_dict({"prompt": ["what is the "] * 12, "chosen": texts[:12], "rejected": texts[12:]})


def dpo(folder: Path, ref_model: Any = "copy", **more: Any) -> Any:
    from trl import DPOConfig, DPOTrainer

    model = causal_model()
    if ref_model == "saved":  # none is given, so the trainer loads it from where the model came from
        model.save_pretrained(folder / "base")
        model = LlamaForCausalLM.from_pretrained(folder / "base")
        ref_model = None
    elif ref_model == "copy":
        ref_model = causal_model()
    arguments = DPOConfig(str(folder), **{**ARGUMENTS, "max_length": 16, "bf16": False, **more})
    return DPOTrainer(model, ref_model, arguments, train_dataset=pairs(), processing_class=tokenizer())


def reward(folder: Path, **more: Any) -> Any:
    from trl import RewardConfig, RewardTrainer

    torch.manual_seed(0)
    model = louder(LlamaForSequenceClassification(config(num_labels=1)))
    arguments = RewardConfig(str(folder), **{**ARGUMENTS, "max_length": 16, "bf16": False, **more})
    return RewardTrainer(model, arguments, train_dataset=pairs(), processing_class=tokenizer())


def sentence_model(folder: Path) -> Any:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
    from transformers import BertModel

    torch.manual_seed(0)
    louder(BertModel(bert_config())).save_pretrained(folder / "bert")
    words = tokenizer()
    words.chat_template = None  # with one, texts would be messages
    words.save_pretrained(folder / "bert")
    encoder = Transformer(str(folder / "bert"), max_seq_length=16)
    return SentenceTransformer(modules=[encoder, Pooling(16, "mean")], device="cpu")


def sentence_trainer(folder: Path, loss: Any = None, model: Any = None, **more: Any) -> Any:
    from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

    model = model or sentence_model(folder)
    texts = sentences(24)
    data = Dataset.from_dict({"anchor": texts[:12], "positive": texts[12:]})
    arguments = SentenceTransformerTrainingArguments(
        str(folder), **{**ARGUMENTS, "per_device_train_batch_size": 4, **more}
    )
    return SentenceTransformerTrainer(
        model, arguments, train_dataset=data, loss=(loss or MultipleNegativesRankingLoss)(model)
    )
