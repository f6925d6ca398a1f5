"""Child processes that run codecs: a module of this package, asked and answering through pipes."""

import os
import subprocess
import sys
from collections.abc import Sequence
from typing import BinaryIO


def start_child(module: str, *arguments: object, files: Sequence[int] = ()) -> "subprocess.Popen[bytes]":
    """Run a module with pipes for its questions and answers; what it complains of is dropped.

    Parameters
    ----------
    files
        Descriptors that the child shares.
    """
    # The child finds the modules where this process, which Ray may have started, does; it decodes with one thread.
    environment = {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    return subprocess.Popen(  # noqa: S603 - ourselves
        [sys.executable, "-m", module, *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        pass_fds=files,
        env=os.environ | environment,
    )


def answers_apart() -> BinaryIO:
    """In the child: the stream for answers, with which what codecs print must not mix."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    return answers
