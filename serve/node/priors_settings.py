"""How the node asks an archive for a patient's earlier studies, as YAML states it."""

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

_AETitle = Annotated[str, StringConstraints(pattern=r"^[!-\[\]-~]([ -\[\]-~]{0,14}[!-\[\]-~])?$")]


class PriorsSettings(BaseModel):
    """Which archive is asked for a patient's earlier studies, for what, and for how long."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal["off", "dicom", "dicomweb"] = Field(
        "off", description="How the archive is asked: dicom (C-FIND, C-GET), dicomweb (QIDO-RS, WADO-RS); off: not at all."
    )
    host: str | None = Field(None, description="Address of the archive; needed by dicom.")
    port: int = Field(104, ge=1, le=65535, description="TCP port of the archive, for dicom.")
    called_ae: _AETitle | None = Field(None, description="AE title of the archive; needed by dicom.")
    calling_ae: _AETitle = Field("CXRRAY", description="AE title that asks; the archive has to know it.")
    tls: bool = Field(default=False, description="Speak DICOM over TLS; false: off. For dicomweb, the URL says it.")
    tls_ca: Path | None = Field(None, description="PEM file of those who may vouch for the archive; null: the system's.")
    tls_certificate: Path | None = Field(None, description="PEM file of the certificate to show; null: none is shown.")
    tls_key: Path | None = Field(None, description="PEM file of its key; null: it is in the file of the certificate.")
    url: Annotated[str, StringConstraints(pattern=r"^https?://[^\s?#]+$")] | None = Field(
        None, description="Root of the archive's DICOMweb services, e.g. https://pacs.example/dicom-web; needed by dicomweb."
    )
    token_file: Path | None = Field(None, description="File with the bearer token for dicomweb; null: none is sent.")
    use: Literal["both", "results", "images"] = Field(
        "both", description="What counts: results (SR) of this node, images, or both: images where there is no result."
    )
    budget_seconds: float = Field(
        5, gt=0, le=300, description="Seconds that a study may wait for all this, from first to last; kind=off is without."
    )
    max_studies: int = Field(5, ge=1, le=100, description="Earlier studies that are used, the newest ones.")
    max_bytes: int = Field(64 * 1024**2, ge=65536, description="Bytes fetched for one study at most, all its priors together.")
    max_matches: int = Field(500, ge=1, le=100_000, description="Matches read of one query; the others are not looked at.")
    remember_seconds: float = Field(
        600, ge=0, description="Seconds in which the same is not asked again; 0: only while it is asked."
    )
    failures: int = Field(3, ge=1, description="Failures in a row after which the archive is left alone for a while.")
    pause_seconds: float = Field(60, ge=0, description="Seconds for which it is left alone then; 0: off.")
    concurrency: int = Field(2, ge=1, le=16, description="Questions to the archive at once.")
    manufacturer: str = Field(
        "cxr-ray", min_length=1, max_length=64, description="Manufacturer by whom results are recognised as this node's own."
    )

    @model_validator(mode="after")
    def _complete(self) -> Self:
        needed = {"dicom": ("host", "called_ae"), "dicomweb": ("url",), "off": ()}[self.kind]
        for name in needed:
            if getattr(self, name) is None:
                raise ValueError(f"{name} is not given; kind {self.kind} needs it")
        if self.tls_key and not self.tls_certificate:
            raise ValueError("tls_key is given without tls_certificate; name the certificate that it belongs to")
        return self
