"""The adapter as MLflow loads it: this file itself is stored with the model (models from code), and needs no LayerLens.

``mlflow.pyfunc.load_model(...).predict(["a text", ...])`` returns the logits of each text.
"""

from __future__ import annotations

from typing import Any

import mlflow.models
import mlflow.pyfunc


class AdaptedModel(mlflow.pyfunc.PythonModel):  # type: ignore[name-defined]
    """The base model with its PEFT adapter."""

    def load_context(self, context: Any) -> None:
        """Load base model and adapter; the base must be there under the name that the run used."""
        import importlib

        import transformers
        from peft import PeftModel

        name, task = context.model_config["base_model"], context.model_config["task"]
        if name.startswith("package:"):
            name = importlib.import_module(name.removeprefix("package:")).get_model_path()
        heads = {"num_labels": len(context.model_config["labels"])} if context.model_config["labels"] else {}
        kind = "AutoModelForCausalLM" if task == "causal-lm" else "AutoModelForSequenceClassification"
        base = getattr(transformers, kind).from_pretrained(name, **heads)
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(name)
        self.model = PeftModel.from_pretrained(base, context.artifacts["peft"]).eval()

    def predict(self, context: Any, model_input: list[str], params: dict[str, Any] | None = None) -> list[list[float]]:
        """Logits [n_texts, n_classes] (for language models of the last token)."""
        import torch

        batch = self.tokenizer(list(model_input), return_tensors="pt", padding=True, truncation=True)
        with torch.no_grad():
            logits = self.model(**batch).logits
        found: list[list[float]] = (logits if logits.dim() == 2 else logits[:, -1]).tolist()
        return found


mlflow.models.set_model(AdaptedModel())
