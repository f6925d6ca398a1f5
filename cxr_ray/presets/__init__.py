"""Presets: the published systems and ours, one file each.

`build` makes the untrained network of a preset; the file of each preset names its source, its split, its published AUCs and
what had to be assumed.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from cxr_ray import vision
from cxr_ray.errors import CxrRayError, UsageError
from cxr_ray.findings import FINDINGS
from cxr_ray.presets import multi_input

Encoding = Literal["paper", "none"]


@dataclass(frozen=True)
class Preset:
    """A network and where it comes from.

    Attributes
    ----------
    make
        Makes the network; True if the clinical branch is wanted.
    published_auc
        Finding to AUC, as the source prints it, on the split that `split` names.
    """

    name: str
    source: str
    split: str
    published_auc: dict[str, float]
    assumed: tuple[str, ...]
    make: Callable[[bool], nn.Module]


PRESETS = {
    preset.name: preset
    for preset in (
        Preset(
            name="multi-input",
            source=multi_input.SOURCE,
            split=multi_input.SPLIT,
            published_auc=dict(zip(FINDINGS, multi_input.PUBLISHED_AUC, strict=True)),
            assumed=multi_input.ASSUMED,
            make=lambda clinical: multi_input.MultiInput(clinical=clinical),
        ),
    )
}


def find(name: str) -> Preset:
    """The preset of that name.

    Raises
    ------
    UsageError
        If there is none.
    """
    if name not in PRESETS:
        raise UsageError(f"preset {name!r} is not known; use one of: {', '.join(PRESETS)}")
    return PRESETS[name]


def build(name: str, *, init: str = "random", encoding: Encoding = "paper") -> nn.Module:
    """The network of a preset: ``forward(images float32 (N, 3, H, W), clinical float32 (N, 17)) -> logits (N, 14)``.

    Parameters
    ----------
    init
        "random", "imagenet" (torchvision's weights, downloaded once), or the path of a bundle or weights file.
    encoding
        "paper" for the 17 clinical numbers, "none" for the image alone.

    Raises
    ------
    UsageError
        If the preset is unknown.
    CxrRayError
        If the weights cannot be had or do not fit.
    """
    model = find(name).make(encoding != "none")
    if init == "imagenet":
        vision.load_imagenet_weights(model.get_submodule("features"))  # type: ignore[arg-type]
    elif init != "random":
        _load_weights(model, Path(init))
    return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def _load_weights(model: nn.Module, path: Path) -> None:
    file = path / "model.safetensors" if path.is_dir() else path
    try:
        if file.suffix == ".safetensors":
            state = load_file(file)
        else:
            state = torch.load(file, map_location="cpu", weights_only=True)
    except (OSError, SafetensorError, RuntimeError, ValueError, EOFError, KeyError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise CxrRayError(f"init {path}: cannot be read ({reason}); give a bundle, a .safetensors or a .pth file") from None
    except Exception as error:  # noqa: BLE001 - torch.load raises pickle's own kinds on foreign files
        raise CxrRayError(f"init {path}: is no weights file ({type(error).__name__}); give a bundle or .safetensors") from None
    if not isinstance(state, dict):
        raise CxrRayError(
            f"init {path}: holds a {type(state).__name__} instead of named weights; give a bundle or .safetensors"
        )
    own = model.state_dict()
    fitting = {name: tensor for name, tensor in state.items() if name in own and own[name].shape == tensor.shape}
    backbone = [name for name in own if name.startswith("features.")]
    absent = [name for name in backbone if name not in fitting]
    if absent:
        raise CxrRayError(
            f"init {path}: holds {len(backbone) - len(absent)} of the backbone's {len(backbone)} tensors "
            f"(first absent: {absent[0]}); give weights of the same backbone"
        )
    model.load_state_dict(fitting, strict=False)
