"""The folder of a run: the settings that it was begun with, which a resumed run has to share."""

import yaml

from cxr_ray import storage
from cxr_ray.errors import CxrRayError
from cxr_ray.settings import as_yaml, without_credentials
from cxr_ray.train_settings import TrainSettings

RUN_SETTINGS = "settings.yaml"
# What a run must have in common with the one that it resumes: network, data, and what its state and its order depend on.
_SAME_ON_RESUME = (
    *("preset", "variant", "meta", "history", "encoding", "input_size", "data", "epochs", "batch_size"),
    *("optimizer", "ema", "schedule", "seed", "window", "withhold"),
)


def check_run(settings: TrainSettings) -> None:
    """Whether the folder is new, or that of the run to go on with; nothing is written.

    Raises
    ------
    CxrRayError
        If it is neither, or that run has other settings.
    """
    filesystem, root = storage.resolve(settings.out)
    out = storage.shown(settings.out)
    earlier = storage.exists(filesystem, f"{root}/{RUN_SETTINGS}")
    if earlier and not settings.resume:
        raise CxrRayError(f"--out {out}: holds a run already; choose another folder or go on with --resume")
    if settings.resume and not earlier:
        raise CxrRayError(f"--out {out}: holds no run to resume; leave out --resume")
    if earlier:
        _check_same_run(settings, storage.read_bytes(filesystem, f"{root}/{RUN_SETTINGS}").decode())


def begin_run(settings: TrainSettings) -> None:
    """Make the folder and write the settings to it: from here on it holds a run."""
    filesystem, root = storage.resolve(settings.out)
    filesystem.create_dir(root, recursive=True)
    storage.write_atomically(filesystem, f"{root}/{RUN_SETTINGS}", as_yaml(without_credentials(settings)).encode())


def _check_same_run(settings: TrainSettings, earlier_yaml: str) -> None:
    earlier = yaml.safe_load(earlier_yaml)
    now = without_credentials(settings).model_dump(mode="json")
    for name in _SAME_ON_RESUME:
        if earlier.get(name) != now[name]:
            raise CxrRayError(
                f"--resume: setting {name!r} is {now[name]!r}, the run in {now['out']} has {earlier.get(name)!r}; "
                "give the same, or start a new run"
            )
