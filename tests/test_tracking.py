"""What trackers write and send, read back by TensorBoard's own reader and from a real MLflow server."""

import contextlib
import json
import math
import os
import re
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import httpx
import pytest
import yaml
from pyarrow import fs
from s3_server import bucket
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from cxr_ray import __version__, mlflow_tracker, storage
from cxr_ray.errors import CxrRayError, UsageError
from cxr_ray.tracking import Mlflow, TensorBoard, Trackers, trackers_for
from cxr_ray.train_events import EpochResult, TrainEvent
from cxr_ray.train_settings import TrainSettings

__all__ = ["bucket"]

IMAGES = 100
EPOCHS = 3
SECRET = "hush-hush-5Kz"


def settings_for(out: Path | str, **values: object) -> TrainSettings:
    return TrainSettings(data="/data/nih", out=str(out), epochs=EPOCHS, batch_size=8, **values)


def step(images: int, loss: float = 0.5, **values: object) -> TrainEvent:
    given = dict(rate=250.0, waiting=0.125, learning_rate=1e-3) | values
    return TrainEvent("step", images // IMAGES + 1, images, IMAGES * EPOCHS, loss=loss, **given)


def epoch(number: int, auc: float = 0.75, **values: object) -> TrainEvent:
    result = EpochResult(
        epoch=number, loss=0.25, val_loss=0.375, val_auc=auc, val_auc_by_finding={"Edema": 0.5, "Hernia": auc},
        learning_rate=5e-4, images_per_second=200.0, waiting=0.0, seconds=1.0, workers=1,
    )  # fmt: skip
    return TrainEvent("epoch", number, number * IMAGES, IMAGES * EPOCHS, loss=0.25, auc=auc, result=replace(result, **values))


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the tracker sets for the client ends with the test."""
    for name in mlflow_tracker._ENVIRONMENT:
        monkeypatch.setenv(name, "to be removed")
        monkeypatch.delenv(name)


@dataclass(frozen=True)
class Server:
    uri: str
    database: Path

    def get(self, path: str, **query: object) -> dict[str, object]:
        answer = httpx.get(f"{self.uri}/api/2.0/mlflow/{path}", params=query, timeout=30)
        answer.raise_for_status()
        return answer.json()

    def run(self, run_id: str) -> dict[str, object]:
        return self.get("runs/get", run_id=run_id)["run"]

    def params(self, run_id: str) -> dict[str, str]:
        return {row["key"]: row["value"] for row in self.run(run_id)["data"]["params"]}

    def tags(self, run_id: str) -> dict[str, str]:
        return {row["key"]: row["value"] for row in self.run(run_id)["data"]["tags"]}

    def curve(self, run_id: str, key: str) -> list[tuple[int, float]]:
        rows = self.get("metrics/get-history", run_id=run_id, metric_key=key)["metrics"]
        return sorted((int(row["step"]), row["value"]) for row in rows)


@contextlib.contextmanager
def started(command: list[object], answers_at: str, folder: Path, **environment: str) -> Iterator[Callable[[], None]]:
    """A server in a process group of its own, stopped in any case; gives what waits until it answers."""
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            [str(part) for part in command], stdout=log, stderr=log, cwd=folder, start_new_session=True,
            env={**os.environ, **environment},
        )  # fmt: skip

        def wait() -> None:
            deadline = time.monotonic() + 120
            while True:
                with contextlib.suppress(httpx.TransportError):
                    if httpx.get(answers_at, timeout=2).status_code == 200:
                        return
                assert process.poll() is None, (folder / "log").read_text()
                assert time.monotonic() < deadline, (folder / "log").read_text()
                time.sleep(0.1)

        try:
            yield wait
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait(10)


@pytest.fixture(scope="module", autouse=True)
def begun_server(
    free_port: Callable[[], int], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Server, Callable[[], None]]]:
    """Begins before the first test, since it takes as long as those that need no server."""
    folder, port = tmp_path_factory.mktemp("mlflow"), free_port()
    database = folder / "mlflow.sqlite"
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", port, "--workers", 1]
    command += ["--backend-store-uri", f"sqlite:///{database}", "--default-artifact-root", folder / "artifacts"]
    quiet = {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    with started(command, f"http://127.0.0.1:{port}/health", folder, **quiet) as wait:
        yield Server(f"http://127.0.0.1:{port}", database), wait


# TensorBoard


def events_of(run: Path) -> EventAccumulator:
    return EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0, "tensors": 0}).Reload()


def curve(run: Path, tag: str) -> list[tuple[int, float]]:
    return [(event.step, event.value) for event in events_of(run).Scalars(tag)]


def test_tensorboard_shows_the_figures_over_the_images_seen(tmp_path):
    board = TensorBoard(str(tmp_path))
    board.start(settings_for(tmp_path), 1)
    board.step(step(40, 0.75))
    board.step(step(80, 0.5, learning_rate=0.25, rate=128.0, waiting=0.5))
    board.epoch(epoch(1, 0.625))
    board.finish({"val_auc": 0.625}, "bundle", None)
    assert curve(tmp_path, "loss") == [(40, 0.75), (80, 0.5)]
    assert curve(tmp_path, "images_per_second") == [(40, 250.0), (80, 128.0)]
    assert curve(tmp_path, "waiting") == [(40, 0.125), (80, 0.5)]
    assert curve(tmp_path, "learning_rate")[1] == (80, 0.25)
    assert curve(tmp_path, "epoch_loss") == [(100, 0.25)]
    assert curve(tmp_path, "val_loss") == [(100, 0.375)]
    assert curve(tmp_path, "val_auc") == [(100, 0.625)]
    assert curve(tmp_path, "val_auc/Edema") == [(100, 0.5)]
    assert curve(tmp_path, "val_auc/Hernia") == [(100, 0.625)]
    assert curve(tmp_path, "final/val_auc") == [(100, 0.625)]


def test_a_figure_that_nobody_knows_is_left_out(tmp_path):
    board = TensorBoard(str(tmp_path))
    board.start(settings_for(tmp_path), 1)
    board.step(step(40, math.inf))
    board.epoch(epoch(1, math.nan))
    board.finish({"val_auc": math.nan}, None, "the loss is not finite")
    tags = events_of(tmp_path).Tags()["scalars"]
    assert "val_loss" in tags
    assert not {"loss", "val_auc", "val_auc/Hernia", "final/val_auc"} & set(tags)


def test_what_is_written_can_be_read_while_the_training_goes_on(tmp_path):
    board = TensorBoard(str(tmp_path))
    board.start(settings_for(tmp_path), 1)
    board.step(step(40))
    assert curve(tmp_path, "loss") == [(40, 0.5)]
    board.finish({}, None, None)


def test_tensorboard_has_the_settings_without_their_credentials(tmp_path):
    board = TensorBoard(str(tmp_path))
    data = f"s3://reader:{SECRET}@radiographs/nih?region=eu-west-1&secret_key={SECRET}"
    settings = settings_for(tmp_path, mlflow=f"http://me:{SECRET}@host:5000").model_copy(update={"data": data})
    board.start(settings, 1)
    board.step(step(8))
    board.finish({}, None, None)
    (text,) = events_of(tmp_path).Tensors("settings/text_summary")
    (content,) = text.tensor_proto.string_val
    lines = [line.removeprefix("    ") for line in content.decode().splitlines()]
    assert lines[0] == f"# cxr-ray {__version__}"
    expected = settings.model_dump(mode="json") | {
        "data": "s3://radiographs/nih?region=eu-west-1",
        "mlflow": "http://host:5000",
    }
    assert yaml.safe_load("\n".join(lines)) == expected
    assert not [path for path in (tmp_path / "tensorboard").iterdir() if SECRET.encode() in path.read_bytes()]


def test_a_resumed_run_takes_back_what_came_after_its_checkpoint(tmp_path):
    lost = TensorBoard(str(tmp_path))
    lost.start(settings_for(tmp_path), 1)
    for event in (step(50, 1.0), step(100, 2.0)):
        lost.step(event)
    lost.epoch(epoch(1, 0.5))
    lost.step(step(104, 8.0))
    lost.step(step(160, 9.0))
    # Killed: nothing was closed. The next process goes on from the checkpoint of epoch 1.
    resumed = TensorBoard(str(tmp_path))
    resumed.start(settings_for(tmp_path, resume=True), 2)
    resumed.step(step(140, 3.0))
    resumed.epoch(epoch(2, 0.75))
    # A worker is lost within the same second, before the checkpoint of epoch 3.
    resumed.step(step(240, 7.0))
    resumed.start(settings_for(tmp_path, resume=True), 3)
    resumed.step(step(250, 4.0))
    resumed.finish({}, None, None)
    assert curve(tmp_path, "loss") == [(50, 1.0), (100, 2.0), (140, 3.0), (250, 4.0)]
    assert curve(tmp_path, "val_auc") == [(100, 0.5), (200, 0.75)]
    assert len(list((tmp_path / "tensorboard").iterdir())) == 3


def test_an_attempt_that_begins_at_the_beginning_takes_everything_back(tmp_path):
    board = TensorBoard(str(tmp_path))
    for loss in (1.0, 0.5):
        board.start(settings_for(tmp_path), 1)
        board.step(step(40, loss))
    board.finish({}, None, None)
    assert curve(tmp_path, "loss") == [(40, 0.5)]


def test_a_folder_that_cannot_be_made_is_told_at_the_start(tmp_path):
    (tmp_path / "tensorboard").write_text("a file")
    with pytest.raises(CxrRayError, match=rf"^{tmp_path}/tensorboard: cannot be made \(.*\); mend it or choose another --out$"):
        TensorBoard(str(tmp_path)).start(settings_for(tmp_path), 1)


def test_a_full_disk_is_told_once_and_ends_nothing(tmp_path):
    said: list[str] = []
    board = TensorBoard(str(tmp_path), said.append)
    board.start(settings_for(tmp_path), 1)
    (tmp_path / "tensorboard").rmdir()
    (tmp_path / "tensorboard").symlink_to("/proc/self")
    board.step(step(8))
    board.epoch(epoch(1))
    board.finish({"val_auc": 0.5}, None, None)
    (line,) = said
    assert line.startswith(f"{tmp_path}/tensorboard: cannot be written (")
    assert line.endswith("; the training goes on without it")


def test_event_files_on_an_object_store_grow_with_each_epoch(bucket, tmp_path):
    uri = bucket("run")
    filesystem, root = storage.resolve(uri)

    def copied() -> Path:
        folder = tmp_path / "copy" / "tensorboard"
        folder.mkdir(parents=True, exist_ok=True)
        for info in filesystem.get_file_info(fs.FileSelector(f"{root}/tensorboard")):
            (folder / info.base_name).write_bytes(storage.read_bytes(filesystem, info.path))
        return folder.parent

    board = TensorBoard(uri)
    board.start(settings_for(uri), 1)
    board.step(step(40, 1.0))
    assert list((copied() / "tensorboard").iterdir()) == []
    board.epoch(epoch(1))
    assert curve(copied(), "loss") == [(40, 1.0)]
    board.step(step(140, 2.0))
    board.epoch(epoch(2))
    assert curve(copied(), "loss") == [(40, 1.0), (140, 2.0)]
    board.step(step(240, 3.0))
    board.finish({"val_auc": 0.5}, None, None)
    assert curve(copied(), "loss") == [(40, 1.0), (140, 2.0), (240, 3.0)]
    assert curve(copied(), "final/val_auc") == [(240, 0.5)]


# MLflow


@pytest.mark.parametrize("uri", ["http://127.0.0.1:9", f"http://me:{SECRET}@127.0.0.1:9"])
def test_a_server_that_is_not_there_is_named_at_once(tmp_path, uri, capfd):
    started = time.monotonic()
    with pytest.raises(CxrRayError) as caught:
        Mlflow(uri, "x").start(settings_for(tmp_path, mlflow=uri), 1)
    assert time.monotonic() - started < 5
    assert re.fullmatch(
        r"--mlflow http://127\.0\.0\.1:9: cannot be used \(\[Errno 111\] Connection refused\); "
        "start the server, mend the URI, or leave out --mlflow",
        str(caught.value),
    )
    assert not (tmp_path / "mlflow-run.json").exists()
    assert capfd.readouterr() == ("", "")


def test_a_server_that_is_silent_is_given_up_within_fifteen_seconds(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        uri = f"http://127.0.0.1:{silent.getsockname()[1]}"
        started = time.monotonic()
        with pytest.raises(CxrRayError, match=rf"^--mlflow {uri}: cannot be used \(.*timed out.*\); start the server"):
            Mlflow(uri, "x").start(settings_for(tmp_path), 1)
        assert time.monotonic() - started < 15


def test_the_user_sets_how_long_a_server_is_waited_for(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        started = time.monotonic()
        with pytest.raises(CxrRayError, match="timed out"):
            Mlflow(f"http://127.0.0.1:{silent.getsockname()[1]}", "x").start(settings_for(tmp_path), 1)
        assert time.monotonic() - started < 4


@pytest.fixture(scope="module")
def server(begun_server: tuple[Server, Callable[[], None]]) -> Server:
    """A real MLflow server on loopback, with SQLite."""
    made, wait = begun_server
    wait()
    return made


class Relay:
    """A way to the server that can be cut and mended."""

    def __init__(self, target: str, port: int) -> None:
        host, _, target_port = target.removeprefix("http://").partition(":")
        self._target, self._port = (host, int(target_port)), port
        self.uri = f"http://127.0.0.1:{port}"
        self._open: list[socket.socket] = []
        self.mend()

    def mend(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", self._port))
        threading.Thread(target=self._accept, args=(self._listener,), daemon=True).start()

    def cut(self) -> None:
        for end in (self._listener, *self._open):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()
        self._open.clear()

    def _accept(self, listener: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = listener.accept()
                far = socket.create_connection(self._target)
                self._open += [near, far]
                for ends in ((near, far), (far, near)):
                    threading.Thread(target=self._pass_on, args=ends, daemon=True).start()

    def _pass_on(self, source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)


@pytest.fixture
def relay(server: Server, free_port: Callable[[], int]) -> Iterator[Relay]:
    made = Relay(server.uri, free_port())
    yield made
    made.cut()


def run_id_of(out: Path) -> str:
    return json.loads((out / "mlflow-run.json").read_text())["run_id"]


def bundle(folder: Path) -> str:
    folder.mkdir(parents=True)
    (folder / "bundle.json").write_text(json.dumps({"digest": "ab" * 32}))
    return str(folder)


def test_mlflow_has_settings_figures_digest_and_end_of_a_run(server, tmp_path, capfd):
    out = tmp_path / "chex-1"
    settings = settings_for(out, preset="multi-input", mlflow=server.uri)
    tracker = Mlflow(server.uri, "chex-1")
    tracker.start(settings, 1)
    run_id = run_id_of(out)
    assert server.run(run_id)["info"]["status"] == "RUNNING"
    tracker.step(step(40, 0.75))
    tracker.step(step(80, 0.5, waiting=math.nan))
    tracker.epoch(epoch(1, 0.625))
    tracker.finish({"val_auc": 0.625}, bundle(out / "bundle"), None)

    info = server.run(run_id)["info"]
    assert (info["status"], info["run_name"]) == ("FINISHED", "chex-1")
    assert server.get("experiments/get", experiment_id=info["experiment_id"])["experiment"]["name"] == "cxr-ray"
    params = server.params(run_id)
    assert set(params) == set(TrainSettings.model_fields)
    assert (params["batch_size"], params["learning_rate"], params["preset"]) == ("8", "0.001", "multi-input")
    assert (params["resume"], params["variant"], params["data"]) == ("false", "null", "/data/nih")
    tags = server.tags(run_id)
    assert (tags["code_version"], tags["preset"]) == (__version__, "multi-input")
    assert (tags["bundle"], tags["bundle_digest"]) == (str(out / "bundle"), "ab" * 32)
    assert "failure" not in tags
    assert server.curve(run_id, "loss") == [(40, 0.75), (80, 0.5)]
    assert server.curve(run_id, "waiting") == [(40, 0.125)]
    assert server.curve(run_id, "val_auc") == [(100, 0.625)]
    assert server.curve(run_id, "val_auc_by_finding/Edema") == [(100, 0.5)]
    assert server.curve(run_id, "learning_rate") == [(40, 1e-3), (80, 1e-3), (100, 5e-4)]
    assert server.curve(run_id, "final/val_auc") == [(100, 0.625)]
    assert capfd.readouterr() == ("", "")


def test_a_run_that_failed_is_marked_so_with_the_reason(server, tmp_path):
    tracker = Mlflow(server.uri, "x")
    tracker.start(settings_for(tmp_path), 1)
    tracker.finish({}, None, "the loss is not finite at epoch 2")
    assert server.run(run_id_of(tmp_path))["info"]["status"] == "FAILED"
    assert server.tags(run_id_of(tmp_path))["failure"] == "the loss is not finite at epoch 2"


def test_a_resumed_training_goes_on_in_its_run(server, tmp_path):
    lost = Mlflow(server.uri, "first")
    lost.start(settings_for(tmp_path, workers="4"), 1)
    lost.epoch(epoch(1, 0.5))
    run_id = run_id_of(tmp_path)
    lost.finish({}, None, "workers were lost")
    said: list[str] = []
    resumed = Mlflow(server.uri, "another name", said.append)
    resumed.start(settings_for(tmp_path, workers="2", resume=True), 2)
    assert server.run(run_id)["info"]["status"] == "RUNNING"
    resumed.start(settings_for(tmp_path, workers="2", resume=True), 2)
    resumed.epoch(epoch(2, 0.75))
    resumed.finish({}, None, None)
    assert run_id_of(tmp_path) == run_id
    assert said == []
    assert server.curve(run_id, "val_auc") == [(100, 0.5), (200, 0.75)]
    assert (server.run(run_id)["info"]["status"], server.run(run_id)["info"]["run_name"]) == ("FINISHED", "first")
    assert server.params(run_id)["workers"] == "4"
    tags = server.tags(run_id)
    assert (tags["resumed.workers"], tags["resumed.resume"]) == ("2", "true")
    assert "resumed.data" not in tags


def test_a_new_run_begins_where_the_old_one_is_gone_or_elsewhere(server, tmp_path):
    Mlflow(server.uri, "x").start(settings_for(tmp_path), 1)
    first = run_id_of(tmp_path)
    httpx.post(f"{server.uri}/api/2.0/mlflow/runs/delete", json={"run_id": first}).raise_for_status()
    said: list[str] = []
    Mlflow(server.uri, "x", said.append).start(settings_for(tmp_path, resume=True), 2)
    second = run_id_of(tmp_path)
    content = {"tracking_uri": server.uri, "run_id": "0" * 32}
    (tmp_path / "mlflow-run.json").write_text(json.dumps(content))
    Mlflow(server.uri, "x", said.append).start(settings_for(tmp_path, resume=True), 2)
    third = run_id_of(tmp_path)
    (tmp_path / "mlflow-run.json").write_text(json.dumps(content | {"tracking_uri": "http://elsewhere", "run_id": third}))
    Mlflow(server.uri, "x", said.append).start(settings_for(tmp_path, resume=True), 2)
    assert len({first, second, third, run_id_of(tmp_path)}) == 4
    assert [line.split(";")[0] for line in said] == [
        f"MLflow run {first} is no longer at {server.uri}",
        f"MLflow run {'0' * 32} is no longer at {server.uri}",
        f"MLflow run {third} is at http://elsewhere",
    ]
    (tmp_path / "mlflow-run.json").write_text("{")
    with pytest.raises(CxrRayError, match=r"mlflow-run\.json: damaged; remove it to go on in a new MLflow run$"):
        Mlflow(server.uri, "x").start(settings_for(tmp_path, resume=True), 2)


def test_no_credentials_reach_the_server_the_disk_or_the_terminal(server, tmp_path, capfd):
    with_password = server.uri.replace("http://", f"http://me:{SECRET}@")
    settings = settings_for(tmp_path, mlflow=with_password).model_copy(
        update={"data": f"s3://reader:{SECRET}@radiographs/nih?region=eu&secret_key={SECRET}", "init": f"gs://a:{SECRET}@b/c"}
    )
    tracker = Mlflow(with_password, "x")
    tracker.start(settings, 1)
    tracker.finish({}, None, f"reading {settings.data} failed")
    run_id = run_id_of(tmp_path)
    assert server.params(run_id)["data"] == "s3://radiographs/nih?region=eu"
    assert server.params(run_id)["mlflow"] == server.uri
    assert server.tags(run_id)["failure"] == "reading s3://radiographs/nih?region=eu failed"
    dump = "\n".join(sqlite3.connect(server.database).iterdump())
    assert run_id in dump
    written = "\n".join(path.read_text() for path in tmp_path.rglob("*") if path.is_file())
    assert SECRET not in dump + written + "".join(capfd.readouterr())


def test_a_server_that_went_away_gets_what_it_missed_when_it_is_back(server, relay, tmp_path, monkeypatch):
    monkeypatch.setattr(mlflow_tracker, "_SECONDS_BETWEEN_REQUESTS", 0.0)
    monkeypatch.setattr(mlflow_tracker, "_SECONDS_AFTER_FAILURE", 0.0)
    monkeypatch.setattr(mlflow_tracker, "_MOST_IN_A_REQUEST", 3)
    said: list[str] = []
    tracker = Mlflow(relay.uri, "x", said.append)
    tracker.start(settings_for(tmp_path), 1)
    tracker.step(step(10))
    relay.cut()
    for images in (20, 30):
        tracker.step(step(images))
    tracker.epoch(epoch(1))
    run_id = run_id_of(tmp_path)
    assert [images for images, _ in server.curve(run_id, "loss")] == [10]
    relay.mend()
    tracker.step(step(140))
    assert [images for images, _ in server.curve(run_id, "loss")] == [10, 20, 30, 140]
    assert server.curve(run_id, "val_auc") == [(100, 0.75)]
    tracker.finish({}, None, None)
    assert server.run(run_id)["info"]["status"] == "FINISHED"
    (line,) = said
    assert re.fullmatch(rf"MLflow at {relay.uri} does not answer \(.*\); the training goes on, .*", line)


def test_a_server_that_stays_away_ends_nothing_and_what_it_lacks_is_told(server, relay, tmp_path, capfd):
    said: list[str] = []
    tracker = Mlflow(relay.uri, "x", said.append)
    tracker.start(settings_for(tmp_path), 1)
    relay.cut()
    started = time.monotonic()
    for images in range(1, 200):
        tracker.step(step(images))
    tracker.epoch(epoch(2))
    tracker.finish({"val_auc": 0.5}, None, None)
    # Not a request an event: 199 of them would each wait for a connection.
    assert time.monotonic() - started < 5
    gone, missing = said
    assert gone.startswith(f"MLflow at {relay.uri} does not answer (")
    run_id = run_id_of(tmp_path)
    # 4 figures a step, 6 of the epoch, 1 of the run.
    assert missing.startswith(f"MLflow at {relay.uri}: 803 figures and that run {run_id} is FINISHED could not be sent (")
    assert "refused" in missing
    assert server.run(run_id)["info"]["status"] == "RUNNING"
    assert capfd.readouterr() == ("", "")


def test_memory_is_bounded_while_a_server_is_away(relay, tmp_path, monkeypatch):
    monkeypatch.setattr(mlflow_tracker, "_MOST_KEPT", 10)
    said: list[str] = []
    tracker = Mlflow(relay.uri, "x", said.append)
    tracker.start(settings_for(tmp_path), 1)
    relay.cut()
    for images in range(1, 6):
        tracker.step(step(images))
    relay.mend()
    tracker.finish({}, None, None)
    assert len(said) == 2
    assert "10 figures could not be sent" in said[1]


def test_something_else_that_answers_is_no_mlflow_server(bucket, tmp_path):
    uri = "http://127.0.0.1:" + re.search(r"127\.0\.0\.1%3A(\d+)", bucket(""))[1]
    with pytest.raises(CxrRayError, match=rf"^--mlflow {uri}: cannot be used \(.+\); start the server") as caught:
        Mlflow(uri, "x").start(settings_for(tmp_path), 1)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("uri", ["http://[host", "host:5000", "htp://host"])
def test_an_address_that_is_none_is_refused_in_one_line(tmp_path, uri):
    with pytest.raises(CxrRayError, match=r"^--mlflow.*URI") as caught:
        Mlflow(uri, "x").start(settings_for(tmp_path), 1)
    assert "\n" not in str(caught.value)


def test_without_the_client_the_remedy_is_named(tmp_path, monkeypatch):
    for name in [name for name in sys.modules if name == "mlflow" or name.startswith("mlflow.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "mlflow", None)
    with pytest.raises(UsageError) as caught:
        trackers_for(settings_for(tmp_path, mlflow="http://me:pw@host:5000"))
    assert str(caught.value) == "--mlflow http://host:5000: needs MLflow's client; pip install 'cxr-ray[mlflow]'"


def test_the_client_is_loaded_only_for_a_run_that_asks_for_mlflow():
    code = (
        "import sys; from cxr_ray.tracking import trackers_for; from cxr_ray.train_settings import TrainSettings; "
        "trackers_for(TrainSettings(data='d', out='o')); "
        "print({name.partition('.')[0] for name in sys.modules} & {'mlflow', 'tensorboard', 'tensorflow', 'ray'})"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"


# All of them


def test_a_run_reports_to_tensorboard_and_to_the_mlflow_server_that_it_names(server, tmp_path):
    assert [type(member) for member in trackers_for(settings_for(tmp_path)).members] == [TensorBoard]
    out = tmp_path / "night run"
    settings = settings_for(f"{out}/", mlflow=server.uri)
    trackers = trackers_for(settings)
    assert isinstance(trackers, Trackers)
    trackers.start(settings, 1)
    trackers.step(step(40, 0.75))
    trackers.epoch(epoch(1))
    trackers.finish({"val_auc": 0.5}, None, "stopped")
    run_id = run_id_of(out)
    assert server.run(run_id)["info"]["run_name"] == "night run"
    assert server.run(run_id)["info"]["status"] == "FAILED"
    assert curve(out, "loss") == server.curve(run_id, "loss") == [(40, 0.75)]
    assert curve(out, "val_auc") == server.curve(run_id, "val_auc") == [(100, 0.75)]
    assert curve(out, "final/val_auc") == server.curve(run_id, "final/val_auc") == [(100, 0.5)]
