"""Whether an evaluation means anything: settings, bundle and dataset looked at together, before anything is scored."""

from pyarrow import fs

from cxr_ray import presets, storage
from cxr_ray.bundle_description import BundleDescription
from cxr_ray.dataset import Dataset
from cxr_ray.errors import CxrRayError, UsageError
from cxr_ray.evaluate_settings import EvaluateSettings


def check_fit(settings: EvaluateSettings, bundle: BundleDescription, dataset: Dataset) -> None:
    """Refuse what cannot be scored, and what would say nothing if it were.

    Raises
    ------
    CxrRayError
        In one line that names the setting, its value and the remedy.
    """
    _check_images(settings, bundle, dataset)
    _check_scores_file(settings)
    _check_inputs(settings, bundle)
    _check_calibration(settings)
    if dataset.split(settings.split).labelled == 0:
        raise CxrRayError(f"--data {dataset.uri}: split {settings.split} has no labelled image; ingest with labels")


def _check_images(settings: EvaluateSettings, bundle: BundleDescription, dataset: Dataset) -> None:
    if bundle.size is None:
        if settings.tta != "none":
            raise UsageError(f"setting 'tta' is {settings.tta!r}: bundle {bundle.name} reads no image; leave it out")
        if settings.boxes is not None:
            raise UsageError(
                f"--boxes {settings.boxes}: bundle {bundle.name} reads no image, so it has no heatmap; leave it out"
            )
        return
    if (size := dataset.require_pixels()) != bundle.size:
        raise CxrRayError(
            f"--data {dataset.uri}: images of {size} pixels, the bundle was trained on {bundle.size}; "
            f"ingest with --size {bundle.size}"
        )
    smallest = presets.find(bundle.preset).smallest_size
    if settings.tta == "ten-crop" and bundle.input_size is not None and bundle.input_size * 7 // 8 < smallest:
        raise UsageError(
            f"setting 'tta' is 'ten-crop': a crop of 7/8 of {bundle.input_size} pixels is below the {smallest} that "
            f"{bundle.preset} needs; use flip or none"
        )


def _check_scores_file(settings: EvaluateSettings) -> None:
    if settings.scores is None:
        return
    filesystem, path = storage.resolve(settings.scores)
    if filesystem.get_file_info(path).type == fs.FileType.Directory:
        shown = storage.shown(settings.scores)
        raise UsageError(f"--scores {shown}: is a folder; name a file, such as {shown.rstrip('/')}/scores.parquet")


def _check_inputs(settings: EvaluateSettings, bundle: BundleDescription) -> None:
    changed = settings.withhold != "nothing" or settings.calibrate != "none"
    if settings.ablate and changed:
        raise UsageError(
            "setting 'ablate' is True beside withhold or calibrate: ablations are of the bundle as it is; leave them out"
        )
    if settings.ablate and bundle.layout.width == 0:
        raise UsageError(f"setting 'ablate' is True: bundle {bundle.name} reads nothing but the image; leave it out")
    if settings.history_curves and changed:
        raise UsageError(
            "setting 'history_curves' is True beside withhold or calibrate: they are of the bundle as it is; leave them out"
        )
    if settings.history_curves and not bundle.layout.history:
        raise UsageError(f"setting 'history_curves' is True: bundle {bundle.name} reads no history; leave it out")
    if settings.card and (changed or settings.split != "test" or settings.tta != "none"):
        raise UsageError(
            "setting 'card' is True beside withhold, calibrate, tta or another split than test: the card is of the bundle as "
            "it is; leave them out"
        )


def _check_calibration(settings: EvaluateSettings) -> None:
    if settings.prevalence is not None and settings.calibrate == "none":
        raise UsageError(
            f"--prevalence {storage.shown(settings.prevalence)}: shifts what is calibrated on the validation split; "
            "give --calibrate temperature or platt with it"
        )
    if settings.calibrate != "none" and settings.split == "val":
        raise UsageError(
            f"setting 'calibrate' is {settings.calibrate!r}: it is fitted on split val, which says nothing of itself; "
            "score another split"
        )
