"""Budgets, the options on offer, the solver and the check of its choice: the section ``optimization``."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from layerlens.config.base import Amount, ConfigModel, MethodName, RegisteredName
from layerlens.quantities import COUNT, MEMORY, TIME
from layerlens.registry import ENGINES, METHODS, UTILITY_MODELS
from layerlens.vocabulary import RESOURCES

UNIFORM_LORA = "uniform-lora"
SCORE: Literal["score"] = "score"
CHEAPEST: Literal["cheapest"] = "cheapest"
MARGIN = 0.05
"""Share of uniform LoRA's predicted improvement that a cheaper choice may lose where nothing is said."""
STEP: Literal["step_ms"] = "step_ms"
Minimised = Literal["trainable_params", "flops", "vram_gb", "latency_ms", "step_ms"]
CandidateName = Annotated[str, RegisteredName(UTILITY_MODELS, others=(UNIFORM_LORA,))]


class ProxyCheckConfig(ConfigModel):
    """Trains the solver's choice and other allocations within the same budgets, and writes the best one.

    With `objective: cheapest`, the candidates are uniform LoRA, the choice with the best score, and the cheapest
    choices for several predicted shares, trained for at least half of the fine-tune's steps. LayerLens writes the
    cheapest choice whose drop in held-out loss is within `quality_margin` of uniform LoRA's by a paired 95 % interval.
    If there is none, it writes the better of the other two.

    All candidates start from the same weights and see the same batches. They are compared on samples that none was
    trained on and that are not in the test split. Each candidate counts at its best learning rate. Uniform LoRA stays
    unless another candidate's drop in loss is at least 2 % larger.
    """

    steps: int = Field(
        default=0,
        ge=0,
        description="Training steps of every candidate, with their own warm-up and decay. 0: no check, and LayerLens "
        "writes the solver's choice. In our study, half the steps of the fine-tune kept most of the gain, and a "
        "quarter kept half of it. The check costs candidates × learning_rates × steps.",
    )
    candidates: tuple[CandidateName, ...] = Field(
        default=(UNIFORM_LORA, "tempered_energy", "tempered_log"),
        min_length=1,
        description="Candidates besides the solver's choice: `uniform-lora` (the largest equal LoRA rank on all layers "
        "that the budgets allow, with the rest spread over the depth), and the choices of other utility models. A "
        "candidate equal to the solver's choice is trained once. Not used with `objective: cheapest`.",
    )
    learning_rates: tuple[float, ...] = Field(
        default=(1e-3,),
        min_length=1,
        description="Peak learning rates of AdamW; each candidate counts at its best one.",
    )
    train_samples: int = Field(default=1024, ge=8, description="Training samples, including the calibration samples.")
    held_out_samples: int = Field(default=256, ge=8, description="Held-out samples for comparing losses.")

    @field_validator("learning_rates")
    @classmethod
    def _positive(cls, rates: tuple[float, ...]) -> tuple[float, ...]:
        if any(not 0.0 < rate < float("inf") for rate in rates):
            raise ValueError("must be finite and above 0")
        return tuple(sorted(set(rates)))

    @field_validator("candidates")
    @classmethod
    def _each_once(cls, candidates: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(dict.fromkeys(candidates))


class LatencyProfile(ConfigModel):
    """The device and the batch for which LayerLens predicts costs.

    The three roofline figures default to nominal figures of the device type. Set them to the figures of your device. A
    run prints the measured forward time of the base model beside the prediction.
    """

    device_type: Literal["cpu", "gpu"] = Field(default="cpu", description="Device for the predictions.")
    model_family: str = Field(default="llm", min_length=1, description="Free text, recorded in the manifest.")
    batch_size: int = Field(default=8, ge=1, description="Sequences in a batch.")
    sequence_length: int = Field(
        default=128, ge=1, description="Tokens in a sequence. The default is lowered to the model's positions."
    )
    peak_gflops: float | None = Field(
        default=None, gt=0, description="Sustained matrix throughput, GFLOP/s. Nominal: cpu 100, gpu 150000."
    )
    memory_bandwidth_gb_s: float | None = Field(
        default=None, gt=0, description="Sustained memory bandwidth, GB/s (1e9 bytes). Nominal: cpu 20, gpu 1500."
    )
    op_overhead_us: float | None = Field(
        default=None, ge=0, description="Fixed cost of one tensor operation, µs. Nominal: cpu 5, gpu 5."
    )

    @property
    def tokens(self) -> int:
        """Tokens in one batch."""
        return self.batch_size * self.sequence_length


class LayerRule(ConfigModel):
    """Restricts the options of some layers. Rules apply in order; each one narrows what the earlier ones allow."""

    layers: str = Field(
        min_length=1,
        description="The layers: a pattern with `*` and `?` for whole names (`*.value`, `*.layer.11.*`), or a role "
        "such as `query`, `value`, `ffn_down`.",
    )
    methods: tuple[MethodName, ...] | None = Field(
        default=None, description="Only these methods (or none, unless `require`)."
    )
    forbid: tuple[MethodName, ...] = Field(default=(), description="Not these methods.")
    ranks: tuple[int, ...] | None = Field(default=None, min_length=1, description="Only these ranks.")
    max_rank: int | None = Field(default=None, ge=0, description="No rank above this; 0 excludes the layers.")
    require: bool = Field(default=False, description="The layers must be adapted.")

    @model_validator(mode="after")
    def _says_something(self) -> LayerRule:
        if not (self.methods is not None or self.forbid or self.ranks or self.max_rank is not None or self.require):
            raise ValueError("the rule changes nothing; give methods, forbid, ranks, max_rank or require")
        if self.require and (self.max_rank == 0 or self.methods == ()):
            raise ValueError("require contradicts a rule that leaves no option but none")
        return self


class LinearResource(ConfigModel):
    """A custom resource: every option uses an amount that is linear in what it adds."""

    budget: float = Field(gt=0, description="Budget for all options together.")
    per_parameter: float = Field(default=0.0, ge=0, description="Amount for each trainable parameter.")
    per_layer: float = Field(default=0.0, ge=0, description="Amount for each adapted layer.")
    per_rank: float = Field(default=0.0, ge=0, description="Amount for each unit of rank.")

    @model_validator(mode="after")
    def _uses_something(self) -> LinearResource:
        if self.per_parameter == self.per_layer == self.per_rank == 0.0:
            raise ValueError("the resource is never used; give per_parameter, per_layer or per_rank")
        return self


class ConstraintConfig(ConfigModel):
    """Constraints on the choice besides the budgets."""

    max_rank: int | None = Field(default=None, ge=1, description="No rank, adapter width or prefix length above this.")
    rules: tuple[LayerRule, ...] = Field(default=(), description="Rules that restrict the options of single layers.")
    choose_alike: tuple[tuple[str, ...], ...] = Field(
        default=(),
        description="Each entry lists patterns or roles, as in `rules`. Among the layers that it names, those in the "
        "same block get the same method and rank. `[[query, value]]` gives q and v the same LoRA.",
    )
    min_layers: dict[MethodName, int] = Field(
        default_factory=dict, description="Minimum number of layers that get each method."
    )
    resources: dict[str, LinearResource] = Field(
        default_factory=dict, description="Custom resources with their budgets, such as adapter bytes on disk."
    )

    @field_validator("min_layers")
    @classmethod
    def _not_negative(cls, least: dict[str, int]) -> dict[str, int]:
        for method, count in least.items():
            if count < 1:
                raise ValueError(f"min_layers of {method!r} must be at least 1, got {count}")
        return least

    @field_validator("choose_alike")
    @classmethod
    def _not_empty(cls, entries: tuple[tuple[str, ...], ...]) -> tuple[tuple[str, ...], ...]:
        if any(not entry for entry in entries):
            raise ValueError("an entry of choose_alike lists no layers")
        return entries

    @field_validator("resources")
    @classmethod
    def _new_names(cls, resources: dict[str, LinearResource]) -> dict[str, LinearResource]:
        for name in resources:
            if name in RESOURCES or name.startswith("layers_without_"):
                raise ValueError(f"{name!r} is a resource that LayerLens has already; choose another name")
        return resources


class OptimizationConfig(ConfigModel):
    """Budgets, the options on offer, and how the solver weighs them. Set at least one budget."""

    max_trainable_params: Annotated[int | None, Field(gt=0), Amount(COUNT)] = Field(
        default=None,
        description="Trainable parameters of all options together, without the task head: `300000`, `300k`, `1.5M`.",
    )
    max_flops: Annotated[float | None, Field(gt=0), Amount(COUNT)] = Field(
        default=None,
        description="Forward FLOPs that the options add to one batch of the latency profile: `80e6`, `80M`, `1.5G`.",
    )
    max_vram_gb: Annotated[float | None, Field(gt=0), Amount(MEMORY)] = Field(
        default=None,
        description="Memory of a training step, including the base model, in GB (1e9 bytes) or with a unit: `8GB`, "
        "`512MB`, `8GiB`.",
    )
    latency_target_ms: Annotated[float | None, Field(gt=0), Amount(TIME)] = Field(
        default=None,
        description="Forward latency of one batch, including the base model, with unmerged options, in ms or with a "
        "unit: `20ms`, `0.5s`.",
    )
    max_step_ms: Annotated[float | None, Field(gt=0), Amount(TIME)] = Field(
        default=None,
        exclude_if=lambda budget: budget is None,
        description="Time of one training step (forward, backward, optimiser) on a batch of the latency profile, "
        "including the base model, in ms or with a unit: `250ms`, `1.5s`.",
    )
    latency_profile: LatencyProfile = Field(
        default_factory=LatencyProfile, description="Device and batch for the predicted FLOPs, memory and latency."
    )
    methods: tuple[MethodName, ...] = Field(
        default=("lora",),
        min_length=1,
        description="PEFT methods on offer: `lora`, which every trainer and serving engine supports, or one other "
        "method of Hugging Face PEFT (`dora`, `ia3`, `bitfit`), because an adapter directory holds one kind; "
        "`ln_tuning`, alone or beside one of these; and `adapter` and `prefix`, which only LayerLens can add to a "
        "model (`layerlens.tuning.apply`).",
    )
    lora_ranks: tuple[int, ...] = Field(default=(1, 2, 4, 8, 16, 32), description="LoRA and DoRA ranks on offer.")
    adapter_sizes: tuple[int, ...] = Field(default=(2, 4, 8, 16, 32), description="Adapter bottleneck widths on offer.")
    prefix_lengths: tuple[int, ...] = Field(
        default=(2, 4, 8, 16),
        description="Prefix lengths on offer, in key/value pairs. The key of a single pair would stay untrained.",
    )
    method_sizes: dict[MethodName, tuple[int, ...]] = Field(
        default_factory=dict,
        exclude_if=lambda sizes: not sizes,
        description="Sizes on offer for registered methods without their own key, by method name.",
    )
    constraints: ConstraintConfig = Field(
        default_factory=ConstraintConfig, description="Constraints on the choice besides the budgets."
    )
    serve_with: str | None = Field(
        default=None,
        exclude_if=lambda engine: engine is None,
        description="Offer only what this serving engine supports without padding (`vllm`, `sglang`, `any` ..., as in "
        "`layerlens export --serve`): the ranks that it allows, one rank if it supports only one, and all or none of "
        "the projections that it fuses.",
    )
    alpha_over_r: float = Field(default=2.0, gt=0, description="LoRA scale alpha/r, one constant for the whole model.")
    use_rslora: bool = Field(
        default=False,
        description="Scale LoRA by alpha/√r instead of alpha/r (rsLoRA), with alpha = alpha_over_r times the largest "
        "chosen rank in every layer.",
    )
    lora_initialization: Literal["default", "pca", "gradient_svd"] = Field(
        default="default",
        description="Initialisation of LoRA's A, with B = 0: `default` (uniform, as in PEFT), `pca` (principal "
        "components of the layer's inputs, as in EVA), `gradient_svd` (right singular vectors of the mean gradient, as "
        "in LoRA-GA). The last two need one more pass over the calibration samples.",
    )
    optimizer: Literal["adamw", "sgd"] = Field(
        default="adamw", description="Optimiser of the later fine-tune; its state is part of the memory prediction."
    )
    objective: Literal["score", "cheapest"] = Field(
        default=SCORE,
        exclude_if=lambda objective: objective == SCORE,
        description="What to optimise within the budgets: `score`, the best score; `cheapest`, the lowest `minimise` "
        "that keeps uniform LoRA's predicted improvement up to `quality_margin`. If that saves nothing, LayerLens "
        "writes uniform LoRA, and the summary says why.",
    )
    quality_margin: float = Field(
        default=MARGIN,
        ge=0,
        lt=1,
        exclude_if=lambda margin: margin == MARGIN,
        description="With `objective: cheapest`: share of uniform LoRA's predicted improvement that the choice may "
        "lose.",
    )
    minimise: Minimised | dict[Minimised, float] = Field(
        default=STEP,
        exclude_if=lambda minimised: minimised == STEP,
        description="With `objective: cheapest`: the resource to minimise (`step_ms`, `vram_gb` ...), or several with "
        "weights (`{step_ms: 2, vram_gb: 1}`), each relative to uniform LoRA's use.",
    )
    objective_weights: dict[str, float] = Field(
        default_factory=lambda: {"utility": 1.0},
        description="score = utility·w_utility − Σ_r w_r·(cost_r / budget_r) − penalty[method], with r in cost, flops, "
        "vram, latency, step. LayerLens first scales the utility so that the best option of the model has 1.",
    )
    method_penalties: dict[MethodName, float] = Field(
        default_factory=dict, description="Subtracted from the score of every option of the method (same scale)."
    )
    refine: bool = Field(
        default=True, description="Refine with OR-Tools CP-SAT, which proves optimality or tightens the bound."
    )
    refine_deterministic_time: float = Field(
        default=20.0,
        gt=0,
        description="Limit for CP-SAT in deterministic time units (about a second each), so that every run gives the "
        "same result.",
    )
    solver_time_s: float | None = Field(
        default=None,
        gt=0,
        allow_inf_nan=False,
        description="Seconds to continue the search for a better allocation while the gap is open. Without it, the "
        "search ends after a fixed amount of work, and every run gives the same allocation.",
    )
    check_predictions: bool = Field(
        default=True,
        exclude_if=lambda check: check,
        description="Compare the predictions with measurements after the choice: parameters, FLOPs, and, on the device "
        "of the latency profile, memory and times.",
    )
    gap_tolerance: float = Field(
        default=1e-6, ge=0, lt=1, description="Relative gap below which the allocation counts as optimal."
    )
    proxy_check: ProxyCheckConfig = Field(
        default_factory=ProxyCheckConfig,
        description="Trains the solver's choice and uniform LoRA, and writes the better one.",
    )

    @field_validator("lora_ranks", "adapter_sizes", "prefix_lengths")
    @classmethod
    def _positive_sizes(cls, sizes: tuple[int, ...]) -> tuple[int, ...]:
        if any(size < 1 for size in sizes):
            raise ValueError("sizes must be 1 or more (leaving a layer alone is always an option)")
        return tuple(sorted(set(sizes)))

    @field_validator("method_sizes")
    @classmethod
    def _sizes_of_others(cls, sizes: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
        for name in sizes:
            if METHODS[name].sizes_key:
                raise ValueError(f"{name} has a key of its own: give {METHODS[name].sizes_key}")
        return {name: cls._positive_sizes(of) for name, of in sizes.items()}

    @field_validator("objective_weights")
    @classmethod
    def _known_objectives(cls, weights: dict[str, float]) -> dict[str, float]:
        known = ("utility", *(resource.objective for resource in RESOURCES.values()))
        for name, weight in weights.items():
            if name not in known:
                raise ValueError(f"unknown objective {name!r}; known: {', '.join(known)}")
            if not 0.0 <= weight < float("inf"):
                raise ValueError(f"weight of {name!r} must be a finite number >= 0, got {weight!r}")
        return weights

    @field_validator("method_penalties")
    @classmethod
    def _finite_penalties(cls, penalties: dict[str, float]) -> dict[str, float]:
        for name, penalty in penalties.items():
            if not 0.0 <= penalty < float("inf"):
                raise ValueError(f"penalty of {name!r} must be a finite number >= 0, got {penalty!r}")
        return penalties

    @model_validator(mode="after")
    def _some_budget_and_some_option(self) -> OptimizationConfig:
        if all(budget is None for budget in self.budgets().values()):
            keys = ", ".join(resource.budget for resource in RESOURCES.values())
            raise ValueError(f"no budget given; set at least one of {keys}")
        if not any(self.ranks().values()):
            raise ValueError("no option on offer; give sizes for at least one of the methods")
        return self

    @field_validator("minimise")
    @classmethod
    def _some_weight(cls, minimise: Any) -> Any:
        if isinstance(minimise, dict) and not all(0.0 < weight < float("inf") for weight in minimise.values()):
            raise ValueError("weights must be finite and above 0")
        if not minimise:
            raise ValueError("name at least one resource")
        return minimise

    @model_validator(mode="after")
    def _of_one_objective(self) -> OptimizationConfig:
        if self.objective == SCORE:
            for key, default in (("quality_margin", MARGIN), ("minimise", STEP)):
                if getattr(self, key) != default:
                    raise ValueError(f"{key} belongs to another objective; set objective: {CHEAPEST}, or leave it out")
            return self
        if self.objective_weights != {"utility": 1.0} or self.method_penalties:
            key = "method_penalties" if self.method_penalties else "objective_weights"
            raise ValueError(f"{key} weighs the score; with objective: {CHEAPEST}, say in minimise what is to be least")
        if "lora" not in self.methods:
            raise ValueError(
                f"objective: {CHEAPEST} holds choices against uniform LoRA, which methods does not offer; add lora"
            )
        return self

    @model_validator(mode="after")
    def _servable(self) -> OptimizationConfig:
        if self.serve_with is None:
            return self
        if self.serve_with not in ENGINES:
            raise ValueError(f"serve_with: {ENGINES.unknown(self.serve_with)}")
        engine, others = ENGINES[self.serve_with], [name for name in self.methods if name != "lora"]
        if others:
            raise ValueError(f"serve_with: {engine.title} holds LoRA alone, not {others[0]}; set methods: [lora]")
        if not any(engine.allows(rank) for rank in self.lora_ranks):
            raise ValueError(
                f"serve_with: {engine.title} holds none of lora_ranks {', '.join(map(str, self.lora_ranks))}; it holds "
                f"{', '.join(map(str, engine.ranks))}"
            )
        return self

    def ranks(self) -> dict[str, tuple[int, ...]]:
        """Sizes on offer for each method on offer."""
        return {name: self._sizes(METHODS[name]) for name in self.methods}

    def minimised(self) -> dict[str, float]:
        """Resource -> weight of what ``objective: cheapest`` makes least; the weights sum to 1."""
        weights = self.minimise if isinstance(self.minimise, dict) else {self.minimise: 1.0}
        total = sum(weights.values())
        return {name: weight / total for name, weight in weights.items()}

    def _sizes(self, method: Any) -> tuple[int, ...]:
        if method.sizes_key:
            sizes: tuple[int, ...] = getattr(self, method.sizes_key)
            return sizes
        return self.method_sizes.get(method.name, method.default_sizes)

    def budgets(self) -> dict[str, float | None]:
        """Budget of each resource, by resource name."""
        return {name: getattr(self, resource.budget) for name, resource in RESOURCES.items()}
