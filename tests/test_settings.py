"""Settings: where a value comes from, and what is said of a wrong one."""

import warnings
from typing import Literal

import pytest
import yaml
from pydantic import Field, ValidationError

from cxr_ray.errors import UsageError
from cxr_ray.settings import Settings, as_yaml, load_settings, without_credentials


class Film(Settings):
    edge: int = Field(64, ge=16)
    view: Literal["PA", "AP"] = "PA"
    note: str | None = None
    source: str


class Node(Settings):
    port: int = Field(104, ge=1, le=65535)


class Service(Settings):
    node: Node = Node()


class Archive(Settings):
    source: str
    named: dict[str, str] = Field(default_factory=dict)


class Archives(Settings):
    first: Archive
    others: tuple[Archive, ...] = ()
    uris: list[str] = Field(default_factory=list)


@pytest.fixture
def config(tmp_path):
    def write(text):
        path = tmp_path / "settings.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write


def refused(model, path, flags, *expected):
    with pytest.raises(UsageError) as error:
        load_settings(model, path, flags)
    message = str(error.value)
    assert "\n" not in message
    for part in expected:
        assert str(part) in message


def test_flags_override_the_file_and_the_file_the_defaults(config):
    path = config("source: disk\nedge: 128\nview: AP\n")
    loaded = load_settings(Film, path, {"edge": 256, "view": None})
    assert (loaded.edge, loaded.view, loaded.note, loaded.source) == (256, "AP", None, "disk")
    assert load_settings(Film, None, {"source": "s"}).edge == 64


def test_flags_that_are_false_or_zero_are_given():
    class Switches(Settings):
        on: bool = True
        count: int = 3

    assert load_settings(Switches, None, {"on": False, "count": 0}) == Switches(on=False, count=0)


def test_an_empty_file_changes_nothing(config):
    assert load_settings(Film, config(""), {"source": "s"}) == Film(source="s")
    assert load_settings(Film, config("# nothing yet\n"), {"source": "s"}) == Film(source="s")


def test_unknown_setting_names_the_known_ones(config):
    refused(Film, config("source: s\nedgy: 3\n"), {}, "'edgy'", "known settings: edge, view, note, source")
    refused(Film, None, {"source": "s", "edgy": 3}, "'edgy'", "known settings")


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"source": "s", "edge": "large"}, ("'edge'", "'large'", "integer")),
        ({"source": "s", "edge": 8}, ("'edge'", "8", "greater than or equal to 16")),
        ({"source": "s", "view": "LL"}, ("'view'", "'LL'", "'PA' or 'AP'")),
        ({}, ("'source'", "required")),
    ],
    ids=["type", "range", "choice", "absent"],
)
def test_a_wrong_value_is_named_with_what_is_allowed(config, values, expected):
    refused(Film, None, values, *expected)
    refused(Film, config(yaml.safe_dump(values)), {}, *expected)


def test_a_nested_setting_is_named_by_its_path(config):
    refused(Service, config("node:\n  port: 0\n"), {}, "'node.port'", "0")
    assert load_settings(Service, config("node:\n  port: 11112\n"), {}).node.port == 11112


@pytest.mark.parametrize(
    "text",
    [
        *("edge: [1, 2", "edge: 3\n  view: 4\n", "\tedge: 3"),
        *(b"edge: \xff\xfe", "- a\n- b\n", "64\n"),
    ],
)
def test_bad_yaml_names_the_file(config, text):
    path = config(text)
    refused(Film, path, {"source": "s"}, f"--config {path}")


def test_yaml_calls_no_python(config, tmp_path):
    path = config(f"edge: !!python/object/apply:os.mkdir [{tmp_path / 'made'}]\n")
    refused(Film, path, {"source": "s"}, f"--config {path}")
    assert not (tmp_path / "made").exists()


def test_absent_file_is_named(tmp_path):
    refused(Film, tmp_path / "none.yaml", {"source": "s"}, tmp_path / "none.yaml")
    refused(Film, tmp_path, {"source": "s"}, tmp_path)


def test_printed_settings_can_be_loaded_again(config):
    given = Film(source="s3://bucket/Übersicht", edge=128, note="a: b # c")
    assert load_settings(Film, config(as_yaml(given)), {}) == given


def test_credentials_are_taken_out_wherever_they_are_and_nothing_else_changes():
    secret, safe = "s3://key:secret@bucket/nih?region=eu", "s3://bucket/nih?region=eu"
    archive = {"source": secret, "named": {"a": secret}}
    settings = Archives.model_validate({"first": archive, "others": [archive, {"source": "/data"}], "uris": [secret, "/data"]})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        told = without_credentials(settings).model_dump(mode="json")
    known = {"source": safe, "named": {"a": safe}}
    assert told == {"first": known, "others": [known, {"source": "/data", "named": {}}], "uris": [safe, "/data"]}
    assert settings.first.source == secret


def test_settings_do_not_change():
    with pytest.raises(ValidationError):
        Film(source="s").edge = 3
