"""Settings of delivery: where results go, in which form, and how patiently.

A destination is a DICOM peer (C-STORE), a DICOMweb service (STOW-RS), a web address that takes the summary as JSON, or
whoever sent the study. Credentials are named by the file that holds them: the settings can be printed whole.
"""

import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, field_validator, model_validator

SrClass = Literal["comprehensive-3d", "comprehensive", "enhanced"]
SR_CLASS_UIDS: dict[SrClass, str] = {
    "comprehensive-3d": "1.2.840.10008.5.1.4.1.1.88.34",
    "comprehensive": "1.2.840.10008.5.1.4.1.1.88.33",
    "enhanced": "1.2.840.10008.5.1.4.1.1.88.22",
}
_AETitle = Annotated[str, StringConstraints(pattern=r"^[!-\[\]-~]([ -\[\]-~]{0,14}[!-\[\]-~])?$")]
_Name = Annotated[str, StringConstraints(pattern=r"^[a-z0-9]([a-z0-9-]{0,46}[a-z0-9])?$")]
_Host = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9._:%-]{1,253}$")]
_Port = Annotated[int, Field(ge=1, le=65535)]
_Url = Annotated[str, StringConstraints(pattern=r"^https?://[^\s/?#@]+(/[^\s?#]*)?$")]
_PEER = re.compile(r"(?:(?P<host>[A-Za-z0-9._-]+|\[[0-9A-Fa-f:.%]+\]):)?(?P<port>\d{1,5})")


class _Settings(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class DicomTls(_Settings):
    """TLS of a DICOM destination (PS3.15 section B.9): version 1.2 or later, the peer's certificate is always checked."""

    ca: Path | None = Field(None, description="PEM file with the certificates trusted; null: the system's.")
    certificate: Path | None = Field(None, description="PEM file with the certificate shown to the peer; null: none.")
    key: Path | None = Field(None, description="PEM file with that certificate's key; null: it is in the same file.")
    server_name: str | None = Field(None, description="Name that the peer's certificate has to bear; null: the host.")
    check_name: bool = Field(True, description="Whether the certificate has to bear that name; false: the authority is enough.")

    @model_validator(mode="after")
    def _key_has_its_certificate(self) -> Self:
        if self.key is not None and self.certificate is None:
            raise ValueError("key has no certificate; name the certificate's file too")
        return self


class DicomTimeouts(_Settings):
    """Patience with a DICOM peer, a limit for each step of an association."""

    connect_seconds: float = Field(10, gt=0, le=600, description="To connect, TLS handshake included; cannot be off.")
    negotiation_seconds: float = Field(30, gt=0, le=600, description="For the answer to an association request; cannot be off.")
    send_seconds: float = Field(60, gt=0, le=3600, description="For the peer to take one PDU; cannot be off.")
    response_seconds: float = Field(120, gt=0, le=3600, description="For the answer to a request; cannot be off.")


class CommitmentSettings(_Settings):
    """Storage commitment (PS3.4 Annex J): a result counts as delivered when the peer says that it keeps it."""

    timeout_seconds: float = Field(3600, gt=0, description="After which the peer is asked again, without end; cannot be off.")
    resends: int = Field(5, ge=0, description="How often what the peer did not keep is sent again; then it is a dead letter.")
    linger_seconds: float = Field(
        2, ge=0, le=60, description="How long an idle association waits for the report; 0: it has to come on one of the peer's."
    )


class _ResultChoice(_Settings):
    results: tuple[Literal["sr", "sc"], ...] = Field(
        ("sr", "sc"), min_length=1, description="sr: structured report; sc: secondary capture."
    )
    sr_class: SrClass = Field("comprehensive-3d", description="SOP class of the structured report.")

    @field_validator("results")
    @classmethod
    def _once_each(cls, results: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(results)) < len(results):
            raise ValueError("names a kind of result twice; name each once")
        return results


class DicomDestination(_ResultChoice):
    """A storage SCP, e.g. the PACS."""

    kind: Literal["dicom"]
    name: _Name = Field(description="Name in folders, tables and metrics: a-z, 0-9 and -.")
    host: _Host = Field(description="Name or address.")
    port: _Port = Field(description="TCP port.")
    called_ae: _AETitle = Field(description="Its AE title.")
    calling_ae: _AETitle = Field("CXRRAY", description="Our AE title, as it knows it.")
    tls: DicomTls | None = Field(None, description="TLS; null: none.")
    commitment: CommitmentSettings | None = Field(None, description="Storage commitment; true: its defaults; null: not asked.")
    timeouts: DicomTimeouts = Field(default_factory=DicomTimeouts, description="Patience with it.")

    @field_validator("commitment", mode="before")
    @classmethod
    def _commitment_by_flag(cls, given: Any) -> Any:
        return {True: {}, False: None}[given] if isinstance(given, bool) else given


class SenderDestination(_ResultChoice):
    """Whoever sent the study: its address, and a port for each AE title."""

    kind: Literal["sender"]
    name: _Name = Field("sender", description="Name in folders, tables and metrics: a-z, 0-9 and -.")
    peers: dict[_AETitle, str] = Field(
        default_factory=dict, description="By calling AE title: PORT at the address that sent the study, or HOST:PORT."
    )
    default_port: _Port | None = Field(None, description="Port of titles that are not in peers; null: those get nothing back.")
    calling_ae: _AETitle = Field("CXRRAY", description="Our AE title, as they know it.")
    tls: DicomTls | None = Field(None, description="TLS; null: none.")
    timeouts: DicomTimeouts = Field(default_factory=DicomTimeouts, description="Patience with them.")

    @field_validator("peers", mode="before")
    @classmethod
    def _peers_as_text(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        peers = {title: str(peer) for title, peer in given.items()}
        for title, peer in peers.items():
            found = _PEER.fullmatch(peer)
            if not found or not 1 <= int(found["port"]) <= 65535:
                raise ValueError(f"{title}: {peer!r} is neither PORT nor HOST:PORT; write e.g. 104 or 10.0.0.7:104")
        return peers

    @model_validator(mode="after")
    def _knows_somebody(self) -> Self:
        if not self.peers and self.default_port is None:
            raise ValueError("knows no port; give peers or default_port")
        return self

    def port_of(self, calling_ae: str, address: str) -> tuple[str, int] | None:
        """Host and port of whoever sent a study from `address` under a title; None where the settings name none."""
        peer = self.peers.get(calling_ae)
        if peer is None:
            return None if self.default_port is None else (address, self.default_port)
        found = _PEER.fullmatch(peer)
        assert found is not None  # noqa: S101 - checked when the settings were read
        return (found["host"] or address).strip("[]"), int(found["port"])


class _HttpPeer(_Settings):
    url: _Url = Field(description="Web address, http or https, without user, query or fragment.")
    token_file: Path | None = Field(None, description="File with the bearer token; null: none is sent.")
    ca: Path | None = Field(None, description="PEM file with the certificates trusted; null: the system's.")
    connect_seconds: float = Field(10, gt=0, le=600, description="Patience to connect; cannot be off.")
    timeout_seconds: float = Field(120, gt=0, le=3600, description="Patience with a silent peer in a request; cannot be off.")


class StowDestination(_HttpPeer, _ResultChoice):
    """A DICOMweb service that takes instances by STOW-RS (PS3.18 section 10.5)."""

    kind: Literal["stow"]
    name: _Name = Field(description="Name in folders, tables and metrics: a-z, 0-9 and -.")
    url: _Url = Field(description="Root of the service, without /studies.")


class WebhookDestination(_HttpPeer):
    """A web address that takes the summary of a study as JSON."""

    kind: Literal["webhook"]
    name: _Name = Field(description="Name in folders, tables and metrics: a-z, 0-9 and -.")
    hmac_secret_file: Path | None = Field(
        None, description="File with the secret that signs each request (HMAC-SHA-256); null: not signed."
    )


Destination = Annotated[
    DicomDestination | StowDestination | WebhookDestination | SenderDestination, Field(discriminator="kind")
]


class PatienceSettings(_Settings):
    """Pauses between attempts, of a destination and of each of its parcels."""

    first_retry_seconds: float = Field(1, gt=0, description="Pause after the first failure; doubles with each.")
    max_retry_seconds: float = Field(900, gt=0, description="Longest pause of our own; Retry-After may ask for more.")
    jitter: float = Field(0.2, ge=0, le=1, description="Random part added to a pause, as a fraction of it; 0: off.")
    give_up_days: float = Field(0, ge=0, description="Age at which a parcel that was tried becomes a dead letter; 0: never.")


class DeliverySettings(_Settings):
    """Where results go and how long is kept what became of them."""

    destinations: tuple[Destination, ...] = Field((), description="Where results go; empty: nowhere.")
    patience: PatienceSettings = Field(default_factory=PatienceSettings, description="Pauses between attempts.")
    poll_seconds: float = Field(1, gt=0, le=60, description="Pause between looks at the outbox; a notification ends it.")
    keep_delivered_days: float = Field(30, ge=0, description="How long receipts are kept; 0: forever.")
    keep_dead_days: float = Field(0, ge=0, description="How long dead letters are kept; 0: forever.")
    keep_orphaned_days: float = Field(
        0, ge=0, description="How long parcels are kept whose destination is no longer in the settings; 0: forever."
    )

    @property
    def asks_for_commitment(self) -> bool:
        """Whether some destination is asked for storage commitment."""
        return any(isinstance(each, DicomDestination) and each.commitment is not None for each in self.destinations)

    @model_validator(mode="after")
    def _names_differ(self) -> Self:
        names = [destination.name for destination in self.destinations]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"destinations {', '.join(twice)} stand there twice; give each a name of its own")
        return self
