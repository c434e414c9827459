"""A causal language model of transformers in this process, with the time of every token.

Times are taken in a streamer, which ``generate`` calls with the prompt and then once for each new token, after the
token has been chosen and read back; text streamers that buffer whole words would hide single tokens.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from layerlens.integrations.torchvision_import import make_torchvision_importable
from layerlens.vision_language.generation import Communication, Generation, GenerationError, Tokens

make_torchvision_importable()
from transformers.generation.streamers import BaseStreamer  # noqa: E402

if TYPE_CHECKING:
    import torch

NOTE = "tokenising and detokenising; there is no transport"


class TokenClock(BaseStreamer):
    """Notes when each generated token arrived."""

    def __init__(self) -> None:
        self.tokens = Tokens(time.perf_counter())
        self._prompt_seen = False

    def put(self, value: torch.Tensor) -> None:
        """Called with the prompt first, then with every token."""
        if self._prompt_seen:
            self.tokens.times.append(time.perf_counter())
        self._prompt_seen = True

    def end(self) -> None:
        """Nothing is left to do."""


class LocalModel:
    """A loaded model and its tokenizer.

    Args:
        model: in evaluation mode, maybe with adapters in it.
        tokenizer: the one it was trained with.
        name: what the result calls it.
    """

    def __init__(self, model: Any, tokenizer: Any, name: str) -> None:
        self.model, self.tokenizer, self.name = model, tokenizer, name

    def describe(self) -> dict[str, Any]:
        """Name, size, precision and device."""
        first = next(self.model.parameters())
        return {
            "kind": "transformers, in process",
            "name": self.name,
            "parameters": sum(parameter.numel() for parameter in self.model.parameters()),
            "dtype": str(first.dtype).removeprefix("torch."),
            "device": str(first.device),
            "chat_template": bool(getattr(self.tokenizer, "chat_template", None)),
        }

    def generate(self, messages: list[dict[str, str]], max_new_tokens: int) -> Generation:
        """Greedy decoding; one forward pass for each token.

        Raises:
            GenerationError: the prompt leaves no room in the model's context.
        """
        import torch

        marks = [time.perf_counter()]
        inputs = self._encode(messages)
        count = inputs["input_ids"].shape[1]
        marks.append(time.perf_counter())
        room = (getattr(self.model.config, "max_position_embeddings", None) or 10**9) - count
        if room < 1:
            raise GenerationError(
                f"the request has {count} tokens, the model's context {count + room}; use a shorter prompt or a "
                "higher confidence", steps_ms={"llm_encode": 1e3 * (marks[1] - marks[0])},
            )  # fmt: skip
        clock = TokenClock()
        with torch.inference_mode():
            output = self.model.generate(
                **inputs, max_new_tokens=min(max_new_tokens, room), do_sample=False, streamer=clock,
                pad_token_id=self.tokenizer.pad_token_id,
            )  # fmt: skip
        new = output[0, count:].tolist()
        text = self.tokenizer.decode(new, skip_special_tokens=True).strip()
        end, times = time.perf_counter(), clock.tokens.times
        ends = self.model.generation_config.eos_token_id
        stopped = new and new[-1] in (ends if isinstance(ends, list) else [ends])
        steps = {
            "llm_encode": 1e3 * (marks[1] - marks[0]),
            "llm_first_token": 1e3 * (times[0] - marks[1]),
            "llm_decode": 1e3 * (times[-1] - times[0]),
            "llm_finish": 1e3 * (end - times[-1]),
        }
        handing = steps["llm_encode"] + steps["llm_finish"]
        return Generation(
            text=text,
            steps_ms=steps,
            time_to_first_token_ms=steps["llm_encode"] + steps["llm_first_token"],
            token_ms=clock.tokens.intervals_ms,
            token_unit="token",
            prompt_tokens=count,
            completion_tokens=len(new),
            finish_reason="stop" if stopped else "length",
            communication=Communication("in process", handing, handing, handing, NOTE),
        )

    def _encode(self, messages: list[dict[str, str]]) -> Any:
        if getattr(self.tokenizer, "chat_template", None):
            inputs = self.tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
        else:  # a model that was not trained on chats gets the words alone
            text = "\n\n".join(message["content"] for message in messages) + "\n"
            inputs = self.tokenizer(text, return_tensors="pt")
        inputs = {key: inputs[key] for key in ("input_ids", "attention_mask")}
        return {key: value.to(next(self.model.parameters()).device) for key, value in inputs.items()}
