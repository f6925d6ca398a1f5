"""Many images at once: what comes out is what the running service answers to each, and nothing stops the others."""

import io
import json
from hashlib import sha256
from pathlib import Path

import httpx
import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import RunningService
from PIL import Image
from radiographs import radiograph

from cxr_ray.bundle import read_description
from cxr_ray.errors import CxrRayError, UsageError
from cxr_ray.findings import FINDINGS
from ingest.phantom import simulate_patients
from ingest.phantom_drawing import draw
from serve.answers_file import METADATA_KEY, positive_column
from serve.batch import make_plan, predict
from serve.batch_settings import PredictSettings
from serve.predict_cli import predict as command

FILMS = [draw(visit, 96) for visit in simulate_patients(4, 5)[:6]]
UIDS = {"study_instance_uid": "1.2.3.2", "series_instance_uid": "1.2.3.3", "sop_instance_uid": "1.2.3.1"}


def picture(film, kind="PNG"):
    content = io.BytesIO()
    Image.fromarray(film).save(content, kind)
    return content.getvalue()


def dicom(film, **attributes):
    content = io.BytesIO()
    radiograph(film, **attributes).save_as(content, enforce_file_format=True)
    return content.getvalue()


# Names say nothing, or the wrong thing.
FILES = {
    "ward 1/a.png": picture(FILMS[0]),
    "ward 1/deeper/b": picture(FILMS[1], "JPEG"),
    "c.png": dicom(FILMS[2]),
    "known.dcm": dicom(FILMS[3], PatientAge=None, ViewPosition=""),
    "overridden.dcm": dicom(FILMS[4]),
    "sixteen.PNG": picture(FILMS[5].astype(np.uint16) * 200),
    "lateral.dcm": dicom(FILMS[0], ViewPosition="LL"),
    "cut.png": picture(FILMS[1])[:900],
    "cut.dcm": dicom(FILMS[1])[:-400],
    "black.png": picture(np.zeros((64, 64), np.uint8)),
    "notes.txt": b"Dear colleague, thank you for your patience.",
    "empty.dcm": b"",
}
REFUSED = {"lateral.dcm", "cut.png", "cut.dcm", "black.png", "notes.txt", "empty.dcm"}
STATED = {
    "ward 1/a.png": {"age": 33.5, "sex": "M", "view": "AP", "history": "Mass|Nodule"},
    "known.dcm": {"age": 70, "history": "No Finding"},
    "overridden.dcm": {"age": 5, "sex": "M", "view": "AP"},
    "cut.png": {"age": 50},
}


def laid_out(folder: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def clinical_csv(path: Path) -> str:
    columns = ("age", "sex", "view", "history")
    lines = [",".join([name, *(str(given.get(column, "")) for column in columns)]) for name, given in STATED.items()]
    path.write_text("\n".join([",".join(["file", *columns]), *lines]))
    return str(path)


def predicted(tmp_path: Path, **settings: object) -> tuple[dict[str, dict[str, object]], object]:
    """The rows of the result by file, in its order, and the summary."""
    out = tmp_path / "results.parquet"
    summary = predict(make_plan(PredictSettings(out=str(out), engine="torch", **settings)))
    return {row["file"]: row for row in pq.read_table(out).to_pylist()}, summary


def asked(service: RunningService, name: str, content: bytes, form: dict[str, object]) -> httpx.Response:
    url = f"{service.url}/v1/predict"
    return httpx.post(url, files={"image": (name, content)}, data=form, timeout=60, trust_env=False)


@pytest.mark.ray
def test_answers_and_refusals_are_those_of_the_service(service: RunningService, untrained_bundle: Path, tmp_path: Path) -> None:
    source = laid_out(tmp_path / "in", FILES)
    rows, summary = predicted(
        tmp_path,
        bundle=str(untrained_bundle),
        input=str(source),
        clinical=clinical_csv(tmp_path / "clinical.csv"),
        batch_size=4,
    )
    assert list(rows) == sorted(FILES)
    assert {name for name, row in rows.items() if row["status"] == "refused"} == REFUSED
    assert (summary.answered, summary.refused) == (len(FILES) - len(REFUSED), len(REFUSED))
    for name, content in FILES.items():
        row, answer = rows[name], asked(service, name, content, STATED.get(name, {}))
        assert row["sha256"] == (sha256(content).hexdigest() if content else None)
        if name in REFUSED:
            assert answer.status_code >= 400
            assert answer.json()["detail"].endswith(row["reason"])
            assert name not in row["reason"]
            assert {row[finding] for finding in FINDINGS} == {row[positive_column(finding)] for finding in FINDINGS} == {None}
            continue
        body = answer.json()
        assert answer.status_code == 200, body
        for finding in body["findings"]:
            assert row[finding["name"]] == pytest.approx(finding["probability"], abs=1e-5)
            assert row[positive_column(finding["name"])] is finding["positive"]
        used = {key: body["clinical"][key] for key in ("age", "sex", "view", "history", "missing")}
        assert {key: row[key] for key in used} == used
        assert (row["warnings"], row["reason"]) == (body["warnings"], None)
        assert {key: row[f"model_{key}"] for key in body["model"]} == body["model"]
    assert {key: rows["lateral.dcm"][key] for key in UIDS} == {key: rows["c.png"][key] for key in UIDS} == UIDS
    assert {rows["ward 1/a.png"][key] for key in UIDS} == {None}
    assert rows["known.dcm"]["warnings"]
    metadata = json.loads(pq.read_metadata(tmp_path / "results.parquet").metadata[METADATA_KEY.encode()])
    assert metadata["thresholds"] == read_description(str(untrained_bundle)).thresholds


@pytest.mark.ray
def test_real_files(
    ray_cluster: None, service: RunningService, untrained_bundle: Path, real_data: Path, tmp_path: Path
) -> None:
    source = tmp_path / "in"
    source.mkdir()
    (source / "dicom").symlink_to(real_data / "dicom")
    nih = sorted((real_data / "nih").rglob("*.png"))[:70]
    for path in nih:
        (source / path.name).symlink_to(path)
    rows, summary = predicted(tmp_path, bundle=str(untrained_bundle), input=str(source))
    assert list(rows) == sorted(
        [*(path.name for path in nih), *(f"dicom/{path.name}" for path in (real_data / "dicom").iterdir())]
    )
    refused = {name for name, row in rows.items() if row["status"] == "refused"}
    assert refused == {name for name in rows if name.startswith("dicom/extremity")}
    assert summary.reasons == {"BodyPartExamined is EXTREMITY; only chest radiographs are read": len(refused)}
    for name in [nih[0].name, nih[-1].name, *(name for name in rows if name.startswith("dicom/chest"))]:
        body = asked(service, "image", (source / name).read_bytes(), {}).json()
        expected = {finding["name"]: finding["probability"] for finding in body["findings"]}
        assert {finding: rows[name][finding] for finding in FINDINGS} == pytest.approx(expected, abs=1e-5)


@pytest.mark.ray
def test_the_command_ends_with_1_where_nothing_could_be_answered(
    ray_cluster: None, untrained_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = laid_out(tmp_path / "in", {name: FILES[name] for name in REFUSED} | {"more.txt": b"12 words"})
    out = tmp_path / "new" / "results.parquet"
    arguments = ["--bundle", untrained_bundle, "--input", source, "--out", out, "--json"]
    with pytest.raises(CxrRayError, match=f"none of the 7 files could be answered; {out} says why"):
        command(args=list(map(str, arguments)), standalone_mode=False)
    told = json.loads(capsys.readouterr().out)
    assert (told["files"], told["answered"], told["refused"], len(told["commonest_reasons"])) == (7, 0, 7, 5)
    assert told["commonest_reasons"][0] == {"reason": "neither PNG, JPEG nor DICOM (N bytes); convert it to one", "files": 2}
    assert pq.read_metadata(out).num_rows == 7
    with pytest.raises(CxrRayError, match="is there already"):
        command(args=list(map(str, arguments)), standalone_mode=False)


def test_what_is_wrong_is_told_before_the_work(untrained_bundle: Path, tmp_path: Path) -> None:
    source = laid_out(tmp_path / "in", {"a.png": FILES["ward 1/a.png"]})
    (tmp_path / "none").mkdir()
    good = {"bundle": str(untrained_bundle), "input": str(source), "out": str(tmp_path / "results.parquet")}
    table = tmp_path / "clinical.csv"
    table.write_text("file,age\nb.png,3\n")
    for wrong, kind, said in (
        ({"bundle": str(source)}, CxrRayError, "holds no bundle.json"),
        ({"input": str(tmp_path / "absent")}, CxrRayError, "--input .*absent: cannot be listed"),
        ({"input": str(tmp_path / "none")}, CxrRayError, "--input .*none: holds no files"),
        ({"out": str(source / "results.parquet")}, UsageError, "lies below --input"),
        ({"clinical": str(table)}, CxrRayError, "line 2: names a file that --input does not hold"),
    ):
        with pytest.raises(kind, match=said):
            make_plan(PredictSettings(**good | wrong))
    assert {path.name for path in tmp_path.iterdir()} == {"in", "none", "clinical.csv"}
    assert make_plan(PredictSettings(**good | {"input": str(source / "a.png")})).files[0].name == "a.png"
