"""A study's answer as a picture in the archive: Secondary Capture, RGB, uncompressed.

Of Modality OT, so that no viewer hangs it among the radiographs, and no node takes it for one and answers it. Uncompressed
(3.9 MB, less than half of a film), because every archive and viewer reads that.
"""

import numpy as np
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence

from serve.node.results.capture_picture import NOT_DIAGNOSTIC, UNVERIFIED, Heatmap, capture_picture
from serve.node.results.codes import SOURCE_FOR_PROCESSING, code_item
from serve.node.results.result_object import SeriesWords, image_reference, made_at, result_object
from serve.node.results.result_uids import result_uids
from serve.node.results.settings import ResultSettings
from serve.node.results.source import choose_character_set, orientation, put, source_class, source_text
from serve.node.results.study_answer import ImageAnswer, StudyAnswer

SERIES_DESCRIPTION = "AI chest findings, picture (unverified)"
_LOSSY = "01"


def shown_image(answer: StudyAnswer) -> ImageAnswer:
    """Which of a study's images its one Secondary Capture shows: that of the leading finding."""
    return answer.leading.image


def secondary_capture(
    answer: StudyAnswer,
    radiograph: np.ndarray,
    heatmap: np.ndarray | None,
    heatmap_finding: str | None,
    settings: ResultSettings,
) -> Dataset:
    """The study's answer as an RGB picture; the same arguments give the same bytes.

    Never raises for a header that was accepted as a chest radiograph's.

    Parameters
    ----------
    radiograph
        `shown_image` as it is stored, air dark: uint8, shape (height, width).
    heatmap
        The same under a heatmap: RGB, uint8, shape (height, width, 3), of any size; None where there is none.
    heatmap_finding
        Of which finding the heatmap is.

    Raises
    ------
    ValueError
        If the arrays are not of these types and shapes, or the heatmap's finding is not said.
    """
    picture = capture_picture(answer, _checked(radiograph, 2), _heatmap(heatmap, heatmap_finding))
    uids = result_uids(answer, "secondary-capture")
    series = SeriesWords("OT", settings.capture_series_number, SERIES_DESCRIPTION)
    capture = result_object(answer, uids, series, settings)
    capture.BodyPartExamined = "CHEST"
    _describe(capture, answer)
    _put_pixels(capture, picture)
    choose_character_set(capture, answer.ordered[0].header)
    return capture


def _heatmap(heatmap: np.ndarray | None, finding: str | None) -> Heatmap | None:
    if heatmap is None:
        return None
    if finding is None:
        raise ValueError("heatmap_finding is None; name the finding that the heatmap is of")
    return Heatmap(_checked(heatmap, 3), finding)


def _checked(pixels: np.ndarray, dimensions: int) -> np.ndarray:
    colours = dimensions == 2 or pixels.shape[2:] == (3,)
    if pixels.dtype != np.uint8 or pixels.ndim != dimensions or not colours or pixels.size == 0:
        wanted = "(height, width)" if dimensions == 2 else "(height, width, 3)"
        raise ValueError(f"pixels are {pixels.dtype} of shape {pixels.shape}; give uint8 of shape {wanted}")
    return pixels


def _describe(capture: Dataset, answer: StudyAnswer) -> None:
    """SC Equipment, SC Image and General Image Modules (PS3.3 C.8.6.1, C.8.6.2, C.7.6.1)."""
    made = made_at(answer)
    capture.ConversionType = "WSD"
    capture.DateOfSecondaryCapture, capture.TimeOfSecondaryCapture = f"{made:%Y%m%d}", f"{made:%H%M%S}"
    capture.ImageType = ["DERIVED", "SECONDARY"]
    capture.BurnedInAnnotation = "YES"
    runs = orientation(shown_image(answer).header)
    capture.PatientOrientation = list(runs) if runs else ""
    capture.SourceImageSequence = Sequence([_source(image) for image in answer.ordered])
    capture.DerivationDescription = " ".join([f"{UNVERIFIED}, {NOT_DIAGNOSTIC}.", *_history(answer)])
    _copy_loss(shown_image(answer).header, capture)


def _history(answer: StudyAnswer) -> list[str]:
    replaced = answer.predecessors.get("secondary-capture")
    lossy = source_text(shown_image(answer).header, "LossyImageCompression") == _LOSSY
    return [
        *([f"Revision {answer.revision}, replaces {replaced.sop_instance_uid}."] if replaced else []),
        *(["The source image had been compressed with loss."] if lossy else []),
    ]


def _source(image: ImageAnswer) -> Dataset:
    item = image_reference(image, source_class(image.header))
    item.PurposeOfReferenceCodeSequence = Sequence([code_item(SOURCE_FOR_PROCESSING)])
    return item


def _copy_loss(header: Dataset, capture: Dataset) -> None:
    """What was lost before stays lost (PS3.3 C.7.6.1.1.5); without the ratio the flag would be invalid."""
    try:
        ratio = float(source_text(header, "LossyImageCompressionRatio").split("\\")[0])
    except ValueError:
        return
    if source_text(header, "LossyImageCompression") == _LOSSY and 1 <= ratio < 1e4:
        put(capture, "LossyImageCompression", _LOSSY)
        put(capture, "LossyImageCompressionRatio", f"{ratio:.6g}")


def _put_pixels(capture: Dataset, picture: np.ndarray) -> None:
    capture.SamplesPerPixel, capture.PhotometricInterpretation, capture.PlanarConfiguration = 3, "RGB", 0
    capture.Rows, capture.Columns = picture.shape[:2]
    capture.BitsAllocated = capture.BitsStored = 8
    capture.HighBit, capture.PixelRepresentation = 7, 0
    capture.PixelData = np.ascontiguousarray(picture).tobytes()
