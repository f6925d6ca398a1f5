"""What a STOW-RS service says of each instance: the Store Instances Response Module (PS3.18 section I.1), as JSON or XML.

Services send the one or the other whatever they are asked for, under several media types: what counts is what it says. A peer
chose these bytes: who received them has bounded their length, and a document type, by which XML can grow, is refused.
"""

import json
from typing import Any, TypeAlias
from xml.etree import ElementTree

_FAILED, _REFERENCED = "00081198", "00081199"
_INSTANCE, _REASON = "00081155", "00081197"
_SUCCESS, _PROCESSING_FAILURE = 0x0000, 0x0110
# Of the DICOM JSON model (PS3.18 annex F): attributes by tag.
_Attributes: TypeAlias = dict[str, dict[str, Any]]


def read_store_response(body: bytes) -> dict[str, int] | None:
    """Read which instances were stored and which were not.

    Parameters
    ----------
    body
        DICOM JSON (PS3.18 annex F) or a Native DICOM Model (PS3.19 annex A).

    Returns
    -------
    dict or None
        Failure reason by SOP Instance UID, 0 for what was stored; None where the body is neither, or has neither list.
    """
    try:
        models = _models(body)
        if not any(_FAILED in model or _REFERENCED in model for model in models):
            return None
        stored = {str(_value(item, _INSTANCE)): _SUCCESS for model in models for item in _items(model, _REFERENCED)}
        failed = {str(_value(item, _INSTANCE)): _reason(item) for model in models for item in _items(model, _FAILED)}
    except (ValueError, TypeError, AttributeError, LookupError, OverflowError, RecursionError, ElementTree.ParseError):
        return None
    return stored | failed


def _reason(item: _Attributes) -> int:
    return int(_value(item, _REASON) or 0) or _PROCESSING_FAILURE


def _items(model: _Attributes, tag: str) -> list[_Attributes]:
    return model.get(tag, {}).get("Value") or []


def _value(item: _Attributes, tag: str) -> Any:
    return (item.get(tag, {}).get("Value") or [None])[0]


def _models(body: bytes) -> list[_Attributes]:
    try:
        content = json.loads(body)
    except ValueError:
        return [_from_xml(body)]
    # Some answer with a list: an object for each study.
    return content if isinstance(content, list) else [content]


class _NoDoctype(ElementTree.TreeBuilder):
    def doctype(self, _name: str, _public: str | None, _system: str | None) -> None:
        raise ValueError("a document type is no part of a Native DICOM Model")


def _from_xml(body: bytes) -> _Attributes:
    root = ElementTree.fromstring(body, ElementTree.XMLParser(target=_NoDoctype()))  # noqa: S314 - see `_NoDoctype`
    if root.tag.rpartition("}")[2] != "NativeDicomModel":
        raise ValueError("no Native DICOM Model")
    return _attributes(root)


def _attributes(element: ElementTree.Element) -> _Attributes:
    """The attributes of a model or of an item; with the standard's namespace or, as some write it, without any."""
    return {
        attribute.get("tag", "").upper(): {
            "Value": [
                *map(_attributes, attribute.findall("{*}Item")),
                *((value.text or "").strip() for value in attribute.findall("{*}Value")),
            ]
        }
        for attribute in element.findall("{*}DicomAttribute")
    }
