"""The search for good training settings: Ray Tune starts trainings and stops the poor ones early.

Each trial is a whole run of `cxr_ray.distributed.train` in a folder of its own; after each epoch its validation AUC decides
with those of the others whether it goes on (ASHA, Li et al. 2018). The test split is never looked at.
"""

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ray import tune
from ray.tune.schedulers import ASHAScheduler
from ray.tune.search.basic_variant import BasicVariantGenerator

from cxr_ray import storage
from cxr_ray.dataset import Dataset
from cxr_ray.distributed import train
from cxr_ray.errors import CxrRayError
from cxr_ray.placement import check_placement, slots
from cxr_ray.recipe import check_data, resolve
from cxr_ray.settings import as_yaml, without_credentials
from cxr_ray.train_events import TrainEvent
from cxr_ray.tune_settings import Choice, TuneSettings, parse_search

BEST = "best.yaml"
TRIALS = "trials"
_METRIC = "val_auc"


@dataclass(frozen=True)
class Trial:
    """One training of a search.

    Attributes
    ----------
    name
        Its folder below ``OUT/trials``.
    drawn
        The settings that were drawn for it.
    epochs, val_auc
        Epochs that it was given, and its best validation AUC in them; NaN where it has none.
    finished
        Whether it was trained to its end.
    error
        Why it failed, or None.
    """

    name: str
    drawn: dict[str, object]
    epochs: int
    val_auc: float
    finished: bool
    error: str | None


def search(settings: TuneSettings, watch: Callable[[str, int, float], None]) -> list[Trial]:
    """Run the trials; write ``OUT/best.yaml``, settings for `cxr-ray train --config`, and return all of them, the best first.

    Ray has to be initialised.

    Parameters
    ----------
    watch
        Called with a trial's name, epoch and validation AUC after each of its epochs.

    Raises
    ------
    CxrRayError
        If the settings, the dataset or the cluster do not allow it, or no trial got through an epoch.
    """
    out = storage.absolute(settings.out)
    _claim(out)
    first = resolve(settings.trial(out, {}))
    check_data(first, Dataset(first.data))
    resources = settings.worker_resources
    workers = settings.worker_range[0]
    check_placement(workers, resources)
    settings = settings.model_copy(update={"data": storage.absolute(settings.data), "out": out})
    filesystem, root = storage.resolve(out)
    # A stopped trial's process waits for its training, which nobody told: Tune ends it, and with it its workers.
    os.environ.setdefault("TUNE_FORCE_TRIAL_CLEANUP_S", "5")
    # Tune's own tables and hints belong to its notebooks.
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    tuner = tune.Tuner(
        tune.with_resources(tune.with_parameters(_run_trial, settings=settings), {"CPU": 0.01}),
        param_space=_space(settings),
        tune_config=tune.TuneConfig(
            metric=_METRIC,
            mode="max",
            num_samples=settings.trials,
            search_alg=BasicVariantGenerator(
                max_concurrent=settings.at_once or max(1, slots(resources) // workers), random_state=settings.seed
            ),
            scheduler=ASHAScheduler(
                time_attr="epoch",
                # One more than there are: a trial that reaches the end is to finish by itself.
                max_t=settings.epochs + 1,
                grace_period=min(settings.grace, settings.epochs),
                reduction_factor=settings.reduction,
            ),
            trial_dirname_creator=lambda trial: trial.trial_id,
        ),
        run_config=tune.RunConfig(
            name="search",
            storage_path=root,
            storage_filesystem=filesystem,
            callbacks=[_Watcher(watch)],
            verbose=0,
        ),
    )
    trials = [_trial(result, settings.epochs) for result in tuner.fit()]
    trials.sort(key=lambda trial: -math.inf if math.isnan(trial.val_auc) else trial.val_auc, reverse=True)
    if math.isnan(trials[0].val_auc):
        raise CxrRayError(f"no trial got through an epoch; the first one: {trials[0].error or 'was stopped'}")
    best = resolve(settings.trial(storage.child(out, "best"), trials[0].drawn))
    storage.write_atomically(filesystem, f"{root}/{BEST}", as_yaml(without_credentials(best)).encode())
    return trials


def _claim(out: str) -> None:
    filesystem, root = storage.resolve(out)
    if storage.exists(filesystem, root):
        raise CxrRayError(f"--out {storage.shown(out)}: is there already; choose another folder")
    filesystem.create_dir(root, recursive=True)


def _space(settings: TuneSettings) -> dict[str, Any]:
    space: dict[str, Any] = {}
    for name, values in parse_search(settings.search).items():
        if isinstance(values, Choice):
            space[name] = tune.choice(list(values.values))
        else:
            space[name] = (tune.loguniform if values.logarithmic else tune.uniform)(values.low, values.high)
    return space


def _run_trial(drawn: dict[str, object], settings: TuneSettings) -> None:
    """A trial, in a process of its own."""
    name = tune.get_context().get_trial_id()
    training = settings.trial(storage.child(settings.out, f"{TRIALS}/{name}"), drawn)
    best = -math.inf

    def report(event: TrainEvent) -> None:
        nonlocal best
        if event.kind == "epoch":
            # ASHA compares what the trials have come to, not the last epoch's luck.
            best = max(best, event.auc if math.isfinite(event.auc) else 0.0)
            tune.report({_METRIC: best, "epoch": event.epoch})

    train(training, report)


class _Watcher(tune.Callback):
    """Passes each trial's epochs on."""

    def __init__(self, watch: Callable[[str, int, float], None]) -> None:
        self._watch = watch

    def __getstate__(self) -> dict[str, object]:
        # Tune writes its callbacks to disk; a terminal cannot be.
        return {}

    def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any) -> None:
        """After an epoch of a trial."""
        if "epoch" in result:
            self._watch(trial.trial_id, int(result["epoch"]), float(result[_METRIC]))


def _trial(result: Any, epochs: int) -> Trial:
    metrics = result.metrics or {}
    error = None if result.error is None else [line for line in str(result.error).splitlines() if line.strip()][-1].strip()
    return Trial(
        name=str(metrics.get("trial_id", "")),
        drawn=dict(result.config or {}),
        epochs=int(metrics.get("epoch", 0)),
        val_auc=float(metrics.get(_METRIC, math.nan)),
        finished=error is None and int(metrics.get("epoch", 0)) >= epochs,
        error=error,
    )
