"""What LayerLens knows about a model: its layers, their shapes, and the options of each layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from layerlens.models.tokens import TokenTraining

NONE, LORA, ADAPTER, PREFIX, DORA = "none", "lora", "adapter", "prefix", "dora"
LORA_KINDS = (LORA, DORA)
"""The methods that a LoraConfig holds, one or the other."""
TRANSFORMER, LINEAR, ATTENTION, CONV, NORM = "transformer", "linear", "attention", "conv", "norm"
EXPERTS, EMBEDDING = "experts", "embedding"
NO_MATRIX = (EXPERTS, EMBEDDING)
"""What is no single matrix that multiplies, as published rank rules and baselines take every layer to be."""


@dataclass(frozen=True)
class LayerSpec:
    """One layer. The solver chooses exactly one option for it.

    Args:
        name: unique name: the module path, such as ``bert.encoder.layer.0.attention.self.query``, or for stacked
            experts the parameter's path, such as ``model.layers.0.mlp.experts.down_proj``.
        hidden_size: width of the residual stream.
        layer_type: ``"linear"`` (one Linear or Conv1D), ``"conv"`` (one Conv2d), ``"attention"`` (one attention block,
            for prefixes), ``"norm"`` (one LayerNorm or RMSNorm; n_out is the number of its parameters), ``"experts"``
            (the weights of all experts of a block, stacked in one parameter), ``"embedding"`` (one Embedding; n_in is
            the number of its rows) or ``"transformer"`` (a whole block, treated as one hidden_size × hidden_size
            matrix; used by ``run_pipeline``).
        n_in: number of input features; ``hidden_size`` unless given. For a convolution, all input channels times the
            kernel's pixels, with or without groups, because its LoRA reads all of them.
        n_out: number of output features; ``hidden_size`` unless given.
        d_kv: width of all key/value heads together (prefix parameters are 2·p·d_kv); ``hidden_size`` unless given.
        num_heads: number of query heads of an attention layer.
        methods: names of the PEFT methods that this layer supports.
        block: index of the layer's transformer block; None outside the blocks.
        role: function of the layer in its block: ``query``, ``key``, ``value``, ``attention_output``, ``ffn_up``,
            ``ffn_gate``, ``ffn_down``, ``attention`` or "".
        writes_residual: True if the model adds the layer's output to the residual stream.
        groups: number of groups of a convolution. PEFT's LoRA ranks must be multiples of it.
        positions: number of output positions (patches, pixels) of one sample; 0 if they are the tokens of a sequence.
        input_elements: number of elements of the input of one sample; 0 means n_in at every position.
        experts: number of matrices [n_out, n_in] in the parameter. LoRA gives each matrix its own A and B.
        experts_per_token: number of experts that process each token.
        by_parameter: True if PEFT adapts the parameter itself (``target_parameters``), so every call forms W + ΔW.
    """

    name: str
    hidden_size: int
    layer_type: str = TRANSFORMER
    n_in: int = 0
    n_out: int = 0
    d_kv: int = 0
    num_heads: int = 1
    methods: tuple[str, ...] = (LORA, ADAPTER, PREFIX)
    block: int | None = None
    role: str = ""
    writes_residual: bool = False
    groups: int = 1
    positions: int = 0
    input_elements: int = 0
    experts: int = 1
    experts_per_token: int = 1
    by_parameter: bool = False

    def __post_init__(self) -> None:
        for field_name in ("n_in", "n_out", "d_kv"):
            if getattr(self, field_name) == 0:
                object.__setattr__(self, field_name, self.hidden_size)
        object.__setattr__(self, "methods", tuple(self.methods))

    @property
    def module(self) -> str:
        """Path of the module that computes it."""
        return self.name.rpartition(".")[0] if self.layer_type == EXPERTS else self.name

    @property
    def inputs_per_position(self) -> float:
        """Input elements for each output position: fewer than n_in where patches overlap."""
        return self.input_elements / self.positions if self.input_elements and self.positions else self.n_in


@dataclass(frozen=True)
class ModelSpec:
    """A pretrained model as a list of layers.

    Args:
        model_name: name or path that the manifest records.
        total_params: number of parameters of the whole frozen model.
        layers: the layers that can be adapted, in forward order.
        weight_bytes: bytes of the frozen weights; 4 per parameter unless given.
        fingerprint: SHA-256 of the weights; "" if only a description of the model was given.
        per_sample: True if the model's memory and FLOPs are counted for each sample (image) and not for each token.
        left_out: module path -> reason, for modules that look like layers but support no method.
        tokens: embedding rows that are trained with any choice; None if there are none.
    """

    model_name: str
    total_params: int
    layers: list[LayerSpec] = field(default_factory=list)
    weight_bytes: int = 0
    fingerprint: str = ""
    per_sample: bool = False
    left_out: dict[str, str] = field(default_factory=dict)
    tokens: TokenTraining | None = None

    def without(self, unmeasured: Mapping[str, str]) -> ModelSpec:
        """The model with some layers, given with the reason, left out."""
        if not unmeasured:
            return self
        layers = [layer for layer in self.layers if layer.name not in unmeasured]
        return replace(self, layers=layers, left_out={**self.left_out, **unmeasured})

    def __post_init__(self) -> None:
        if self.weight_bytes == 0:
            object.__setattr__(self, "weight_bytes", 4 * self.total_params)
        if isinstance(self.tokens, Mapping):  # from a file
            object.__setattr__(self, "tokens", TokenTraining.of(self.tokens))


@dataclass(frozen=True)
class Option:
    """One choice for one layer.

    ``rank`` is the size of the method: the LoRA rank r, the width k of an adapter's bottleneck, or the number p of
    prefix pairs. It is 0 if and only if the method is "none".
    """

    layer: str
    method: str
    rank: int
