"""TLS towards destinations: version 1.2 or later, and the peer's certificate is always checked."""

import ssl
from pathlib import Path

from cxr_ray.errors import UsageError


def client_context(
    where: str, ca: Path | None, certificate: Path | None = None, key: Path | None = None, *, check_name: bool = True
) -> ssl.SSLContext:
    """A context for connections to a destination.

    Parameters
    ----------
    where
        What a complaint names.
    ca
        PEM file with the certificates trusted; None: the system's.
    check_name
        Whether the certificate has to bear the peer's name.

    Raises
    ------
    UsageError
        When a file cannot be read, or does not hold what it should.
    """
    try:
        context = ssl.create_default_context(cafile=ca)
    except (OSError, ValueError) as error:
        raise UsageError(f"{where}: ca {ca}: {_words(error)}; name a PEM file with certificates") from error
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.check_hostname = check_name
    if certificate is not None:
        try:
            # Asks on the terminal where the key has a password; nobody is there to answer.
            context.load_cert_chain(certificate, key, password="")
        except (OSError, ValueError) as error:
            names = f"certificate {certificate}, key {key or certificate}"
            raise UsageError(f"{where}: {names}: {_words(error)}; name PEM files that belong together") from error
    return context


def _words(error: Exception) -> str:
    if isinstance(error, ssl.SSLError):
        return (error.reason or "no PEM file").lower().replace("_", " ")
    return getattr(error, "strerror", None) or type(error).__name__
