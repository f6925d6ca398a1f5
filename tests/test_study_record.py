"""The pictures that results show, as the service gives them: now, not now, or never."""

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO

import httpx
import numpy as np
import pytest
from PIL import Image
from pydicom.dataset import Dataset

from cxr_ray.errors import CxrRayError
from serve.node.assembly import ServiceAwayError
from serve.node.study_record import Drawings

STUDY, INSTANCE = "1.2.3", "1.2.3.4"


class Service(ThreadingHTTPServer):
    """Answers everything alike, and notes what it was asked."""

    status = 200
    asked: list[str]

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked = []
        picture = BytesIO()
        Image.fromarray(np.full((2, 3), 7, dtype=np.uint8)).save(picture, "png")
        self.picture = picture.getvalue()


class Handler(BaseHTTPRequestHandler):
    server: Service

    def do_GET(self) -> None:
        self.server.asked.append(self.path)
        self.send_response(self.server.status)
        self.send_header("Content-Length", str(len(self.server.picture)))
        self.end_headers()
        self.wfile.write(self.server.picture)

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def service() -> Iterator[Service]:
    with Service() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture
def drawings(service: Service) -> Iterator[Drawings]:
    with httpx.Client(base_url=f"http://127.0.0.1:{service.server_port}", trust_env=False, timeout=10) as client:
        yield Drawings(client)


def source(study: str = STUDY) -> Dataset:
    dataset = Dataset()
    dataset.add_new("StudyInstanceUID", "UI", study)
    dataset.SOPInstanceUID = INSTANCE
    return dataset


def test_a_radiograph_is_grey_and_a_heatmap_has_colours(service: Service, drawings: Drawings) -> None:
    grey, colours = drawings.radiograph(source()), drawings.heatmap(source(), "Mass")
    assert (grey.shape, grey.dtype, set(grey.flat)) == ((2, 3), np.uint8, {7})
    assert (colours.shape, colours.dtype) == ((2, 3, 3), np.uint8)
    place = f"/v1/studies/{STUDY}/instances/{INSTANCE}"
    assert service.asked == [f"{place}/film.png", f"{place}/heatmap/Mass.png"]


def test_a_uid_that_is_a_path_stays_a_name(service: Service, drawings: Drawings) -> None:
    drawings.radiograph(source("../../v1/tokens?x="))
    assert service.asked == [f"/v1/studies/..%2F..%2Fv1%2Ftokens%3Fx%3D/instances/{INSTANCE}/film.png"]


@pytest.mark.parametrize("status", [401, 403, 408, 429, 500, 503])
def test_a_service_that_may_answer_later_is_waited_for(service: Service, drawings: Drawings, status: int) -> None:
    service.status = status
    with pytest.raises(ServiceAwayError, match=str(status)):
        drawings.radiograph(source())


def test_a_service_that_is_gone_is_waited_for(service: Service, drawings: Drawings) -> None:
    service.shutdown()
    service.server_close()
    with pytest.raises(ServiceAwayError, match="cannot be reached"):
        drawings.heatmap(source(), "Mass")


@pytest.mark.parametrize("status", [400, 404, 410, 422])
def test_what_the_service_does_not_have_is_not_waited_for(service: Service, drawings: Drawings, status: int) -> None:
    service.status = status
    with pytest.raises(CxrRayError, match="has no picture of this instance"):
        drawings.radiograph(source())
