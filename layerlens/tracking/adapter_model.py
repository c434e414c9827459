"""The adapter as MLflow loads it: this file itself is stored with the model (models from code).

``mlflow.pyfunc.load_model(...).predict(["a text", ...])`` returns the logits of each text. An adapter of LoRA alone
needs PEFT and transformers; one with bottleneck adapters, prefixes or a trained head needs LayerLens to put them in.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlflow.models
import mlflow.pyfunc


class AdaptedModel(mlflow.pyfunc.PythonModel):
    """The base model with its adapter."""

    def load_context(self, context: Any) -> None:
        """Load base model and adapter; the base must be there under the name that the run used."""
        facts, directory = context.model_config["model"], Path(context.artifacts["adapter"])
        if context.model_config["needs_layerlens"]:
            from layerlens.models.tokens import TokenTraining
            from layerlens.sources import load_pretrained
            from layerlens.tuning import load

            base = load_pretrained(
                facts["name_or_path"], facts["task"], facts["labels"], seed=facts["seed"], dtype=facts["dtype"],
                quantization=facts.get("quantization"),
                tokens=TokenTraining.of(facts["tokens"]) if facts.get("tokens") else None,
            )  # fmt: skip
            self.tokenizer, self.model = base.tokenizer, load(base.model, directory, trainable=False).eval()
            return
        import importlib

        import transformers
        from peft import PeftModel

        name = facts["name_or_path"]
        if facts["package"]:  # what the model's source said when the adapter was stored
            name = importlib.import_module(facts["package"]).get_model_path()
        heads: dict[str, Any] = {"num_labels": facts["num_labels"]} if facts["num_labels"] else {}
        if facts.get("quantization"):
            from transformers.quantizers.auto import AutoQuantizationConfig

            heads["quantization_config"] = AutoQuantizationConfig.from_dict(facts["quantization"])
        plain = getattr(transformers, facts["auto_class"]).from_pretrained(
            name, dtype=facts["dtype"], trust_remote_code=False, **heads
        )
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        if facts.get("tokens"):
            plain.resize_token_embeddings(facts["tokens"]["rows"])
        self.model = PeftModel.from_pretrained(plain, str(directory)).eval()

    def predict(self, context: Any, model_input: list[str], params: dict[str, Any] | None = None) -> list[list[float]]:
        """Logits [n_texts, n_classes]; of language models those of each text's last token, [n_texts, vocabulary]."""
        import torch

        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        batch = self.tokenizer(list(model_input), return_tensors="pt", padding=True, truncation=True)
        with torch.no_grad():
            logits = self.model(**batch).logits
        if logits.dim() == 3:
            last = batch["attention_mask"].cumsum(1).argmax(1)  # whichever side the padding is on
            logits = logits[torch.arange(len(logits)), last]
        found: list[list[float]] = logits.tolist()
        return found


mlflow.models.set_model(AdaptedModel())
