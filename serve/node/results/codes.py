"""Every coded concept that results hold, in one place; `docs/results.md` has the evidence for each.

Those of the fourteen findings stand with the findings, in `cxr_ray.findings.CODES`.
"""

from pydicom.dataset import Dataset

from cxr_ray.findings import CODES, Code

PRIVATE_SCHEME = "99CXRRAY"
PRIVATE_SCHEME_UID = "2.25.265722474398354278272774067191740402560"

FINDING_CODES = CODES
# Where the finding's own code leaves open of what it is one.
FINDING_SITES = {
    "Mass": Code("39607008", "SCT", "Lung"),
    "Nodule": Code("39607008", "SCT", "Lung"),
    "Pleural_Thickening": Code("3120008", "SCT", "Pleura"),
}

# CID 100 has no code for a radiograph of the chest, and its "XR unspecified body region" is too young for PixelMed's validator.
PROCEDURE_REPORTED = Code("363679005", "SCT", "Imaging procedure")
PROBABILITY = Code("122157", "DCM", "Probability")
NO_UNITS = Code("1", "UCUM", "no units")
CERTAINTY = Code("111012", "DCM", "Certainty of Finding")
PERCENT = Code("%", "UCUM", "Percent")
MAXIMUM = Code("56851009", "SCT", "Maximum")
PRESENT = Code("52101004", "SCT", "Present")
ABSENT = Code("272519000", "SCT", "Absent")

IMAGE_LIBRARY = Code("111028", "DCM", "Image Library")
IMAGE_LIBRARY_GROUP = Code("126200", "DCM", "Image Library Group")
IMAGE_OF_LIBRARY = Code("260753009", "SCT", "Source")
MODALITY = Code("121139", "DCM", "Modality")
MODALITIES = {
    "CR": Code("CR", "DCM", "Computed Radiography"),
    "DX": Code("DX", "DCM", "Digital Radiography"),
}
STUDY_DATE = Code("111060", "DCM", "Study Date")
ROWS = Code("110910", "DCM", "Pixel Data Rows")
COLUMNS = Code("110911", "DCM", "Pixel Data Columns")
PIXELS = Code("{pixels}", "UCUM", "Pixels")
ORIENTATION_ROW = Code("111044", "DCM", "Patient Orientation Row")
ORIENTATION_COLUMN = Code("111043", "DCM", "Patient Orientation Column")

PROCESSING_EQUIPMENT = Code("109102", "DCM", "Processing Equipment")
SOURCE_FOR_PROCESSING = Code("121322", "DCM", "Source Image for Image Processing Operation")


def code_item(code: Code) -> Dataset:
    """The item of a code sequence (PS3.3 section 8.8)."""
    item = Dataset()
    item.CodeValue, item.CodingSchemeDesignator, item.CodeMeaning = code.value, code.scheme, code.meaning
    return item


def private_scheme() -> Dataset:
    """The item of Coding Scheme Identification Sequence (0008,0110) that says whose the private codes are."""
    item = Dataset()
    item.CodingSchemeDesignator = PRIVATE_SCHEME
    item.CodingSchemeUID = PRIVATE_SCHEME_UID
    item.CodingSchemeName = "cxr-ray findings"
    item.CodingSchemeResponsibleOrganization = "cxr-ray"
    return item
