"""What a sentence-transformers directory has beside its transformer: pooling and what follows, prompts and cases."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from layerlens.exceptions import ConfigurationError, ModelSpecError

if TYPE_CHECKING:
    import torch

MODULES, SETTINGS, PROMPTS = "modules.json", "sentence_bert_config.json", "config_sentence_transformers.json"
LIBRARY = "sentence_transformers."
NEEDED = "task sentence-embedding needs the package sentence-transformers: pip install 'layerlens[embeddings]'"
QUERY, DOCUMENT = ("query",), ("document", "passage", "corpus")
"""Names of the prompts that are written before a query and before what is looked for, as the library has them."""


@dataclass(frozen=True)
class SentenceModel:
    """The way from the hidden states of a transformer to the embedding of a text.

    Args:
        modules: the library's own, in order: pooling, and what follows (Dense, Normalize ...).
        query, document: written before anchors, and before what is compared with them.
        pool_prompt: whether tokens of these prompts are among those that are pooled.
        lower: whether texts are put in lower case.
        max_length: the longest text that the library would read, in tokens; None where nothing says it.
        said: what the user should know, a line each.
    """

    modules: tuple[Any, ...] = field(repr=False)
    query: str = ""
    document: str = ""
    pool_prompt: bool = True
    lower: bool = False
    max_length: int | None = None
    said: tuple[str, ...] = ()

    @property
    def number(self) -> int:
        """What the modules are, for keys: of their classes, settings and weights."""
        digest = hashlib.sha256()
        for module in self.modules:
            digest.update(f"{type(module).__name__}{module.get_config_dict()}".encode())
            for name, tensor in module.state_dict().items():
                digest.update(name.encode() + tensor.detach().cpu().float().numpy().tobytes())
        return int.from_bytes(digest.digest()[:7], "big")

    def embed(self, hidden__rth: torch.Tensor, mask__rt: torch.Tensor) -> torch.Tensor:
        """Embeddings [rows, d] of hidden states [rows, tokens, features]; ``mask`` is 1 for tokens that count."""
        features: dict[str, Any] = {"token_embeddings": hidden__rth, "attention_mask": mask__rt}
        for module in self.modules:
            features = module.to(hidden__rth.device, hidden__rth.dtype)(features)
        embeddings: torch.Tensor = features["sentence_embedding"]
        return embeddings


def transformer_folder(folder: Path) -> Path:
    """Where the transformer of a model directory lies: of one of sentence-transformers where its modules.json says.

    Raises:
        ModelSpecError: its first module is no transformer, or lies elsewhere.
    """
    listed = _listed(folder)
    if not listed or (folder / "config.json").is_file():
        return folder
    first = listed[0]
    if str(first.get("type", "")).rpartition(".")[2] != "Transformer":
        raise ModelSpecError(
            f"model.name_or_path: the first module of {folder} is {first.get('type')}; LayerLens adapts "
            "sentence-transformers models that begin with a Transformer"
        )
    return _below(folder, str(first.get("path", "")))


@lru_cache(maxsize=4)
def sentence_model(path: str, width: int) -> SentenceModel:
    """What follows the transformer that was loaded from ``path``; mean pooling where no directory says it.

    Args:
        path: of the transformer, which may be a folder inside of the directory of sentence-transformers.
        width: features of its hidden states.

    Raises:
        ConfigurationError: the package is not installed.
        ModelSpecError: a module is none of the library's, or cannot be loaded.
    """
    try:
        import sentence_transformers  # noqa: F401
        from sentence_transformers.util import import_from_string
    except ImportError as error:
        raise ConfigurationError(f"model.task: {NEEDED}") from error
    folder, listed = _directory_of(Path(path))
    if not listed:
        pooling: Any = import_from_string(f"{LIBRARY}models.Pooling")
        said = "model: there is no modules.json with a pooling module, so embeddings are the mean over tokens"
        return SentenceModel((pooling(width).eval(),), said=(said,))
    modules = []
    for entry in listed[1:]:
        kind = str(entry.get("type", ""))
        if not kind.startswith(LIBRARY):
            raise ModelSpecError(
                f"model.name_or_path: the module {kind} of {folder} is not one of sentence-transformers' modules"
            )
        try:
            made: Any = import_from_string(kind)
            module = made.load(str(_below(folder, str(entry.get("path", "")))))
        except (ImportError, OSError, ValueError, TypeError, KeyError) as error:
            raise ModelSpecError(
                f"model.name_or_path: the module {kind} of {folder} cannot be loaded: {error}"
            ) from error
        modules.append(module.eval().requires_grad_(False))
    settings, told = _read(Path(path) / SETTINGS), _read(folder / PROMPTS)
    return _with_prompts(
        modules, told.get("prompts"), told.get("default_prompt_name"), settings.get("do_lower_case"),
        settings.get("max_seq_length"),
    )  # fmt: skip


def sentence_model_of(model: Any) -> SentenceModel:
    """What follows the transformer of a SentenceTransformer in memory; copies, which nothing done to them changes.

    Raises:
        ModelSpecError: its first module is no Transformer.
    """
    first, *rest = model
    if getattr(model, "transformers_model", None) is None or getattr(first, "model", None) is None:
        raise ModelSpecError(
            f"model: the first module of this {type(model).__name__} is a {type(first).__name__}; LayerLens adapts "
            "sentence-transformers models that begin with a Transformer"
        )
    modules = [copy.deepcopy(module).eval().requires_grad_(False) for module in rest]
    return _with_prompts(
        modules, model.prompts, model.default_prompt_name, getattr(first, "do_lower_case", False), model.max_seq_length
    )


def _with_prompts(
    modules: Sequence[Any], prompts: Mapping[str, Any] | None, usual: str | None, lower: Any, max_length: int | None
) -> SentenceModel:
    """The modules with the prompts that the library writes before queries and documents, by their names."""
    texts = {name: str(text or "") for name, text in (prompts or {}).items()}
    otherwise = texts.get(str(usual), "")
    return SentenceModel(
        tuple(modules),
        query=next((texts[name] for name in QUERY if name in texts), otherwise),
        document=next((texts[name] for name in DOCUMENT if name in texts), otherwise),
        pool_prompt=all(getattr(module, "include_prompt", True) for module in modules),
        lower=bool(lower),
        max_length=max_length,
    )


def _directory_of(path: Path) -> tuple[Path, list[dict[str, Any]]]:
    """The directory of sentence-transformers around a transformer, and its modules; none where there is no such."""
    for folder in (path, path.parent):
        listed = _listed(folder)
        if listed and _below(folder, str(listed[0].get("path", ""))).resolve() == path.resolve():
            return folder, listed
    return path, []


def _listed(folder: Path) -> list[dict[str, Any]]:
    found = _read(folder / MODULES, [])
    whole = isinstance(found, list) and all(isinstance(entry, dict) for entry in found)
    return sorted(found, key=lambda entry: int(entry.get("idx", 0))) if whole else []


def _read(file: Path, instead: Any = None) -> Any:
    """What a JSON file says; ``instead`` (an empty mapping) where there is none.

    Raises:
        ModelSpecError: it is damaged.
    """
    if not file.is_file():
        return {} if instead is None else instead
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelSpecError(f"model.name_or_path: {file} is damaged: {error}") from error


def _below(folder: Path, path: str) -> Path:
    found = folder / path
    if not found.resolve().is_relative_to(folder.resolve()):
        raise ModelSpecError(f"model.name_or_path: {folder / MODULES} names {path!r}, which is outside of that folder")
    return found


def loss_of(name: str, embeddings: Sequence[torch.Tensor], scores: torch.Tensor) -> torch.Tensor:
    """The library's loss of a batch, a scalar.

    Args:
        name: "multiple-negatives", "cosent" or "triplet".
        embeddings: [b, d] of anchors, of their positives, and of their negatives.
        scores: [b], how alike both texts of a pair are; read by CoSENT alone.
    """
    from sentence_transformers.util import import_from_string

    loss: Any = import_from_string(f"{LIBRARY}losses.{LOSSES[name]}")
    value: torch.Tensor = loss(model=None).compute_loss_from_embeddings(list(embeddings), scores)
    return value


LOSSES = {"multiple-negatives": "MultipleNegativesRankingLoss", "cosent": "CoSENTLoss", "triplet": "TripletLoss"}
"""What a configuration calls each loss -> its class in sentence-transformers."""
