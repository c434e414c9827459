"""Tiny models with random weights and their processors, of the vision-language kinds that people tune."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from language_support import tokenizer

TURNS = (
    "{% for m in messages %}{{ m['role'] }}: {% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for p in m['content'] %}{% if p['type'] == 'image' %}IMAGE{% else %}{{ p['text'] }}{% endif %}{% endfor %}"
    "{% endif %}</s>{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)
TEXT: dict[str, Any] = {
    "vocab_size": 400, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 512, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
VISION: dict[str, Any] = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 8,
    "patch_size": 4,
}  # fmt: skip
SIDE = {"height": 8, "width": 8}
MROPE = {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 10000.0}


@dataclass(frozen=True)
class Kind:
    """How one kind is made.

    Args:
        image: what its template writes for an image.
        tokens: its special tokens by the name of the tokenizer's attribute.
        config: from the ids of these tokens to the model's configuration.
        processor: from the tokenizer to the processor.
        takes: arguments of the model beside ids, mask and pixels, that a chat with an image has.
    """

    image: str
    tokens: dict[str, str]
    config: Callable[[dict[str, int]], Any]
    processor: Callable[[Any], Any]
    takes: tuple[str, ...] = ()

    def save(self, folder: Path) -> Path:
        """Write the model and its processor into ``folder``."""
        torch.manual_seed(0)
        words: Any = tokenizer(template := TURNS.replace("IMAGE", self.image))
        words.add_special_tokens({"additional_special_tokens": list(self.tokens.values())})
        words = hf.PreTrainedTokenizerFast(
            tokenizer_object=words.backend_tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>",
            extra_special_tokens=self.tokens, chat_template=template,
        )  # fmt: skip
        ids = {name: words.convert_tokens_to_ids(token) for name, token in self.tokens.items()}
        processor = self.processor(words)
        processor.chat_template = template
        model = hf.AutoModelForImageTextToText.from_config(self.config(ids))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.dim() > 1 and "norm" not in name:
                    parameter.mul_(4.0)
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        return folder


def _qwen(name: str, image: str = "<|vision_start|><|image_pad|><|vision_end|>", **vision: Any) -> Kind:
    tower = {"depth": 2, "num_heads": 2, "patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2, **vision}
    tokens = {
        "image_token": "<|image_pad|>", "video_token": "<|video_pad|>", "vision_bos_token": "<|vision_start|>",
        "vision_eos_token": "<|vision_end|>",
    }  # fmt: skip

    def config(ids: dict[str, int]) -> Any:
        text = {**TEXT, "rope_parameters": MROPE}
        return hf.AutoConfig.for_model(
            name, text_config=text, vision_config=tower, image_token_id=ids["image_token"],
            video_token_id=ids["video_token"], vision_start_token_id=ids["vision_bos_token"],
            vision_end_token_id=ids["vision_eos_token"],
        )  # fmt: skip

    def processor(words: Any) -> Any:
        size = {"patch_size": 4, "merge_size": 2, "size": {"shortest_edge": 64, "longest_edge": 256}}
        made = hf.Qwen3VLProcessor if name.startswith("qwen3") else hf.Qwen2_5_VLProcessor
        made = hf.Qwen2VLProcessor if name == "qwen2_vl" else made
        videos = hf.Qwen3VLVideoProcessor if name.startswith("qwen3") else hf.Qwen2VLVideoProcessor
        return made(hf.Qwen2VLImageProcessor(**size), words, videos(**size))

    return Kind(image, tokens, config, processor, ("image_grid_thw", "mm_token_type_ids"))


def _gemma(name: str) -> Kind:
    tokens = {"image_token": "<image_soft_token>", "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>"}

    def config(ids: dict[str, int]) -> Any:
        given = {"boi_token_id": ids["boi_token"], "eoi_token_id": ids["eoi_token"],
                 "image_token_id": ids["image_token"]}  # fmt: skip
        if name == "gemma3":
            return hf.Gemma3Config(
                text_config={**TEXT, "sliding_window": 16, "query_pre_attn_scalar": 8}, vision_config=VISION,
                mm_tokens_per_image=4, boi_token_index=ids["boi_token"], eoi_token_index=ids["eoi_token"],
                image_token_index=ids["image_token"],
            )  # fmt: skip
        text = {
            **TEXT, "layer_types": ["sliding_attention", "full_attention"], "global_head_dim": 8, "sliding_window": 16,
            "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 400,
        }  # fmt: skip
        vision = {
            **VISION, "num_key_value_heads": 2, "head_dim": 8, "patch_size": 4, "pooling_kernel_size": 2,
            "position_embedding_size": 64,
        }  # fmt: skip
        return hf.Gemma4Config(text_config=text, vision_config=vision, audio_config=None, **given)

    def processor(words: Any) -> Any:
        if name == "gemma3":
            return hf.Gemma3Processor(hf.Gemma3ImageProcessor(size=SIDE), words, image_seq_length=4)
        images = hf.Gemma4ImageProcessor(patch_size=4, max_soft_tokens=70, pooling_kernel_size=2)
        videos = hf.Gemma4VideoProcessor(patch_size=4, max_soft_tokens=70, pooling_kernel_size=2)
        return hf.Gemma4Processor(hf.Gemma4AudioFeatureExtractor(), images, words, videos, image_seq_length=70)

    if name == "gemma4":
        sound = {"audio_token": "<|audio|>", "boa_token": "<boa>", "eoa_token": "<eoa>"}
        return Kind("<image_soft_token>", tokens | sound, config, processor, ("image_position_ids",))
    return Kind("<start_of_image>", tokens, config, processor, ("token_type_ids",))


def _pixtral(name: str) -> Kind:
    tokens = {"image_token": "[IMG]", "break_token": "[IMG_BREAK]", "end_token": "[IMG_END]"}
    vision = {**VISION, "model_type": "pixtral", "image_size": 16, "head_dim": 8}
    merge = 2 if name == "mistral3" else 1

    def config(ids: dict[str, int]) -> Any:
        more = {"spatial_merge_size": 2} if name == "mistral3" else {}
        return hf.AutoConfig.for_model(
            name, text_config={**TEXT, "model_type": "mistral"}, vision_config=vision, vision_feature_layer=-1,
            image_token_id=ids["image_token"], vision_feature_select_strategy="full", **more,
        )  # fmt: skip

    def processor(words: Any) -> Any:
        images = hf.PixtralImageProcessor(size={"longest_edge": 16}, patch_size={"height": 4, "width": 4})
        return hf.PixtralProcessor(images, words, patch_size=4, spatial_merge_size=merge)

    return Kind("[IMG]", tokens, config, processor, ("image_sizes",))


def _llava(name: str) -> Kind:
    def config(ids: dict[str, int]) -> Any:
        tower = "siglip_vision_model" if name == "llava_onevision" else "clip_vision_model"
        more: dict[str, Any] = {"image_grid_pinpoints": [[8, 16], [16, 8]]}
        if name == "llava_onevision":
            more |= {"vision_feature_select_strategy": "full", "vision_feature_layer": -1}
        return hf.AutoConfig.for_model(
            name, text_config={**TEXT, "model_type": "llama"}, vision_config={**VISION, "model_type": tower},
            image_token_index=ids["image_token"], **more,
        )  # fmt: skip

    def processor(words: Any) -> Any:
        pins = [[8, 16], [16, 8]]
        if name == "llava_onevision":
            return hf.LlavaOnevisionProcessor(
                hf.LlavaOnevisionImageProcessor(size=SIDE, image_grid_pinpoints=pins), words,
                hf.LlavaOnevisionVideoProcessor(size=SIDE), num_image_tokens=4, vision_feature_select_strategy="full",
            )  # fmt: skip
        images = hf.LlavaNextImageProcessor(size={"shortest_edge": 8}, crop_size=SIDE, image_grid_pinpoints=pins)
        return hf.LlavaNextProcessor(
            images, words, patch_size=4, vision_feature_select_strategy="default", num_additional_image_tokens=1
        )

    tokens = {"image_token": "<image>"}
    return Kind("<image>", tokens | ({"video_token": "<video>"} if "one" in name else {}), config, processor,
                ("image_sizes",))  # fmt: skip


def _idefics(name: str) -> Kind:
    tokens = {
        "image_token": "<image>", "fake_image_token": "<fake_token_around_image>", "global_image_token": "<global-img>",
        "end_of_utterance_token": "<end_of_utterance>", "image_boundary_token": "<fake_token_around_image>",
    }  # fmt: skip

    def config(ids: dict[str, int]) -> Any:
        if name == "idefics2":
            return hf.Idefics2Config(
                text_config={**TEXT, "model_type": "mistral"}, vision_config=VISION, image_token_id=ids["image_token"],
                perceiver_config={"resampler_n_latents": 4, "resampler_depth": 1, "resampler_n_heads": 2,
                                  "resampler_head_dim": 8, "num_key_value_heads": 1, "hidden_size": 16},
            )  # fmt: skip
        return hf.AutoConfig.for_model(
            name, text_config={**TEXT, "model_type": "llama"}, vision_config=VISION, scale_factor=2,
            image_token_id=ids["image_token"], pad_token_id=0,
        )  # fmt: skip

    def processor(words: Any) -> Any:
        if name == "idefics2":
            images = hf.Idefics2ImageProcessor(size={"shortest_edge": 4, "longest_edge": 8}, do_image_splitting=False)
            return hf.Idefics2Processor(images, words, image_seq_len=4)
        size = {"size": {"longest_edge": 16}, "max_image_size": {"longest_edge": 8}}
        if name == "smolvlm":
            videos = hf.SmolVLMVideoProcessor(
                **size, video_sampling={"fps": 1, "max_frames": 2, "video_size": {"longest_edge": 8}}
            )
            return hf.SmolVLMProcessor(hf.SmolVLMImageProcessor(**size), words, videos, image_seq_len=1)
        return hf.Idefics3Processor(hf.Idefics3ImageProcessor(**size), words, image_seq_len=1)

    return Kind("<image>", tokens, config, processor, ("pixel_attention_mask",))


def _internvl() -> Kind:
    tokens = {
        "context_image_token": "<IMG_CONTEXT>", "start_image_token": "<img>", "end_image_token": "</img>",
        "video_token": "<video>",
    }  # fmt: skip

    def config(ids: dict[str, int]) -> Any:
        vision = {**VISION, "image_size": [8, 8], "patch_size": [4, 4]}
        return hf.InternVLConfig(
            text_config={**TEXT, "model_type": "qwen2"}, vision_config=vision, downsample_ratio=0.5,
            image_token_id=ids["context_image_token"],
        )  # fmt: skip

    def processor(words: Any) -> Any:
        images = hf.GotOcr2ImageProcessor(size=SIDE, crop_to_patches=True, max_patches=2)
        return hf.InternVLProcessor(images, words, hf.InternVLVideoProcessor(size=SIDE), image_seq_length=1)

    return Kind("<IMG_CONTEXT>", tokens, config, processor)


def _paligemma() -> Kind:
    def config(ids: dict[str, int]) -> Any:
        return hf.PaliGemmaConfig(
            text_config={**TEXT, "model_type": "gemma", "vocab_size": 1600},
            vision_config={**VISION, "model_type": "siglip_vision_model"}, image_token_index=ids["image_token"],
            projection_dim=16,
        )  # fmt: skip

    def processor(words: Any) -> Any:
        images = hf.SiglipImageProcessor(size=SIDE)
        images.image_seq_length = 4
        return hf.PaliGemmaProcessor(images, words)

    return Kind("<image>", {"image_token": "<image>"}, config, processor, ("token_type_ids",))


def _aya() -> Kind:
    tokens = {
        "image_token": "<image>", "start": "<|START_OF_IMG|>", "end": "<|END_OF_IMG|>", "patch": "<|IMG_PATCH|>",
        "line": "<|IMG_LINE_BREAK|>", "tile": "TILE", "whole": "TILE_GLOBAL",
    }  # fmt: skip

    def config(ids: dict[str, int]) -> Any:
        vision = {**VISION, "model_type": "siglip_vision_model"}
        return hf.AyaVisionConfig(
            text_config={**TEXT, "model_type": "cohere2"}, vision_config=vision,
            downsample_factor=2, image_token_index=ids["patch"], vision_feature_layer=-1, adapter_layer_norm_eps=1e-6,
            vision_feature_select_strategy="full",
        )  # fmt: skip

    def processor(words: Any) -> Any:
        images = hf.GotOcr2ImageProcessor(size=SIDE, crop_to_patches=True, max_patches=2)
        return hf.AyaVisionProcessor(images, words, patch_size=4, img_size=8, downsample_factor=2)

    return Kind("<image>", tokens, config, processor)


def _mllama() -> Kind:
    def config(ids: dict[str, int]) -> Any:
        text = {**TEXT, "num_hidden_layers": 3, "cross_attention_layers": [1]}
        vision = {
            "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_global_layers": 1,
            "attention_heads": 2, "image_size": 8, "patch_size": 4, "max_num_tiles": 2, "vision_output_dim": 32,
            "intermediate_layers_indices": [0], "supported_aspect_ratios": [[1, 1], [1, 2], [2, 1]],
        }  # fmt: skip
        return hf.MllamaConfig(text_config=text, vision_config=vision, image_token_index=ids["image_token"])

    def processor(words: Any) -> Any:
        return hf.MllamaProcessor(hf.MllamaImageProcessor(size=SIDE, max_image_tiles=2), words)

    tokens = {"image_token": "<|image|>", "python_token": "<|python_tag|>"}
    takes = ("aspect_ratio_ids", "aspect_ratio_mask", "cross_attention_mask")
    return Kind("<|image|>", tokens, config, processor, takes)


def _llama4() -> Kind:
    names = ("<|image|>", "<|image_start|>", "<|image_end|>", "<|patch|>", "<|tile_x_separator|>",
             "<|tile_y_separator|>")  # fmt: skip
    tokens = {"image_token": names[0], "patch": names[3]} | {f"other_{n}": names[n] for n in (1, 2, 4, 5)}

    def config(ids: dict[str, int]) -> Any:
        text = {**TEXT, "intermediate_size_mlp": 32, "num_local_experts": 2, "attention_chunk_size": 32}
        vision = {**VISION, "projector_input_dim": 16, "projector_output_dim": 16, "vision_output_dim": 16,
                  "pixel_shuffle_ratio": 0.5, "intermediate_size": 64}  # fmt: skip
        return hf.Llama4Config(text_config=text, vision_config=vision, image_token_index=ids["patch"])

    def processor(words: Any) -> Any:
        images = hf.Llama4ImageProcessor(size=SIDE, max_patches=2)
        return hf.Llama4Processor(images, words, patch_size=4, pixel_shuffle_ratio=0.5)

    return Kind("<|image|>", tokens, config, processor)


KINDS: dict[str, Kind] = {
    "qwen2_vl": _qwen("qwen2_vl", embed_dim=16, hidden_size=16, mlp_ratio=2),
    "qwen2_5_vl": _qwen(
        "qwen2_5_vl", hidden_size=16, intermediate_size=32, out_hidden_size=16, fullatt_block_indexes=[1],
        window_size=16,
    ),
    "qwen3_vl": _qwen(
        "qwen3_vl", hidden_size=16, intermediate_size=32, out_hidden_size=16, deepstack_visual_indexes=[0],
        num_position_embeddings=16,
    ),
    "gemma3": _gemma("gemma3"), "gemma4": _gemma("gemma4"), "mistral3": _pixtral("mistral3"),
    "llava of pixtral": _pixtral("llava"), "llava_next": _llava("llava_next"),
    "llava_onevision": _llava("llava_onevision"), "idefics2": _idefics("idefics2"), "idefics3": _idefics("idefics3"),
    "smolvlm": _idefics("smolvlm"), "internvl": _internvl(), "paligemma": _paligemma(), "aya_vision": _aya(),
    "mllama": _mllama(), "llama4": _llama4(),
}  # fmt: skip
