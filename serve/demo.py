"""The demo: the whole way on one machine, with nothing but made-up patients.

A release of synthetic radiographs is drawn and ingested, a network is trained on it by two Ray workers (and once more without
clinical inputs, to see what they are worth), both are scored on the untouched test split, and a study that neither has
seen travels by C-STORE to the DICOM node and comes back as fourteen probabilities.
"""

import json
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import httpx
import numpy as np
import pandas as pd
import pydicom
from pydantic import Field
from pynetdicom import AE
from rich.table import Table

from cxr_ray import findings
from cxr_ray.bundle import load_bundle
from cxr_ray.clinical import from_request
from cxr_ray.distributed import BUNDLE, train
from cxr_ray.errors import CxrRayError
from cxr_ray.evaluate_settings import EvaluateSettings
from cxr_ray.evaluation import Evaluation, evaluate
from cxr_ray.heatmap import occlusion, overlay
from cxr_ray.progress import ProgressReport
from cxr_ray.ray_session import ray_session
from cxr_ray.report import interval_text, scores_table, study_picture
from cxr_ray.settings import Settings
from cxr_ray.terminal import console, table
from cxr_ray.torch_engine import TorchEngine
from cxr_ray.train_settings import TrainSettings
from cxr_ray.training_view import TrainingView
from ingest.nih import NihSettings, ingest_nih
from ingest.phantom_release import DICOM, IMAGES, TABLE, TEST_PATIENT, TRUTH, PhantomSettings, make_release
from serve.node.listener import ListenerSettings
from serve.node.node import NodeSettings, dicom_node
from serve.service import ServeSettings, http_service
from serve.uploads import decode_upload

_MARK = ".cxr-ray-demo"
_SIZE = 64
_ANSWER_SECONDS = 60.0


class DemoSettings(Settings):
    """Settings of `cxr-ray demo`."""

    out: Path = Field(Path("demo"), description="Folder for everything that the demo makes; an earlier demo is replaced.")
    patients: int = Field(300, ge=40, description="Patients of the made-up release.")
    epochs: int = Field(6, ge=1, description="Passes over the training split.")
    workers: int = Field(2, ge=1, description="Training processes.")
    http_port: int = Field(8000, ge=1, le=65535, description="TCP port of the HTTP service.")
    dicom_port: int = Field(11112, ge=1, le=65535, description="TCP port of the DICOM node.")
    stay: bool = Field(default=False, description="Leave the service up at the end.")


@dataclass(frozen=True)
class _Case:
    """The study that is sent: a later visit of a test patient, with what is true and what was known before."""

    image_id: str
    truth: list[str]
    visible: list[str]
    history: list[str]


def run_demo(settings: DemoSettings, wait: Callable[[], None]) -> None:
    """Run the demo; with `stay` it ends when `wait` returns.

    Raises
    ------
    CxrRayError
        If the folder holds something else, a port is taken, or no answer comes.
    """
    out = settings.out
    _claim(out)
    with ray_session():
        with _step(1, f"Draw radiographs of {settings.patients} made-up patients"):
            release = PhantomSettings(out=str(out / "release"), patients=settings.patients)
            make_release(release)
        with _step(2, "Ingest the release with Ray Data: official lists, history, validation by patient"):
            data = str(out / "dataset")
            manifest = ingest_nih(NihSettings(release=release.out, out=data, size=_SIZE))
            console.print("  ".join(f"{name} {split.images}" for name, split in manifest.splits.items()))
        with _step(3, f"Train multi-input (DenseNet-121 and 17 clinical numbers) on {settings.workers} Ray workers"):
            _train(settings, data, out / "run", clinical=True)
        with _step(4, "Train the same network without its clinical inputs"):
            _train(settings, data, out / "run-image-only", clinical=False)
        with _step(5, "Score both on the untouched test patients"):
            full = _evaluate(data, out / "run", out / "evaluation")
            image_only = _evaluate(data, out / "run-image-only", out / "evaluation-image-only")
            console.print(scores_table(_title(full), full.scores))
            console.print(f"mean AUC with clinical inputs    {interval_text(full.scores.auroc)}")
            console.print(f"mean AUC without clinical inputs {interval_text(image_only.scores.auroc)}")
            _write_summary(out, full, image_only)
        service = ServeSettings(
            bundle=str(out / "run" / BUNDLE),
            store=f"sqlite:///{(out / 'results.sqlite').resolve()}",
            port=settings.http_port,
            node=NodeSettings(spool=out / "spool", listener=ListenerSettings(port=settings.dicom_port)),
        )
        console.print("\n6/6  Serve, and send a study by C-STORE", style="bold")
        with http_service(service) as url, dicom_node(service.node, service_url=url, token=None):
            _send_and_show(settings, url)
            _say_next(settings, url)
            if settings.stay:
                wait()


def _claim(out: Path) -> None:
    if out.exists() and not (out / _MARK).exists() and (not out.is_dir() or any(out.iterdir())):
        raise CxrRayError(f"--out {out}: holds something that no demo made; choose another folder")
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    (out / _MARK).touch()


@contextmanager
def _step(number: int, title: str) -> Iterator[None]:
    console.print(f"\n{number}/6  {title}", style="bold")
    started = time.monotonic()
    yield
    console.print(f"{time.monotonic() - started:.0f} s", style="dim")


def _train(settings: DemoSettings, data: str, out: Path, *, clinical: bool) -> None:
    # The made-up release has some eighty validation images, too few to tell one epoch from the next.
    chosen = dict(workers=settings.workers, epochs=settings.epochs, select="last")
    run = TrainSettings.model_validate(dict(data=data, out=str(out), meta=clinical, history=clinical) | chosen)
    with ProgressReport("train", 0, "images") as progress:
        train(run, TrainingView(progress, settings.epochs))


def _evaluate(data: str, run: Path, out: Path) -> Evaluation:
    return evaluate(EvaluateSettings(bundle=str(run / BUNDLE), data=data, out=str(out)))


def _title(evaluation: Evaluation) -> str:
    return f"Test split: {evaluation.scores.images} images of {evaluation.scores.patients} patients (synthetic)"


def _write_summary(out: Path, full: Evaluation, image_only: Evaluation) -> None:
    summary = {"with_clinical_inputs": asdict(full.scores.auroc), "image_only": asdict(image_only.scores.auroc)}
    (out / "summary.json").write_text(json.dumps(summary, indent=2))


def _choose_case(release: Path) -> _Case:
    """The first later visit of a test patient with two findings on the film and one known from before."""
    truth = pd.read_csv(release / TRUTH).set_index("Image Index")
    rows = pd.read_csv(release / TABLE, index_col=False)
    for patient, visits in rows[rows["Patient ID"] % TEST_PATIENT == 0].groupby("Patient ID"):
        del patient
        earlier = np.zeros(len(findings.FINDINGS), dtype=np.uint8)
        for image in visits.sort_values("Follow-up #")["Image Index"]:
            labels = findings.parse(truth.loc[image, "Finding Labels"])
            visible = findings.parse(truth.loc[image, "Visible Findings"])
            if visible.sum() >= 2 and (labels & earlier).any():
                named = [findings.names(values) for values in (labels, visible, earlier)]
                return _Case(image.removesuffix(".png"), *named)
            earlier |= labels
    raise CxrRayError(f"{release}: no test patient has a suitable study; give more --patients")


def _send_and_show(settings: DemoSettings, url: str) -> None:
    release = settings.out / "release"
    case = _choose_case(release)
    file = release / DICOM / f"{case.image_id}.dcm"
    study = _store(file, settings.dicom_port)
    console.print(f"sent {file.name} by C-STORE to CXRRAY@127.0.0.1:{settings.dicom_port}, accepted (0x0000)")
    answer = _wait_for_answer(f"{url}/v1/studies/{study}")
    by_store = {entry["name"]: entry for entry in answer["instances"][0]["findings"]}
    by_post = _post(url, release / IMAGES / f"{case.image_id}.png", answer["instances"][0]["clinical"], case.history)
    console.print(_answer_table(case, by_store, by_post))
    console.print(f"GET {url}/v1/studies/{study}")
    _draw(settings.out, case, file, by_store)


def _store(file: Path, port: int) -> str:
    dataset = pydicom.dcmread(file)
    sender = AE("DEMO")
    sender.add_requested_context(dataset.SOPClassUID, dataset.file_meta.TransferSyntaxUID)
    association = sender.associate("127.0.0.1", port, ae_title="CXRRAY")
    if not association.is_established:
        raise CxrRayError(f"the DICOM node on port {port} refused the association; see its log")
    status = association.send_c_store(dataset)
    association.release()
    if status.get("Status") != 0:
        raise CxrRayError(f"C-STORE of {file} was answered 0x{status.get('Status', 0xFFFF):04X}; see the node's log")
    return str(dataset.StudyInstanceUID)


def _wait_for_answer(url: str) -> dict:
    deadline = time.monotonic() + _ANSWER_SECONDS
    while time.monotonic() < deadline:
        response = httpx.get(url, timeout=10, trust_env=False)
        if response.status_code == httpx.codes.OK:
            return response.json()
        time.sleep(0.1)
    raise CxrRayError(f"{url}: no answer within {_ANSWER_SECONDS:.0f} s; see the node's log")


def _post(url: str, image: Path, clinical: dict, history: list[str]) -> dict[str, dict]:
    form = {"age": clinical["age"], "sex": clinical["sex"], "view": clinical["view"]}
    form["history"] = findings.SEPARATOR.join(history) or findings.NO_FINDING
    with image.open("rb") as content:
        response = httpx.post(f"{url}/v1/predict", data=form, files={"image": content}, timeout=60, trust_env=False)
    response.raise_for_status()
    return {entry["name"]: entry for entry in response.json()["findings"]}


def _answer_table(case: _Case, by_store: dict[str, dict], by_post: dict[str, dict]) -> Table:
    columns = [("finding", False), ("C-STORE", True), ("HTTP, history", True), ("threshold", True), ("truth", False)]
    shown = table(f"Probabilities for {case.image_id}", columns)
    for name in findings.FINDINGS:
        truth = "present" if name in case.visible else "present, not on the film" if name in case.truth else ""
        known = "known before" if name in case.history else ""
        marks = ", ".join(part for part in (truth, known) if part)
        probabilities = (by_store[name]["probability"], by_post[name]["probability"], by_store[name]["threshold"])
        style = "bold" if name in case.truth else None
        shown.add_row(name.replace("_", " "), *(f"{value:.3f}" for value in probabilities), marks, style=style)
    return shown


def _draw(out: Path, case: _Case, file: Path, answer: dict[str, dict]) -> None:
    bundle = load_bundle(str(out / "run" / BUNDLE))
    decoded = decode_upload(file.read_bytes(), file.name, bundle.require_images())
    shown = decode_upload(file.read_bytes(), file.name, 256).pixels
    inputs, _ = from_request(decoded.age_years, decoded.sex, decoded.view, None)
    above = [name for name in findings.FINDINGS if answer[name]["positive"]] or list(findings.FINDINGS)
    explained = max(above, key=lambda name: answer[name]["probability"])
    contribution = occlusion(TorchEngine(bundle), decoded.pixels, inputs, findings.FINDINGS.index(explained))
    picture = study_picture(
        shown,
        overlay(shown, contribution),
        explained,
        {name: entry["probability"] for name, entry in answer.items()},
        {name: entry["threshold"] for name, entry in answer.items()},
        case.truth,
        f"Synthetic study {case.image_id}, received by C-STORE",
    )
    (out / "study.png").write_bytes(picture)


def _say_next(settings: DemoSettings, url: str) -> None:
    out = settings.out
    for what, where in (
        ("bundle", out / "run" / BUNDLE),
        ("the report of its evaluation", out / "evaluation" / "report.html"),
        ("the study with its heatmap", out / "study.png"),
    ):
        console.print(f"  {what}: {where}")
    if settings.stay:
        console.print(f"the service stays up until Ctrl-C: {url}/ (documentation: {url}/docs)")
        return
    console.print("next: make demo SERVE=1 leaves the service up; or, with this demo's bundle:")
    console.print(f"  cxr-ray serve --bundle {out / 'run' / BUNDLE} --with-node")
