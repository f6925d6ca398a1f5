"""The films that costs are taken with: decoded PNGs of 1024x1024, and a radiograph of 10 MB."""

import cv2
import numpy as np
from bench_ingest import _instance, pngs
from pydicom.uid import ExplicitVRLittleEndian

FILM_UID = "1.2.3.900000"


def decoded_films() -> list[np.ndarray]:
    return [cv2.imdecode(np.frombuffer(png, np.uint8), cv2.IMREAD_GRAYSCALE) for png in pngs()]


def large_film() -> bytes:
    """A radiograph of 2500x2048 pixels of 12 bits, 10 MB, whose UIDs and PatientID are all `FILM_UID`."""
    noise = np.random.default_rng(0).normal(0, 20, (2500, 2048))
    deep = cv2.resize(decoded_films()[0], (2048, 2500), interpolation=cv2.INTER_CUBIC).astype(np.float32) * 16 + noise
    return _instance(np.clip(deep, 0, 4095).astype(np.uint16), ExplicitVRLittleEndian)
