"""The engine of a bundle and the decoder, each alone in one process, for as long as each line on standard input says.

    python bench/engine_alone.py --bundle BUNDLE

`{"batch": 8, "seconds": 5}` runs the engine on stored squares in memory, `{"file": PATH, "seconds": 5}` decodes a file in one
thread; the answer to each is a line of JSON with the seconds of each batch or file.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from cxr_ray.bundle import load_bundle
from cxr_ray.clinical import ClinicalInputs, from_request
from cxr_ray.cpus import available_cpus
from cxr_ray.engines import open_engine
from serve.uploads import decode_upload

_MOST = 16


def main() -> None:
    """Answer until standard input ends."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bundle", required=True)
    bundle = load_bundle(parser.parse_args().bundle)
    size = bundle.require_images()
    engine = open_engine(bundle, "auto", threads=available_cpus(), batch_size=_MOST)
    squares = np.random.default_rng(0).integers(0, 256, (_MOST, size, size), dtype=np.uint8)
    inputs = from_request(60, "M", "PA", None)[0]
    answer({"device": engine.device})
    for line in sys.stdin:
        asked = json.loads(line)
        if "file" in asked:
            content = Path(asked["file"]).read_bytes()
            answer({"seconds": timed(lambda content=content: decode_upload(content, "image", size), asked["seconds"])})
        else:
            batch = min(asked["batch"], _MOST)
            given = (squares[:batch], ClinicalInputs.concatenate([inputs] * batch))
            answer({"batch": batch, "seconds": timed(lambda given=given: engine.predict(*given), asked["seconds"])})


def timed(work: Callable[[], object], seconds: float) -> list[float]:
    """Seconds of each call, after one that is not counted."""
    work()
    taken: list[float] = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or not taken:
        begun = time.perf_counter()
        work()
        taken.append(time.perf_counter() - begun)
    return taken


def answer(value: dict[str, object]) -> None:
    """One line."""
    print(json.dumps(value), flush=True)


if __name__ == "__main__":
    main()
