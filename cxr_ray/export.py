"""`cxr-ray bundle export`: a bundle's network for those who run it without cxr-ray.

What is written is the `AnswerGraph`: stored squares and encoded clinical numbers in, probabilities out, in float32, for batches
of any size, with ``export.json`` beside it that says how inputs are made and what the outputs mean. Before anything is written,
the file is loaded by the runtime that it is meant for and asked the bundle's probe.
"""

import contextlib
import hashlib
import importlib
import io
import json
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from cxr_ray import storage
from cxr_ray.answer_graph import AnswerGraph, answer_graph
from cxr_ray.bundle import Bundle
from cxr_ray.clinical import encode
from cxr_ray.errors import CxrRayError
from cxr_ray.findings import FINDINGS
from cxr_ray.openvino_engine import convert, runtime
from cxr_ray.probe import TOLERANCE

SIDECAR = "export.json"
_MOST_IMAGES = 4096


@dataclass(frozen=True)
class Exported:
    """An export that was written.

    Attributes
    ----------
    files
        Their names, the sidecar last.
    difference
        The largest one between its answers to the bundle's probe and those that the bundle holds.
    """

    files: tuple[str, ...]
    difference: float


class _Format(NamedTuple):
    """How a format is written to a folder, giving the files' names, how it answers from there, and what answers."""

    write: Callable[[Bundle, Path], tuple[str, ...]]
    answer: Callable[[Path, dict[str, np.ndarray]], np.ndarray]
    runtime: str


def export(bundle: Bundle, form: str, out: str) -> Exported:
    """Write a bundle's network in another format, once it has given the answers of the probe there.

    Parameters
    ----------
    form
        One of `FORMATS`.
    out
        Folder or URI; files of the same names in it are replaced.

    Raises
    ------
    CxrRayError
        If a package that the format needs is absent, the network cannot be converted, or what was converted answers the probe
        with a difference above `TOLERANCE`; nothing is written then.
    """
    if bundle.model.trees() is not None:
        raise CxrRayError(f"bundle {bundle.description.name} has boosted trees, which only torch computes; export another one")
    chosen = FORMATS[form]
    with tempfile.TemporaryDirectory() as folder:
        names = chosen.write(bundle, Path(folder))
        given = answer_graph(bundle).given(bundle.probe.pixels, _encoded(bundle))
        difference = bundle.probe.largest_difference(chosen.answer(Path(folder), given))
        if difference > TOLERANCE:
            raise CxrRayError(
                f"{form} export of bundle {bundle.description.name}: its answers to the probe differ by up to "
                f"{difference:.3f}, and {TOLERANCE} is allowed; nothing was written, use another format"
            )
        content = {name: (Path(folder) / name).read_bytes() for name in names}
    told = _sidecar(bundle, form, content, {"largest_difference": difference, "runtime": _versioned(chosen.runtime)})
    content[SIDECAR] = json.dumps(told, indent=2).encode()
    filesystem, root = storage.resolve(out)
    filesystem.create_dir(root, recursive=True)
    for name, data in content.items():
        storage.write_atomically(filesystem, f"{root}/{name}", data)
    return Exported(tuple(content), difference)


def _encoded(bundle: Bundle) -> np.ndarray:
    return encode(bundle.probe.inputs, bundle.statistics, bundle.layout)


def _versioned(package: str) -> str:
    return f"{package} {version(package)}"


def _sidecar(bundle: Bundle, form: str, content: dict[str, bytes], verified: dict[str, object]) -> dict[str, object]:
    description = bundle.description
    told = {
        "pixels": ("uint8", "stored squares, see pixel_recipe; scaling to the network's size and range is inside"),
        "clinical": ("float32", "cxr_ray.clinical.encode with this layout and these statistics; no NaN"),
    }
    return {
        "format": form,
        "files": {name: hashlib.sha256(data).hexdigest() for name, data in content.items()},
        "inputs": [
            {"name": name, "dtype": told[name][0], "shape": ["N", *shape], "holds": told[name][1]}
            for name, shape in answer_graph(bundle).shapes.items()
        ],
        "outputs": [
            {"name": "probabilities", "dtype": "float32", "shape": ["N", len(FINDINGS)], "holds": "findings in their order"}
        ],
        "findings": list(FINDINGS),
        "thresholds": description.thresholds,
        "bundle": {"name": description.name, "version": description.version, "digest": description.digest},
        "pixel_recipe": description.pixel_recipe,
        "clinical": {"layout": asdict(description.layout), "statistics": description.statistics},
        "verified": verified,
    }


def _needed(package: str) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise CxrRayError(f"format 'onnx' needs {package} ({error}); install it with pip install 'cxr-ray[export]'") from None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what exporters print and warn of; what matters is whether the answers are right."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


def _program(graph: AnswerGraph, name: str) -> torch.export.ExportedProgram:
    images = torch.export.Dim("N", min=1, max=_MOST_IMAGES)
    examples = graph.examples()
    try:
        with torch.no_grad(), _quiet():
            return torch.export.export(graph, examples, dynamic_shapes=tuple({0: images} for _ in examples))
    except Exception as error:  # noqa: BLE001 - of torch's tracer, kinds of its own
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise CxrRayError(f"torch cannot export {name} ({reason}); use format openvino") from None


def _write_onnx(bundle: Bundle, folder: Path) -> tuple[str, ...]:
    for package in ("onnx", "onnxscript", "onnxruntime"):
        _needed(package)
    graph = answer_graph(bundle)
    program = _program(graph, bundle.description.name)
    name = "model.onnx"
    try:
        with torch.no_grad(), _quiet():
            torch.onnx.export(
                program,
                (),
                folder / name,
                input_names=list(graph.shapes),
                output_names=["probabilities"],
                dynamo=True,
                external_data=False,
                verbose=False,
            )
    except Exception as error:  # noqa: BLE001 - of the exporter, kinds of its own
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise CxrRayError(f"torch cannot write {bundle.description.name} as ONNX ({reason}); use another format") from None
    return (name,)


def _answer_onnx(folder: Path, given: dict[str, np.ndarray]) -> np.ndarray:
    session = _needed("onnxruntime").InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])
    return np.asarray(session.run(["probabilities"], given)[0])


def _write_openvino(bundle: Bundle, folder: Path) -> tuple[str, ...]:
    runtime().save_model(convert(bundle), folder / "model.xml", compress_to_fp16=False)
    return "model.xml", "model.bin"


def _answer_openvino(folder: Path, given: dict[str, np.ndarray]) -> np.ndarray:
    core = runtime().Core()
    request = core.compile_model(folder / "model.xml", "CPU", {"INFERENCE_PRECISION_HINT": "f32"}).create_infer_request()
    return np.array(request.infer(given)["probabilities"])


def _write_torch_export(bundle: Bundle, folder: Path) -> tuple[str, ...]:
    name = "model.pt2"
    program = _program(answer_graph(bundle), bundle.description.name)
    with _quiet():
        torch.export.save(program, folder / name)
    return (name,)


def _answer_torch_export(folder: Path, given: dict[str, np.ndarray]) -> np.ndarray:
    module = torch.export.load(folder / "model.pt2").module()
    with torch.inference_mode():
        return module(*(torch.from_numpy(np.array(values)) for values in given.values())).numpy()


FORMATS: dict[str, _Format] = {
    "onnx": _Format(_write_onnx, _answer_onnx, "onnxruntime"),
    "openvino": _Format(_write_openvino, _answer_openvino, "openvino"),
    "torch-export": _Format(_write_torch_export, _answer_torch_export, "torch"),
}
