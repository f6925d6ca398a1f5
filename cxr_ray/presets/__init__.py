"""Presets: the published systems and ours, one file each.

`build` makes the network of a preset; the file of each names its source, its split, its published AUCs and what had to be
assumed.
"""

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from cxr_ray.clinical import ClinicalLayout, Encoding
from cxr_ray.errors import CxrRayError, UsageError
from cxr_ray.presets import (
    baltruschat2018,
    beyond,
    chexnet,
    clinical_only,
    guendel2018,
    multi_input,
    wang2017,
    yao2017,
)
from cxr_ray.presets.preset import Network, NetworkOptions, Preset

PRESETS: dict[str, Preset] = {
    module.PRESET.name: module.PRESET
    for module in (multi_input, wang2017, yao2017, chexnet, baltruschat2018, guendel2018, clinical_only, beyond)
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


def options(
    preset: Preset,
    *,
    variant: str | None = None,
    meta: bool | None = None,
    history: bool | None = None,
    encoding: Encoding | None = None,
) -> NetworkOptions:
    """A user's choice, and the source's where the user left it open.

    Raises
    ------
    UsageError
        If the preset has no such variant, or nothing is left for the network to read.
    """
    published = preset.layout
    layout = ClinicalLayout(
        encoding=published.encoding if encoding is None else encoding,
        meta=published.meta if meta is None else meta,
        history=published.history if history is None else history,
    )
    if variant is not None and variant not in preset.variants:
        raise UsageError(
            f"setting 'variant' is {variant!r}: preset {preset.name} has {', '.join(preset.variants)}; use one of them"
        )
    if not preset.reads_images and layout.width == 0:
        raise UsageError(f"preset {preset.name} reads no image: leave it meta or history")
    return NetworkOptions(layout, variant or preset.variants[0])


def build(name: str, chosen: NetworkOptions | None = None, *, init: str = "random") -> Network:
    """The network of a preset; without `chosen`, as its source has it.

    Parameters
    ----------
    init
        "random", "imagenet" (torchvision's weights, downloaded once), or the path of a bundle or weights file.

    Raises
    ------
    UsageError
        If the preset is unknown.
    CxrRayError
        If the weights cannot be had or do not fit.
    """
    preset = find(name)
    model = preset.make(chosen if chosen is not None else options(preset))
    if init == "imagenet":
        model.load_imagenet()
    elif init != "random":
        _load_weights(model, Path(init))
    return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def _load_weights(model: Network, path: Path) -> None:
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
    wanted = [name for name in own if name.startswith(model.backbone)] if model.backbone else list(own)
    absent = [name for name in wanted if name not in fitting]
    if absent:
        raise CxrRayError(
            f"init {path}: holds {len(wanted) - len(absent)} of the {len(wanted)} tensors that the network starts from "
            f"(first absent: {absent[0]}); give weights of the same backbone"
        )
    model.load_state_dict(fitting, strict=False)
