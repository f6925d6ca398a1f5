"""The content of a structured report: PS3.16 TID 1500 "Measurement Report", a group of TID 1501 for each finding.

Built from highdicom's templates, except for the image library: what highdicom reads off an image's header for it, real headers
often lack.
"""

from highdicom.sr import (
    AlgorithmIdentification,
    CodeContentItem,
    CodedConcept,
    ContainerContentItem,
    ContentItem,
    ContentSequence,
    DateContentItem,
    DeviceObserverIdentifyingAttributes,
    FindingSite,
    ImageContentItem,
    Measurement,
    MeasurementReport,
    MeasurementsAndQualitativeEvaluations,
    NumContentItem,
    ObservationContext,
    ObserverContext,
    QualitativeEvaluation,
    RelationshipTypeValues,
    SourceImageForMeasurementGroup,
    TextContentItem,
    TrackingIdentifier,
)
from pydicom.dataset import Dataset
from pydicom.sr.codedict import codes as standard

from cxr_ray.dicom_values import whole_number
from cxr_ray.findings import Code
from serve.node.results import codes
from serve.node.results.result_uids import tracking_uid
from serve.node.results.settings import ResultSettings
from serve.node.results.source import orientation, source_class, source_date, source_text
from serve.node.results.study_answer import ImageAnswer, StudyAnswer, StudyFinding

_DECIMALS = 6
_LIBRARY_PLACE = -1


def report_tree(answer: StudyAnswer, settings: ResultSettings) -> Dataset:
    """The root container, with everything below it."""
    report = MeasurementReport(
        observation_context=_observer(settings),
        procedure_reported=_concept(codes.PROCEDURE_REPORTED),
        imaging_measurements=[_group(answer, found, settings) for found in answer.findings],
    )
    root: Dataset = report[0]
    content = root.ContentSequence
    # Before the measurements (PS3.16 TID 1500 rows 5 and 6).
    content.insert(len(content) + _LIBRARY_PLACE, _library(answer))
    return root


def _concept(code: Code) -> CodedConcept:
    return CodedConcept(code.value, code.scheme, code.meaning)


def _observer(settings: ResultSettings) -> ObservationContext:
    device = DeviceObserverIdentifyingAttributes(
        uid=settings.observer_uid,
        name=settings.device_name,
        manufacturer_name=settings.manufacturer,
        model_name=settings.device_model,
        serial_number=settings.serial_number,
    )
    return ObservationContext(observer_device_context=ObserverContext(standard.DCM.Device, device))


def _group(answer: StudyAnswer, found: StudyFinding, settings: ResultSettings) -> MeasurementsAndQualitativeEvaluations:
    name, image = found.answer.name, found.image
    site = codes.FINDING_SITES.get(name)
    return MeasurementsAndQualitativeEvaluations(
        tracking_identifier=TrackingIdentifier(uid=tracking_uid(answer, name), identifier=name.replace("_", " ")),
        finding_type=_concept(codes.FINDING_CODES[name]),
        finding_sites=[FindingSite(_concept(site))] if site else None,
        algorithm_id=AlgorithmIdentification(
            name=image.model.name,
            version=image.model.version,
            manufacturer=settings.manufacturer,
            parameters=_parameters(answer, found),
        ),
        source_images=[SourceImageForMeasurementGroup(source_class(image.header), image.sop_instance_uid)],
        measurements=[_measurement(answer, found)],
        qualitative_evaluations=[_evaluation(found)],
    )


def _parameters(answer: StudyAnswer, found: StudyFinding) -> list[str]:
    image, finding = found.image, found.answer
    of_several = f" of image {answer.ordered.index(image) + 1} of {len(answer.ordered)}" if len(answer.ordered) > 1 else ""
    return [
        f"bundle SHA-256: {image.model.digest}",
        f"operating threshold: {finding.threshold:.{_DECIMALS}g}",
        *(f"input{of_several}, {name}: {value}" for name, value in image.inputs),
        *(f"warning{of_several}: {warning}" for warning in image.warnings),
    ]


def _measurement(answer: StudyAnswer, found: StudyFinding) -> Measurement:
    calibrated, probability = found.image.model.calibrated, found.answer.probability
    return Measurement(
        name=_concept(codes.PROBABILITY if calibrated else codes.CERTAINTY),
        value=round(probability if calibrated else 100 * probability, _DECIMALS),
        unit=_concept(codes.NO_UNITS if calibrated else codes.PERCENT),
        derivation=_concept(codes.MAXIMUM) if len(answer.ordered) > 1 else None,
    )


def _evaluation(found: StudyFinding) -> QualitativeEvaluation:
    # The question is the finding itself, so that a viewer that shows name = value reads "Pneumothorax = Present".
    question = _concept(codes.FINDING_CODES[found.answer.name])
    return QualitativeEvaluation(question, _concept(codes.PRESENT if found.answer.positive else codes.ABSENT))


def _library(answer: StudyAnswer) -> ContainerContentItem:
    """Image Library (TID 1600): all images of the answer, each with what its header says of it (TID 1602, 1603)."""
    library = ContainerContentItem(_concept(codes.IMAGE_LIBRARY), relationship_type=RelationshipTypeValues.CONTAINS)
    group = ContainerContentItem(_concept(codes.IMAGE_LIBRARY_GROUP), relationship_type=RelationshipTypeValues.CONTAINS)
    group.ContentSequence = ContentSequence([_entry(image) for image in answer.ordered])
    library.ContentSequence = ContentSequence([group])
    return library


def _entry(image: ImageAnswer) -> ImageContentItem:
    entry = ImageContentItem(
        _concept(codes.IMAGE_OF_LIBRARY),
        referenced_sop_class_uid=source_class(image.header),
        referenced_sop_instance_uid=image.sop_instance_uid,
        relationship_type=RelationshipTypeValues.CONTAINS,
    )
    if described := _descriptors(image.header):
        entry.ContentSequence = ContentSequence(described)
    return entry


def _descriptors(header: Dataset) -> list[ContentItem]:
    relation = RelationshipTypeValues.HAS_ACQ_CONTEXT
    said: list[ContentItem] = []
    modality = codes.MODALITIES.get(source_text(header, "Modality").upper())
    if modality:
        said.append(CodeContentItem(_concept(codes.MODALITY), _concept(modality), relation))
    if studied := source_date(header, "StudyDate"):
        said.append(DateContentItem(_concept(codes.STUDY_DATE), studied, relation))
    for name, keyword in ((codes.ROWS, "Rows"), (codes.COLUMNS, "Columns")):
        count = _count(header, keyword)
        if count:
            said.append(NumContentItem(_concept(name), count, _concept(codes.PIXELS), relationship_type=relation))
    for name, way in zip((codes.ORIENTATION_ROW, codes.ORIENTATION_COLUMN), orientation(header) or (), strict=False):
        said.append(TextContentItem(_concept(name), way, relation))
    return said


def _count(header: Dataset, keyword: str) -> int:
    try:
        return whole_number(header, keyword)
    except Exception:  # noqa: BLE001 - as `source_text`
        return 0
