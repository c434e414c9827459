"""Settings of the detection-to-report pipeline: images, detector, language model and timing."""

from __future__ import annotations

import string
from typing import Any

from pydantic import Field, field_validator, model_validator

from layerlens.config.base import ConfigModel

PLACEHOLDERS = ("findings", "image", "width", "height", "count")
"""What a prompt template may refer to."""


class PipelineConfig(ConfigModel):
    """One job of ``layerlens pipeline``."""

    images: tuple[str, ...] = Field(min_length=1, description="Image files, folders of images, or patterns.")
    detector: str = Field(
        min_length=1,
        description="A `.pt` file of ultralytics, or the name of published weights such as `yolo11n.pt`.",
    )
    llm: str = Field(
        min_length=1,
        description="Base URL of an OpenAI-compatible server, or a causal language model for transformers: a "
        "directory, a hub name, or `package:NAME`.",
    )
    detector_adapter: str | None = Field(
        default=None, description="Folder with a tuned manifest for the detector: its timings stand beside the base's."
    )
    llm_adapter: str | None = Field(
        default=None, description="Folder with a tuned manifest (or a PEFT adapter) for the local language model."
    )
    llm_model: str | None = Field(default=None, description="The server's name of the model; its only one if not set.")
    api_key_env: str | None = Field(default=None, description="Environment variable that holds the server's key.")
    timeout_s: float = Field(default=120.0, gt=0, description="Longest time for one answer of a server.")
    retries: int = Field(default=3, ge=0, le=20, description="How often a request is repeated that may yet succeed.")
    max_new_tokens: int = Field(default=160, ge=1, description="Longest report, in tokens.")
    prompt: str | None = Field(
        default=None,
        description="Template of the request, with " + ", ".join(f"{{{name}}}" for name in PLACEHOLDERS) + ".",
    )
    image_size: int | None = Field(
        default=None, ge=32, le=4096, description="Side of the detector's square input; what it was trained with."
    )
    confidence: float = Field(default=0.25, ge=0, le=1, description="Boxes below this confidence are left out.")
    iou: float = Field(default=0.5, ge=0, le=1, description="Of boxes that overlap more than this, the best stays.")
    batch_size: int = Field(default=1, ge=1, le=1024, description="Images that the detector sees at once.")
    repeats: int = Field(default=1, ge=1, description="Measured passes over all images.")
    warmup: int = Field(default=1, ge=0, description="Passes over the first batch before, kept apart.")
    max_megapixels: float = Field(default=100.0, gt=0, description="Larger images are refused before they are decoded.")
    device: str = Field(default="cpu", min_length=1, description="Device of the detector and the local model.")
    threads: int = Field(default=0, ge=0, description="CPU threads; 0 for one on each core.")

    @model_validator(mode="before")
    @classmethod
    def _models_are_given(cls, values: Any) -> Any:
        missing = [name for name in ("detector", "llm") if isinstance(values, dict) and values.get(name) is None]
        if missing:
            hints = {name: str(cls.model_fields[name].description).rstrip(".") for name in missing}
            raise ValueError("; ".join(f"{name} is missing: {hint}" for name, hint in hints.items()))
        return values

    @field_validator("prompt")
    @classmethod
    def _known_placeholders(cls, template: str | None) -> str | None:
        if template is None:
            return None
        try:
            names = {name for _, name, _, _ in string.Formatter().parse(template) if name is not None}
        except ValueError as error:
            raise ValueError(f"is not a template ({error}); write {{{{ and }}}} for braces") from error
        unknown = sorted(names - set(PLACEHOLDERS))
        if unknown:
            raise ValueError(f"does not know {{{unknown[0]}}}; known: {', '.join(f'{{{n}}}' for n in PLACEHOLDERS)}")
        if "findings" not in names:
            raise ValueError("must contain {findings}, or the report could only be invented")
        return template
