"""`cxr-ray cluster up`: what is wrong with a network or a folder is said in one line, at once, and nothing is left behind."""

from pathlib import Path

import pytest

from cluster import local
from cluster.errors import SubmitError
from cluster.hosts import check_network
from cluster.local import up
from cluster.local_cli import local as command


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[object, str]:
    """Exit code and error of `cxr-ray cluster up`."""
    with pytest.raises(SystemExit) as ended:
        command(args=["up", *map(str, arguments)], prog_name="cxr-ray cluster", standalone_mode=False)
    said = capsys.readouterr().err
    assert said.startswith("cxr-ray: ")
    assert said.count("\n") == 1
    return ended.value.code, said


@pytest.mark.timeout(20)
@pytest.mark.parametrize(
    ("subnet", "reason"),
    [
        ("abc", "is no IPv4 network"),
        ("", "is no IPv4 network"),
        ("10.97.0.1/24", "has host bits set"),
        ("fd00::/64", "is no IPv4 network"),
        ("10.0.0.0/8", "is larger than /16"),
        ("10.96.0.0/15", "is larger than /16"),
        ("10.97.0.0/30", "has no room for 2 nodes"),
        ("10.97.0.0/31", "has no room for 2 nodes"),
        ("10.97.0.9", "has no room for 2 nodes"),
    ],
)
def test_a_network_that_cannot_be_is_bad_usage(
    subnet: str, reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "kept"
    code, said = refused(capsys, "--subnet", subnet, "--folder", folder)
    assert code == 2
    assert f"--subnet {subnet}: " in said
    assert reason in said
    assert "give" in said
    assert not folder.exists()


@pytest.mark.parametrize("name", ["", "ninechars", "a b", "a/b", "ä"])
def test_a_name_that_no_interface_can_have_is_bad_usage(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, said = refused(capsys, "--name", name, "--plain")
    assert code == 2
    assert f"--name {name}: give 1 to 8 letters and digits" in said


def test_a_network_has_room_for_this_machine_and_the_nodes() -> None:
    assert check_network("dev", 5, "10.97.0.0/29").prefixlen == 29
    with pytest.raises(SubmitError, match="has no room for 6 nodes"):
        check_network("dev", 6, "10.97.0.0/29")
    assert check_network("dev", 16, "10.97.0.0/16").num_addresses == 65_536


def test_folders_above_are_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # As far as the first node, which would take Ray.
    def ended(*_: object) -> None:
        raise SubmitError("far enough")

    monkeypatch.setattr(local, "_start", ended)
    folder = tmp_path / "a" / "b"
    with pytest.raises(SubmitError, match="far enough"):
        up(folder, "dev", 1, 1, 100, None)
    assert folder.parent.is_dir()
    assert not folder.exists()


def test_a_folder_that_is_taken_is_told_by_what_is_in_it(tmp_path: Path) -> None:
    with pytest.raises(SubmitError, match=rf"^--folder {tmp_path}: is there already, .*; name a folder that is not there yet"):
        up(tmp_path, "dev", 1, 1, 100, None)
    (tmp_path / "cluster.json").write_text("{}")
    with pytest.raises(SubmitError, match=f"holds a cluster already; end it with .* --name dev --folder {tmp_path}'"):
        up(tmp_path, "dev", 1, 1, 100, None)
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file" / "a", tmp_path / "file" / "a" / "b"):
        with pytest.raises(SubmitError, match=f"{folder}: .*; name "):
            up(folder, "dev", 1, 1, 100, None)
