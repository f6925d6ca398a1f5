"""TLS for connections of every kind: contexts from PEM files, with errors that name the file.

TLS 1.2 and 1.3 only, and of 1.2 only what gives forward secrecy and authenticated encryption, as the BCP 195 profiles of
PS3.15 (sections B.9 and B.12) ask for.
"""

import ssl
from pathlib import Path

from cxr_ray.errors import UsageError

_CIPHERS_OF_1_2 = "ECDHE+AESGCM:ECDHE+CHACHA20:DHE+AESGCM:!aNULL:!PSK"


def server_context(certificate: Path, key: Path | None, client_ca: Path | None = None) -> ssl.SSLContext:
    """What a server needs to speak TLS.

    Parameters
    ----------
    certificate
        PEM file: the server's certificate, then those that lead to its authority.
    key
        PEM file with the certificate's key, without a passphrase; None where the certificate's file holds it.
    client_ca
        PEM file of authorities. Clients have to show a certificate of one of them (mutual TLS); None asks for none.

    Raises
    ------
    UsageError
        When a file cannot be read, holds something else, or certificate and key do not belong together.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    _strengthen(context)
    _load_identity(context, certificate, key)
    if client_ca is not None:
        _load_authorities(context, client_ca)
        context.verify_mode = ssl.CERT_REQUIRED
    return context


def client_context(ca: Path | None, certificate: Path | None = None, key: Path | None = None) -> ssl.SSLContext:
    """What a client needs to speak TLS to a server whose certificate it checks, name included.

    Parameters
    ----------
    ca
        PEM file of the authorities that may vouch for the server; None: those of the system.
    certificate, key
        The client's own, for servers that ask for one.

    Raises
    ------
    UsageError
        As `server_context`.
    """
    context = ssl.create_default_context() if ca is None else ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    _strengthen(context)
    if ca is not None:
        _load_authorities(context, ca)
    if certificate is not None:
        _load_identity(context, certificate, key)
    return context


def _strengthen(context: ssl.SSLContext) -> None:
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_ciphers(_CIPHERS_OF_1_2)
    # A renegotiation costs the server more than the client that asks for it.
    context.options |= ssl.OP_NO_RENEGOTIATION | ssl.OP_NO_COMPRESSION


def _load_identity(context: ssl.SSLContext, certificate: Path, key: Path | None) -> None:
    for path in (certificate, *([key] if key else [])):
        _check_readable(path)
    try:
        # The password is asked for on a terminal otherwise, where nobody may sit.
        context.load_cert_chain(certificate, key, password="")
    except (ssl.SSLError, ValueError) as error:
        files = f"{certificate} and {key}" if key else str(certificate)
        raise UsageError(
            f"{files}: no PEM certificate with its key, without a passphrase ({_reason(error)}); "
            "name the two files that belong together"
        ) from None


def _load_authorities(context: ssl.SSLContext, authorities: Path) -> None:
    _check_readable(authorities)
    try:
        context.load_verify_locations(cafile=authorities)
    except ssl.SSLError as error:
        raise UsageError(f"{authorities}: no PEM certificates of authorities ({_reason(error)})") from None


def _check_readable(path: Path) -> None:
    try:
        with path.open("rb"):
            pass
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}; name a PEM file that this user can read") from None


def _reason(error: Exception) -> str:
    return (error.reason or "unreadable") if isinstance(error, ssl.SSLError) else type(error).__name__
