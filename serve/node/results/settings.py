"""As whom the node signs its results."""

from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from serve.node.results.result_uids import device_uid

# A value of representation LO (PS3.5 section 6.2): a backslash would part it.
_Name = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1, max_length=64, pattern=r"^[^\\\x00-\x1f]+$")]
_Uid = Annotated[str, StringConstraints(max_length=64, pattern=r"^[0-2](\.(0|[1-9][0-9]*))+$")]


class ResultSettings(BaseModel):
    """As whom the node signs its results: equipment (PS3.3 C.7.5.1) and observer (PS3.16 TID 1004)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    manufacturer: _Name = Field("cxr-ray", description="Manufacturer of the equipment and of the algorithm.")
    device_model: _Name = Field("cxr-ray DICOM node", description="Manufacturer's model name of the equipment.")
    device_name: _Name = Field("CXRRAY", description="Name of this installation, for instance its AE title.")
    serial_number: _Name = Field("1", description="Serial number of this installation.")
    device_uid: _Uid | None = Field(
        None, description="Device Observer UID, fixed for the installation; null: computed from the four names before."
    )
    institution_name: _Name | None = Field(None, description="Institution that runs the equipment; null: not said.")
    sr_series_number: int = Field(9901, ge=1, le=2**31 - 1, description="Series Number of structured reports.")
    capture_series_number: int = Field(9902, ge=1, le=2**31 - 1, description="Series Number of secondary captures.")

    @property
    def observer_uid(self) -> str:
        """The Device Observer UID."""
        return self.device_uid or device_uid(self.manufacturer, self.device_model, self.device_name, self.serial_number)

    @cached_property
    def software_version(self) -> str:
        """Version of the software that makes the results."""
        try:
            return version("cxr-ray")
        except PackageNotFoundError:
            return "unknown"
