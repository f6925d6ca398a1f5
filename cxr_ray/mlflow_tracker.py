"""A run on an MLflow server.

Requests are made by the process that watches the training, a few each minute: figures are collected in between. While the
server does not answer they are kept, so that it has no gaps when it is there again.
"""

import json
import logging
import math
import os
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import islice
from typing import Any

from pyarrow import fs

from cxr_ray import __version__, storage
from cxr_ray.errors import CxrRayError, UsageError
from cxr_ray.settings import without_credentials
from cxr_ray.tracked_figures import (
    Say,
    epoch_figures,
    final_figures,
    reason,
    say_on_stderr,
    step_figures,
)
from cxr_ray.train_events import TrainEvent
from cxr_ray.train_settings import TrainSettings

MLFLOW_RUN = "mlflow-run.json"
EXPERIMENT = "cxr-ray"

_SECONDS_BETWEEN_REQUESTS = 10.0
_SECONDS_AFTER_FAILURE = 60.0
_MOST_IN_A_REQUEST = 1000
_MOST_KEPT = 200_000
# A server that does not answer costs ten seconds; and nothing goes anywhere but to the server, standard output included.
_ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "5",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_RESPECT_RETRY_AFTER_HEADER": "false",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_DISABLE_TELEMETRY": "true",
}


class Mlflow:
    """A run in the experiment MLFLOW_EXPERIMENT_NAME, or else ``cxr-ray``, of an MLflow server.

    ``OUT/mlflow-run.json`` remembers it, and a resumed training goes on in it. What an attempt repeats after a lost worker
    stands there twice, since MLflow does not take figures back.

    Parameters
    ----------
    tracking_uri
        Such as ``http://host:5000``; a password belongs in MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD.
    say
        Takes the lines that tell, once, that the server went away, and at the end what it did not get.

    Raises
    ------
    UsageError
        If the client package is not installed.
    """

    def __init__(self, tracking_uri: str, run_name: str, say: Say = say_on_stderr) -> None:
        try:
            self._shown = storage.shown(tracking_uri)
        except ValueError as error:
            raise UsageError(f"--mlflow: is no URI ({error}); give one such as http://host:5000") from None
        for name, value in _ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        try:
            from mlflow import MlflowClient, entities  # noqa: PLC0415 - an optional package
        except ImportError:
            raise UsageError(f"--mlflow {self._shown}: needs MLflow's client; pip install 'cxr-ray[mlflow]'") from None
        self._make_client, self._entities = MlflowClient, entities
        self._client: Any = None
        self._uri, self._run_name, self._say = tracking_uri, run_name, say
        self._run_id = ""
        self._last_images = 0
        self._waiting: deque[Any] = deque()
        self._discarded = 0
        self._next_request = self._next_try = -math.inf
        self._why = ""
        self._shown_for = {tracking_uri: self._shown}

    def start(self, settings: TrainSettings, first_epoch: int) -> None:
        """Find the run to go on with or create one, and send the settings; an attempt that begins anew needs nothing.

        Raises
        ------
        CxrRayError
            If the server does not answer or refuses, or the file that remembers the run is damaged.
        """
        if self._run_id:
            return
        texts = [value for value in settings.model_dump().values() if isinstance(value, str) and "://" in value]
        self._shown_for |= {text: storage.shown(text) for text in texts}
        filesystem, root = storage.resolve(settings.out)
        remembered = _remembered(filesystem, f"{root}/{MLFLOW_RUN}") if settings.resume else None
        try:
            with _quiet_retries():
                self._client = self._make_client(tracking_uri=self._uri)
                run = self._run_to_continue(remembered) or self._new_run(settings)
                self._send_settings(settings, run)
        except Exception as error:  # noqa: BLE001 - the client raises whatever its transport does
            raise CxrRayError(
                f"--mlflow {self._shown}: cannot be used ({self._plain(reason(error))}); "
                "start the server, mend the URI, or leave out --mlflow"
            ) from None
        self._run_id = run.info.run_id
        filesystem.create_dir(root, recursive=True)
        content = json.dumps({"tracking_uri": self._shown, "run_id": self._run_id}, indent=2)
        storage.write_atomically(filesystem, f"{root}/{MLFLOW_RUN}", f"{content}\n".encode())

    def step(self, event: TrainEvent) -> None:
        """Keep the figures of a step, and send what is kept if it is time."""
        self._keep(event.images, step_figures(event))
        if time.monotonic() >= max(self._next_request, self._next_try):
            self._send()

    def epoch(self, event: TrainEvent) -> None:
        """Send the figures of an epoch."""
        self._keep(event.images, epoch_figures(event))
        if time.monotonic() >= self._next_try:
            self._send()

    def finish(self, metrics: dict[str, float], bundle_uri: str | None, failure: str | None) -> None:
        """Send what is left, the figures of the whole run, its bundle's digest and how it ended."""
        if not self._run_id:
            return
        self._keep(self._last_images, final_figures(metrics))
        tags = self._bundle_tags(bundle_uri) if bundle_uri is not None else {}
        if failure is not None:
            tags["failure"] = self._plain(failure)[:1000]
        status = "FINISHED" if failure is None else "FAILED"
        ended = self._send() and self._ask(partial(self._end, tags, status))
        count = len(self._waiting) + self._discarded
        missing = [f"{count} figures"] * bool(count) + [f"that run {self._run_id} is {status}"] * (not ended)
        if missing:
            self._say(
                f"MLflow at {self._shown}: {' and '.join(missing)} could not be sent ({self._why}); "
                "the run's folder has its figures"
            )

    def _run_to_continue(self, remembered: dict[str, str] | None) -> Any:
        if remembered is None:
            return None
        if remembered["tracking_uri"] != self._shown:
            self._say(
                f"MLflow run {remembered['run_id']} is at {remembered['tracking_uri']}; a new one begins at {self._shown}"
            )
            return None
        from mlflow.exceptions import MlflowException  # noqa: PLC0415 - an optional package

        try:
            run = self._client.get_run(remembered["run_id"])
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            run = None
        if run is None or run.info.lifecycle_stage != "active":
            self._say(f"MLflow run {remembered['run_id']} is no longer at {self._shown}; a new one begins")
            return None
        self._client.update_run(run.info.run_id, status="RUNNING")
        return run

    def _new_run(self, settings: TrainSettings) -> Any:
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or EXPERIMENT
        found = self._client.get_experiment_by_name(name)
        experiment = found.experiment_id if found is not None else self._client.create_experiment(name)
        tags = {"code_version": __version__, "preset": settings.preset}
        return self._client.create_run(experiment, tags=tags, run_name=self._run_name)

    def _send_settings(self, settings: TrainSettings, run: Any) -> None:
        """Parameters cannot change in MLflow: what a resumed training has otherwise becomes a tag."""
        given = {
            name: value if isinstance(value, str) else json.dumps(value)
            for name, value in without_credentials(settings).model_dump(mode="json").items()
        }
        known = run.data.params
        params = [self._entities.Param(name, value) for name, value in given.items() if name not in known]
        changed = {f"resumed.{name}": value for name, value in given.items() if known.get(name, value) != value}
        self._client.log_batch(run.info.run_id, params=params, tags=self._tags(changed), synchronous=True)

    def _tags(self, tags: dict[str, str]) -> list[Any]:
        return [self._entities.RunTag(name, value) for name, value in tags.items()]

    def _keep(self, images: int, figures: dict[str, float]) -> None:
        self._last_images = images
        now = time.time_ns() // 1_000_000
        for name, value in figures.items():
            # A server that keeps its figures in files has one named val_auc, which cannot be a folder too.
            key = name.replace("val_auc/", "val_auc_by_finding/")
            self._waiting.append(self._entities.Metric(key, value, now, images))
        while len(self._waiting) > _MOST_KEPT:
            self._waiting.popleft()
            self._discarded += 1

    def _send(self) -> bool:
        while self._waiting:
            batch = list(islice(self._waiting, _MOST_IN_A_REQUEST))
            if not self._ask(partial(self._client.log_batch, self._run_id, metrics=batch, synchronous=True)):
                return False
            for _ in batch:
                self._waiting.popleft()
        self._next_request = time.monotonic() + _SECONDS_BETWEEN_REQUESTS
        return True

    def _end(self, tags: dict[str, str], status: str) -> None:
        self._client.log_batch(self._run_id, tags=self._tags(tags), synchronous=True)
        self._client.set_terminated(self._run_id, status)

    def _ask(self, request: Callable[[], object]) -> bool:
        """Whether the server did it; the first time that it does not is told."""
        try:
            with _quiet_retries():
                request()
        except Exception as error:  # noqa: BLE001 - whatever it is must not end the training
            first = not self._why
            self._why = self._plain(reason(error))
            self._next_try = time.monotonic() + _SECONDS_AFTER_FAILURE
            if first:
                self._say(
                    f"MLflow at {self._shown} does not answer ({self._why}); "
                    "the training goes on, and what it misses is sent when it answers again"
                )
            return False
        return True

    def _bundle_tags(self, uri: str) -> dict[str, str]:
        tags = {"bundle": storage.shown(uri)}
        try:
            filesystem, root = storage.resolve(uri)
            tags["bundle_digest"] = str(json.loads(storage.read_bytes(filesystem, f"{root}/bundle.json"))["digest"])
        except (CxrRayError, OSError, ValueError, KeyError) as error:
            self._say(f"MLflow at {self._shown}: gets no bundle digest ({self._plain(reason(error))})")
        return tags

    def _plain(self, text: str) -> str:
        for uri, shown in self._shown_for.items():
            text = text.replace(uri, shown)
        return text


def _remembered(filesystem: fs.FileSystem, path: str) -> dict[str, str] | None:
    if not storage.exists(filesystem, path):
        return None
    try:
        run = json.loads(storage.read_bytes(filesystem, path))
        return {name: str(run[name]) for name in ("tracking_uri", "run_id")}
    except (ValueError, KeyError, TypeError):
        raise CxrRayError(f"{path}: damaged; remove it to go on in a new MLflow run") from None


@contextmanager
def _quiet_retries() -> Iterator[None]:
    """Without a warning for each request that is made again."""
    logger = logging.getLogger("urllib3.connectionpool")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
