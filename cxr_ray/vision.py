"""The one place that imports torchvision.

A torchvision built against CUDA does not load its compiled operators beside a CPU build of torch, and fails at import because
its Python code registers a fake kernel for operators that nobody declared (pytorch/vision#9085). Declaring them first lets the
models and transforms work; nothing is declared where the builds match.
"""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from cxr_ray.errors import CxrRayError

IMAGENET_MEAN = 0.449
IMAGENET_STD = 0.226
_OPERATORS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_declared: list[torch.library.Library] = []


def _declare_missing_operators() -> None:
    """Declare torchvision's operators where its compiled library cannot bring them."""
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None:
        raise CxrRayError("torchvision is not installed; install the release that matches torch")
    for library in Path(spec.origin).parent.glob("_C*.so"):
        try:
            torch.ops.load_library(library)
        except OSError:
            continue
        return
    library_fragment = torch.library.Library("torchvision", "FRAGMENT")
    for operator in _OPERATORS:
        library_fragment.define(operator)
    _declared.append(library_fragment)


_declare_missing_operators()

from torchvision import models  # noqa: E402 - the operators have to be declared before
from torchvision.models.resnet import Bottleneck, ResNet  # noqa: E402


@dataclass(frozen=True)
class _Backbone:
    make: Callable[[], nn.Module]
    width: int
    imagenet: models.WeightsEnum | None


def _resnet_trunk(made: ResNet) -> nn.Module:
    """A ResNet up to its last maps; the names of its layers stay those of torchvision."""
    names = ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4")
    trunk = nn.Sequential()
    for name in names:
        trunk.add_module(name, made.get_submodule(name))
    return trunk


def _googlenet_trunk() -> nn.Module:
    made = models.googlenet(weights=None, aux_logits=False, init_weights=False)
    trunk = nn.Sequential()
    for name, module in made.named_children():
        if name not in ("aux1", "aux2", "avgpool", "dropout", "fc"):
            trunk.add_module(name, module)
    return trunk


_BACKBONES = {
    "densenet121": _Backbone(lambda: models.densenet121(weights=None).features, 1024, models.DenseNet121_Weights.IMAGENET1K_V1),
    # Baltruschat et al. 2019: bottlenecks [2, 3, 5, 2]; nobody published ImageNet weights of it.
    "resnet38": _Backbone(lambda: _resnet_trunk(ResNet(Bottleneck, [2, 3, 5, 2])), 2048, None),
    "resnet50": _Backbone(lambda: _resnet_trunk(models.resnet50(weights=None)), 2048, models.ResNet50_Weights.IMAGENET1K_V1),
    "resnet101": _Backbone(lambda: _resnet_trunk(models.resnet101(weights=None)), 2048, models.ResNet101_Weights.IMAGENET1K_V1),
    "alexnet": _Backbone(lambda: models.alexnet(weights=None).features, 256, models.AlexNet_Weights.IMAGENET1K_V1),
    "googlenet": _Backbone(_googlenet_trunk, 1024, models.GoogLeNet_Weights.IMAGENET1K_V1),
    "vgg16": _Backbone(lambda: models.vgg16(weights=None).features, 512, models.VGG16_Weights.IMAGENET1K_V1),
    "convnext_tiny": _Backbone(
        lambda: models.convnext_tiny(weights=None).features, 768, models.ConvNeXt_Tiny_Weights.IMAGENET1K_V1
    ),
}


def backbone(name: str) -> tuple[nn.Module, int]:
    """A network of torchvision without its pooling and classifier, untrained, and the channels of its last maps.

    It maps (N, 3, H, W) to (N, channels, H/32, W/32); DenseNet's maps are before their last ReLU.
    """
    chosen = _BACKBONES[name]
    return chosen.make(), chosen.width


def load_imagenet_weights(name: str, features: nn.Module) -> None:
    """Fill a `backbone` with torchvision's ImageNet weights, downloading them if they are not cached.

    Raises
    ------
    CxrRayError
        If there are none, or the download fails.
    """
    weights = _BACKBONES[name].imagenet
    if weights is None:
        raise CxrRayError(
            f"init 'imagenet': there are no such weights of {name}; give --init random, a weights file or a bundle"
        )
    try:
        state = weights.get_state_dict(progress=False, check_hash=True)
    except (OSError, RuntimeError) as error:
        raise CxrRayError(
            f"init 'imagenet': the weights cannot be downloaded ({error}); "
            "give --init PATH of a weights file or bundle, or --init random"
        ) from None
    own = features.state_dict()
    features.load_state_dict({key: tensor for key, tensor in _renamed(state).items() if key in own})


def _renamed(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The names of a trunk: without ``features.``, and with ``norm1`` where DenseNet's published files spell ``norm.1``."""
    renamed = {}
    for name, tensor in state.items():
        key = name.removeprefix("features.")
        for layer in ("norm", "relu", "conv"):
            key = key.replace(f"{layer}.1.", f"{layer}1.").replace(f"{layer}.2.", f"{layer}2.")
        renamed[key] = tensor
    return renamed


def as_input(pixels_NHW: torch.Tensor, size: int | None = None) -> torch.Tensor:
    """Stored squares (uint8, shape (N, H, W)) to what a backbone reads: float32, shape (N, 3, size, size), channels last.

    All three channels carry the same grey, scaled with the mean of ImageNet's channel means and deviations. Where `size` is
    smaller than the stored square, pixels are averaged by area.
    """
    grey = pixels_NHW.unsqueeze(1).float()
    if size is not None and size != pixels_NHW.shape[-1]:
        grey = F.interpolate(grey, (size, size), mode="area")
    grey = grey.div_(255).sub_(IMAGENET_MEAN).div_(IMAGENET_STD)
    return grey.expand(-1, 3, -1, -1).contiguous(memory_format=torch.channels_last)
