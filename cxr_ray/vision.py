"""The one place that imports torchvision.

A torchvision built against CUDA does not load its compiled operators beside a CPU build of torch, and fails at import because
its Python code registers a fake kernel for operators that nobody declared (pytorch/vision#9085). Declaring them first lets the
models and transforms work; nothing is declared where the builds match.
"""

import importlib.util
from pathlib import Path

import torch
from torch import nn

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


def densenet121_features() -> nn.Sequential:
    """DenseNet-121 without its classifier: (N, 3, H, W) to (N, 1024, H/32, W/32), before the last ReLU (Huang et al. 2017)."""
    return models.densenet121(weights=None).features


def load_imagenet_weights(features: nn.Sequential) -> None:
    """Fill DenseNet-121's features with torchvision's ImageNet weights, downloading them if they are not cached.

    Raises
    ------
    CxrRayError
        If the download fails.
    """
    try:
        state = models.DenseNet121_Weights.IMAGENET1K_V1.get_state_dict(progress=False, check_hash=True)
    except (OSError, RuntimeError) as error:
        raise CxrRayError(
            f"init 'imagenet': the weights cannot be downloaded ({error}); "
            "give --init PATH of a weights file or bundle, or --init random"
        ) from None
    features.load_state_dict(_renamed(state))


def _renamed(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Torchvision's published DenseNet files spell ``norm.1`` where the modules say ``norm1``; keep the features only."""
    renamed = {}
    for name, tensor in state.items():
        if name.startswith("features."):
            key = name.removeprefix("features.")
            for layer in ("norm", "relu", "conv"):
                key = key.replace(f"{layer}.1.", f"{layer}1.").replace(f"{layer}.2.", f"{layer}2.")
            renamed[key] = tensor
    return renamed


def as_input(pixels_NHW: torch.Tensor) -> torch.Tensor:
    """Stored squares (uint8, shape (N, H, W)) to what a backbone reads: float32, shape (N, 3, H, W), channels last.

    All three channels carry the same grey, scaled with the mean of ImageNet's channel means and deviations.
    """
    grey = pixels_NHW.unsqueeze(1).float().div_(255).sub_(IMAGENET_MEAN).div_(IMAGENET_STD)
    return grey.expand(-1, 3, -1, -1).contiguous(memory_format=torch.channels_last)
