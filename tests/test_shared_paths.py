"""What the nodes of a cluster are asked about before a command begins: every local path that it names, and nothing else."""

import importlib
from contextlib import contextmanager
from pathlib import Path

import pytest

from cxr_ray import shared_paths
from cxr_ray.errors import UsageError
from cxr_ray.shared_paths import check_shared

URIS = ("s3://bucket/data", "gs://bucket/data", "hdfs://host:9000/data")


@pytest.mark.parametrize(
    ("uri", "path"),
    [
        (None, None),
        ("/data/x", "/data/x"),
        ("file:///data/x", "/data/x"),
        ("file:///data/a%20b", "/data/a b"),
        *((uri, None) for uri in URIS),
    ],
)
def test_a_file_uri_is_a_local_path_and_other_uris_are_none(uri, path):
    assert shared_paths._local(uri) == (None if path is None else Path(path))


def test_nodes_are_asked_about_file_uris(monkeypatch, tmp_path):
    """A cluster of two nodes, of which one is this process."""
    import ray

    nodes = [{"Alive": True, "NodeID": str(number), "NodeManagerAddress": f"10.0.0.{number}"} for number in range(2)]
    monkeypatch.setattr(ray, "nodes", lambda: nodes)
    asked = {}
    monkeypatch.setattr(shared_paths, "_ask", lambda _nodes, looked_for, _given: asked.update(looked_for))
    check_shared({"data": f"file://{tmp_path}/data", "init": URIS[0]}, {"out": f"file://{tmp_path}/out"})
    assert asked["data"] == tmp_path / "data"
    assert asked["out"].parent == tmp_path
    assert set(asked) == {"data", "out"}
    assert list(tmp_path.iterdir()) == []


class _Asked(Exception):
    pass


@pytest.mark.parametrize(
    ("module", "command", "settings", "names"),
    [
        (
            "cxr_ray.compare_cli",
            "compare",
            {"data": "d", "out": "o", "presets": "none", "bundles": "ours=a,theirs=b"},
            {"data": "d", "bundles ours": "a", "bundles theirs": "b", "out": "o"},
        ),
        (
            "serve.predict_cli",
            "predict",
            {"bundle": "b", "input": "i", "out": "o", "clinical": "c"},
            {"bundle": "b", "input": "i", "out": "o", "clinical": "c"},
        ),
        (
            "cxr_ray.cli",
            "evaluate",
            {"bundle": "b", "data": "d", "out": "o", "scores": "s", "prevalence": "p", "boxes": "x"},
            {"bundle": "b", "data": "d", "out": "o", "scores": "s", "prevalence": "p", "boxes": "x"},
        ),
        ("cxr_ray.cli", "train", {"data": "d", "out": "o", "init": "w"}, {"data": "d", "out": "o", "init": "w"}),
        ("cxr_ray.cli", "tune", {"data": "d", "out": "o"}, {"data": "d", "out": "o"}),
        (
            "ingest.cli",
            "dicom",
            {"source": "s", "out": "o", "labels": "l", "patient_key_file": "k"},
            {"source": "s", "out": "o", "labels": "l", "patient_key_file": "k"},
        ),
        (
            "ingest.cli",
            "nih",
            {"release": "r", "out": "o", "split": "lists", "train_list": "a", "val_list": "b", "test_list": "c"},
            {"release": "r", "out": "o", "train_list": "a", "val_list": "b", "test_list": "c"},
        ),
        ("ingest.cli", "phantom", {"out": "o"}, {"out": "o"}),
    ],
)
def test_every_path_of_a_command_is_asked_about(module, command, settings, names, monkeypatch):
    asked = {}

    def stop(read: dict, written: dict) -> None:
        asked.update(read | written)
        raise _Asked

    @contextmanager
    def session(**_: object):
        yield

    loaded = importlib.import_module(module)
    monkeypatch.setattr(loaded, "check_shared", stop)
    monkeypatch.setattr(loaded, "ray_session", session)
    # What is looked at before: none of these files is there.
    for where in ("cxr_ray.bundle.read_description", "cxr_ray.recipe.check_data", "cxr_ray.comparison_plan.make_plan"):
        monkeypatch.setattr(where, lambda *_: None)
    monkeypatch.setattr("serve.batch.make_plan", lambda _: None)
    if hasattr(loaded, "Dataset"):
        monkeypatch.setattr(loaded, "Dataset", lambda _: None)
    app = loaded.app if module == "ingest.cli" else getattr(loaded, command)
    options = [part for name, value in settings.items() for part in (f"--{name.replace('_', '-')}", value)]
    with pytest.raises(_Asked):
        app(args=[*([command] if module == "ingest.cli" else []), *options], standalone_mode=False)
    assert {name: uri for name, uri in asked.items() if uri is not None} == names


def test_a_file_uri_on_another_machine_is_refused():
    with pytest.raises(UsageError, match="cannot be used"):
        shared_paths._local("file://other/data")
