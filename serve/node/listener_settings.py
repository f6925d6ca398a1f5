"""What the listener accepts, from whom and how much."""

import ipaddress
from pathlib import Path
from typing import Annotated, Self

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

_AETitle = Annotated[str, StringConstraints(pattern=r"^[!-\[\]-~]([ -\[\]-~]{0,14}[!-\[\]-~])?$")]


class ListenerSettings(BaseModel):
    """What the listener accepts, from whom and how much."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    ae_title: _AETitle = Field("CXRRAY", description="Called AE title, 1 to 16 characters; peers must use it.")
    other_titles: tuple[_AETitle, ...] = Field((), description="Further called AE titles that are answered to; empty: none.")
    host: str = Field("127.0.0.1", description="Address to listen on; 0.0.0.0 or :: for every interface.")
    port: int = Field(11112, ge=0, le=65535, description="TCP port; 0 picks a free one.")
    share_port: bool = Field(
        default=False, description="Let several listeners of this machine and user share the port (SO_REUSEPORT)."
    )
    allowed_calling: tuple[_AETitle, ...] = Field((), description="Calling AE titles let in; empty: any.")
    allowed_networks: tuple[ipaddress.IPv4Network | ipaddress.IPv6Network, ...] = Field(
        (ipaddress.ip_network("127.0.0.0/8"), ipaddress.ip_network("::1/128")),
        description="Networks let in, CIDR; 0.0.0.0/0 and ::/0: any.",
    )
    tls_certificate: Path | None = Field(None, description="PEM file with the certificate and its chain; null: no TLS.")
    tls_key: Path | None = Field(None, description="PEM file with the certificate's key; null: in the certificate's file.")
    tls_client_ca: Path | None = Field(
        None, description="PEM file of the authorities whose clients are let in (mutual TLS); null: any client."
    )
    accept_all: bool = Field(
        default=False,
        description="Also accept every other storage class and transfer syntax, and file it unread; nobody answers it.",
    )
    max_associations: int = Field(10, ge=1, description="Associations at once.")
    max_connections: int = Field(
        256, ge=1, description="Connections that are no association yet, or no longer; the oldest gives way to a new one."
    )
    max_pdu: int = Field(131072, ge=4096, le=1048576, description="Largest PDU to receive, bytes; cannot be off.")
    max_object_bytes: int = Field(134217728, ge=1024, description="Largest data set, bytes; cannot be off.")
    max_command_bytes: int = Field(65536, ge=1024, le=1048576, description="Largest command set, bytes; cannot be off.")
    max_contexts: int = Field(128, ge=1, le=128, description="Presentation contexts that one association may propose.")
    min_free_bytes: int = Field(
        2147483648, ge=0, description="Free bytes on the spool's disk below which nothing is accepted; 0: off."
    )
    acse_timeout_seconds: float = Field(
        30, gt=0, description="Patience for the TLS handshake, and again for the association request; cannot be off."
    )
    dimse_timeout_seconds: float = Field(
        30, gt=0, description="Patience with a pause within a message, and with an answer that is not taken; cannot be off."
    )
    network_timeout_seconds: float = Field(
        60, gt=0, description="Patience with a silent peer, and with one PDU from start to end; cannot be off."
    )
    message_timeout_seconds: float = Field(600, gt=0, description="Patience with one message from start to end; cannot be off.")
    drain_seconds: float = Field(
        10, ge=0, description="On stop, time for running associations to end before they are aborted; 0: at once."
    )
    metrics_port: int | None = Field(None, ge=0, le=65535, description="TCP port of the Prometheus metrics; null: none.")
    metrics_host: str = Field("127.0.0.1", description="Address of the metrics; they carry no identifier.")

    @model_validator(mode="after")
    def _tls_is_whole(self) -> Self:
        if self.tls_certificate is None and (self.tls_key or self.tls_client_ca):
            raise ValueError("tls_key and tls_client_ca need tls_certificate; name the certificate's PEM file")
        return self
