"""docs/conformance.md against the code: what it says of classes, syntaxes, settings and of the objects that are made.

What the node does with a peer is tried in `test_conformance`.
"""

import re
from dataclasses import replace
from itertools import dropwhile, takewhile

import numpy as np
import pytest
from conftest import REPOSITORY
from pydicom import Dataset
from result_answers import header, image, study

from cxr_ray.transfer_syntaxes import TRANSFER_SYNTAXES
from serve.node.file_meta import IMPLEMENTATION_CLASS_UID, IMPLEMENTATION_VERSION_NAME
from serve.node.node import NodeSettings
from serve.node.results import codes
from serve.node.results.result_uids import SOP_CLASSES
from serve.node.results.secondary_capture import secondary_capture
from serve.node.results.settings import ResultSettings
from serve.node.results.structured_report import structured_report
from serve.node.results.study_answer import Predecessor, SrClass
from serve.node.sop_classes import STORAGE_CLASSES, STORAGE_COMMITMENT, VERIFICATION

PAGE = (REPOSITORY / "docs" / "conformance.md").read_text()
SETTINGS = ResultSettings(institution_name="St. Elsewhere")
# What results take over where an image has it.
GIVEN = {
    "AccessionNumber": "A-4711",
    "StudyDescription": "Thorax p.a.",
    "IssuerOfPatientID": "HOSPITAL",
    "PatientAge": "062Y",
    "PatientName": "Müller^Jörg",
    "SpecificCharacterSet": "ISO_IR 100",
    "TimezoneOffsetFromUTC": "+0100",
    "LossyImageCompression": "01",
    "LossyImageCompressionRatio": "10",
}


def table(words: str) -> list[list[str]]:
    """The cells of the first table after some words of the page, its head left out."""
    _, found, rest = PAGE.partition(words)
    assert found, words
    lines = dropwhile(lambda line: not line.startswith("|"), rest.splitlines())
    _, _, *body = takewhile(lambda line: line.startswith("|"), lines)
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in body]


def attributes(words: str) -> dict[str, str]:
    """The attributes of such a table: name by tag."""
    return {tag: name for _, name, tag, *_ in table(words)}


def made(sr_class: SrClass | None) -> list[Dataset]:
    """Objects with all that is ever written: a revision of an image whose header says everything, and one that says nothing."""
    replaced = Predecessor(SOP_CLASSES["enhanced"], "2.25.11", "2.25.12", "2.25.13")
    full = replace(study(image(header(**GIVEN))), revision=2, predecessors=dict.fromkeys(SOP_CLASSES, replaced))
    answers = (full, study(image(header())))
    if sr_class:
        return [structured_report(answer, sr_class, SETTINGS) for answer in answers]
    film = np.zeros((16, 16), np.uint8)
    return [secondary_capture(answer, film, None, None, SETTINGS) for answer in answers]


@pytest.mark.parametrize(
    ("kind", "sr_class"),
    [("Structured report", "comprehensive-3d"), ("Structured report", "enhanced"), ("Picture", None)],
)
def test_the_annex_has_each_attribute_that_is_written(kind: str, sr_class: SrClass | None) -> None:
    stated = attributes("**Both**") | attributes(f"**{kind}**")
    full, bare = made(sr_class)
    written = {f"({element.tag.group:04X},{element.tag.element:04X})": element.name for element in full}
    assert stated.keys() == written.keys()
    for tag, name in stated.items():
        assert name.replace("'", "").casefold() == written[tag].replace("'", "").casefold()
    assert {element.tag for element in bare} <= {element.tag for element in full}
    assert not any(element.tag.is_private for element in full.iterall())


def test_classes_and_syntaxes_are_those_of_the_listener() -> None:
    accepted = [uid for _, uid in table("#### 4.2.1 Listener")]
    assert accepted == [VERIFICATION, *STORAGE_CLASSES, STORAGE_COMMITMENT]
    assert [uid for _, uid in table("most wanted first.")] == list(TRANSFER_SYNTAXES)
    assert f"{IMPLEMENTATION_CLASS_UID}, {IMPLEMENTATION_VERSION_NAME}" in PAGE
    assert f"UID {codes.PRIVATE_SCHEME_UID}" in PAGE


def test_settings_that_are_named_exist() -> None:
    sections = NodeSettings.model_fields
    named = [re.findall(r"`([a-z_.]+)`", names) for _, names, _ in table("#### 4.4.2 Parameters")]
    checked = 0
    for first, *others in filter(None, named):
        part, _, name = first.partition(".")
        if part in sections and name and "." not in name:
            fields = sections[part].annotation.model_fields
            assert {name, *others} <= fields.keys()
            checked += 1 + len(others)
    assert checked > 20
