"""A trained model on disk: weights and everything that is needed to use them.

A bundle is a folder of ``model.safetensors``, ``bundle.json`` and ``MODEL_CARD.md``. `bundle.json` holds the SHA-256 of the
other two and of itself, so that a flipped byte anywhere is noticed. Nothing is unpickled.
"""

import hashlib
import json
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Literal

import torch
from pyarrow import fs
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import nn

from cxr_ray import __version__, presets, storage
from cxr_ray.clinical import ClinicalLayout, ClinicalStatistics
from cxr_ray.errors import CxrRayError
from cxr_ray.findings import FINDINGS
from cxr_ray.pixels import PIXEL_RECIPE
from cxr_ray.presets.preset import Network, NetworkOptions

DESCRIPTION = "bundle.json"
WEIGHTS = "model.safetensors"
CARD = "MODEL_CARD.md"


class BundleDescription(BaseModel):
    """Content of ``bundle.json``.

    `size` is that of the stored squares, `input_size` that of the network's input, which may be smaller. `layout` says which
    clinical numbers the network reads.
    `files` maps the other files to their SHA-256; `digest` is the SHA-256 of this description without `digest`, and thereby
    identifies the whole bundle.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    format_version: Literal[2] = 2
    name: str
    version: str
    created: datetime
    code_version: str
    preset: str
    variant: str
    layout: ClinicalLayout
    size: int | None
    input_size: int | None
    findings: list[str]
    statistics: dict[str, object]
    pixel_recipe: dict[str, object]
    thresholds: dict[str, float]
    validation: dict[str, object]
    settings: dict[str, object]
    dataset_digest: str
    files: dict[str, str]
    digest: str = ""

    def computed_digest(self) -> str:
        """SHA-256 of the description, its own digest left out."""
        content = json.dumps(self.model_dump(mode="json", exclude={"digest"}), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(content.encode()).hexdigest()


@dataclass(frozen=True)
class Bundle:
    """A bundle that was read and verified; the model is in evaluation mode on the CPU."""

    description: BundleDescription
    statistics: ClinicalStatistics
    model: Network

    @property
    def layout(self) -> ClinicalLayout:
        """The clinical numbers that the network reads."""
        return self.description.layout

    def require_images(self) -> int:
        """Pixels an edge of the stored squares that the network reads.

        Raises
        ------
        CxrRayError
            If it reads no image.
        """
        return required_size(self.description)

    @property
    def input_size(self) -> int | None:
        """Pixels an edge that the network sees; None without images."""
        return self.description.input_size


def required_size(description: BundleDescription) -> int:
    """Pixels an edge of the stored squares that a bundle's network reads.

    Raises
    ------
    CxrRayError
        If it reads no image.
    """
    if description.size is None:
        raise CxrRayError(f"bundle {description.name} {description.version} reads no image; give one that does")
    return description.size


def write_bundle(uri: str, model: nn.Module, description: BundleDescription) -> BundleDescription:
    """Write a bundle so that it appears whole or not at all, replacing an earlier one.

    `description.files` and `description.digest` are filled in here.
    """
    weights = save({name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()})
    card = model_card(description).encode()
    described = description.model_copy(
        update={"files": {WEIGHTS: hashlib.sha256(weights).hexdigest(), CARD: hashlib.sha256(card).hexdigest()}}
    )
    described = described.model_copy(update={"digest": described.computed_digest()})
    content = _content(described)
    filesystem, root = storage.resolve(uri)
    # Object stores cannot rename folders: there the description, written last, is what makes the bundle exist.
    local = isinstance(filesystem, fs.LocalFileSystem)
    target = f"{root}.partial" if local else root
    if local and storage.exists(filesystem, target):
        filesystem.delete_dir(target)
    filesystem.create_dir(target, recursive=True)
    for name, data in ((WEIGHTS, weights), (CARD, card), (DESCRIPTION, content)):
        storage.write_atomically(filesystem, f"{target}/{name}", data)
    if local:
        if storage.exists(filesystem, root):
            filesystem.delete_dir(root)
        filesystem.move(target, root)
    return described


def _content(description: BundleDescription) -> bytes:
    return description.model_dump_json(indent=2).encode()


def read_description(uri: str) -> BundleDescription:
    """Read and verify a bundle's description and the digests of its files.

    Raises
    ------
    CxrRayError
        Naming the file that is absent, damaged or altered.
    """
    return _read_verified(uri)[0]


def _read_verified(uri: str) -> tuple[BundleDescription, bytes]:
    filesystem, root = storage.resolve(uri)
    path = f"{root}/{DESCRIPTION}"
    if not storage.exists(filesystem, path):
        raise CxrRayError(f"{storage.shown(uri)}: holds no {DESCRIPTION}; give the bundle folder that 'cxr-ray train' wrote")
    content = storage.read_bytes(filesystem, path)
    try:
        description = BundleDescription.model_validate_json(content)
    except (ValidationError, UnicodeDecodeError) as error:
        if isinstance(error, ValidationError) and error.errors()[0]["loc"] == ("format_version",):
            raise CxrRayError(f"{path}: is a bundle of another release; use that release, or train again") from None
        reason = error.errors()[0]["msg"] if isinstance(error, ValidationError) else str(error)
        raise CxrRayError(f"{path}: damaged ({' '.join(reason.split())}); copy the bundle again") from None
    # The bytes too: a changed byte may leave the meaning, as 't' for 'T' in a time does.
    if description.computed_digest() != description.digest or content != _content(description):
        raise CxrRayError(f"{path}: was altered (its SHA-256 is not the one it states); copy the bundle again")
    contents = {name: storage.read_bytes(filesystem, f"{root}/{name}") for name in description.files}
    for name, digest in description.files.items():
        if hashlib.sha256(contents[name]).hexdigest() != digest:
            raise CxrRayError(f"{root}/{name}: was altered (SHA-256 is not {digest[:12]}…); copy the bundle again")
    if set(description.files) != {WEIGHTS, CARD}:
        raise CxrRayError(f"{path}: lists {sorted(description.files)} instead of {WEIGHTS}, {CARD}; copy the bundle again")
    return description, contents[WEIGHTS]


def load_bundle(uri: str) -> Bundle:
    """Read a bundle and rebuild its model.

    Raises
    ------
    CxrRayError
        If a file is absent or altered, a tensor's shape does not fit, a weight is not finite, or the findings differ.
    """
    description, weights = _read_verified(uri)
    shown = storage.shown(uri)
    if tuple(description.findings) != FINDINGS:
        raise CxrRayError(f"{shown}: was trained on other findings ({', '.join(description.findings)}); train again")
    if description.pixel_recipe != PIXEL_RECIPE:
        raise CxrRayError(f"{shown}: was trained on pixels of another recipe; use the release that wrote it or train again")
    model = presets.build(description.preset, NetworkOptions(description.layout, description.variant))
    try:
        state = load(weights)
        model.load_state_dict(state)
    except (SafetensorError, RuntimeError) as error:
        raise CxrRayError(f"{shown}/{WEIGHTS}: does not fit preset {description.preset} ({str(error)[:200]!r})") from None
    for name, tensor in state.items():
        if not torch.isfinite(tensor).all():
            raise CxrRayError(f"{shown}/{WEIGHTS}: {name} holds values that are not finite; train again with a smaller rate")
    return Bundle(description, ClinicalStatistics.from_json(description.statistics), model.eval())


def describe(
    *,
    preset: str,
    network: NetworkOptions,
    size: int | None,
    input_size: int | None,
    statistics: dict[str, object],
    thresholds: dict[str, float],
    validation: dict[str, object],
    settings: dict[str, object],
    dataset_digest: str,
) -> BundleDescription:
    """The description of a model that was just trained; its version is the moment of training."""
    now = datetime.now(UTC)
    return BundleDescription(
        name=preset,
        version=now.strftime("%Y%m%d.%H%M%S"),
        created=now,
        code_version=__version__,
        preset=preset,
        variant=network.variant,
        layout=network.layout,
        size=size,
        input_size=input_size,
        findings=list(FINDINGS),
        statistics=statistics,
        pixel_recipe=PIXEL_RECIPE,
        thresholds=thresholds,
        validation=validation,
        settings=settings,
        dataset_digest=dataset_digest,
        files={},
    )


def inputs_in_words(description: BundleDescription) -> str:
    """What the network of a bundle reads."""
    layout = description.layout
    read = []
    if description.input_size is not None:
        read.append(f"image of {description.input_size} x {description.input_size} pixels")
    if layout.meta:
        read.append("age, sex, view")
    if layout.history:
        read.append("findings of earlier visits")
    numbers = f" ({layout.width} clinical numbers, {layout.encoding} encoding)" if layout.width else ""
    return f"{', '.join(read)}{numbers}"


def _variant(description: BundleDescription) -> str:
    return "" if description.variant == "default" else f", variant {description.variant}"


def model_card(description: BundleDescription) -> str:
    """The model card: what the network is, what it was trained on and what it must not be used for."""
    preset = presets.find(description.preset)
    rows = "\n".join(f"| {name} | {value:.4f} |" for name, value in description.thresholds.items())
    return f"""# Model card: {description.name} {description.version}

- Network: preset `{preset.name}`{_variant(description)} ({preset.source})
- Inputs: {inputs_in_words(description)}
- Assumed where the source is silent: {"; ".join(preset.assumed)}
- Trained with cxr-ray {description.code_version} on the dataset with manifest SHA-256 `{description.dataset_digest}`
- Mean AUC on the validation split: {description.validation.get("auc", float("nan")):.4f}

**Not a medical device.** Research use only; every result needs a radiologist. The labels of ChestX-ray14 were mined from
reports, and part of what the history adds is that a report repeats the one before.

## Operating thresholds (largest sensitivity + specificity on validation)

| finding | probability |
|---|---|
{rows}
"""
