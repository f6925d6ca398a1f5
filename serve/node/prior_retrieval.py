"""From an earlier study in the archive to what can be told of it: this software's own result, or its frontal chest films."""

from dataclasses import dataclass

from cxr_ray.bounded_header import read_bounded_header
from cxr_ray.errors import CxrRayError
from cxr_ray.frontal_chest import check_frontal_chest
from serve.node.deadline import DeadlineError
from serve.node.prior_query import (
    Archive,
    ArchiveError,
    EarlierSeries,
    EarlierStudy,
    FetchedTooMuchError,
    Question,
    earlier_studies,
    is_of,
    usable_series,
)
from serve.node.prior_results import ReadResult, newest, read_result
from serve.node.priors_settings import PriorsSettings

# A study has one frontal film, sometimes a repeated one; a study of many is none that the network was taught.
_MOST_IMAGES = 2
_MOST_SERIES = 10


@dataclass(frozen=True)
class FetchedStudy:
    """What an archive has of an earlier study: a result of this software, or frontal chest films, or neither."""

    study: EarlierStudy
    result: ReadResult | None = None
    images: tuple[bytes, ...] = ()


class Retrieval:
    """What was found and fetched so far, also when the archive fails in between.

    Attributes
    ----------
    found
        The earlier studies that are wanted, the newest first.
    fetched
        What there is of those that were not known, in the same order.
    failure
        Why it ended early: an error of the archive or of the time; None where it did not.
    """

    def __init__(self, settings: PriorsSettings, question: Question, known: frozenset[str]) -> None:
        self._settings, self._question, self._known = settings, question, known
        self.found: list[EarlierStudy] = []
        self.fetched: list[FetchedStudy] = []
        self.failure: ArchiveError | DeadlineError | None = None

    def run(self, archive: Archive) -> None:
        """Ask for the studies, then fetch the newest first, until all are here or something ends it."""
        try:
            with archive:
                self.found = earlier_studies(archive.studies(self._question), self._question, self._settings.max_studies)
                for study in self.found:
                    if study.study_uid not in self._known:
                        self.fetched.append(self._fetch(archive, study))
        except FetchedTooMuchError:
            # What is here by then counts: the newest studies came first.
            if not self.found:
                self.failure = ArchiveError("it sends more than max_bytes")
        except (ArchiveError, DeadlineError) as failure:
            self.failure = failure

    def _fetch(self, archive: Archive, study: EarlierStudy) -> FetchedStudy:
        series = usable_series(archive.series(study.study_uid), study.study_uid)[:_MOST_SERIES]
        if self._settings.use != "images":
            result = self._own_result(archive, study, [each for each in series if each.modality == "SR"])
            if result is not None:
                return FetchedStudy(study, result=result)
        if self._settings.use == "results":
            return FetchedStudy(study)
        return FetchedStudy(study, images=self._images(archive, study, [each for each in series if each.modality != "SR"]))

    def _own_result(self, archive: Archive, study: EarlierStudy, reports: list[EarlierSeries]) -> ReadResult | None:
        files = (file for each in reports for file in archive.instances(study.study_uid, each.series_uid))
        return newest(read_result(file, study, self._question, self._settings.manufacturer) for file in files)

    def _images(self, archive: Archive, study: EarlierStudy, radiographs: list[EarlierSeries]) -> tuple[bytes, ...]:
        images: list[bytes] = []
        for each in radiographs:
            files = archive.instances(study.study_uid, each.series_uid)
            images.extend(file for file in files if self._is_prior(file, study))
            if len(images) >= _MOST_IMAGES:
                break
        return tuple(images[:_MOST_IMAGES])

    def _is_prior(self, file: bytes, study: EarlierStudy) -> bool:
        """Whether this is a frontal chest film of the study and the patient that were asked for, as its own header says."""
        try:
            header = read_bounded_header(file, "prior")
            if not is_of(header, self._question) or str(header.StudyInstanceUID) != study.study_uid:
                return False
            # History counts by this date: one that differs from the archive's answer must not put the film elsewhere.
            if str(header.get("StudyDate") or "").strip() != f"{study.day:%Y%m%d}":
                return False
            check_frontal_chest(header, "prior")
        except CxrRayError:
            return False
        # An archive chose these bytes, and a parser has no closed list of ways to fail on them.
        except Exception:  # noqa: BLE001
            return False
        return True
