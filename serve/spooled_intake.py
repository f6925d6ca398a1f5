"""Instances that come over HTTP into the DICOM node's spool: the same checks and the same promise as C-STORE's.

The spool is on the disk of one machine. Where this process runs on another, there is no such folder, and none is made: what
nobody dispatches must not be accepted.
"""

from pathlib import Path

from prometheus_client import CollectorRegistry

from cxr_ray.errors import CxrRayError
from serve.instance_names import instance_names
from serve.node.file_meta import presentation_address
from serve.node.receiving_metrics import ReceivingMetrics
from serve.node.spool import Spool
from serve.node.storage import OUT_OF_RESOURCES, Storage, StorageRules, StoreRefused, store_part10

# PS3.3 section C.14.1.1 and PS3.18 table 10.5.3-1.
OF_ANOTHER_STUDY = 0x0111
_CANNOT_UNDERSTAND = 0xC000


class SpooledIntake:
    """Takes DICOM files into the spool under `root`.

    Parameters
    ----------
    root
        Folder of a node's spool.
    rules
        What is taken.
    """

    def __init__(self, root: Path, rules: StorageRules) -> None:
        self._root, self._rules = root, rules
        self._storage: Storage | None = None

    def take(self, file: bytes, *, study_uid: str | None, address: str) -> None:
        """Make a file durable in the spool.

        Parameters
        ----------
        file
            DICOM Part 10.
        study_uid
            The study that it has to be of; None for any.
        address
            Of the client that sent it, which has no AE title: results cannot be returned to it.

        Raises
        ------
        StoreRefused
            With the status that C-STORE would have.
        """
        if study_uid is not None:
            self._require_study(file, study_uid)
        store_part10(self._opened(), file, address=presentation_address("http", address))

    def _require_study(self, file: bytes, study_uid: str) -> None:
        try:
            found = instance_names(file).study_instance_uid
        except CxrRayError:
            raise StoreRefused(_CANNOT_UNDERSTAND, "is not readable as DICOM, or names no study") from None
        if found != study_uid:
            raise StoreRefused(OF_ANOTHER_STUDY, "is of another study than the one it was sent to")

    def _opened(self) -> Storage:
        if self._storage is None:
            if not (self._root / "ready").is_dir():
                raise StoreRefused(OUT_OF_RESOURCES, "the node's spool is not on this machine")
            try:
                spool = Spool(self._root)
            except CxrRayError:
                raise StoreRefused(OUT_OF_RESOURCES, "the node's spool cannot be used now") from None
            self._storage = Storage(self._rules, spool, ReceivingMetrics(CollectorRegistry()))
        return self._storage
