"""Small models with random weights of the families of timm and torchvision: one configuration of each.

Sizes are lowered where a family's own arguments allow it. Weights that begin at zero (heads, the last norm of a
residual branch) are drawn too, since no gradient would reach what lies below them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from layerlens.integrations.torchvision_import import make_torchvision_importable

make_torchvision_importable()
import timm  # noqa: E402
import torchvision.models as tv  # noqa: E402

N_CLASSES = 3
VIT: dict[str, Any] = {"img_size": 32, "patch_size": 8, "depth": 2, "embed_dim": 32, "num_heads": 2}
STAGES: dict[str, Any] = {"depths": (1, 1, 1, 1), "dims": (8, 16, 24, 32)}
TIMM: dict[str, tuple[int, dict[str, Any]]] = {
    "beit_base_patch16_224": (32, VIT),
    "beitv2_base_patch16_224": (32, VIT),
    "cait_xxs24_224": (32, {**VIT, "depth": 2}),
    "convit_tiny": (32, {**VIT, "local_up_to_layer": 1}),
    "convnext_atto": (32, STAGES),
    "convnextv2_atto": (32, STAGES),
    "deit_tiny_distilled_patch16_224": (32, VIT),
    "deit3_small_patch16_224": (32, VIT),
    "densenet121": (32, {"growth_rate": 8, "block_config": (2, 2)}),
    "eva02_tiny_patch14_224": (28, {"img_size": 28, "depth": 2, "embed_dim": 32, "num_heads": 2}),
    "inception_next_atto": (32, {"depths": (1, 1, 1, 1), "dims": (16, 16, 24, 32)}),
    "sequencer2d_s": (32, {"layers": (1, 1, 1, 1), "embed_dims": (16, 16, 16, 16), "hidden_sizes": (4, 4, 4, 4)}),
    "swin_s3_tiny_224": (32, {"img_size": 32, "patch_size": 2, "window_size": 4, "embed_dim": 16, "depths": (2, 2),
                              "num_heads": (2, 4)}),
    "swin_tiny_patch4_window7_224": (32, {"img_size": 32, "patch_size": 2, "window_size": 4, "embed_dim": 16,
                                          "depths": (2, 2), "num_heads": (2, 4)}),
    "swinv2_tiny_window8_256": (32, {"img_size": 32, "patch_size": 2, "window_size": 4, "embed_dim": 16,
                                     "depths": (2, 2), "num_heads": (2, 4)}),
    "swinv2_cr_tiny_224": (32, {"img_size": 32, "patch_size": 2, "window_size": 4, "embed_dim": 16, "depths": (2, 2),
                                "num_heads": (2, 4)}),
    "test_efficientnet": (32, {}),
    "tnt_s_patch16_224": (32, {"img_size": 32, "embed_dim": 32, "depth": 2, "num_heads_outer": 2}),
    "vit_relpos_small_patch16_224": (32, VIT),
    "vit_small_patch16_dinov3": (32, VIT),
    "vit_tiny_patch16_224": (32, VIT),
    "xcit_nano_12_p16_224": (32, {"img_size": 32, "depth": 2, "embed_dim": 32, "num_heads": 2}),
}  # fmt: skip
"""Name of timm -> (side of the image, arguments)."""


def _mixer(block: str) -> nn.Module:
    from timm.models import mlp_mixer

    return mlp_mixer.MlpMixer(
        N_CLASSES,
        32,
        patch_size=8,
        num_blocks=2,
        embed_dim=32,
        block_layer=getattr(mlp_mixer, block),
        mlp_ratio=(0.5, 4) if block == "MixerBlock" else 4,
    )


def _conv_mixer() -> nn.Module:
    from timm.models.convmixer import ConvMixer

    return ConvMixer(32, 2, num_classes=N_CLASSES)


def _nest() -> nn.Module:
    from timm.models.nest import Nest

    sizes: dict[str, Any] = {"embed_dims": (16, 32), "num_heads": (2, 4), "depths": (1, 1)}
    return Nest(32, patch_size=4, num_levels=2, num_classes=N_CLASSES, **sizes)


def _narrow(model: nn.Module, n_in: int) -> nn.Module:
    """The head of VGG and AlexNet with fewer features than 4,096."""
    model.classifier = nn.Sequential(
        nn.Linear(n_in, 64), nn.ReLU(True), nn.Dropout(), nn.Linear(64, N_CLASSES)
    )  # fmt: skip
    return model


def _vit() -> nn.Module:
    return tv.VisionTransformer(32, 8, num_layers=2, num_heads=2, hidden_dim=32, mlp_dim=64, num_classes=N_CLASSES)


def _swin(**more: Any) -> nn.Module:
    return tv.SwinTransformer([2, 2], 16, [2, 2], [2, 4], [4, 4], num_classes=N_CLASSES, **more)


def _swin_v2() -> nn.Module:
    from torchvision.models.swin_transformer import PatchMergingV2, SwinTransformerBlockV2

    return _swin(block=SwinTransformerBlockV2, downsample_layer=PatchMergingV2)


def _convnext() -> nn.Module:
    from torchvision.models.convnext import CNBlockConfig

    return tv.ConvNeXt([CNBlockConfig(8, 16, 1), CNBlockConfig(16, None, 1)], num_classes=N_CLASSES)


def _maxvit() -> nn.Module:
    return tv.MaxVit((32, 32), 8, 2, [8, 16], [1, 1], 4, 0.0, num_classes=N_CLASSES)


def _resnet(block: str, **more: Any) -> nn.Module:
    from torchvision.models import resnet

    return tv.ResNet(getattr(resnet, block), [1, 1, 1, 1], num_classes=N_CLASSES, **more)


TIMM_CLASSES: dict[str, tuple[int, Callable[[], nn.Module]]] = {
    "convmixer": (32, _conv_mixer),
    "mixer": (32, lambda: _mixer("MixerBlock")),
    "nest": (32, _nest),
    "resmlp": (32, lambda: _mixer("ResBlock")),
}
"""Those whose names of timm fix their sizes: the class."""
TORCHVISION: dict[str, tuple[int, Callable[[], nn.Module]]] = {
    "alexnet": (64, lambda: _narrow(tv.alexnet(), 256 * 6 * 6)),
    "convnext": (32, _convnext),
    "densenet": (32, lambda: tv.DenseNet(8, (2, 2), 16, num_classes=N_CLASSES)),
    "efficientnet_b0": (32, lambda: tv.efficientnet_b0(num_classes=N_CLASSES)),
    "googlenet": (64, lambda: tv.googlenet(num_classes=N_CLASSES, aux_logits=False, init_weights=False)),
    "maxvit": (32, _maxvit),
    "mnasnet": (32, lambda: tv.MNASNet(0.35, num_classes=N_CLASSES)),
    "mobilenet_v2": (32, lambda: tv.mobilenet_v2(num_classes=N_CLASSES, width_mult=0.35)),
    "mobilenet_v3_small": (32, lambda: tv.mobilenet_v3_small(num_classes=N_CLASSES)),
    "regnet_y_400mf": (32, lambda: tv.regnet_y_400mf(num_classes=N_CLASSES)),
    "resnet": (32, lambda: _resnet("Bottleneck")),
    "resnext": (32, lambda: _resnet("Bottleneck", groups=4, width_per_group=4)),
    "shufflenet_v2": (32, lambda: tv.shufflenet_v2_x0_5(num_classes=N_CLASSES)),
    "squeezenet": (32, lambda: tv.squeezenet1_1(num_classes=N_CLASSES)),
    "swin": (32, _swin),
    "swin_v2": (32, _swin_v2),
    "vgg11": (32, lambda: _narrow(tv.vgg11(), 512 * 7 * 7)),
    "vgg11_bn": (32, lambda: _narrow(tv.vgg11_bn(), 512 * 7 * 7)),
    "vit": (32, _vit),
}
"""Family -> (side of the image, what makes it)."""
BUILT = {"timm": TIMM_CLASSES, "torchvision": TORCHVISION}
KEYS = (
    *(f"timm {name}" for name in sorted([*TIMM, *TIMM_CLASSES])),
    *(f"torchvision {name}" for name in sorted(TORCHVISION)),
)


def side_of(key: str) -> int:
    """Pixels of a side of the images that the model takes."""
    library, _, name = key.partition(" ")
    return BUILT[library][name][0] if name in BUILT[library] else TIMM[name][0]


def make(key: str) -> nn.Module:
    """The model, in evaluation mode, with the same weights every time."""
    library, _, name = key.partition(" ")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if name in BUILT[library]:
            model = BUILT[library][name][1]()
        else:
            model = timm.create_model(name, pretrained=False, num_classes=N_CLASSES, **TIMM[name][1])
        with torch.no_grad():
            for parameter in model.parameters():
                if not parameter.any():
                    parameter.normal_(std=0.1)
    return model.eval()
