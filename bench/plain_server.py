"""What one would write in an afternoon: FastAPI and uvicorn in one process, PIL or pydicom, the network as PyTorch runs it.

    python bench/plain_server.py --bundle BUNDLE --port PORT

It answers `POST /v1/predict` with probabilities, checks nothing, batches nothing, and hands each request to a thread.
"""

import argparse
import io

import numpy as np
import pydicom
import torch
import uvicorn
from fastapi import FastAPI, UploadFile
from PIL import Image

from cxr_ray import vision
from cxr_ray.bundle import load_bundle
from cxr_ray.clinical import encode, from_request
from cxr_ray.findings import FINDINGS


def picture(data: bytes) -> Image.Image:
    """The image as 8-bit grey."""
    if data[128:132] != b"DICM":
        return Image.open(io.BytesIO(data)).convert("L")
    values = pydicom.dcmread(io.BytesIO(data)).pixel_array.astype(np.float32)
    low, high = values.min(), values.max()
    return Image.fromarray(((values - low) * (255 / (high - low))).astype(np.uint8))


def application(uri: str) -> FastAPI:
    """The service of a bundle."""
    bundle = load_bundle(uri)
    size = bundle.input_size or bundle.require_images()
    api = FastAPI()

    @api.get("/readyz")
    def ready() -> dict[str, str]:
        return {"status": "ready"}

    @api.post("/v1/predict")
    def predict(
        image: UploadFile, age: float | None = None, sex: str | None = None, view: str | None = None
    ) -> dict[str, float]:
        pixels = np.asarray(picture(image.file.read()).resize((size, size), Image.Resampling.BILINEAR))
        numbers = encode(from_request(age, sex, view, None)[0], bundle.statistics, bundle.layout)
        with torch.inference_mode():
            logits = bundle.model(vision.as_input(torch.from_numpy(pixels.copy())[None]), torch.from_numpy(numbers))
        return dict(zip(FINDINGS, torch.sigmoid(logits)[0].tolist(), strict=True))

    return api


def main() -> None:
    """Serve until SIGTERM."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bundle", required=True)
    parser.add_argument("--port", type=int, required=True)
    given = parser.parse_args()
    uvicorn.run(application(given.bundle), host="127.0.0.1", port=given.port, log_level="warning", access_log=False)


if __name__ == "__main__":
    main()
