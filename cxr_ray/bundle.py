"""A trained model on disk: weights and everything that is needed to use them.

A bundle is a folder of ``model.safetensors``, ``probe.safetensors``, ``bundle.json`` and ``MODEL_CARD.md``. `bundle.json` holds
the SHA-256 of the weights, of the probe (`cxr_ray.probe`) and of itself, the card that of itself and the bundle it belongs to,
so that a flipped byte anywhere is noticed. The card can be written again, with the figures of an evaluation, and the bundle
stays the same. Nothing is unpickled.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import torch
from pyarrow import fs
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import nn

from cxr_ray import __version__, presets, storage
from cxr_ray.bundle_description import BundleDescription
from cxr_ray.clinical import ClinicalLayout, ClinicalStatistics
from cxr_ray.errors import CxrRayError
from cxr_ray.findings import FINDINGS
from cxr_ray.input_profile import InputProfile
from cxr_ray.model_card import is_sealed, model_card, seal
from cxr_ray.pixels import PIXEL_RECIPE
from cxr_ray.presets.preset import Network, NetworkOptions
from cxr_ray.probe import Probe, make_probe, read_probe

DESCRIPTION = "bundle.json"
WEIGHTS = "model.safetensors"
PROBE = "probe.safetensors"
CARD = "MODEL_CARD.md"


@dataclass(frozen=True)
class Bundle:
    """A bundle that was read and verified; the model is in evaluation mode on the CPU."""

    description: BundleDescription
    statistics: ClinicalStatistics
    model: Network
    probe: Probe

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

    @property
    def training_inputs(self) -> InputProfile:
        """What the network was shown in training."""
        return InputProfile.from_json(self.description.training_inputs)


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

    `description.files` and `description.digest` are filled in here, and the probe is made.

    Parameters
    ----------
    model
        On the CPU; in evaluation mode afterwards.
    """
    files = {
        WEIGHTS: save({name: tensor.detach().contiguous() for name, tensor in model.state_dict().items()}),
        PROBE: make_probe(model, description).to_bytes(),
    }
    digests = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
    described = description.model_copy(update={"files": digests})
    described = described.model_copy(update={"digest": described.computed_digest()})
    card = seal(model_card(described), described.digest)
    content = _content(described)
    filesystem, root = storage.resolve(uri)
    # Object stores cannot rename folders: there the description, written last, is what makes the bundle exist.
    local = isinstance(filesystem, fs.LocalFileSystem)
    target = f"{root}.partial" if local else root
    if local and storage.exists(filesystem, target):
        filesystem.delete_dir(target)
    filesystem.create_dir(target, recursive=True)
    for name, data in (*files.items(), (CARD, card), (DESCRIPTION, content)):
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


def _read_verified(uri: str) -> tuple[BundleDescription, dict[str, bytes]]:
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
    if set(description.files) != {WEIGHTS, PROBE}:
        raise CxrRayError(f"{path}: lists {sorted(description.files)} instead of {WEIGHTS} and {PROBE}; copy the bundle again")
    files = {}
    for name, digest in description.files.items():
        files[name] = storage.read_bytes(filesystem, f"{root}/{name}")
        if hashlib.sha256(files[name]).hexdigest() != digest:
            raise CxrRayError(f"{root}/{name}: was altered (SHA-256 is not {digest[:12]}…); copy the bundle again")
    if not is_sealed(storage.read_bytes(filesystem, f"{root}/{CARD}"), description.digest):
        raise CxrRayError(f"{root}/{CARD}: was altered, or is of another bundle; copy the bundle again")
    return description, files


def write_card(uri: str, evaluation: Mapping[str, Any]) -> None:
    """Write a bundle's model card again, with the figures of an evaluation; nothing else of the bundle changes.

    Parameters
    ----------
    evaluation
        As ``evaluation.json`` has it.

    Raises
    ------
    CxrRayError
        If the evaluation is of another bundle, or the bundle is unusable.
    """
    description = read_description(uri)
    judged = evaluation["bundle"]["digest"]
    if judged != description.digest:
        raise CxrRayError(f"{storage.shown(uri)}: is not the bundle {judged[:12]}… that was evaluated; evaluate this one")
    filesystem, root = storage.resolve(uri)
    storage.write_atomically(filesystem, f"{root}/{CARD}", seal(model_card(description, evaluation), description.digest))


def load_bundle(uri: str) -> Bundle:
    """Read a bundle and rebuild its model.

    Raises
    ------
    CxrRayError
        If a file is absent or altered, a tensor's shape does not fit, a weight is not finite, or the findings differ.
    """
    description, files = _read_verified(uri)
    shown = storage.shown(uri)
    if tuple(description.findings) != FINDINGS:
        raise CxrRayError(f"{shown}: was trained on other findings ({', '.join(description.findings)}); train again")
    if description.pixel_recipe != PIXEL_RECIPE:
        raise CxrRayError(f"{shown}: was trained on pixels of another recipe; use the release that wrote it or train again")
    model = presets.build(description.preset, NetworkOptions(description.layout, description.variant))
    try:
        state = load(files[WEIGHTS])
        model.load_state_dict(state)
    except (SafetensorError, RuntimeError) as error:
        raise CxrRayError(f"{shown}/{WEIGHTS}: does not fit preset {description.preset} ({str(error)[:200]!r})") from None
    for name, tensor in state.items():
        if not torch.isfinite(tensor).all():
            raise CxrRayError(f"{shown}/{WEIGHTS}: {name} holds values that are not finite; train again with a smaller rate")
    InputProfile.from_json(description.training_inputs)
    probe = read_probe(files[PROBE], description, f"{shown}/{PROBE}")
    return Bundle(description, ClinicalStatistics.from_json(description.statistics), model.eval(), probe)


def describe(
    *,
    preset: str,
    network: NetworkOptions,
    size: int | None,
    input_size: int | None,
    statistics: dict[str, object],
    training_inputs: InputProfile,
    thresholds: dict[str, float],
    other_thresholds: dict[str, dict[str, float]],
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
        training_inputs=training_inputs.to_json(),
        pixel_recipe=PIXEL_RECIPE,
        thresholds=thresholds,
        other_thresholds=other_thresholds,
        validation=validation,
        settings=settings,
        dataset_digest=dataset_digest,
        files={},
    )
