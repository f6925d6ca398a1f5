"""Results as DICOM objects: what they say, whose they are, and what independent judges make of them."""

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime, timedelta, timezone
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from dicom_judges import dciodvfy, orthanc, report_lines, validate_report
from highdicom.sr import srread
from phantom_films import VISITS, dicom, film
from pydicom import Dataset, dcmread
from result_answers import ANSWERED, MODEL, PROBABILITIES, findings, header, image, service_answer, study

from cxr_ray.dicom_header import radiograph_header, read_dicom_header
from cxr_ray.findings import CODES, FINDINGS, Code
from cxr_ray.heatmap import overlay
from serve.node.results import codes
from serve.node.results.capture_picture import NOT_DIAGNOSTIC, UNVERIFIED, percent
from serve.node.results.from_service import image_answer, input_words
from serve.node.results.json_summary import json_summary
from serve.node.results.result_object import file_bytes
from serve.node.results.result_uids import SOP_CLASSES, result_uids
from serve.node.results.secondary_capture import secondary_capture, shown_image
from serve.node.results.settings import ResultSettings
from serve.node.results.structured_report import structured_report
from serve.node.results.study_answer import ImageAnswer, Predecessor, SrClass, StudyAnswer

SETTINGS = ResultSettings(institution_name="St. Elsewhere")
SR_CLASSES: tuple[SrClass, ...] = ("comprehensive-3d", "comprehensive", "enhanced")
FILM = film(VISITS[0])
OTHER_UID = "2.25.1234567890"
PREDECESSOR = Predecessor(SOP_CLASSES["comprehensive-3d"], "2.25.11", "2.25.12", str(header().StudyInstanceUID))


def two_images() -> StudyAnswer:
    """Of one study and two series; the second image is sure of a hernia, the first of nothing."""
    low = tuple(value / 10 for value in PROBABILITIES)
    first = image(header(AccessionNumber="A-4711", AcquisitionTime="080000"), findings=findings(low))
    second = image(
        header(AccessionNumber="A-4711", AcquisitionTime="090000", SOPInstanceUID=OTHER_UID, SeriesInstanceUID="2.25.77"),
        content_digest="ffff",
    )
    return study(first, second)


def calibrated() -> StudyAnswer:
    return study(image(header(AccessionNumber="A-4711"), model=replace(MODEL, calibrated=True)))


def revised() -> StudyAnswer:
    return replace(two_images(), revision=2, predecessors={"comprehensive-3d": PREDECESSOR, "enhanced": PREDECESSOR})


def capture(answer: StudyAnswer, radiograph: np.ndarray = FILM) -> Dataset:
    heat = np.zeros((16, 16), dtype=np.float32)
    heat[9, 5] = 1
    warm = overlay(radiograph, heat)
    return secondary_capture(answer, radiograph, warm, answer.leading.answer.name, SETTINGS)


def written(dataset: Dataset, folder: Path) -> Path:
    path = folder / f"{dataset.SOPInstanceUID}.dcm"
    path.write_bytes(file_bytes(dataset))
    return path


def reread(dataset: Dataset) -> Dataset:
    return dcmread(BytesIO(file_bytes(dataset)))


def errors(lines: list[str]) -> list[str]:
    return [line for line in lines if "error" in line.lower()]


DEFINITIONS = {"comprehensive-3d": "Comprehensive3DSR", "comprehensive": "ComprehensiveSR", "enhanced": "EnhancedSR"}
REPORTS = [("comprehensive-3d", revised), ("comprehensive", calibrated), ("enhanced", two_images)]


@pytest.mark.parametrize(("sr_class", "answer"), REPORTS)
def test_dciodvfy_finds_no_error_in_a_report(sr_class: SrClass, answer: Callable[[], StudyAnswer], tmp_path: Path) -> None:
    said = dciodvfy(written(structured_report(answer(), sr_class, SETTINGS), tmp_path))
    assert said[0] == DEFINITIONS[sr_class]
    assert errors(said) == []


@pytest.mark.parametrize("answer", [study, revised])
def test_dciodvfy_finds_no_error_in_a_capture(answer: Callable[[], StudyAnswer], tmp_path: Path) -> None:
    said = dciodvfy(written(capture(answer()), tmp_path))
    assert said == ["SCImage"]


def test_the_connectathon_judge_finds_no_error(tmp_path: Path) -> None:
    """It takes ten seconds for a report, most of them to read its rules: all are judged at once."""
    reports = [written(structured_report(answer(), sr_class, SETTINGS), tmp_path) for sr_class, answer in REPORTS]
    assert len(set(reports)) == len(REPORTS)
    with ThreadPoolExecutor() as judges:
        verdicts = list(judges.map(validate_report, reports))
    for (sr_class, _), said in zip(REPORTS, verdicts, strict=True):
        assert {f"Found {DEFINITIONS[sr_class]} IOD", "Found Root Template TID_1500 (MeasurementReport)"} <= set(said)
        assert {"Root Template Validation Complete", "IOD validation complete"} <= set(said)
        assert errors(said) == []


def test_the_tree_is_the_same_in_all_classes() -> None:
    trees = [structured_report(two_images(), sr_class, SETTINGS).ContentSequence for sr_class in SR_CLASSES]
    assert trees[0] == trees[1] == trees[2]


def test_dciodvfy_would_find_an_error(tmp_path: Path) -> None:
    report = structured_report(study(), "enhanced", SETTINGS)
    del report.CompletionFlag
    assert any("CompletionFlag" in line for line in errors(dciodvfy(written(report, tmp_path))))


def test_dcmtk_prints_all_fourteen_findings(tmp_path: Path) -> None:
    lines = report_lines(written(structured_report(study(), "comprehensive-3d", SETTINGS), tmp_path))
    coded = [line.partition("=")[2].rstrip(">") for line in lines if '"Finding")=' in line]
    assert coded == [f'({code.value},{code.scheme},"{code.meaning}")' for code in CODES.values()]
    numbers = [line for line in lines if "<contains NUM:" in line]
    assert len(numbers) == 14
    assert all('"Certainty of Finding")' in line and '(%,UCUM,"Percent")' in line for line in numbers)
    assert any('(,,"Algorithm Parameters")="bundle SHA-256: 4f4f' in line for line in lines)
    assert any("operating threshold: 0.5" in line for line in lines)
    assert any("input, history: not known" in line for line in lines)


def test_orthanc_files_results_beside_their_image(tmp_path: Path, free_port: Callable[[], int]) -> None:
    source = dicom(VISITS[0], PatientName="Müller^Jörg", SpecificCharacterSet="ISO_IR 192", AccessionNumber="A-4711")
    answer = study(image(dcmread(BytesIO(source), stop_before_pixels=True)))
    reports = [file_bytes(structured_report(answer, sr_class, SETTINGS)) for sr_class in SR_CLASSES]
    with orthanc(tmp_path, free_port) as client:
        for content in (source, *reports, file_bytes(capture(answer))):
            stored = client.post("/instances", content=content)
            assert (stored.status_code, stored.json()["Status"]) == (200, "Success"), stored.text
        # A retry is the same object.
        again = client.post("/instances", content=file_bytes(structured_report(answer, "enhanced", SETTINGS)))
        assert again.json()["Status"] == "AlreadyStored"
        (kept,) = client.get("/studies?expand").json()
        assert kept["PatientMainDicomTags"]["PatientName"] == "Müller^Jörg"
        assert kept["MainDicomTags"]["AccessionNumber"] == "A-4711"
        modalities = [one["MainDicomTags"]["Modality"] for one in client.get("/series?expand").json()]
        assert sorted(modalities) == ["DX", "OT", "SR", "SR", "SR"]
        (shown,) = client.post("/tools/find", json={"Level": "Instance", "Query": {"Modality": "OT"}}).json()
        assert client.get(f"/instances/{shown}/preview").status_code == 200


def test_highdicom_reads_a_report_back(tmp_path: Path) -> None:
    report = srread(written(structured_report(two_images(), "comprehensive-3d", SETTINGS), tmp_path))
    groups = report.content.get_image_measurement_groups()
    assert [group.tracking_identifier for group in groups] == [name.replace("_", " ") for name in FINDINGS]
    for group, probability in zip(groups, PROBABILITIES, strict=True):
        (measured,) = group.get_measurements()
        assert measured.value == pytest.approx(100 * probability)
        (evaluated,) = group.get_qualitative_evaluations()
        assert evaluated.name == group.finding_type
        assert evaluated.value.meaning == ("Present" if probability >= 0.5 else "Absent")
    assert {uids[2] for uids in report.get_evidence()} == {str(header().SOPInstanceUID), OTHER_UID}


def test_a_calibrated_model_states_probabilities() -> None:
    report = reread(structured_report(calibrated(), "comprehensive", SETTINGS))
    measurements = report.ContentSequence[-1].ContentSequence
    for group, probability in zip(measurements, PROBABILITIES, strict=True):
        (number,) = (item for item in group.ContentSequence if item.ValueType == "NUM")
        assert number.ConceptNameCodeSequence[0].CodeMeaning == "Probability"
        value = number.MeasuredValueSequence[0]
        assert value.MeasurementUnitsCodeSequence[0].CodeValue == "1"
        assert float(value.NumericValue) == pytest.approx(probability)
        assert len(str(value.NumericValue)) <= 16


def test_a_report_says_that_nobody_has_looked_at_it() -> None:
    report = reread(structured_report(revised(), "comprehensive-3d", SETTINGS))
    flags = (report.CompletionFlag, report.VerificationFlag, report.PreliminaryFlag)
    assert flags == ("COMPLETE", "UNVERIFIED", "PRELIMINARY")
    assert "unverified" in report.SeriesDescription
    assert "VerifyingObserverSequence" not in report
    assert (report.PerformedProcedureCodeSequence, report.ReferencedPerformedProcedureStepSequence) == ([], [])
    assert report.ReferencedRequestSequence[0].AccessionNumber == "A-4711"
    replaced = report.PredecessorDocumentsSequence[0]
    series = replaced.ReferencedSeriesSequence[0]
    assert (replaced.StudyInstanceUID, series.SeriesInstanceUID) == (PREDECESSOR.study_instance_uid, "2.25.12")
    assert series.ReferencedSOPSequence[0].ReferencedSOPInstanceUID == "2.25.11"
    (equipment,) = report.ContributingEquipmentSequence
    assert (equipment.ManufacturerModelName, list(equipment.SoftwareVersions)) == ("multi-input", ["3", "4f" * 32])
    assert "PredecessorDocumentsSequence" not in structured_report(two_images(), "comprehensive-3d", SETTINGS)


def test_the_same_answer_gives_the_same_bytes_in_any_order() -> None:
    answer = two_images()
    turned = replace(answer, images=answer.images[::-1])
    for sr_class in SR_CLASSES:
        first, again = (file_bytes(structured_report(each, sr_class, SETTINGS)) for each in (answer, turned))
        assert first == again
    assert file_bytes(capture(answer)) == file_bytes(capture(turned))


def test_uids_change_with_what_a_result_is_about_and_with_nothing_else() -> None:
    base = study()
    same = study(image(answered_at=ANSWERED + timedelta(hours=1), warnings=()))
    assert result_uids(same, "enhanced") == result_uids(base, "enhanced")
    others = [
        study(image(header(SOPInstanceUID=OTHER_UID))),
        study(image(content_digest="another")),
        study(image(model=replace(MODEL, digest="aa" * 32))),
        study(image(findings=findings(threshold=0.4))),
        study(image(), image(header(SOPInstanceUID=OTHER_UID))),
        study(revision=2),
    ]
    named = {result_uids(answer, "enhanced").sop_instance_uid for answer in [base, *others]}
    named |= {result_uids(base, kind).sop_instance_uid for kind in ("comprehensive", "secondary-capture")}
    assert len(named) == len(others) + 3
    assert all(uid.startswith("2.25.") and len(uid) <= 64 for uid in named)
    assert result_uids(study(revision=2), "enhanced").series_instance_uid == result_uids(base, "enhanced").series_instance_uid


def test_a_studys_findings_are_the_highest_over_its_images() -> None:
    answer = two_images()
    assert [found.answer.probability for found in answer.findings] == list(PROBABILITIES)
    assert {found.image.sop_instance_uid for found in answer.findings} == {OTHER_UID}
    assert answer.leading.answer.name == "Hernia"
    assert shown_image(answer).sop_instance_uid == OTHER_UID
    # A rare finding above its threshold leads before a common one below it.
    rare = tuple(
        replace(finding, threshold=0.02, positive=True) if finding.name == "Mass" else replace(finding, threshold=0.99)
        for finding in findings()
    )
    assert study(image(findings=rare)).leading.answer.name == "Mass"


def test_a_capture_is_no_radiograph_and_says_what_it_is() -> None:
    shown = reread(capture(study(image(header(PatientOrientation=["L", "F"])))))
    assert shown.file_meta.TransferSyntaxUID == "1.2.840.10008.1.2.1"
    assert (shown.Modality, shown.BurnedInAnnotation, shown.ConversionType) == ("OT", "YES", "WSD")
    assert list(shown.PatientOrientation) == ["L", "F"]
    assert shown.DerivationDescription == f"{UNVERIFIED}, {NOT_DIAGNOSTIC}."
    assert (UNVERIFIED, NOT_DIAGNOSTIC) == ("AI result, unverified", "not for diagnostic use")
    assert shown.SourceImageSequence[0].ReferencedSOPInstanceUID == header().SOPInstanceUID
    assert shown.pixel_array.shape == (900, 1440, 3)


@pytest.mark.parametrize(("height", "width"), [(256, 256), (300, 150), (150, 300), (16, 16)])
def test_a_film_keeps_its_proportions(height: int, width: int) -> None:
    white = np.full((height, width), 255, dtype=np.uint8)
    blank = np.zeros_like(white)
    drawn, empty = (
        secondary_capture(study(), pixels, None, None, SETTINGS).pixel_array.astype(int) for pixels in (white, blank)
    )
    rows, columns = np.nonzero(np.abs(drawn - empty).sum(axis=2) > 300)
    tall, wide = np.ptp(rows) + 1, np.ptp(columns) + 1
    assert tall / wide == pytest.approx(height / width, rel=0.02)
    assert max(tall / 532, wide / 880) == pytest.approx(1, abs=0.01)


def test_an_unusable_picture_is_refused() -> None:
    for pixels in (np.zeros((4, 4)), np.zeros((4, 4, 3), np.uint8), np.zeros((0, 4), np.uint8)):
        with pytest.raises(ValueError, match="give uint8 of shape"):
            secondary_capture(study(), pixels, None, None, SETTINGS)
    with pytest.raises(ValueError, match="heatmap_finding is None"):
        secondary_capture(study(), FILM, np.zeros((4, 4, 3), np.uint8), None, SETTINGS)


def test_times_stand_in_the_zone_of_the_source() -> None:
    away = reread(structured_report(study(image(header(TimezoneOffsetFromUTC="-0530"))), "enhanced", SETTINGS))
    assert (away.ContentDate, away.ContentTime, away.TimezoneOffsetFromUTC) == ("20260203", "083506", "-0530")
    local = datetime(2026, 2, 3, 15, 5, 6, tzinfo=timezone(timedelta(hours=1)))
    near = reread(structured_report(study(image(answered_at=local)), "enhanced", SETTINGS))
    assert (near.ContentTime, "TimezoneOffsetFromUTC" in near) == ("150506", False)


def verhoeff_holds(number: str) -> bool:
    """SNOMED CT identifiers end in a check digit of the dihedral group of order ten (Verhoeff 1969)."""

    def times(left: int, right: int) -> int:
        if left < 5:
            return (left + right) % 5 + (0 if right < 5 else 5)
        return (left - right) % 5 + (5 if right < 5 else 0)

    permuted = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]
    total = 0
    for digit in reversed(number):
        total = times(total, permuted[int(digit)])
        permuted = [permuted[place] for place in (1, 5, 7, 6, 2, 8, 3, 0, 9, 4)]
    return total == 0


def all_codes() -> list[Code]:
    held = [value for value in vars(codes).values() if isinstance(value, Code | dict)]
    found = [code for value in held for code in (value.values() if isinstance(value, dict) else [value])]
    return [code for code in found if isinstance(code, Code)]


def test_snomed_codes_have_their_check_digit() -> None:
    snomed = {code.value for code in all_codes() if code.scheme == "SCT"}
    assert len(snomed) >= 20
    assert [value for value in sorted(snomed) if not verhoeff_holds(value)] == []
    # Codes for consolidation and hernia in circulation that are none.
    assert not any(verhoeff_holds(value) for value in ("95436003", "9494007", "60567007", "73122008"))


def test_codes_fit_their_representations_and_private_ones_are_introduced() -> None:
    for code in all_codes():
        assert 0 < len(code.value) <= 16
        assert 0 < len(code.meaning) <= 64
    assert {code.scheme for code in all_codes()} == {"SCT", "DCM", "UCUM", codes.PRIVATE_SCHEME}
    scheme = structured_report(study(), "enhanced", SETTINGS).CodingSchemeIdentificationSequence[0]
    assert (scheme.CodingSchemeDesignator, scheme.CodingSchemeUID) == ("99CXRRAY", codes.PRIVATE_SCHEME_UID)


def test_json_names_everything_and_nobody() -> None:
    answer = revised()
    made = {kind: result_uids(answer, kind) for kind in ("comprehensive-3d", "secondary-capture")}
    summary = json_summary(answer, made)
    assert json.loads(json.dumps(summary)) == summary
    assert [finding["name"] for finding in summary["findings"]] == list(FINDINGS)
    assert (summary["revision"], summary["status"]) == (2, "unverified")
    assert [one["sop_instance_uid"] for one in summary["images"]] == [str(header().SOPInstanceUID), OTHER_UID]
    report = structured_report(answer, "comprehensive-3d", SETTINGS)
    assert summary["results"]["comprehensive-3d"]["sop_instance_uid"] == report.SOPInstanceUID
    assert summary["predecessors"]["comprehensive-3d"]["sop_instance_uid"] == "2.25.11"
    assert summary["images"][0]["model"]["digest"] == "4f" * 32
    said = json.dumps(summary)
    assert not any(value in said for value in ("PHANTOM", "Phantom", "A-4711"))


def test_the_services_answer_is_taken_by_name() -> None:
    made = image_answer(header(), "00112233aabbccdd", service_answer(), ANSWERED)
    assert made == replace(image(made.header), warnings=())
    broken = service_answer()
    broken["findings"].pop()
    with pytest.raises(ValueError, match="Atelectasis"):
        image_answer(header(), "", broken, ANSWERED)


@pytest.mark.parametrize(
    ("clinical", "history"),
    [
        ({"history": None}, "not known"),
        ({"history": [], "history_source": "stated"}, "as stated: no finding"),
        ({"history": [], "history_source": "stored", "earlier_visits": []}, "no earlier visit"),
        ({"history": ["Pleural_Thickening"], "history_source": "stored", "earlier_visits": [{}]}, None),
        (None, "not known"),
    ],
)
def test_inputs_in_words(clinical: dict | None, history: str | None) -> None:
    words = dict(input_words(clinical))
    assert words == {
        "age": "not known",
        "sex": "not known",
        "view": "not known",
        "history": history or "1 earlier visit: Pleural Thickening",
    }


@pytest.mark.parametrize(
    ("value", "words"), [(0.0, "<0.1 %"), (0.0571, "5.7 %"), (0.0999, "10 %"), (0.5, "50 %"), (1.0, ">99.9 %")]
)
def test_percentages(value: float, words: str) -> None:
    assert percent(value) == words


def test_answers_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ValueError, match="all fourteen"):
        image(findings=findings()[:13])
    with pytest.raises(ValueError, match="time zone"):
        image(answered_at=datetime(2026, 2, 3))
    with pytest.raises(ValueError, match="is nan"):
        findings((float("nan"), *PROBABILITIES[1:]))
    with pytest.raises(ValueError, match="images are none"):
        StudyAnswer(images=())
    with pytest.raises(ValueError, match="revision is 0"):
        study(revision=0)


def test_real_films_headers_become_results_without_errors(real_data: Path, tmp_path: Path) -> None:
    files = sorted((real_data / "dicom").glob("chest_*.dcm"))
    assert files
    for file in files:
        with file.open("rb") as stream:
            source = read_dicom_header(stream, file.name)
        radiograph_header(source, file.name)
        answer: StudyAnswer = study(ImageAnswer(**{**vars(image()), "header": source, "answered_at": ANSWERED.astimezone(UTC)}))
        for result in (*(structured_report(answer, sr_class, SETTINGS) for sr_class in SR_CLASSES), capture(answer)):
            assert (result.PatientID, result.StudyInstanceUID) == (source.PatientID, source.StudyInstanceUID)
            assert errors(dciodvfy(written(result, tmp_path))) == []
