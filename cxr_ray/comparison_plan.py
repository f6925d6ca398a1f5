"""What a comparison is going to do: which networks stand in it, which of them are trained already, and what cannot be.

Everything is looked at before Ray is started and the first network is trained, which may take days.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import yaml

from cxr_ray import presets, storage
from cxr_ray.bundle import load_bundle, read_description
from cxr_ray.compare_settings import CompareSettings
from cxr_ray.dataset import Dataset
from cxr_ray.errors import CxrRayError, UsageError
from cxr_ray.presets.preset import Preset
from cxr_ray.recipe import check_data, resolve
from cxr_ray.run_folder import RUN_SETTINGS
from cxr_ray.settings import without_credentials
from cxr_ray.train_settings import TrainSettings

# Where a run lies, where it computes and what it survives: the network is the same whatever these are.
_MAY_DIFFER = (
    *("data", "out", "resume", "workers", "resize_seconds", "gpu", "cpus_per_worker", "threads"),
    *("keep", "max_failures", "mlflow"),
)


@dataclass(frozen=True)
class Entry:
    """A network of the comparison.

    Attributes
    ----------
    bundle
        URI of its bundle, which `training` writes.
    trained_here
        Whether the comparison trains it, now or when it was begun.
    training
        Settings of the training, those of a run to go on with included; None where the bundle is there already.
    """

    name: str
    bundle: str
    trained_here: bool
    training: TrainSettings | None


@dataclass(frozen=True)
class Plan:
    """A comparison before it begins.

    Attributes
    ----------
    left_out
        Presets that the dataset cannot feed, and why.
    """

    settings: CompareSettings
    dataset: Dataset
    entries: tuple[Entry, ...]
    left_out: Mapping[str, str]


def make_plan(settings: CompareSettings) -> Plan:
    """Look at dataset, presets, bundles and what an earlier comparison left in ``OUT``; nothing is written.

    Raises
    ------
    CxrRayError
        If a preset is unknown or cannot be fed, a bundle does not fit, or ``OUT`` holds runs with other settings.
    """
    settings = settings.model_copy(update={"data": storage.absolute(settings.data), "out": storage.absolute(settings.out)})
    dataset = Dataset(settings.data)
    if dataset.split(settings.split).labelled == 0:
        raise CxrRayError(f"--data {dataset.uri}: split {settings.split} has no labelled image; ingest with labels")
    left_out = {}
    names = settings.named_presets
    if names is None:
        reasons = {name: _unfit(preset, dataset) for name, preset in presets.PRESETS.items()}
        left_out = {name: reason for name, reason in reasons.items() if reason is not None}
        names = tuple(name for name, reason in reasons.items() if reason is None)
    bundles = settings.bundles or {}
    if not names and not bundles:
        raise UsageError(f"setting 'presets' is {settings.presets!r} and there are no bundles: name what to compare")
    if both := [name for name in bundles if name in names]:
        raise UsageError(f"setting 'bundles' names {both[0]!r} as a preset is named; write NAME=URI with another name")
    # All settings before all runs: what was mistyped is told before what an earlier call left behind.
    trainings = {name: _training(settings, name, dataset) for name in names}
    entries = [_trained(name, training, dataset) for name, training in trainings.items()]
    entries += [_given(name, storage.absolute(uri), dataset) for name, uri in bundles.items()]
    return Plan(settings, dataset, tuple(entries), left_out)


def _unfit(preset: Preset, dataset: Dataset) -> str | None:
    """Why the dataset cannot feed a preset, or None where it can."""
    if not preset.reads_images:
        return None
    size = dataset.manifest.size
    if size is None:
        return "the dataset holds metadata only"
    return None if size >= preset.smallest_size else f"the dataset's {size} pixels are fewer than {preset.smallest_size}"


def _training(settings: CompareSettings, name: str, dataset: Dataset) -> TrainSettings:
    preset = presets.find(name)
    chosen: dict[str, object] = {"data": settings.data, "out": storage.child(settings.out, name), "preset": name}
    if settings.init == "imagenet" and preset.reads_images and preset.pretrained:
        chosen["init"] = settings.init
    training = resolve(TrainSettings.model_validate(chosen | settings.handed_on()))
    check_data(training, dataset)
    return training


def _trained(name: str, training: TrainSettings, dataset: Dataset) -> Entry:
    """What is left to train of a preset."""
    bundle = storage.child(training.out, "bundle")
    filesystem, root = storage.resolve(training.out)
    path = f"{root}/{RUN_SETTINGS}"
    if not storage.exists(filesystem, path):
        return Entry(name, bundle, trained_here=True, training=training)
    earlier = yaml.safe_load(storage.read_bytes(filesystem, path))
    _check_same(training, earlier, _MAY_DIFFER)
    try:
        trained_on = read_description(bundle).dataset_digest
    except CxrRayError:
        _check_same(training, earlier, tuple(field for field in _MAY_DIFFER if field != "data"))
        return Entry(name, bundle, trained_here=True, training=training.model_copy(update={"resume": True}))
    if trained_on != dataset.digest:
        raise CxrRayError(
            f"--data {dataset.uri}: is not the dataset that {storage.shown(training.out)} was trained on; "
            "give that one, or choose another --out"
        )
    return Entry(name, bundle, trained_here=True, training=None)


def _check_same(training: TrainSettings, earlier: Mapping[str, object], may_differ: tuple[str, ...]) -> None:
    now = without_credentials(training).model_dump(mode="json")
    for name, value in now.items():
        if name not in may_differ and earlier.get(name) != value:
            raise CxrRayError(
                f"--out {now['out']}: setting {name!r} is {value!r}, the run there has {earlier.get(name)!r}; "
                "give the same, or choose another --out"
            )


def _given(name: str, uri: str, dataset: Dataset) -> Entry:
    size = load_bundle(uri).description.size
    if size is not None and size != dataset.require_pixels():
        raise CxrRayError(
            f"bundle {storage.shown(uri)}: reads images of {size} pixels, {dataset.uri} holds {dataset.manifest.size}; "
            f"ingest with --size {size}, or leave it out"
        )
    return Entry(name, uri, trained_here=False, training=None)
