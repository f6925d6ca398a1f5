"""Those who send: DCMTK's storescu, pynetdicom, Orthanc, and connections that are cut on purpose.

Each sends some files in one association and tells the status of each: "0x0000" where it was answered so, "none" where no
answer came, else what was said instead.
"""

import os
import random
import re
import socket
import struct
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from io import BytesIO
from pathlib import Path

import httpx
import pydicom
from pynetdicom import AE
from pynetdicom.association import Association
from pynetdicom.dimse_messages import C_STORE_RQ
from pynetdicom.dimse_primitives import C_STORE
from pynetdicom.dsutils import encode
from pynetdicom.pdu import P_DATA_TF

SUCCESS = "0x0000"
NONE = "none"
_PATIENCE_SECONDS = 20
_FRAGMENT = 16384
_SENT = re.compile(r"I: Sending file: (?P<file>.*)|I: Received Store Response \((?P<said>.*)\)")

Send = Callable[[Sequence[Path], int], list[str]]


def storescu(title: str) -> Send:
    """DCMTK's client; called with files and the port."""

    def send(files: Sequence[Path], port: int) -> list[str]:
        patience = [part for option in ("-to", "-ta", "-td") for part in (option, str(_PATIENCE_SECONDS))]
        command = ["/usr/bin/storescu", "-v", "-xe", *patience, "-aet", "STORESCU", "-aec", title, "127.0.0.1", str(port)]
        environment = {**os.environ, "TCP_NODELAY": "1"}
        ran = subprocess.run(
            [*command, *map(str, files)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
            timeout=10 * _PATIENCE_SECONDS,
        )
        told = dict.fromkeys(map(str, files), NONE)
        current = ""
        for found in _SENT.finditer(ran.stdout):
            current = found["file"] or current
            if found["said"]:
                told[current] = SUCCESS if found["said"] == "Success" else found["said"]
        return [told[str(file)] for file in files]

    return send


def pynetdicom_client(title: str) -> Send:
    """pynetdicom's client; called with files and the port."""

    def send(files: Sequence[Path], port: int) -> list[str]:
        datasets = [pydicom.dcmread(file) for file in files]
        association = _associated(datasets[0], title, port)
        told = [NONE] * len(files)
        if association is None:
            return told
        try:
            for place, dataset in enumerate(datasets):
                answer = association.send_c_store(dataset)
                if "Status" not in answer:
                    break
                told[place] = f"0x{answer.Status:04X}"
        # The connection ends whenever it likes: then there is no answer.
        except (RuntimeError, OSError):
            pass
        finally:
            _end(association)
        return told

    return send


def orthanc_client(client: httpx.Client) -> Send:
    """An Orthanc that knows the node's ports as the modalities ``node-PORT``."""

    def send(files: Sequence[Path], port: int) -> list[str]:
        study = ""
        resources = []
        try:
            for file in files:
                taken = client.post("/instances", content=file.read_bytes())
                taken.raise_for_status()
                resources.append(taken.json()["ID"])
                study = taken.json()["ParentStudy"]
            stored = client.post(f"/modalities/node-{port}/store", json={"Resources": resources, "Synchronous": True})
            if stored.status_code != 200:
                return [NONE] * len(files)
            # It does not say which one failed.
            return [SUCCESS if stored.json()["FailedInstancesCount"] == 0 else "one failed"] * len(files)
        except httpx.HTTPError:
            return [NONE] * len(files)
        finally:
            if study:
                with suppress(httpx.HTTPError):
                    client.delete(f"/studies/{study}")

    return send


def cut_association(file: Path, title: str, port: int, fraction: float) -> str:
    """Send a part of a C-STORE and break the connection, without waiting for an answer where all was sent.

    Parameters
    ----------
    fraction
        Of the bytes of the request that are sent; 1 is all of them.
    """
    dataset = pydicom.dcmread(file)
    association = _associated(dataset, title, port)
    if association is None:
        return NONE
    try:
        message = _store_request(dataset, association)
        connection = association.dul.socket.socket
        if connection is None:
            return NONE
        connection.settimeout(_PATIENCE_SECONDS)
        connection.sendall(message[: int(len(message) * fraction)])
        if fraction < 1:
            # A reset, as when a cable is pulled behind a firewall: what was not read is thrown away.
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        else:
            time.sleep(random.uniform(0, 0.05))
        connection.shutdown(socket.SHUT_WR if fraction == 1 else socket.SHUT_RDWR)
    except OSError:
        pass
    finally:
        association.abort()
        _end(association)
    return NONE


def _associated(dataset: pydicom.Dataset, title: str, port: int) -> Association | None:
    entity = AE("PYNETDICOM")
    entity.acse_timeout = entity.dimse_timeout = entity.network_timeout = _PATIENCE_SECONDS
    entity.connection_timeout = _PATIENCE_SECONDS
    entity.add_requested_context(dataset.SOPClassUID, dataset.file_meta.TransferSyntaxUID)
    association = entity.associate("127.0.0.1", port, ae_title=title)
    if association.is_established:
        return association
    _end(association)
    return None


def _end(association: Association) -> None:
    if association.is_established:
        association.release()
    association.join(_PATIENCE_SECONDS)


def _store_request(dataset: pydicom.Dataset, association: Association) -> bytes:
    """A C-STORE request as it goes over the wire (PS3.7 section 9.3.1, PS3.8 section 9.3.5)."""
    (context,) = association.accepted_contexts
    request = C_STORE()
    request.MessageID, request.Priority = 1, 2
    request.AffectedSOPClassUID, request.AffectedSOPInstanceUID = dataset.SOPClassUID, dataset.SOPInstanceUID
    syntax = context.transfer_syntax[0]
    encoded = encode(dataset, syntax.is_implicit_VR, syntax.is_little_endian)
    if encoded is None:
        raise ValueError("the image cannot be encoded")
    request.DataSet = BytesIO(encoded)
    message = C_STORE_RQ()
    message.primitive_to_message(request)
    wire = b""
    for fragment in message.encode_msg(context.context_id, _FRAGMENT):
        unit = P_DATA_TF()
        unit.from_primitive(fragment)
        wire += unit.encode()
    return wire
