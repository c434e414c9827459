"""Linear layers whose weights are stored in fewer bits than they multiply with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from layerlens.exceptions import ModelSpecError


def quantization_arguments(asked: Mapping[str, Any] | None) -> dict[str, Any]:
    """What ``from_pretrained`` is told of ``model.quantization``.

    Raises:
        ModelSpecError: transformers does not know such a quantization, or a package that it needs is not there.
    """
    if not asked:
        return {}
    from transformers.quantizers.auto import AutoQuantizationConfig

    try:
        return {"quantization_config": AutoQuantizationConfig.from_dict(dict(asked))}
    except (ValueError, TypeError, KeyError, AttributeError, ImportError) as error:
        raise ModelSpecError(
            f"model.quantization: transformers cannot use {dict(asked)} ({' '.join(str(error).split())}); give what "
            "its quantization configurations take, such as {load_in_4bit: true}"
        ) from error
