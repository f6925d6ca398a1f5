"""A study's answer as a structured report: for archives, and for programs that read codes and numbers.

The tree is the same in all three classes; which one an archive takes is a matter of its age. The report is preliminary and
unverified: nobody has looked at it.
"""

from pydicom.dataset import Dataset
from pydicom.sequence import Sequence

from serve.node.results.codes import private_scheme
from serve.node.results.report_tree import report_tree
from serve.node.results.result_object import SeriesWords, image_reference, result_object
from serve.node.results.result_uids import result_uids
from serve.node.results.settings import ResultSettings
from serve.node.results.source import choose_character_set, first_item, identifier, put, source_class, source_text
from serve.node.results.study_answer import Predecessor, SrClass, StudyAnswer

SERIES_DESCRIPTION = "AI chest findings (unverified)"


def structured_report(answer: StudyAnswer, sr_class: SrClass, settings: ResultSettings) -> Dataset:
    """The study's answer as an Imaging Measurement Report (PS3.16 TID 1500); the same answer gives the same bytes.

    Never raises for a header that was accepted as a chest radiograph's.

    Parameters
    ----------
    sr_class
        Comprehensive 3D SR, Comprehensive SR or Enhanced SR (PS3.3 A.35.13, A.35.3, A.35.2).
    """
    uids = result_uids(answer, sr_class)
    series = SeriesWords("SR", settings.sr_series_number, SERIES_DESCRIPTION)
    report = result_object(answer, uids, series, settings)
    # SR Document General Module (PS3.3 C.17.2).
    report.CompletionFlag = "COMPLETE"
    report.VerificationFlag = "UNVERIFIED"
    report.PreliminaryFlag = "PRELIMINARY"
    report.PerformedProcedureCodeSequence = Sequence()
    report.ReferencedPerformedProcedureStepSequence = Sequence()
    report.CodingSchemeIdentificationSequence = Sequence([private_scheme()])
    report.CurrentRequestedProcedureEvidenceSequence = Sequence([_evidence(answer)])
    if request := _request(answer):
        report.ReferencedRequestSequence = Sequence([request])
    if replaced := answer.predecessors.get(sr_class):
        report.PredecessorDocumentsSequence = Sequence([_predecessor(replaced)])
    for element in report_tree(answer, settings):
        report.add(element)
    choose_character_set(report, answer.ordered[0].header)
    return report


def _evidence(answer: StudyAnswer) -> Dataset:
    """Hierarchical references to all images (PS3.3 table C.17-3), by their series."""
    series: dict[str, Dataset] = {}
    for image in answer.ordered:
        uid = source_text(image.header, "SeriesInstanceUID")
        if uid not in series:
            series[uid] = Dataset()
            put(series[uid], "SeriesInstanceUID", uid)
            series[uid].ReferencedSOPSequence = Sequence()
        series[uid].ReferencedSOPSequence.append(image_reference(image, source_class(image.header)))
    return _study(answer.study_instance_uid, list(series.values()))


def _predecessor(replaced: Predecessor) -> Dataset:
    document, series = Dataset(), Dataset()
    put(document, "ReferencedSOPClassUID", replaced.sop_class_uid)
    put(document, "ReferencedSOPInstanceUID", replaced.sop_instance_uid)
    put(series, "SeriesInstanceUID", replaced.series_instance_uid)
    series.ReferencedSOPSequence = Sequence([document])
    return _study(replaced.study_instance_uid, [series])


def _study(uid: str, series: list[Dataset]) -> Dataset:
    study = Dataset()
    put(study, "StudyInstanceUID", uid)
    study.ReferencedSeriesSequence = Sequence(series)
    return study


def _request(answer: StudyAnswer) -> Dataset | None:
    """The order that the study fulfils, where the images name it (PS3.3 table C.17-2)."""
    header = answer.ordered[0].header
    accession = identifier(header, "AccessionNumber")
    if not accession:
        return None
    asked = first_item(header, "RequestAttributesSequence")
    item = Dataset()
    put(item, "StudyInstanceUID", answer.study_instance_uid)
    item.ReferencedStudySequence = Sequence()
    put(item, "AccessionNumber", accession)
    for keyword in ("PlacerOrderNumberImagingServiceRequest", "FillerOrderNumberImagingServiceRequest"):
        put(item, keyword, "")
    for keyword in ("RequestedProcedureID", "RequestedProcedureDescription"):
        put(item, keyword, identifier(asked, keyword))
    item.RequestedProcedureCodeSequence = Sequence()
    return item
