"""What a run is made of: the preset's recipe under the user's settings, and whether the dataset has what it needs."""

from cxr_ray import presets
from cxr_ray.dataset import Dataset
from cxr_ray.errors import CxrRayError, UsageError
from cxr_ray.presets.preset import NetworkOptions
from cxr_ray.train_settings import TrainSettings


def resolve(settings: TrainSettings) -> TrainSettings:
    """The settings with the preset's recipe and network where the user left them open.

    Raises
    ------
    UsageError
        If the preset is unknown, or what is chosen contradicts it.
    """
    preset = presets.find(settings.preset)
    open_ones = {name: value for name, value in preset.recipe.items() if name not in settings.model_fields_set}
    chosen = TrainSettings.model_validate(settings.model_dump() | open_ones)
    network = network_options(chosen)
    return chosen.model_copy(update={"variant": network.variant, **vars(network.layout)})


def network_options(settings: TrainSettings) -> NetworkOptions:
    """The network that the settings choose.

    Raises
    ------
    UsageError
        If there is no such network.
    """
    return presets.options(
        presets.find(settings.preset),
        variant=settings.variant,
        meta=settings.meta,
        history=settings.history,
        encoding=settings.encoding,
    )


def check_data(settings: TrainSettings, dataset: Dataset) -> None:
    """Whether the dataset has what the network reads and learns from.

    Raises
    ------
    CxrRayError
        Naming what is absent or too small.
    """
    preset = presets.find(settings.preset)
    for name in ("train", "val"):
        if dataset.split(name).labelled == 0:
            raise CxrRayError(f"{dataset.uri}: split {name} has no labelled image; ingest with labels")
    if dataset.split("train").images < settings.worker_range[1]:
        raise CxrRayError(
            f"{dataset.uri}: split train has {dataset.split('train').images} images for {settings.worker_range[1]} workers; "
            "lower workers"
        )
    if not preset.reads_images:
        if settings.input_size is not None:
            raise UsageError(
                f"setting 'input_size' is {settings.input_size}: preset {preset.name} reads no image; leave it out"
            )
        return
    size = dataset.require_pixels()
    wanted = settings.input_size or size
    if wanted > size:
        raise CxrRayError(
            f"setting 'input_size' is {wanted}: {dataset.uri} holds images of {size} pixels; ingest with --size {wanted}"
        )
    if wanted < preset.smallest_size:
        raise CxrRayError(
            f"preset {preset.name} needs images of {preset.smallest_size} pixels, {dataset.uri} gives {wanted}; "
            f"ingest with --size {preset.published_size}"
        )
