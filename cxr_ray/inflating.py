"""Deflated data sets (PS3.5 section A.5), inflated part by part: a kilobyte may stand for a megabyte.

Whoever inflates in one step has reserved what the sender wished before he can say that it is too much.
"""

import zlib
from collections.abc import Iterator
from typing import BinaryIO

_STEP = 64 * 1024


def inflated_parts(compressed: BinaryIO) -> Iterator[bytes]:
    """Inflate from where a stream stands, as far as it is asked for; a part has at most 64 KiB.

    Raises
    ------
    zlib.error
        When the stream is damaged, or breaks off.
    """
    inflater = zlib.decompressobj(-zlib.MAX_WBITS)
    while not inflater.eof:
        given = inflater.unconsumed_tail or compressed.read(_STEP)
        part = inflater.decompress(given, _STEP)
        if not given and not part:
            raise zlib.error("the deflated data set breaks off")
        yield part
