"""What every result object has, whatever it shows: whose it is, which series, who made it and when."""

from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from io import BytesIO

from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.sequence import Sequence
from pydicom.uid import ExplicitVRLittleEndian

from serve.node.results.codes import PROCESSING_EQUIPMENT, code_item
from serve.node.results.result_uids import ResultUids
from serve.node.results.settings import ResultSettings
from serve.node.results.source import copy_patient_and_study, put, utc_offset
from serve.node.results.study_answer import ImageAnswer, Model, StudyAnswer
from serve.node.spool import IMPLEMENTATION_CLASS_UID, IMPLEMENTATION_VERSION_NAME

_LONGEST_LO = 64


@dataclass(frozen=True)
class SeriesWords:
    """What tells the result's series from others: modality, number and description."""

    modality: str
    number: int
    description: str


def result_object(answer: StudyAnswer, uids: ResultUids, series: SeriesWords, settings: ResultSettings) -> Dataset:
    """The modules that all results share (PS3.3 C.7.1 to C.7.5, C.12.1), with file meta information."""
    result = Dataset()
    result.file_meta = _file_meta(uids)
    put(result, "SOPClassUID", uids.sop_class_uid)
    put(result, "SOPInstanceUID", uids.sop_instance_uid)
    copy_patient_and_study(answer.ordered[0].header, result)
    put(result, "SeriesInstanceUID", uids.series_instance_uid)
    result.Modality, result.SeriesNumber, result.SeriesDescription = series.modality, series.number, series.description
    result.InstanceNumber = answer.revision
    _sign(result, settings)
    made = made_at(answer)
    for stem in ("InstanceCreation", "Content"):
        setattr(result, f"{stem}Date", f"{made:%Y%m%d}")
        setattr(result, f"{stem}Time", f"{made:%H%M%S}")
    models = {image.model.digest: image.model for image in answer.ordered}
    result.ContributingEquipmentSequence = Sequence([_equipment(model, made, settings) for model in models.values()])
    return result


def file_bytes(result: Dataset) -> bytes:
    """The result as a file (PS3.10)."""
    content = BytesIO()
    result.save_as(content, enforce_file_format=True)
    return content.getvalue()


def made_at(answer: StudyAnswer) -> datetime:
    """When the result was made: in the source's time zone where it says one, for its study times stand beside it."""
    offset = utc_offset(answer.ordered[0].header)
    if not offset:
        return answer.answered_at
    away = timedelta(hours=int(offset[1:3]), minutes=int(offset[3:]))
    return answer.answered_at.astimezone(timezone(-away if offset[0] == "-" else away))


def image_reference(image: ImageAnswer, sop_class_uid: str) -> Dataset:
    """An item that refers to a source image (PS3.3 section 10.3)."""
    item = Dataset()
    put(item, "ReferencedSOPClassUID", sop_class_uid)
    put(item, "ReferencedSOPInstanceUID", image.sop_instance_uid)
    return item


def within(value: str, length: int = _LONGEST_LO) -> str:
    """A text of our own as one value that is no longer than its representation allows."""
    return value.replace("\\", "/")[:length].strip()


def _file_meta(uids: ResultUids) -> FileMetaDataset:
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = uids.sop_class_uid
    meta.MediaStorageSOPInstanceUID = uids.sop_instance_uid
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    meta.ImplementationClassUID = IMPLEMENTATION_CLASS_UID
    meta.ImplementationVersionName = IMPLEMENTATION_VERSION_NAME
    return meta


def _sign(result: Dataset, settings: ResultSettings) -> None:
    result.Manufacturer = settings.manufacturer
    result.ManufacturerModelName = settings.device_model
    result.DeviceSerialNumber = settings.serial_number
    result.SoftwareVersions = settings.software_version
    result.StationName = within(settings.device_name, 16)
    if settings.institution_name:
        result.InstitutionName = settings.institution_name


def _equipment(model: Model, made: datetime, settings: ResultSettings) -> Dataset:
    item = Dataset()
    item.PurposeOfReferenceCodeSequence = Sequence([code_item(PROCESSING_EQUIPMENT)])
    item.Manufacturer = settings.manufacturer
    item.ManufacturerModelName = within(model.name)
    item.DeviceSerialNumber = settings.serial_number
    item.SoftwareVersions = [within(model.version), within(model.digest)]
    item.ContributionDateTime = f"{made:%Y%m%d%H%M%S%z}"
    item.ContributionDescription = "Detection of findings by a neural network; not verified"
    return item
