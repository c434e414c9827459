"""What is tuned, and for what: the sections ``model`` and ``data``."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from layerlens.config.base import ConfigModel, TaskName
from layerlens.models.tokens import TokenRequest
from layerlens.registry import source_of

FUNCTION_NAME = r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$"


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
    dpo_beta: float = Field(
        default=0.1,
        gt=0,
        description="Of preference pairs: how much a change of log-probabilities weighs in DPO's loss.",
    )
    embedding_loss: Literal["auto", "multiple-negatives", "cosent", "triplet"] = Field(
        default="auto",
        exclude_if=lambda loss: loss == "auto",
        description="Of sentence-embedding: the loss of sentence-transformers. `auto`: CoSENT for scored pairs, else "
        "multiple negatives ranking, where the texts of other samples in the batch are negatives.",
    )
    task: TaskName = Field(
        default="",
        description="What the model is to be fine-tuned for; docs/configuration.md says of each task what its samples "
        "are and what it is judged by. Not given: guessed from the data's columns and the checkpoint's architecture, "
        "and said.",
    )
    trust_remote_code: bool = Field(
        default=False,
        description="Whether Python code that lies beside a checkpoint's weights (`auto_map` in its config.json) may "
        "run. Without it such a checkpoint is refused, and nobody is asked.",
    )
    quantization: dict[str, Any] | None = Field(
        default=None,
        min_length=1,
        description="Load the weights in fewer bits (QLoRA); handed to transformers as it is: "
        "`{load_in_4bit: true, bnb_4bit_quant_type: nf4}`, or with `quant_method` any other method of transformers. "
        "Not needed for checkpoints that are quantized already.",
    )
    resize_token_embeddings: bool = Field(
        default=False,
        exclude_if=lambda resize: not resize,
        description="Give every token of the tokenizer a row of the embeddings (and of the output layer), as "
        "transformers' `resize_token_embeddings` does it: new rows are drawn around the mean of the others. They are "
        "trained beside what is chosen. Where the model has rows enough, nothing changes.",
    )
    trainable_tokens: tuple[str, ...] = Field(
        default=(),
        exclude_if=lambda tokens: not tokens,
        description="Other tokens whose rows are trained too, such as chat markers that the vocabulary has and no text "
        "has trained: `['<|im_start|>', '<|im_end|>']`.",
    )
    token_training: Literal["trainable_token_indices", "modules_to_save"] = Field(
        default="trainable_token_indices",
        exclude_if=lambda by: by == "trainable_token_indices",
        description="How PEFT trains the rows of new tokens and of `trainable_tokens`: those rows alone, in the LoRA "
        "directory, or with `modules_to_save` the embeddings (and the output layer) whole.",
    )
    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        default="float32",
        description="Precision of the weights while profiling, and of the base model in later fine-tuning. Sums of "
        "statistics are float32 or wider in any case.",
    )
    new_head: bool = Field(
        default=False,
        description="Give a checkpoint that has a trained head the classes of the data in place of its own. Its head "
        "is made anew where their number differs, else it goes on from the trained weights. Without it the data's "
        "classes must be among the checkpoint's (see `data.label_names`).",
    )
    head: tuple[str, ...] | None = Field(
        default=None,
        exclude_if=lambda head: head is None,
        description="Modules that are trained whole and saved beside what is chosen (PEFT's `modules_to_save`), such "
        "as a new last layer: patterns for their names, or for what follows a dot in them, with `*` and `?`: `[fc]`, "
        "`[decode_head.classifier]`. They are not offered to other methods. When not given: the task head of a "
        "checkpoint; of a `factory` model of transformers a head whose weights look as they were drawn. `[]`: none.",
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
    """A little of the data that the model will be fine-tuned on."""

    source: str = Field(
        min_length=1,
        description="A .jsonl, .json, .csv, .tsv or .parquet file (.gz too); a .txt file with a text in each "
        "line; a .conll, .bio or .conllu file of words with their tags; a folder of such files, of which those of the "
        "split train are read; a directory that `datasets` saved with save_to_disk; `hf:NAME:SPLIT` or "
        "`hf:NAME/CONFIG:SPLIT` for a data set of the Hugging Face hub; a folder with a sub-folder of images, or "
        "of clips of sound, for each class; `module:function` of yours, which returns rows (for the task custom: a "
        "map-style data set or batches); "
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
    label_column: str | list[str] | None = Field(
        default=None,
        description="Column with the label; `label`, `labels`, `class` or `target` when not given. A list of columns "
        "of 0 and 1, one for each class, where a text has several classes. Of seq2seq the "
        "target text, of token-classification the list of tags, of question-answering the answers "
        '(`{"text": ["..."], "answer_start": [0]}`).',
    )
    chosen_column: str | None = Field(
        default=None, description="Of preference pairs the column with the better answer; `chosen` when not given."
    )
    rejected_column: str | None = Field(
        default=None, description="Of preference pairs the column with the worse answer; `rejected` when not given."
    )
    prompt_template: str | None = Field(
        default=None,
        min_length=1,
        description="How the prompt is written before its answer, with columns in braces, such as "
        "`Question: {question}\\nAnswer: `. When not given, a question (with its passage, or an instruction with its "
        "input) is the user's turn in the tokenizer's chat template, or, where there is none, a text with a line break "
        "at its end; a column `prompt` is taken as it is.",
    )
    image_column: str | None = Field(
        default=None,
        description="Column with the image, a path (from the table's folder) or encoded bytes; `image` or `img` when "
        "not given.",
    )
    audio_column: str | None = Field(
        default=None,
        exclude_if=lambda column: column is None,
        description="Column with the clip of sound: a path (from the table's folder, or `clips`, `audio`, `wavs` in it "
        "or beside it), encoded bytes, or what `datasets` has for an Audio feature; `audio`, `path`, `file` or "
        "`file_name` when not given.",
    )
    max_seconds: float = Field(
        default=20.0,
        gt=0,
        exclude_if=lambda seconds: seconds == 20.0,
        description="Longest clip of sound. Of a longer one audio-classification takes the beginning; clips with a "
        "transcript are left out.",
    )
    label_names: list[str] | dict[str, str] | None = Field(
        default=None,
        description="Names of the classes: a list in the order of the labels' numbers, which may have classes that the "
        "data lacks; or for each label of the data the name of the model's class that it is, such as "
        "`{neg: NEGATIVE}`.",
    )
    encoding: str | None = Field(
        default=None,
        min_length=1,
        description="Encoding of text files, such as cp1252; when not given, by the byte-order mark, UTF-8, or what "
        "the content looks like, which the run says.",
    )
    delimiter: str | None = Field(
        default=None,
        min_length=1,
        max_length=1,
        description="What separates the columns of a .csv file; when not given, the most frequent of `,`, `;`, tab and "
        "`|` in its header.",
    )
    max_rows: int | None = Field(
        default=None,
        ge=2,
        description="Most rows that are kept, drawn from the whole source. When not given, all, or as many as 512 MB "
        "of the source have.",
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
    collate: str | None = Field(
        default=None,
        pattern=FUNCTION_NAME,
        exclude_if=lambda collate: collate is None,
        description="Of the task custom, `module:function` that makes a batch of a list of samples: (inputs, targets), "
        "or a mapping with the targets under `labels`, with the samples along the first axis of every tensor. It pads "
        "samples and targets of unequal length. When not given, torch's `default_collate`, which wants one shape.",
    )
    max_length: int = Field(
        default=128,
        ge=2,
        description="Longest sequence, in tokens. Longer texts of causal-lm are cut into several samples; everything "
        "else is truncated.",
    )
    packing: Literal["none", "bfd", "bfd_split", "wrapped"] = Field(
        default="none",
        description="How samples of causal-lm are put together into rows of `max_length` tokens, as TRL's "
        "`packing_strategy` does it: `bfd` and `bfd_split` keep texts apart (`bfd` truncates those that are longer, "
        "`bfd_split` cuts them), `wrapped` is one long text that is cut.",
    )
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
