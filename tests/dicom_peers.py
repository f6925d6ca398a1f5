"""What tests of the receiving side share: instances, PDUs made by hand, certificates, and a listener in a process."""

import os
import socket
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import pydicom
from conftest import REPOSITORY, require_program
from pydicom.uid import ExplicitVRLittleEndian, generate_uid

CR = "1.2.840.10008.5.1.4.1.1.1"
VERIFICATION = "1.2.840.10008.1.1"
EXPLICIT, IMPLICIT = "1.2.840.10008.1.2.1", "1.2.840.10008.1.2"
DEFLATED = "1.2.840.10008.1.2.1.99"


def instance(**elements: object) -> pydicom.Dataset:
    """A small CR of its own UID, with file meta information."""
    content = pydicom.Dataset()
    content.SOPClassUID, content.SOPInstanceUID = CR, generate_uid()
    content.StudyInstanceUID, content.SeriesInstanceUID = generate_uid(), generate_uid()
    content.Modality, content.PatientName, content.PatientID = "CR", "Doe^Jane", "P77"
    content.Rows = content.Columns = 64
    content.SamplesPerPixel, content.PhotometricInterpretation = 1, "MONOCHROME2"
    content.BitsAllocated = content.BitsStored = 8
    content.HighBit, content.PixelRepresentation = 7, 0
    content.PixelData = os.urandom(64 * 64)
    for keyword, value in elements.items():
        setattr(content, keyword, value)
    content.file_meta = pydicom.dataset.FileMetaDataset()
    content.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    return content


def part10(content: pydicom.Dataset) -> bytes:
    file = BytesIO()
    content.save_as(file, enforce_file_format=True)
    return file.getvalue()


def data_set(content: pydicom.Dataset) -> bytes:
    return data_set_of(part10(content))


def data_set_of(file: bytes) -> bytes:
    return file[144 + int.from_bytes(file[140:144], "little") :]


def deflated(data: bytes, mebibytes: int = 0) -> bytes:
    """A data set, deflated; it goes on with so many MiB of zeros, which take a kilobyte each."""
    deflater = zlib.compressobj(9, wbits=-zlib.MAX_WBITS)
    begun = deflater.compress(data) + deflater.flush(zlib.Z_FULL_FLUSH)
    # A full flush refers to nothing before it, so that what lies between two of them can be repeated.
    zeros = deflater.compress(bytes(1 << 20)) + deflater.flush(zlib.Z_FULL_FLUSH)
    return begun + zeros * mebibytes + deflater.flush()


def pdu(kind: int, body: bytes) -> bytes:
    return struct.pack(">BxL", kind, len(body)) + body


def item(kind: int, content: bytes) -> bytes:
    return struct.pack(">BxH", kind, len(content)) + content


def request(
    *contexts: tuple[int, str, str], called: str = "CXRRAY", calling: str = "TESTPACS", version: int = 1, more: bytes = b""
) -> bytes:
    """An A-ASSOCIATE-RQ that proposes (identifier, abstract syntax, transfer syntax)."""
    body = struct.pack(">H2x16s16s32x", version, called.ljust(16).encode(), calling.ljust(16).encode())
    body += item(0x10, b"1.2.840.10008.3.1.1.1")
    for identifier, abstract, transfer in contexts:
        body += item(0x20, bytes((identifier, 0, 0, 0)) + item(0x30, abstract.encode()) + item(0x40, transfer.encode()))
    return pdu(1, body + item(0x50, item(0x51, struct.pack(">L", 16384)) + item(0x52, b"1.2.3.4") + more))


def command(**elements: object) -> bytes:
    """A command set; C-STORE's elements by default names, numbers as US, texts as UI."""
    tags = {"sop_class": 0x0002, "field": 0x0100, "message": 0x0110, "priority": 0x0700, "data": 0x0800, "uid": 0x1000}
    tags |= {"status": 0x0900, "event": 0x1002, "responded": 0x0120}
    body = b""
    for name, value in sorted(elements.items(), key=lambda pair: tags[pair[0]]):
        encoded = struct.pack("<H", value) if isinstance(value, int) else str(value).encode()
        encoded += b"\x00" * (len(encoded) % 2)
        body += struct.pack("<HHL", 0, tags[name], len(encoded)) + encoded
    return struct.pack("<HHLL", 0, 0, 4, len(body)) + body


def store_command(uid: str, sop_class: str = CR) -> bytes:
    return command(sop_class=sop_class, field=0x0001, message=1, priority=0, data=0, uid=uid)


def pdv(context: int, control: int, data: bytes) -> bytes:
    return struct.pack(">LBB", len(data) + 2, context, control) + data


def p_data(*values: bytes) -> bytes:
    return pdu(4, b"".join(values))


def store_pdus(content: pydicom.Dataset, context: int = 1, fragment: int = 8000) -> list[bytes]:
    """The PDUs of a C-STORE."""
    data = data_set(content)
    parts = [data[start : start + fragment] for start in range(0, len(data), fragment)]
    sent = [p_data(pdv(context, 3, store_command(str(content.SOPInstanceUID))))]
    return sent + [p_data(pdv(context, 2 if part is parts[-1] else 0, part)) for part in parts]


ECHO = command(sop_class=VERIFICATION, field=0x0030, message=1, data=0x0101)
RELEASE = pdu(5, bytes(4))


class Wire:
    """A TCP connection of which a test writes every byte."""

    def __init__(self, port: int, timeout: float = 30) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port), timeout)

    def send(self, *pdus: bytes) -> "Wire":
        self.socket.sendall(b"".join(pdus))
        return self

    def read(self) -> tuple[int, bytes]:
        """The next PDU; (0, b"") where the peer closed."""
        header = self._exactly(6)
        if len(header) < 6:
            return 0, b""
        return header[0], self._exactly(int.from_bytes(header[2:6], "big"))

    def status(self) -> int:
        """Of the next response."""
        kind, body = self.read()
        assert kind == 4, (kind, body)
        position, data = 0, body[6:]
        while position < len(data):
            _, tag, length = struct.unpack_from("<HHL", data, position)
            if tag == 0x0900:
                return int.from_bytes(data[position + 8 : position + 10], "little")
            position += 8 + length
        raise AssertionError("no status")

    def ends(self) -> bool:
        """Whether the peer closes, whatever it says before."""
        try:
            while self.socket.recv(65536):
                pass
        except ConnectionError:
            pass
        return True

    def _exactly(self, size: int) -> bytes:
        received = b""
        while len(received) < size:
            try:
                part = self.socket.recv(size - len(received))
            except ConnectionError:
                break
            if not part:
                break
            received += part
        return received

    def __enter__(self) -> "Wire":
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()


def until(is_so: Callable[[], object], what: str, seconds: float = 30) -> None:
    patience = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < patience, f"waited in vain for {what}"
        time.sleep(0.02)


@dataclass(frozen=True)
class Certificates:
    """PEM files: an authority, a server and a client of it, and a client that nobody vouches for."""

    ca: Path
    server: Path
    server_key: Path
    client: Path
    client_key: Path
    stranger: Path
    stranger_key: Path


def make_certificates(folder: Path) -> Certificates:
    openssl = require_program("openssl")

    def run(*arguments: object) -> None:
        subprocess.run([openssl, *map(str, arguments)], check=True, capture_output=True, cwd=folder)

    def signed(name: str, extension: str) -> tuple[Path, Path]:
        key, asked, certificate = folder / f"{name}.key", folder / f"{name}.csr", folder / f"{name}.pem"
        (folder / f"{name}.ext").write_text(extension)
        run("req", "-newkey", "rsa:2048", "-nodes", "-keyout", key, "-out", asked, "-subj", f"/CN={name}")
        authority = ("-CA", folder / "ca.pem", "-CAkey", folder / "ca.key", "-CAcreateserial")
        run("x509", "-req", "-in", asked, *authority, "-days", 2, "-out", certificate, "-extfile", folder / f"{name}.ext")
        return certificate, key

    def own(name: str) -> tuple[Path, Path]:
        key, certificate = folder / f"{name}.key", folder / f"{name}.pem"
        request = ("req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", 2, "-subj", f"/CN={name}")
        run(*request, "-keyout", key, "-out", certificate)
        return certificate, key

    ca, _ = own("ca")
    names = (ca, *signed("server", "subjectAltName=IP:127.0.0.1\n"), *signed("client", "extendedKeyUsage=clientAuth\n"))
    return Certificates(*names, *own("stranger"))


LISTENER = """
import json, sys, time
from pathlib import Path
from serve.node.listener import Listener, ListenerSettings
from serve.node.spool import Spool
with Listener(ListenerSettings(**json.loads(sys.argv[2])), Spool(Path(sys.argv[1]))) as listener:
    print(listener.port, flush=True)
    sys.stdin.read()
"""


@contextmanager
def listener_process(spool: Path, settings: str) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """A listener without a service in a process of its own; ends with its standard input."""
    variables = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    process = subprocess.Popen(
        [sys.executable, "-c", LISTENER, str(spool), settings],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=REPOSITORY,
        env=variables,
    )
    try:
        yield process, int(process.stdout.readline())
    finally:
        process.stdin.close()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()
