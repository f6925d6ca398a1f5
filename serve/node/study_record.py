"""What a study's results are made of: source headers without pixels, the service's answers, and the pictures that it drew."""

import json
from http import HTTPStatus
from io import BytesIO
from urllib.parse import quote

import httpx
import numpy as np
from PIL import Image
from pydicom.dataset import Dataset

from cxr_ray.bounded_header import read_bounded_header
from cxr_ray.errors import CxrRayError
from serve.node.assembly import ServiceAwayError
from serve.node.results.from_service import image_answer
from serve.node.results.study_answer import ImageAnswer
from serve.node.spool import Spool

# Whoever asks again is answered alike: the results store is another one, say.
_LASTING = frozenset({400, 404, 410, 422})


def read_image(spool: Spool, name: str) -> ImageAnswer:
    """Read an answered instance's header and answer.

    Raises
    ------
    FileNotFoundError
        When the spool does not hold them any more.
    CxrRayError
        When the header cannot be read within bounds.
    ValueError
        When the answer lacks something.
    """
    instance = spool.answers.instance(name)
    return image_answer(
        read_bounded_header(instance.path, name),
        instance.content_digest,
        json.loads(spool.answers.answer(name)),
        spool.answers.answered_at(name).astimezone(),
    )


class Drawings:
    """The pictures that the service keeps or draws of the instances of a study."""

    def __init__(self, client: httpx.Client) -> None:
        self._client = client

    def radiograph(self, source: Dataset) -> np.ndarray:
        """The film as it is shown to people: uint8, height x width.

        Raises
        ------
        ServiceAwayError
            When the service does not give it now.
        CxrRayError
            When the service does not have it.
        """
        return np.asarray(self._picture(source, "film.png").convert("L"))

    def heatmap(self, source: Dataset, finding: str) -> np.ndarray:
        """The film with what speaks for a finding in warm colours: uint8, height x width x 3.

        Raises
        ------
        ServiceAwayError
            When the service does not give it now.
        CxrRayError
            When the service does not have it.
        """
        return np.asarray(self._picture(source, f"heatmap/{finding}.png").convert("RGB"))

    def _picture(self, source: Dataset, what: str) -> Image.Image:
        # A peer chose these: they are names here, and never parts of a path.
        study, instance = (quote(str(uid), safe="") for uid in (source.StudyInstanceUID, source.SOPInstanceUID))
        place = f"/v1/studies/{study}/instances/{instance}"
        try:
            answer = self._client.get(f"{place}/{what}")
        except httpx.HTTPError as error:
            raise ServiceAwayError(f"the service cannot be reached ({type(error).__name__})") from error
        if answer.status_code in _LASTING:
            raise CxrRayError(
                f"the service has no picture of this instance ({answer.status_code}); replay it to have it answered anew"
            )
        if answer.status_code != HTTPStatus.OK:
            raise ServiceAwayError(f"the service answers {answer.status_code} when asked for a picture")
        return Image.open(BytesIO(answer.content))
