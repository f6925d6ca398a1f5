"""Settings of `cxr-ray predict`; its own module, because who lists them need not wait for torch."""

from typing import Literal

from pydantic import Field

from cxr_ray.settings import Settings


class PredictSettings(Settings):
    """Settings of `cxr-ray predict`."""

    bundle: str = Field(description="Folder or URI of the bundle that answers.")
    input: str = Field(description="Folder or URI with PNG, JPEG and DICOM files at any depth, or a single file.")
    out: str = Field(description="Parquet file or its URI, a row for each file of the input.")
    clinical: str | None = Field(
        None,
        description="CSV with the columns file (as in the result), age, sex, view, history ('Mass|Nodule', 'No Finding'); an "
        "empty cell is unknown, or as the DICOM header says. Without it, headers alone speak.",
    )
    engine: Literal["auto", "torch", "openvino"] = Field("auto", description="What runs the network; auto chooses.")
    batch_size: int = Field(32, ge=1, le=1024, description="Images a forward pass.")
    workers: int = Field(1, ge=1, description="Processes that run the network; decoding takes the CPUs that are left.")
    gpu: bool = Field(default=False, description="Give each network a GPU.")
    overwrite: bool = Field(default=False, description="Replace the file that OUT holds.")
