"""Which studies, series and reports of an archive count, what an answer says, and what is bounded: without any archive."""

import json
import threading
from dataclasses import replace
from datetime import date
from pathlib import Path

import pytest
from archives import film, match_of, report, until
from dicom_peers import DEFLATED, data_set_of, deflated
from pydantic import ValidationError
from pydicom.dataset import Dataset
from pydicom.uid import generate_uid
from radiographs import file_of
from result_answers import MODEL, PROBABILITIES, header, image, study

from cxr_ray.errors import UsageError
from cxr_ray.findings import FINDINGS
from serve.node.bounded import Breaker, Remembered
from serve.node.deadline import Aside, Deadline, DeadlineError
from serve.node.file_meta import FileMeta, encode_head
from serve.node.prior_query import (
    ArchiveError,
    EarlierStudy,
    NotAskedError,
    Question,
    earlier_studies,
    question_of,
    usable_series,
)
from serve.node.prior_results import newest, read_result
from serve.node.prior_web import parts
from serve.node.priors import Priors
from serve.node.priors_settings import PriorsSettings
from serve.node.results.result_object import file_bytes
from serve.node.results.settings import ResultSettings
from serve.node.results.structured_report import structured_report
from serve.priors_outcome import PriorsOutcome

QUESTION = Question("P1", "", "", "1.9", date(2020, 6, 1))
SERVICE = "http://127.0.0.1:1"


def test_question_of_a_broken_file(tmp_path: Path) -> None:
    (tmp_path / "broken").write_bytes(b"no DICOM")
    with pytest.raises(NotAskedError, match="cannot be read"):
        question_of(tmp_path / "broken")


def test_studies_of_other_regions_and_modalities_are_left_out() -> None:
    def match(**changes: object) -> Dataset:
        return match_of(film("P1", "20190101"), **changes)

    left_out = [
        match(ModalitiesInStudy=["CT", "SEG"]),
        match(StudyDescription="XR ABDOMEN"),
        match(StudyInstanceUID="1.2/../3"),
    ]
    wanted = [match(ModalitiesInStudy=["CR", "CT"]), match(StudyDescription="Chest and abdomen"), match(ModalitiesInStudy="")]
    found = earlier_studies([*left_out, *wanted], QUESTION, 10)
    assert {study.study_uid for study in found} == {each.StudyInstanceUID for each in wanted}


def test_series_of_laterals_and_other_regions_are_left_out() -> None:
    instance = film("P1", "20190101")

    def match(modality: str = "CR", **changes: object) -> Dataset:
        return match_of(instance, Modality=modality, SeriesInstanceUID=generate_uid(), **changes)

    left_out = [match(SeriesDescription="Chest lateral"), match(BodyPartExamined="KNEE"), match("CT"), match("PR")]
    left_out.append(match(StudyInstanceUID="1.2.3"))
    wanted = [match(SeriesDescription="PA and lateral"), match("DX", BodyPartExamined="PORT CHEST"), match("SR")]
    found = usable_series([*left_out, *wanted], str(instance.StudyInstanceUID))
    assert {series.series_uid for series in found} == {each.SeriesInstanceUID for each in wanted}


def read(result: Dataset, of: Dataset):
    study = EarlierStudy(str(of.StudyInstanceUID), date(2019, 1, 1), "")
    return read_result(file_of(result), study, QUESTION, "cxr-ray")


def test_a_result_is_read_with_all_that_it_says() -> None:
    earlier = film("P1", "20190101")
    result = read(report(earlier, ("Pleural_Thickening", "Mass")), earlier)
    assert result.positive == ("Mass", "Pleural_Thickening")
    assert [finding.name for finding in result.findings] == list(FINDINGS)
    assert {finding.probability for finding in result.findings if finding.present} == {0.9}
    revised = read(report(earlier, ("Mass",), InstanceNumber=2), earlier)
    assert newest([revised, None, result]) == revised


@pytest.mark.parametrize("kind", ["comprehensive-3d", "comprehensive", "enhanced"])
@pytest.mark.parametrize("calibrated", [False, True])
def test_what_the_node_writes_it_reads(kind, calibrated: bool) -> None:
    answer = study(image(header(PatientID="P1", StudyDate="20190101"), model=replace(MODEL, calibrated=calibrated)))
    written = file_bytes(structured_report(answer, kind, ResultSettings()))
    result = read_result(written, EarlierStudy(answer.study_instance_uid, date(2019, 1, 1), ""), QUESTION, "cxr-ray")
    assert result.positive == tuple(found.answer.name for found in answer.findings if found.answer.positive)
    assert 0 < len(result.positive) < len(FINDINGS)
    assert [finding.probability for finding in result.findings] == pytest.approx(PROBABILITIES, abs=1e-6)


def test_results_that_do_not_count() -> None:
    earlier = film("P1", "20190101")
    good = report(earlier, ("Mass",))
    assert read(good, earlier) is not None
    for keyword, value in (
        ("PatientID", "P2"),
        ("StudyInstanceUID", "1.2"),
        ("CompletionFlag", "PARTIAL"),
        ("Manufacturer", "X"),
    ):
        changed = report(earlier, ("Mass",), **{keyword: value})
        assert read(changed, earlier) is None, keyword
    short = report(earlier, ("Mass",))
    short.ContentSequence[0].ContentSequence.pop()
    assert read(short, earlier) is None
    both_ways = report(earlier, ("Mass",))
    group = both_ways.ContentSequence[0].ContentSequence[0].ContentSequence
    group.append(report(earlier, FINDINGS).ContentSequence[0].ContentSequence[0].ContentSequence[-1])
    assert read(both_ways, earlier) is None
    assert read_result(b"no DICOM", EarlierStudy("1.2", date(2019, 1, 1), ""), QUESTION, "cxr-ray") is None


def test_a_report_of_very_many_items_is_not_read() -> None:
    earlier = film("P1", "20190101")
    study = EarlierStudy(str(earlier.StudyInstanceUID), date(2019, 1, 1), "")
    good = report(earlier, ("Mass",))
    for undefined in (False, True):
        many = report(earlier, ("Mass",))
        many["ContentSequence"].is_undefined_length = undefined
        assert read_result(file_of(many), study, QUESTION, "cxr-ray") is not None
        many.ContentSequence.extend(Dataset() for _ in range(100_000))
        assert read_result(file_of(many), study, QUESTION, "cxr-ray") is None
    head = encode_head(FileMeta("1.2.840.10008.5.1.4.1.1.88.34", "1.2.3", DEFLATED))
    assert read_result(head + deflated(data_set_of(file_of(good))), study, QUESTION, "cxr-ray") is not None
    assert read_result(head + deflated(data_set_of(file_of(good)), mebibytes=100), study, QUESTION, "cxr-ray") is None


def test_parts_of_a_message() -> None:
    kind = 'multipart/related; type="application/dicom"; boundary="xx"'
    body = b"--xx\r\nContent-Type: application/dicom\r\n\r\none\r\n--xx\r\nA: b\r\n\r\n\r\ntwo\r\n--xx--\r\n"
    assert list(parts(body, kind)) == [b"one", b"\r\ntwo"]
    for wrong, said in ((body[:-8], kind), (body, "application/dicom"), (b"", kind), (b"--xx\r\nnothing\r\n--xx--", kind)):
        with pytest.raises(ArchiveError):
            list(parts(wrong, said))


def test_deadline_and_what_is_left_behind() -> None:
    assert Aside(lambda: 3, "work").result(Deadline(60)) == 3
    with pytest.raises(KeyError):
        Aside(lambda: {}["a"], "work").result(Deadline(60))
    over = threading.Event()
    with pytest.raises(DeadlineError):
        Aside(over.wait, "work").result(Deadline(0.05))
    over.set()
    late = Deadline(1e-9)
    with pytest.raises(DeadlineError):
        late.check()
    assert late.left() == 0
    assert 0 < Deadline(60).earlier(0.5).left() <= 30


def test_what_is_remembered_is_bounded() -> None:
    remembered: Remembered[int] = Remembered(60, 3)
    for number in range(5):
        remembered.put(number, number)
    assert [remembered.get(number) for number in range(5)] == [None, None, 2, 3, 4]
    assert len(remembered) == 3
    brief: Remembered[int] = Remembered(1e-9, 3)
    brief.put(1, 1)
    assert brief.get(1) is None


def test_breaker_lets_one_try_after_a_pause() -> None:
    breaker = Breaker(2, 0.2)
    assert [breaker.failed(), breaker.may_try(), breaker.failed(), breaker.may_try()] == [False, True, True, False]
    until(breaker.may_try, "the pause's end")
    assert not breaker.may_try()
    breaker.worked()
    assert breaker.may_try()


def test_settings_name_what_is_missing(tmp_path: Path) -> None:
    for given, missing in (({"kind": "dicom", "host": "pacs"}, "called_ae"), ({"kind": "dicomweb"}, "url")):
        with pytest.raises(ValidationError, match=f"{missing} is not given"):
            PriorsSettings(**given)
    with pytest.raises(ValidationError, match="tls_key is given without"):
        PriorsSettings(tls_key=tmp_path / "key.pem")
    with pytest.raises(UsageError, match=r"token_file .*none cannot be used"):
        Priors(PriorsSettings(kind="dicomweb", url=SERVICE, token_file=tmp_path / "none"), SERVICE)
    with pytest.raises(UsageError, match=r"ca\.pem: No such file"):
        Priors(PriorsSettings(kind="dicom", host="pacs", called_ae="PACS", tls_ca=tmp_path / "ca.pem"), SERVICE)
    with pytest.raises(UsageError, match="is off"):
        Priors(PriorsSettings(), SERVICE)


@pytest.mark.parametrize(
    ("said", "warning"),
    [
        ({"outcome": "found", "studies": 2, "used": 2}, None),
        ({"outcome": "none"}, None),
        ({"outcome": "timeout", "budget_seconds": 5}, "the archive did not answer within 5 s; predicted without its studies"),
        (
            {"outcome": "timeout", "budget_seconds": 2.5, "studies": 3, "used": 1},
            "the archive did not answer within 2.5 s; predicted with 1 of 3 earlier studies",
        ),
        ({"outcome": "failed", "reason": "HTTP 500"}, "the archive failed (HTTP 500); predicted without its studies"),
    ],
)
def test_what_an_answer_says(said: dict, warning: str | None) -> None:
    expected = [] if warning is None else [f"priors: {warning}"]
    assert PriorsOutcome.model_validate_json(json.dumps({"asked": True, **said})).warnings() == expected
