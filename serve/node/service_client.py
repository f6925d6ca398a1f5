"""The way from the node to the service: where it is, the token that it asks for, and patience with it."""

import ssl
from typing import Annotated

import httpx
from pydantic import BaseModel, ConfigDict, Field, SecretStr, StringConstraints

from cxr_ray.errors import UsageError


class DispatchSettings(BaseModel):
    """Where the service is and how patiently it is asked."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    service_url: Annotated[str, StringConstraints(pattern=r"^https?://[^\s]+$")] = Field(
        "http://127.0.0.1:8000", description="Root of the service, without /v1."
    )
    token: SecretStr | None = Field(None, description="Bearer token for the service; null: none is sent.")
    first_retry_seconds: float = Field(0.5, gt=0, description="Pause after the first failure; doubles with each.")
    max_retry_seconds: float = Field(60, gt=0, description="Longest pause of our own; Retry-After may ask for more.")
    jitter: float = Field(0.2, ge=0, le=1, description="Random part added to a pause, as a fraction of it; 0: off.")
    timeout_seconds: float = Field(120, gt=0, description="Patience with one request; cannot be off.")
    poll_seconds: float = Field(0.5, gt=0, description="Pause between looks at the spool; a notification ends it.")
    concurrency: int = Field(2, ge=1, le=64, description="Requests at once.")


def service_client(settings: DispatchSettings) -> httpx.Client:
    """A client of the service.

    Raises
    ------
    UsageError
        When `service_url` is no URL.
    """
    token, service = settings.token, settings.service_url
    try:
        base = httpx.URL(service)
    except httpx.InvalidURL as error:
        raise UsageError(f"service_url {service!r}: {error}; write e.g. http://127.0.0.1:8000") from error
    return httpx.Client(
        base_url=base,
        headers={"Authorization": f"Bearer {token.get_secret_value().strip()}"} if token else {},
        timeout=settings.timeout_seconds,
        # Images of patients do not take a detour by a proxy that some environment variable names.
        trust_env=False,
        verify=ssl.create_default_context(),
    )
