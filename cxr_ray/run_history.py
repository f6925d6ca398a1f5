"""Figures of every epoch of a run, kept in ``OUT/epochs.json`` so that a run that is resumed or looked at later has them all.

The file is a JSON list of `EpochResult`, one object an epoch, in order. JSON has no NaN: a figure that the split cannot tell
is null there.
"""

import json
import math
from dataclasses import asdict

from pydantic import TypeAdapter, ValidationError

from cxr_ray import storage
from cxr_ray.errors import CxrRayError
from cxr_ray.train_events import EpochResult

EPOCHS = "epochs.json"


class RunHistory:
    """The epochs of the run in a folder, read from it at first and written after each one.

    Parameters
    ----------
    uri
        Folder of the run, at any pyarrow filesystem URI; it need not exist yet.

    Raises
    ------
    CxrRayError
        If the file that is there cannot be understood.
    """

    def __init__(self, uri: str) -> None:
        self._filesystem, self._root = storage.resolve(uri)
        self._path = f"{self._root}/{EPOCHS}"
        self._results: tuple[EpochResult, ...] = ()
        if storage.exists(self._filesystem, self._path):
            self._results = _parsed(storage.read_bytes(self._filesystem, self._path), self._path)

    @property
    def results(self) -> tuple[EpochResult, ...]:
        """All epochs so far, in order."""
        return self._results

    def add(self, result: EpochResult) -> None:
        """Append an epoch and write the file; an attempt that goes on from an earlier epoch replaces what came after it."""
        self._results = (*(earlier for earlier in self._results if earlier.epoch < result.epoch), result)
        self._filesystem.create_dir(self._root, recursive=True)
        rows = [_with_nulls(asdict(kept)) for kept in self._results]
        storage.write_atomically(self._filesystem, self._path, json.dumps(rows, indent=2, allow_nan=False).encode() + b"\n")


def _with_nulls(row: dict[str, object]) -> dict[str, object]:
    def shown(value: object) -> object:
        if isinstance(value, dict):
            return {name: shown(inner) for name, inner in value.items()}
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return {name: shown(value) for name, value in row.items()}


def _with_nans(row: object) -> object:
    if isinstance(row, dict):
        return {name: _with_nans(value) for name, value in row.items()}
    return math.nan if row is None else row


def _parsed(content: bytes, path: str) -> tuple[EpochResult, ...]:
    try:
        rows = json.loads(content)
        results = TypeAdapter(tuple[EpochResult, ...]).validate_python([_with_nans(row) for row in rows])
    except ValidationError as error:
        first = error.errors()[0]
        raise _damaged(path, f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    except (ValueError, TypeError) as error:
        raise _damaged(path, str(error)) from None
    epochs = [result.epoch for result in results]
    if epochs != sorted(set(epochs)) or min(epochs, default=1) < 1:
        raise _damaged(path, f"its epochs are {epochs[:20]} instead of rising from 1")
    return results


def _damaged(path: str, reason: str) -> CxrRayError:
    return CxrRayError(
        f"{path}: damaged ({' '.join(reason.split())[:200]}); remove it to go on without the figures of earlier epochs"
    )
