"""Archives of chest films of noise, ingested, and what the dataset then says: for tests that need several of them."""

import numpy as np
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian

from cxr_ray.dataset import Dataset as Shards
from cxr_ray.findings import names
from cxr_ray.records import SPLITS
from ingest.dicom import DicomSettings, ingest_dicom

ROOT = "1.2.826.0.1.3680043.8.498.77"


def uid(*parts):
    return ".".join([ROOT, *map(str, parts)])


def write(path, patient, study, image, date="20200131", time="101112", **attributes):
    """A chest film of noise whose seed is its own UID; attributes that are None are removed."""
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.SOPClassUID = "1.2.840.10008.5.1.4.1.1.1.1"
    dataset.StudyInstanceUID, dataset.SeriesInstanceUID = uid(study), uid(study, 1)
    dataset.SOPInstanceUID = uid(study, 1, image)
    dataset.PatientID, dataset.PatientName, dataset.PatientSex = patient, f"Muster^{patient}", "F"
    dataset.PatientAge, dataset.PatientBirthDate, dataset.AccessionNumber = "058Y", "19611224", f"ACC{study}"
    dataset.StudyDate, dataset.StudyTime = date, time
    dataset.Modality, dataset.BodyPartExamined, dataset.ViewPosition = "DX", "CHEST", "PA"
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
    dataset.Rows = dataset.Columns = 24
    dataset.BitsAllocated = dataset.BitsStored = 8
    dataset.HighBit, dataset.PixelRepresentation = 7, 0
    dataset.PixelData = np.random.default_rng([study, image]).integers(0, 256, 576).astype(np.uint8).tobytes()
    for name, value in attributes.items():
        if value is None:
            del dataset[name]
        else:
            setattr(dataset, name, value)
    path.parent.mkdir(parents=True, exist_ok=True)
    dataset.save_as(path, enforce_file_format=True)
    return str(dataset.SOPInstanceUID)


def label_file(path, labels):
    path.write_text("SOPInstanceUID,Finding Labels\n" + "".join(f"{name},{text}\n" for name, text in labels.items()))
    return str(path)


def ingest(source, out, **settings):
    return ingest_dicom(DicomSettings(source=str(source), out=str(out), **{"size": 16, "max_quarantined": 0.5} | settings))


def rows_of(out):
    """The rows of every split, by (patient key, visit, view)."""
    shards = Shards(str(out))
    columns = ["image_id", "patient_key", "visit", "age_years", "sex", "view", "labels", "split", "source"]
    columns += ["history_count", "history_ever", "history_last", "history_fraction"]
    rows = []
    for split in SPLITS:
        if shards.manifest.splits[split].images:
            rows += shards.read(split, columns).to_pylist()
    return rows


def visits_of(out):
    """Of the only patient: labels, earlier visits, findings ever and last seen, in the order of visits."""
    rows = sorted(rows_of(out), key=lambda row: (row["visit"], row["view"] or ""))
    assert len({row["patient_key"] for row in rows}) == 1
    shown = [(row["labels"], row["history_count"], row["history_ever"], row["history_last"]) for row in rows]
    return [
        (row["visit"], *(value if value is None or isinstance(value, int) else names(value) for value in values))
        for row, values in zip(rows, shown, strict=True)
    ]
