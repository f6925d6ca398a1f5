"""The files that describe clusters, as tests read them: kustomizations rendered, custom resources checked by their schemas."""

import gzip
import json
import os
import subprocess
import tomllib
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import yaml
from conftest import require_program

REPOSITORY = Path(__file__).resolve().parents[1]
CLUSTER = REPOSITORY / "cluster"
KUBERAY = CLUSTER / "kuberay"
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
PINNED = dict(
    line.split("==") for line in (REPOSITORY / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")
)
HTTP, DICOM, DASHBOARD, RAY_METRICS, NODE_METRICS = 8000, 11112, 8265, 9470, 9471
RAY_KINDS = ("RayCluster", "RayJob", "RayService")
Document = dict[str, Any]


def documents(path: Path) -> list[Document]:
    """The YAML documents of a file."""
    return _documents(path.read_text())


def _documents(text: str) -> list[Document]:
    return [document for document in yaml.load_all(text, yaml.CSafeLoader) if document is not None]


@cache
def _parsed(folder: Path) -> list[Document]:
    # Not one of 'make peers': Debian's is older than components and replacements of kustomize.
    kubectl = require_program("kubectl", os.environ["PATH"], "install 1.27 or later, see kubernetes.io/docs/tasks/tools")
    done = subprocess.run([kubectl, "kustomize", folder], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return _documents(done.stdout)


def rendered(folder: Path) -> list[Document]:
    """What `kubectl apply -k` would apply."""
    return deepcopy(_parsed(folder))


def found(within: list[Document], kind: str, name: str | None = None) -> Document:
    """The one document of a kind, and of a name where there are several."""
    (one,) = [each for each in within if each["kind"] == kind and name in {None, each["metadata"]["name"]}]
    return one


@dataclass(frozen=True)
class Pods:
    """A pod template and where it stands."""

    where: str
    template: Document

    @property
    def spec(self) -> Document:
        return self.template["spec"]

    @property
    def component(self) -> str:
        return self.template["metadata"]["labels"]["cxr-ray/component"]

    @property
    def containers(self) -> list[Document]:
        return [*self.spec.get("initContainers", []), *self.spec["containers"]]


def pods(within: list[Document]) -> Iterator[Pods]:
    """Every pod template, those of custom resources too."""
    for document in within:
        yield from _templates(document, f"{document['kind']} {document['metadata']['name']}")


def _templates(node: object, where: str) -> Iterator[Pods]:
    if isinstance(node, list):
        for number, each in enumerate(node):
            yield from _templates(each, f"{where}[{number}]")
    elif isinstance(node, dict):
        if isinstance(node.get("spec"), dict) and "containers" in node["spec"]:
            yield Pods(where, node)
            return
        for key, each in node.items():
            yield from _templates(each, f"{where}.{key}")


@cache
def definition(kind: str) -> Document:
    """How KubeRay defines a kind, in the version that the manifests name; kuberay/README.md says where it is from."""
    packed = Path(__file__).with_name("kuberay") / f"{kind.lower()}s.json.gz"
    published = json.loads(gzip.decompress(packed.read_bytes()))
    assert published["spec"]["names"]["kind"] == kind
    (version,) = [each for each in published["spec"]["versions"] if each["name"] == "v1"]
    return version


@cache
def _validator(kind: str) -> jsonschema.Draft7Validator:
    schema = deepcopy(definition(kind)["schema"]["openAPIV3Schema"])
    _close(schema)
    schema["properties"]["metadata"] = {"type": "object"}
    return jsonschema.Draft7Validator(schema)


def _close(schema: object) -> None:
    """Let an unknown field be an error: Kubernetes drops it without a word."""
    if isinstance(schema, dict):
        if "properties" in schema and not schema.get("x-kubernetes-preserve-unknown-fields"):
            schema.setdefault("additionalProperties", False)
        for each in schema.values():
            _close(each)
    elif isinstance(schema, list):
        for each in schema:
            _close(each)


def faults(document: Document) -> list[str]:
    """What the published definition of a Ray kind has against a document."""
    errors = _validator(document["kind"]).iter_errors(document)
    return [f"{'.'.join(map(str, error.absolute_path))}: {error.message}" for error in errors]
