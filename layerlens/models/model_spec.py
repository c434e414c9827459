"""What LayerLens needs to know of a model: its layers, their shapes, and which PEFT methods each can take."""

from __future__ import annotations

from dataclasses import dataclass, field

TRANSFORMER, LINEAR, ATTENTION = "transformer", "linear", "attention"


@dataclass(frozen=True)
class LayerSpec:
    """One layer: the unit that gets exactly one option.

    Args:
        name: unique name; a module path such as ``bert.encoder.layer.0.attention.self.query``.
        hidden_size: width of the residual stream.
        layer_type: ``"linear"`` (one Linear or Conv1D), ``"attention"`` (one attention block, for prefixes) or
            ``"transformer"`` (a whole block, taken as one hidden_size × hidden_size map, as in the origin's API).
        n_in: input features; ``hidden_size`` unless given.
        n_out: output features; ``hidden_size`` unless given.
        d_kv: width of all key/value heads together (prefix parameters are 2·p·d_kv); ``hidden_size`` unless given.
        num_heads: query heads of an attention layer.
        methods: PEFT methods that this layer can take.
        block: index of the transformer block the layer belongs to, or None outside the blocks.
        role: what the layer does in its block: ``query``, ``key``, ``value``, ``attention_output``, ``ffn_up``,
            ``ffn_gate``, ``ffn_down``, ``attention`` or "".
        writes_residual: its output is added to the residual stream.
    """

    name: str
    hidden_size: int
    layer_type: str = TRANSFORMER
    n_in: int = 0
    n_out: int = 0
    d_kv: int = 0
    num_heads: int = 1
    methods: tuple[str, ...] = ("lora", "adapter", "prefix")
    block: int | None = None
    role: str = ""
    writes_residual: bool = False

    def __post_init__(self) -> None:
        for field_name in ("n_in", "n_out", "d_kv"):
            if getattr(self, field_name) == 0:
                object.__setattr__(self, field_name, self.hidden_size)
        object.__setattr__(self, "methods", tuple(self.methods))


@dataclass(frozen=True)
class ModelSpec:
    """A pretrained model as a list of layers.

    Args:
        model_name: name or path that the manifest records.
        total_params: parameters of the whole frozen model.
        layers: the layers that may be adapted, in forward order.
        weight_bytes: bytes of the frozen weights; 4 per parameter unless given.
        fingerprint: content hash of the weights ("" when the model itself was never at hand).
    """

    model_name: str
    total_params: int
    layers: list[LayerSpec] = field(default_factory=list)
    weight_bytes: int = 0
    fingerprint: str = ""

    def __post_init__(self) -> None:
        if self.weight_bytes == 0:
            object.__setattr__(self, "weight_bytes", 4 * self.total_params)
