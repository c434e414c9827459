"""The sections of a configuration, every field with its meaning and unit."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from layerlens.config.base import ConfigModel
from layerlens.config.distributed import DistributedConfig
from layerlens.config.monitoring import TelemetryConfig, TrackingConfig
from layerlens.config.names import MethodName, StatisticName, TaskName, UtilityName
from layerlens.config.proxy_check import ProxyCheckConfig
from layerlens.config.rules import ConstraintConfig
from layerlens.config.study import StudyConfig
from layerlens.config.training import TrainingConfig
from layerlens.registry import METHODS, source_of

FUNCTION_NAME = r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$"
METRICS = ("gradient_energy", "fisher", "proxy_eval")


class ModelConfig(ConfigModel):
    """Which pretrained model, for which task."""

    name_or_path: str = Field(
        default="",
        description="Directory of a transformers model, a Hugging Face hub name, `package:NAME` for an installed "
        "package whose `get_model_path()` returns such a directory, `timm:NAME` for a model of timm, or "
        "`ultralytics:WEIGHTS.pt` for a detector (loading one runs what its pickle says: use trusted files). Not "
        "needed with `factory`.",
    )
    factory: str | None = Field(
        default=None,
        pattern=FUNCTION_NAME,
        description="`module:function` that returns the model, a `torch.nn.Module`, or (model, tokenizer or image "
        "transform). Your code is run only because it is named here.",
    )
    weights: str | None = Field(
        default=None,
        description="Weights for a `factory` or `timm:` model: a .safetensors file, a directory with "
        "model.safetensors, or `random` (timm only; by default timm loads its pretrained weights).",
    )
    loss: str | None = Field(
        default=None,
        pattern=FUNCTION_NAME,
        description="`module:function` for the task `custom`: (model output, targets of the batch) -> loss of each "
        "sample, a tensor [batch]. A sample's loss must not depend on the others in its batch.",
    )
    task: TaskName = Field(
        default="sequence-classification",
        description="What the model is to be fine-tuned for; docs/configuration.md says of each task what its samples "
        "are and what it is judged by.",
    )
    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        default="float32",
        description="Precision of the weights while profiling, and of the base model in later fine-tuning. Sums of "
        "statistics are float32 or wider in any case.",
    )
    head_fit_samples: int = Field(
        default=512,
        ge=0,
        description="Samples on which a newly initialised task head is fitted (logistic regression on frozen features) "
        "before profiling; they are disjoint from the calibration samples. 0 leaves the head as it was initialised, "
        "which makes the gradients of a random head.",
    )

    device_map: Literal["auto", "balanced", "balanced_low_0", "sequential"] | dict[str, str | int] | None = Field(
        default=None,
        description="Where accelerate puts the modules of a transformers model: `auto` (GPUs, then main memory, then "
        "disk), or a device for each module: `{model.embed_tokens: 0, model.layers.0: cpu, model.layers.1: disk}`. "
        "Not given: all on `runtime.device`.",
    )
    max_memory: dict[str, str] | None = Field(
        default=None, description="What `device_map` may use of each device: `{0: 20GiB, cpu: 60GiB}`."
    )
    offload_folder: str | None = Field(
        default=None, description="Where weights placed on `disk` are kept; safetensors checkpoints are read in place."
    )

    @property
    def reference(self) -> str:
        """What the model is loaded by: ``name_or_path``, or ``factory:module:function``."""
        return self.name_or_path or f"factory:{self.factory}"

    @property
    def source(self) -> Any:
        """Where the model comes from: a ``layerlens.sources.ModelSource``."""
        return source_of(self.reference)[0]

    @model_validator(mode="after")
    def _one_source_and_its_companions(self) -> ModelConfig:
        if bool(self.name_or_path) == (self.factory is not None):
            raise ValueError("give the model by name_or_path or by factory, one of the two")
        if (self.task == "custom") != (self.loss is not None):
            raise ValueError("task custom and loss belong together: give both or neither")
        if self.device_map is not None and not self.source.of_transformers:
            raise ValueError("device_map is for models of transformers; place a model of your own in its factory")
        if self.device_map is None and (self.max_memory or self.offload_folder):
            raise ValueError("max_memory and offload_folder belong to device_map; give it too, such as auto")
        if self.weights is not None and not self.source.takes_weights:
            raise ValueError("weights is for factory and timm: models; a transformers directory has its own weights")
        return self


class DataConfig(ConfigModel):
    """A little of the data that the model will be fine-tuned on."""

    source: str = Field(
        min_length=1,
        description="A .jsonl, .csv or .parquet file; a directory that `datasets` saved with save_to_disk; "
        "`hf:NAME:SPLIT` for a data set of the Hugging Face hub; a folder with a sub-folder of images for each class; "
        "`module:function` of yours, which returns rows (for the task custom: a map-style data set or batches); "
        "`builtin:stdlib-docstrings` (docstrings of the running Python's standard library, labelled by the package "
        "they come from); `builtin:digits` (8 × 8 handwritten digits; needs scikit-learn); for `object-detection` the "
        "YAML file of a YOLO data set.",
    )
    text_column: str | None = Field(
        default=None,
        description="Column with the text; found by itself when one column is obviously text. Of seq2seq the source "
        "text (`source`, `text`, `document` ...), of token-classification the list of words (`tokens` or `words`), of "
        "question-answering the question. `translation.en` is the value `en` of the mapping `translation`.",
    )
    pair_column: str | None = Field(
        default=None,
        description="Column with the second sentence, for tasks on sentence pairs; of question-answering the context.",
    )
    label_column: str | None = Field(
        default=None,
        description="Column with the label; `label`, `labels`, `class` or `target` when not given. Of seq2seq the "
        "target text, of token-classification the list of tags, of question-answering the answers "
        '(`{"text": ["..."], "answer_start": [0]}`).',
    )
    image_column: str | None = Field(
        default=None,
        description="Column with the image, a path (from the table's folder) or encoded bytes; `image` or `img` when "
        "not given.",
    )
    max_image_pixels: int = Field(
        default=2**26, ge=1, description="Larger images are refused before they are decoded (decompression bombs)."
    )
    calibration_samples: int | None = Field(
        default=None,
        ge=2,
        description="Samples that are measured. When not given: 256, or, where nothing but the gradient energy is "
        "wanted (as for the utility model `auto`), a fiftieth of the samples that `training` will train on, at least "
        "16 and at most 256, so that measuring stays below a twentieth of the fine-tune.",
    )
    max_length: int = Field(default=128, ge=2, description="Longest sequence, in tokens; longer texts are truncated.")
    max_target_length: int | None = Field(
        default=None, ge=1, description="Longest target text of seq2seq, in tokens; `max_length` when not given."
    )
    source_prefix: str = Field(default="", description="Written before every text, such as `summarize: ` for T5.")
    mlm_probability: float = Field(
        default=0.15, gt=0, le=1, description="Share of the tokens that a masked language model has to find."
    )
    batch_size: int = Field(
        default=16, ge=1, description="Samples in one measuring batch. Memory grows with it; results do not change."
    )


class ProxyConfig(ConfigModel):
    """Short real training of a few options, which turns utilities into predicted loss drops and checks them.

    Each option is trained alone, from the same start and on the same batches, and judged on held-out samples.
    """

    options: int = Field(
        default=0,
        ge=0,
        description="How many options are trained, chosen evenly over methods, roles, depths and ranks; 0: none, the "
        "utilities stay uncalibrated. At least 4; 24 is a good start.",
    )
    steps: int = Field(default=16, ge=1, description="Training steps of each option.")
    learning_rate: float = Field(default=1e-3, gt=0, description="Learning rate of AdamW in these steps.")
    held_out_samples: int = Field(
        default=128, ge=8, description="Samples, neither measured nor trained on, whose loss is compared."
    )
    time_limit_s: float | None = Field(
        default=None,
        gt=0,
        description="No further option is begun after this many seconds; what is done counts, and a later run goes on.",
    )

    @field_validator("options")
    @classmethod
    def _enough_to_fit(cls, options: int) -> int:
        if 0 < options < 4:
            raise ValueError("must be 0 or at least 4, the fewest that a curve can be fitted to")
        return options


class ProfilingConfig(ConfigModel):
    """What is measured and how it becomes a utility."""

    utility_model: UtilityName = Field(
        default="auto",
        description="How statistics become a utility curve: `auto` (`tempered_energy` where the budget of parameters "
        "is below rank 2 on every layer, else `tempered_log`), `tempered_log` (fourth root of the gradient energy "
        "times the parameters of a rank times log(1 + rank): ranks become alike as the budget grows), "
        "`tempered_energy` (the fourth root times the square root of the rank: half-way between `gradient` and even "
        "spreading), `tempered` (the same with the sampling noise taken off the energy), `signal` (square root of the "
        "noise-corrected energy times the square root of the rank), `whitened` (K-FAC-whitened split-half spectrum, in "
        "nats), `gradient` (plain gradient energy), `weighted` (`metric_weights` over layers), `uniform` (every layer "
        "equal).",
    )
    metric_weights: dict[str, float] = Field(
        default_factory=lambda: {"gradient_energy": 0.5, "fisher": 0.5},
        description="Weight of each metric in the `weighted` utility and in `run_pipeline`: gradient_energy, fisher, "
        "proxy_eval. Weights are scaled to sum 1; a metric that no layer has is left out with a warning.",
    )
    statistics: tuple[StatisticName, ...] = Field(
        default=(),
        description="Statistics to measure beside those that the utility model reads: `fisher` (trace of the empirical "
        "Fisher), `gradient` (energy of the mean gradient), `input_scale`, `spectrum` (split-half spectrum of the mean "
        "gradient), `whitened_spectrum` (the same, K-FAC-whitened), `factors` (the K-FAC factors themselves; large), "
        "`sketched_spectrum` and `sketched_factors` (by random projections, with their errors), `ntk` (Gram matrix of "
        "per-sample gradients, its effective rank and target alignment), `fisher_diagonal` (importance of single "
        "weights: mean, quantiles, participation, sums for each output), and of every module `activation_memory`, "
        "`flops` and `time`. Only what is needed or asked for is computed.",
    )
    ntk_samples: int = Field(
        default=64,
        ge=2,
        le=8192,
        description="Samples of the neural tangent kernel. Up to 256 it is exact, from activations and gradients that "
        "are kept in memory: samples × tokens × (inputs + outputs of every layer) × 4 bytes. Beyond, it comes from "
        "random projections of 4 kB a sample, and its error is told.",
    )
    all_weights: bool = Field(
        default=False,
        description="Measure the weights outside the layers too (embeddings, convolutions, heads), and list what is "
        "left out; they are in the statistics file, and no option is offered for them.",
    )
    adapter_sites: Literal["residual", "all"] = Field(
        default="residual",
        description="Where adapters are considered: after the modules that write to the residual stream (attention "
        "output, FFN output), or after every Linear.",
    )
    memory_mode: Literal["auto", "plain", "checkpointed", "streamed"] = Field(
        default="auto",
        description="How the model is held while it is measured: `plain` (in memory), `checkpointed` (in memory; "
        "blocks keep only what they are given and run again in the backward pass), `streamed` (weights stay in their "
        "safetensors files and blocks come one at a time; transformers models with one stack of blocks), `auto` (the "
        "first of these that is predicted to keep within `max_memory_gb`; plain without it). Layers have the same "
        "statistics in all of them.",
    )
    max_memory_gb: float | None = Field(
        default=None,
        gt=0,
        description="Memory that profiling may take, GB (1e9 bytes) resident in the whole process; `memory_mode: auto` "
        "follows from it. Later training is not meant.",
    )
    proxies: ProxyConfig = Field(
        default_factory=ProxyConfig, description="Short real training of a few options, to calibrate the utilities."
    )

    @property
    def limits_memory(self) -> str | None:
        """The key that limits the memory of profiling, with its section; None where nothing does."""
        if self.memory_mode == "auto":
            return None if self.max_memory_gb is None else "profiling.max_memory_gb"
        return None if self.memory_mode == "plain" else "profiling.memory_mode"

    @field_validator("metric_weights")
    @classmethod
    def _known_and_positive(cls, weights: dict[str, float]) -> dict[str, float]:
        for name, weight in weights.items():
            if name not in METRICS:
                raise ValueError(f"unknown metric {name!r}; known: {', '.join(METRICS)}")
            if not 0.0 <= weight < float("inf"):
                raise ValueError(f"weight of {name!r} must be a finite number >= 0, got {weight!r}")
        if not sum(weights.values()) > 0.0:
            raise ValueError("at least one weight must be above 0")
        return weights


class LatencyProfile(ConfigModel):
    """The device and the batch that costs are predicted for.

    The three roofline numbers default to nominal figures of the device type; give your own for figures that hold on
    your device. A run prints the measured forward time of the base model beside the prediction.
    """

    device_type: Literal["cpu", "gpu"] = Field(default="cpu", description="Device that the predictions are for.")
    model_family: str = Field(default="llm", min_length=1, description="Free text, recorded in the manifest.")
    batch_size: int = Field(default=8, ge=1, description="Sequences in a batch.")
    sequence_length: int = Field(default=128, ge=1, description="Tokens in a sequence.")
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


class OptimizationConfig(ConfigModel):
    """Budgets, the options on offer, and how the solver weighs them. At least one budget is needed."""

    max_trainable_params: int | None = Field(
        default=None, gt=0, description="Trainable parameters of all options together (the task head not counted)."
    )
    max_flops: float | None = Field(
        default=None, gt=0, description="Forward FLOPs that the options add to one batch of the latency profile."
    )
    max_vram_gb: float | None = Field(
        default=None, gt=0, description="Memory of a training step, base model included, GB (1e9 bytes)."
    )
    latency_target_ms: float | None = Field(
        default=None, gt=0, description="Forward latency of one batch, base model included, ms, options unmerged."
    )
    latency_profile: LatencyProfile = Field(
        default_factory=LatencyProfile, description="Device and batch that FLOPs, memory and latency are predicted for."
    )
    methods: tuple[MethodName, ...] = Field(
        default=("lora", "adapter", "prefix"), min_length=1, description="PEFT methods on offer."
    )
    lora_ranks: tuple[int, ...] = Field(default=(1, 2, 4, 8, 16, 32), description="LoRA ranks on offer.")
    adapter_sizes: tuple[int, ...] = Field(default=(2, 4, 8, 16, 32), description="Adapter bottleneck widths on offer.")
    prefix_lengths: tuple[int, ...] = Field(
        default=(2, 4, 8, 16),
        description="Prefix lengths on offer, in key/value pairs. A single pair would leave its key untrained.",
    )
    method_sizes: dict[MethodName, tuple[int, ...]] = Field(
        default_factory=dict,
        exclude_if=lambda sizes: not sizes,
        description="Sizes on offer of registered methods without a key of their own, by the method's name.",
    )
    constraints: ConstraintConfig = Field(
        default_factory=ConstraintConfig, description="What the choice must keep beyond the four budgets."
    )
    alpha_over_r: float = Field(default=2.0, gt=0, description="LoRA scale alpha/r, one constant for the whole model.")
    use_rslora: bool = Field(
        default=False,
        description="Scale LoRA by alpha/√r instead of alpha/r (rsLoRA), with alpha = alpha_over_r times the largest "
        "chosen rank in every layer.",
    )
    lora_initialization: Literal["default", "pca", "gradient_svd"] = Field(
        default="default",
        description="How LoRA's A begins, with B = 0: `default` (uniform, as PEFT draws it), `pca` (principal "
        "components of the layer's inputs, as EVA), `gradient_svd` (right singular vectors of the mean gradient, as "
        "LoRA-GA). The last two are measured on the calibration samples in one more pass.",
    )
    optimizer: Literal["adamw", "sgd"] = Field(
        default="adamw", description="Optimiser of the later fine-tune; its state is part of the memory prediction."
    )
    objective_weights: dict[str, float] = Field(
        default_factory=lambda: {"utility": 1.0},
        description="score = utility·w_utility − Σ_r w_r·(cost_r / budget_r) − penalty[method], with r in cost, flops, "
        "vram, latency. The utility is first scaled so that the best option of the model has 1.",
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
        description="CP-SAT limit in deterministic time units (about a second each), so that every run ends alike.",
    )
    gap_tolerance: float = Field(
        default=1e-6, ge=0, lt=1, description="Relative gap under which the allocation is called optimal."
    )
    proxy_check: ProxyCheckConfig = Field(
        default_factory=ProxyCheckConfig,
        description="Training of the solver's choice and of uniform LoRA beside each other, to write the better one.",
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
        known = ("utility", "cost", "flops", "vram", "latency")
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
        budgets = (self.max_trainable_params, self.max_flops, self.max_vram_gb, self.latency_target_ms)
        if all(budget is None for budget in budgets):
            raise ValueError(
                "no budget given; set at least one of max_trainable_params, max_flops, max_vram_gb, latency_target_ms"
            )
        if not any(self.ranks().values()):
            raise ValueError("no option on offer; give sizes for at least one of the methods")
        return self

    def ranks(self) -> dict[str, tuple[int, ...]]:
        """Sizes on offer for each method on offer."""
        return {name: self._sizes(METHODS[name]) for name in self.methods}

    def _sizes(self, method: Any) -> tuple[int, ...]:
        if method.sizes_key:
            sizes: tuple[int, ...] = getattr(self, method.sizes_key)
            return sizes
        return self.method_sizes.get(method.name, method.default_sizes)

    def budgets(self) -> dict[str, float | None]:
        """Budget of each resource, by resource name."""
        return {
            "trainable_params": self.max_trainable_params,
            "flops": self.max_flops,
            "vram_gb": self.max_vram_gb,
            "latency_ms": self.latency_target_ms,
        }


class OutputConfig(ConfigModel):
    """Where the results go."""

    directory: str = Field(
        default="out", min_length=1, description="Directory for the results, relative to the configuration file."
    )


class RuntimeConfig(ConfigModel):
    """How the run uses this machine."""

    seed: int = Field(default=0, ge=0, lt=2**31, description="Seed of the data split, the head and the solver.")
    threads: int = Field(
        default=0,
        ge=0,
        description="CPU threads for torch, the kernels and the solver; 0: all cores, shared by the processes that "
        "torchrun started on this machine.",
    )
    device: Literal["cpu", "cuda"] = Field(
        default="cpu",
        description="Where the model runs and statistics are computed. On `cuda` activations and gradients never leave "
        "the GPU.",
    )
    cache_dir: str | None = Field(
        default=None,
        description="Directory of the sensitivity cache; by default $LAYERLENS_CACHE, or layerlens in the user's "
        "cache directory. Several processes need one that all of them see.",
    )
    saving_time_share: float = Field(
        default=0.05,
        gt=0,
        le=1,
        description="Largest share of the measuring time that is spent on keeping what is measured so far in the "
        "cache, from where an interrupted run goes on. 1: keep it after every batch.",
    )


class RunConfig(ConfigModel):
    """The whole job: `layerlens run config.yaml`."""

    model: ModelConfig
    data: DataConfig
    profiling: ProfilingConfig = Field(default_factory=ProfilingConfig, description="What is measured.")
    optimization: OptimizationConfig = Field(description="Budgets, options and solver.")
    training: TrainingConfig = Field(default_factory=TrainingConfig, description="How the choice is fine-tuned.")
    output: OutputConfig = Field(default_factory=OutputConfig, description="Where the results go.")
    runtime: RuntimeConfig = Field(default_factory=RuntimeConfig, description="How the run uses this machine.")
    distributed: DistributedConfig = Field(
        default_factory=DistributedConfig, description="How several processes do one run together."
    )
    study: StudyConfig = Field(
        default_factory=StudyConfig, description="What `layerlens evaluate` compares; other commands do not read it."
    )
    telemetry: TelemetryConfig = Field(default_factory=TelemetryConfig, description="Metrics and traces.")
    tracking: TrackingConfig = Field(default_factory=TrackingConfig, description="Experiment trackers.")
