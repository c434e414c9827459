"""Embeddings for more tokens than a checkpoint has, and which of PEFT's ways can train their rows in a model.

PEFT (0.21) computes an output layer with trained rows without its bias, and ties copies of whole embeddings by the
names ``embed_tokens`` and ``lm_head`` alone. What comes out wrong is refused before anything is measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from layerlens.exceptions import ModelSpecError
from layerlens.models.tokens import ROWS, WHOLE, TokenRequest, TokenTraining

if TYPE_CHECKING:
    import torch

RESIZE, TOKENS, TRAINING = "model.resize_token_embeddings", "model.trainable_tokens", "model.token_training"


def with_tokens(model: Any, tokenizer: Any, wanted: TokenRequest | TokenTraining) -> TokenTraining | None:
    """Resize the model's embeddings as it is wanted, in place, and say which rows are trained; None for no rows.

    New rows are drawn around the mean of the others, as transformers does it; the caller seeds the random state.

    Raises:
        ModelSpecError: the model has no one table of embeddings, a token is unknown, or PEFT cannot train the rows in
            this way.
    """
    if isinstance(wanted, TokenTraining):
        if _embedding(model).num_embeddings < wanted.rows:
            _resize(model, wanted.rows)
        return wanted
    if tokenizer is None:
        raise ModelSpecError(f"{RESIZE if wanted.resize else TOKENS}: the model has no tokenizer, so it has no tokens")
    before, shapes = _embedding(model).num_embeddings, {}
    if wanted.resize and len(tokenizer) > before:
        shapes = _resize(model, len(tokenizer))
    new = range(before, _embedding(model).num_embeddings)
    indices = sorted({*new, *_ids(tokenizer, wanted.tokens, _embedding(model).num_embeddings)})
    return training_of(model, indices, wanted.by, shapes) if indices else None


def training_of(
    model: Any, indices: Sequence[int], by: str, checkpoint_shapes: dict[str, tuple[int, ...]] | None = None
) -> TokenTraining:
    """How the rows of ``indices`` are trained in this model.

    Raises:
        ModelSpecError: not in this way.
    """
    embedding, output = _embedding(model), _output(model)
    names = {name: module for name, module in model.named_modules() if module is embedding or module is output}
    first = next(name for name, module in names.items() if module is embedding)
    modules = dict(model.named_modules())
    tied = tuple(
        name
        for name, module in modules.items()
        if name != first and getattr(module, "weight", None) is embedding.weight and module is not embedding
    )
    own = [name for name, module in names.items() if module is output and name not in tied and name != first]
    used = (first, *own)
    if reason := _why_not(by, first, tied, output):
        raise ModelSpecError(f"{TRAINING}: {reason}")
    return TokenTraining(
        by, embedding.num_embeddings, embedding.embedding_dim, tuple(indices), used, tied,
        sum(x.numel() for name in used for x in modules[name].parameters()), checkpoint_shapes or {},
    )  # fmt: skip


def _why_not(by: str, first: str, tied: tuple[str, ...], output: Any) -> str:
    """Why PEFT cannot train rows in this way; "" where it can."""
    from peft import __version__
    from peft.utils.constants import EMBEDDING_LAYER_NAMES

    known = all(name.rpartition(".")[2] in EMBEDDING_LAYER_NAMES for name in (first, *tied)) and len(tied) < 2
    biased = output is not None and getattr(output, "bias", None) is not None
    if by == ROWS and biased:
        other = f"set {TRAINING}: {WHOLE}" if not tied or known else "PEFT has no other way for this model"
        return f"PEFT {__version__} drops the bias of the output layer when it trains single rows ({ROWS}); {other}"
    if by == WHOLE and tied and not known:
        other = f"set {TRAINING}: {ROWS}" if not biased else "PEFT has no other way for this model"
        return (
            f"the weight of {first} is also that of {', '.join(tied)}, and PEFT {__version__} would train a copy of it "
            f"in {first} alone ({WHOLE}); {other}"
        )
    return ""


def _embedding(model: Any) -> torch.nn.Embedding:
    import torch

    try:
        found = model.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        found = None
    if not isinstance(found, torch.nn.Embedding):
        raise ModelSpecError(
            f"{RESIZE}: {type(model).__name__} has no one table of token embeddings (get_input_embeddings), so nothing "
            "can be resized or trained there; leave model.resize_token_embeddings and model.trainable_tokens out"
        )
    return found


def _output(model: Any) -> Any:
    try:
        return model.get_output_embeddings()
    except (AttributeError, NotImplementedError):
        return None


def _resize(model: Any, rows: int) -> dict[str, tuple[int, ...]]:
    """Name -> shape before, of the tensors that have another one now."""
    before = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    try:
        model.resize_token_embeddings(rows)
    except (NotImplementedError, ValueError, RuntimeError, AttributeError, TypeError) as error:
        said = " ".join(str(error).split()) or type(error).__name__
        raise ModelSpecError(f"{RESIZE}: transformers cannot resize {type(model).__name__}: {said}") from error
    model.requires_grad_(False)
    after = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    return {name: shape for name, shape in before.items() if after.get(name, shape) != shape}


def _ids(tokenizer: Any, tokens: Sequence[str], rows: int) -> list[int]:
    known = tokenizer.get_vocab()
    unknown = [token for token in tokens if token not in known]
    if unknown:
        raise ModelSpecError(
            f"{TOKENS}: {unknown[0]!r} is not a token of the tokenizer; add it there (tokenizer.add_tokens) and save "
            "the tokenizer beside the model"
        )
    beyond = [token for token in tokens if known[token] >= rows]
    if beyond:
        raise ModelSpecError(
            f"{TOKENS}: {beyond[0]!r} is token {known[beyond[0]]}, and the model has embeddings for {rows}; set "
            f"{RESIZE}: true"
        )
    return [known[token] for token in tokens]
