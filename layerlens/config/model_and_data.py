"""What is tuned, and for what: the sections ``model`` and ``data``."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from layerlens.config.base import ConfigModel, TaskName
from layerlens.models.tokens import TokenRequest
from layerlens.registry import source_of

FUNCTION_NAME = r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$"


class ModelConfig(ConfigModel):
    """The pretrained model and the task."""

    name_or_path: str = Field(
        default="",
        description="Directory of a transformers model, a Hugging Face hub name, `package:NAME` for an installed "
        "package whose `get_model_path()` returns such a directory, `timm:NAME` for a timm model, or "
        "`ultralytics:WEIGHTS.pt` for a detector (loading it runs the code in its pickle, so use only trusted files). "
        "Not needed with `factory`.",
    )
    factory: str | None = Field(
        default=None,
        pattern=FUNCTION_NAME,
        description="`module:function` that returns the model, a `torch.nn.Module`, or (model, tokenizer or image "
        "transform). LayerLens runs your code only because you name it here.",
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
        "sample, a tensor [batch]. The loss of a sample must not depend on the other samples in its batch.",
    )
    dpo_beta: float = Field(
        default=0.1,
        gt=0,
        description="For preference pairs: weight of a change in log-probabilities in DPO's loss (beta).",
    )
    embedding_loss: Literal["auto", "multiple-negatives", "cosent", "triplet"] = Field(
        default="auto",
        exclude_if=lambda loss: loss == "auto",
        description="For sentence-embedding: the loss from sentence-transformers. `auto` uses CoSENT for scored pairs "
        "and multiple negatives ranking otherwise, where the texts of other samples in the batch are the negatives.",
    )
    task: TaskName = Field(
        default="",
        description="Task that the model will be fine-tuned for; docs/configuration.md lists the samples and the "
        "metric of each task. When not given, LayerLens guesses the task from the data's columns and the checkpoint's "
        "architecture, and says which.",
    )
    trust_remote_code: bool = Field(
        default=False,
        description="Whether Python code in the checkpoint's directory (`auto_map` in its config.json) may run. "
        "Otherwise LayerLens refuses such a checkpoint, without a prompt.",
    )
    quantization: dict[str, Any] | None = Field(
        default=None,
        min_length=1,
        description="Load the weights in fewer bits (QLoRA). Passed to transformers unchanged: `{load_in_4bit: true, "
        "bnb_4bit_quant_type: nf4}`, or with `quant_method` any other method of transformers. Not needed for "
        "checkpoints that are already quantized.",
    )
    resize_token_embeddings: bool = Field(
        default=False,
        exclude_if=lambda resize: not resize,
        description="Give every token of the tokenizer a row in the embeddings (and in the output layer), like "
        "transformers' `resize_token_embeddings`, which initialises new rows around the mean of the others. Training "
        "updates the new rows together with the chosen layers. If the model already has enough rows, nothing changes.",
    )
    trainable_tokens: tuple[str, ...] = Field(
        default=(),
        exclude_if=lambda tokens: not tokens,
        description="Other tokens whose rows to train, such as chat markers that are in the vocabulary but untrained: "
        "`['<|im_start|>', '<|im_end|>']`.",
    )
    token_training: Literal["trainable_token_indices", "modules_to_save"] = Field(
        default="trainable_token_indices",
        exclude_if=lambda by: by == "trainable_token_indices",
        description="How PEFT trains the rows of new tokens and of `trainable_tokens`: only those rows, saved in the "
        "LoRA directory, or with `modules_to_save` the whole embeddings (and output layer).",
    )
    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        default="float32",
        description="Precision of the weights while profiling, and of the base model in later fine-tuning. Statistics "
        "are always summed in float32 or wider.",
    )
    new_head: bool = Field(
        default=False,
        description="Replace the classes of a checkpoint's trained head by the classes of the data. If their numbers "
        "differ, the head is initialised anew; otherwise training continues from its weights. Without this key, the "
        "data's classes must be among the checkpoint's (see `data.label_names`). For `speech-ctc`: a new head for the "
        "checkpoint's vocabulary, or for the letters of the data if the vocabulary lacks some.",
    )
    head: tuple[str, ...] | None = Field(
        default=None,
        exclude_if=lambda head: head is None,
        description="Modules to train in full and save with the choice (PEFT's `modules_to_save`), such as a new last "
        "layer. Patterns with `*` and `?` for whole names, or for the part after a dot: `[fc]`, "
        "`[decode_head.classifier]`. No method is offered for them. When not given: the task head of a checkpoint, or "
        "the head of a transformers model from a `factory` whose weights look freshly initialised. `[]`: none.",
    )
    head_fit_samples: int = Field(
        default=512,
        ge=0,
        description="Samples on which LayerLens fits a newly initialised task head (logistic regression on frozen "
        "features) before profiling. They are disjoint from the calibration samples. With 0, gradients are those of a "
        "random head.",
    )

    device_map: Literal["auto", "balanced", "balanced_low_0", "sequential"] | dict[str, str | int] | None = Field(
        default=None,
        description="Where accelerate places the modules of a transformers model: `auto` (GPUs, then main memory, then "
        "disk), or a device for each module: `{model.embed_tokens: 0, model.layers.0: cpu, model.layers.1: disk}`. "
        "When not given: all on `runtime.device`.",
    )
    max_memory: dict[str, str] | None = Field(
        default=None, description="Memory that `device_map` may use on each device: `{0: 20GiB, cpu: 60GiB}`."
    )
    offload_folder: str | None = Field(
        default=None, description="Folder for weights placed on `disk`; safetensors checkpoints are read in place."
    )

    @property
    def reference(self) -> str:
        """What the model is loaded by: ``name_or_path``, or ``factory:module:function``."""
        return self.name_or_path or f"factory:{self.factory}"

    @property
    def token_request(self) -> TokenRequest:
        """What is said of tokens; false where it is nothing."""
        return TokenRequest(self.resize_token_embeddings, self.trainable_tokens, self.token_training)

    @property
    def source(self) -> Any:
        """Where the model comes from: a ``layerlens.sources.ModelSource``."""
        return source_of(self.reference)[0]

    @model_validator(mode="after")
    def _one_source_and_its_companions(self) -> ModelConfig:
        if bool(self.name_or_path) == (self.factory is not None):
            raise ValueError("give the model by name_or_path or by factory, one of the two")
        if (self.task == "custom" and self.loss is None) or (self.task not in ("custom", "") and self.loss is not None):
            raise ValueError("task custom and loss belong together: give both or neither")
        if self.device_map is not None and not self.source.of_transformers:
            raise ValueError("device_map is for models of transformers; place a model of your own in its factory")
        for name in ("trust_remote_code", "quantization", "resize_token_embeddings"):
            if getattr(self, name) and not self.source.of_transformers:
                raise ValueError(f"{name} is for checkpoints of transformers; {self.reference} is none")
        if self.device_map is None and (self.max_memory or self.offload_folder):
            raise ValueError("max_memory and offload_folder belong to device_map; give it too, such as auto")
        if self.weights is not None and not self.source.takes_weights:
            raise ValueError("weights is for factory and timm: models; a transformers directory has its own weights")
        return self


class DataConfig(ConfigModel):
    """A sample of the data that the model will be fine-tuned on."""

    source: str = Field(
        min_length=1,
        description="A .jsonl, .json, .csv, .tsv, .parquet or .arrow file (text files also as .gz, .bz2, .xz, .zst or "
        "a .zip of one file); a .txt file with one text per line; a .conll, .bio or .conllu file of tagged words; a "
        "folder of such files, of which LayerLens reads the train "
        "split; a directory that `datasets` saved with save_to_disk; `hf:NAME:SPLIT` or `hf:NAME/CONFIG:SPLIT` for a "
        "data set of the Hugging Face hub; a folder with a sub-folder of images, audio clips "
        "or short texts (.txt) for each class; "
        "`module:function` that returns rows (for the task custom: a map-style data set or batches); "
        "`builtin:stdlib-docstrings` (docstrings of your Python's standard library, labelled by package); "
        "`builtin:digits` (8 × 8 handwritten digits; needs scikit-learn); for `object-detection`, the YAML file of a "
        "YOLO data set.",
    )
    text_column: str | None = Field(
        default=None,
        description="Column with the text; detected if only one column looks like text. For seq2seq the source text "
        "(`source`, `text`, `document` ...), for token-classification the list of words (`tokens` or `words`), for "
        "question-answering the question. `translation.en` is the value `en` of the mapping `translation`.",
    )
    pair_column: str | None = Field(
        default=None,
        description="Column with the second sentence, for tasks on sentence pairs; for question-answering the context.",
    )
    label_column: str | list[str] | None = Field(
        default=None,
        description="Column with the label; `label`, `labels`, `class` or `target` when not given. For several classes "
        "per text, a list of 0/1 columns, one for each class. For seq2seq the target text, for token-classification "
        'the list of tags, for question-answering the answers (`{"text": ["..."], "answer_start": [0]}`).',
    )
    chosen_column: str | None = Field(
        default=None, description="For preference pairs: column with the better answer; `chosen` when not given."
    )
    rejected_column: str | None = Field(
        default=None, description="For preference pairs: column with the worse answer; `rejected` when not given."
    )
    prompt_template: str | None = Field(
        default=None,
        min_length=1,
        description="Template of the prompt before its answer, with columns in braces, such as `Question: "
        "{question}\\nAnswer: `. When not given, a question (with its passage) or an instruction (with its input) is "
        "the user's turn in the tokenizer's chat template; without a chat template, it is the text and a line break. A "
        "column `prompt` is used unchanged.",
    )
    image_column: str | None = Field(
        default=None,
        description="Column with the image, a path (relative to the table's folder) or encoded bytes; `image` or `img` "
        "when not given.",
    )
    audio_column: str | None = Field(
        default=None,
        exclude_if=lambda column: column is None,
        description="Column with the audio clip: a path (in the table's folder, or in `clips`, `audio` or `wavs` in it "
        "or beside it), encoded bytes, or an Audio feature of `datasets`; `audio`, `path`, `file` or `file_name` when "
        "not given.",
    )
    max_seconds: float = Field(
        default=20.0,
        gt=0,
        exclude_if=lambda seconds: seconds == 20.0,
        description="Longest audio clip. audio-classification uses the beginning of a longer clip; the speech tasks "
        "leave longer clips out.",
    )
    label_names: list[str] | dict[str, str] | None = Field(
        default=None,
        description="Names of the classes: a list in the order of the label numbers, which may include classes that "
        "the data lacks; or a mapping from each label of the data to a class of the model, such as `{neg: NEGATIVE}`.",
    )
    encoding: str | None = Field(
        default=None,
        min_length=1,
        description="Encoding of text files, such as cp1252. When not given, LayerLens uses the byte-order mark, "
        "UTF-8, or a guess from the content, and says which.",
    )
    delimiter: str | None = Field(
        default=None,
        min_length=1,
        max_length=1,
        description="Column separator of a .csv file; when not given, the most frequent of `,`, `;`, tab and `|` in "
        "its header.",
    )
    max_rows: int | None = Field(
        default=None,
        ge=2,
        description="Maximum number of rows, sampled from the whole source. When not given: all rows, up to 512 MB of "
        "the source.",
    )
    max_image_pixels: int = Field(
        default=2**26, ge=1, description="LayerLens refuses larger images before decoding them (decompression bombs)."
    )
    calibration_samples: int | None = Field(
        default=None,
        ge=2,
        description="Number of samples to measure. When not given: 256. If only the gradient energy is needed (as for "
        "the utility model `auto`), a fiftieth of the samples that `training` will train on, between 16 and 256, so "
        "that measuring takes less than a twentieth of the fine-tune.",
    )
    collate: str | None = Field(
        default=None,
        pattern=FUNCTION_NAME,
        exclude_if=lambda collate: collate is None,
        description="For the task custom: `module:function` that makes a batch from a list of samples: (inputs, "
        "targets), or a mapping with the targets under `labels`, with the samples along the first axis of every "
        "tensor. It must pad samples and targets of unequal length. When not given: torch's `default_collate`, which "
        "needs samples of one shape.",
    )
    max_length: int = Field(
        default=128,
        ge=2,
        description="Longest sequence, in tokens. Longer texts of causal-lm are split into several samples; all other "
        "samples are truncated. The default is lowered to the model's positions where these are fewer.",
    )
    packing: Literal["none", "bfd", "bfd_split", "wrapped"] = Field(
        default="none",
        description="How to pack samples of causal-lm into rows of `max_length` tokens, like TRL's `packing_strategy`: "
        "`bfd` and `bfd_split` keep texts separate (`bfd` truncates longer texts, `bfd_split` splits them), `wrapped` "
        "cuts all texts as one long text.",
    )
    max_target_length: int | None = Field(
        default=None, ge=1, description="Longest target text of seq2seq, in tokens; `max_length` when not given."
    )
    source_prefix: str = Field(default="", description="Prefix of every text, such as `summarize: ` for T5.")
    mlm_probability: float = Field(
        default=0.15, gt=0, le=1, description="Share of tokens to mask for a masked language model."
    )
    batch_size: int = Field(
        default=16,
        ge=1,
        description="Samples in one measuring batch. A larger batch needs more memory and gives the same results.",
    )
