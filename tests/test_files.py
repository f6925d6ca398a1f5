"""Files of a source: found, listed inside archives and read, with archives that are broken in the ways archives are."""

import os
import tarfile
import zipfile

import pytest
from packed_files import CONTENTS, LOCAL, read, reason, source_file, write_tar, write_zip
from pyarrow import fs

from cxr_ray.errors import CxrRayError
from cxr_ray.pixels import DamagedImage
from ingest import files
from ingest.archives import list_archives, list_members, try_archives
from ingest.files import SourceFile, archive_and_member, list_files, open_file, read_files, walk_files


def test_a_folder_is_listed_in_order_with_names_relative_to_it(tmp_path):
    for name in ("b.dcm", "sub/a.dcm", "sub.dcm", "Ä b.dcm"):
        path = tmp_path / "in" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"12")
    filesystem, root, found = list_files(f"{tmp_path}/in/", "--source")
    assert isinstance(filesystem, fs.LocalFileSystem)
    assert root == str(tmp_path / "in")
    assert [file.name for file in found] == sorted(["b.dcm", "sub/a.dcm", "sub.dcm", "Ä b.dcm"])
    assert [file.location for file in found] == [f"{root}/{file.name}" for file in found]
    assert list_files(f"file://{tmp_path}/in", "--source")[2] == found
    before = found[0].stamp
    (tmp_path / "in" / found[0].name).write_bytes(b"34")
    os.utime(tmp_path / "in" / found[0].name, ns=(1, 1))
    assert list_files(f"{tmp_path}/in", "--source")[2][0].stamp != before


def test_a_single_file_is_its_own_source(tmp_path):
    (tmp_path / "one.dcm").write_bytes(b"123")
    _, root, found = list_files(str(tmp_path / "one.dcm"), "--source")
    assert root == str(tmp_path)
    stamp = f"3-{(tmp_path / 'one.dcm').stat().st_mtime_ns}"
    assert found == [SourceFile(str(tmp_path / "one.dcm"), "one.dcm", stamp)]


def test_links_in_a_circle_pipes_and_names_that_are_no_text_stop_nothing(tmp_path):
    inner = tmp_path / "in" / "folder"
    inner.mkdir(parents=True)
    (inner / "a.dcm").write_bytes(b"a")
    (inner / "round").symlink_to(tmp_path / "in")
    (inner / "nowhere").symlink_to(tmp_path / "absent")
    (inner / "linked.dcm").symlink_to(inner / "a.dcm")
    os.mkfifo(inner / "pipe")
    with open(os.fsencode(inner) + b"/\xff.dcm", "wb"):  # noqa: PTH123 - a name that pathlib cannot hold
        pass
    found = list_files(str(tmp_path / "in"), "--source")[2]
    assert [file.name for file in found] == [r"folder/\xff.dcm", "folder/a.dcm", "folder/linked.dcm"]
    assert "No such file" in reason(found[0].location)


def test_a_source_that_is_not_there_is_said_so_without_its_secrets(tmp_path):
    with pytest.raises(CxrRayError, match=r"^--release .*absent: cannot be listed \(No such file or directory\); check"):
        list_files(str(tmp_path / "absent"), "--release")
    with pytest.raises(CxrRayError, match=r"^--source s3://.*: cannot be listed \(") as caught:
        list_files(
            "s3://AKIDENTITY:hush%2Fhush@bucket/f?endpoint_override=127.0.0.1:9&scheme=http&region=eu-west-1", "--source"
        )
    assert "hush" not in str(caught.value)


def test_a_filesystem_that_is_not_local_is_walked_and_read_in_the_same_way(tmp_path):
    (tmp_path / "in" / "sub").mkdir(parents=True)
    (tmp_path / "in" / "sub" / "1.dcm").write_bytes(b"1")
    write_zip(tmp_path / "in" / "x.zip")
    write_tar(tmp_path / "in" / "y.tgz")
    remote = fs.SubTreeFileSystem(str(tmp_path), LOCAL)
    found = walk_files(remote, "in")
    assert [(file.location, file.name) for file in found] == [
        ("in/sub/1.dcm", "sub/1.dcm"),
        ("in/x.zip", "x.zip"),
        ("in/y.tgz", "y.tgz"),
    ]
    members = [member.location for archive in found[1:] for member in list_members(remote, archive)]
    contents = dict(read_files(remote, ["in/sub/1.dcm", *members]))
    assert [contents[index] for index in range(9)] == [b"1", *CONTENTS.values(), *CONTENTS.values()]
    with open_file(remote, "in/x.zip!/deep/er/b c.dcm") as stream:
        assert stream.read() == b"beta"


@pytest.mark.parametrize("name", ["all.zip", "ALL.ZIP", "all.tar", "all.tar.gz", "all.tgz", "all.Tar.Gz"])
def test_members_are_listed_and_read_as_they_were_packed(tmp_path, name):
    path = tmp_path / name
    if name.lower().endswith("zip"):
        write_zip(path)
    else:
        write_tar(path, mode="w" if name.endswith("tar") else "w:gz")
    archive = source_file(path)
    members = list_members(LOCAL, archive)
    assert [member.name for member in members] == [f"{name}!/{inner}" for inner in CONTENTS]
    assert [member.location for member in members] == [f"{path}!/{inner}" for inner in CONTENTS]
    assert [member.stamp for member in members] == [f"{archive.stamp}-{len(data)}" for data in CONTENTS.values()]
    order = [2, 0, 3, 1, 0]
    wanted = [members[number].location for number in order]
    assert read(*wanted) == [list(CONTENTS.values())[number] for number in order]


def test_plain_files_zips_and_tars_are_read_together(tmp_path):
    (tmp_path / "plain.dcm").write_bytes(b"plain")
    write_zip(tmp_path / "x.zip")
    write_tar(tmp_path / "y.tgz")
    locations = [
        f"{tmp_path}/y.tgz!/deep/er/b c.dcm",
        f"{tmp_path}/x.zip!/a.dcm",
        f"{tmp_path}/plain.dcm",
        f"{tmp_path}/absent.dcm",
        f"{tmp_path}/y.tgz!/absent.dcm",
        f"{tmp_path}/x.zip!/absent.dcm",
        f"{tmp_path}/none.zip!/a.dcm",
        f"{tmp_path}/none.tar!/a.dcm",
    ]
    found = read(*locations)
    assert found[:3] == [CONTENTS["deep/er/b c.dcm"], CONTENTS["a.dcm"], b"plain"]
    gone, left = "cannot be read (No such file or directory); check the file", "cannot be read (no longer in its archive)"
    assert [str(error) for error in found[3:]] == [gone, f"{left}; check the file", f"{left}; check the file", gone, gone]
    assert {type(error) for error in found[3:]} == {DamagedImage}


def test_a_tar_is_passed_over_once_and_in_its_own_order(tmp_path, monkeypatch):
    write_tar(tmp_path / "y.tgz")
    passes = []
    whole = files.stream_tar
    monkeypatch.setattr(files, "stream_tar", lambda *arguments: passes.append(arguments) or whole(*arguments))
    locations = [f"{tmp_path}/y.tgz!/{name}" for name in reversed(CONTENTS)]
    assert [index for index, _ in read_files(LOCAL, locations)] == [3, 2, 1, 0]
    assert len(passes) == 1


def test_only_regular_files_of_a_tar_are_members(tmp_path):
    kinds = {"link": tarfile.SYMTYPE, "hard": tarfile.LNKTYPE, "dev": tarfile.CHRTYPE, "pipe": tarfile.FIFOTYPE}
    extra = []
    for name, kind in (*kinds.items(), ("folder", tarfile.DIRTYPE)):
        entry = tarfile.TarInfo(f"{name}.dcm")
        entry.type, entry.linkname = kind, "/etc/passwd"
        extra.append(entry)
    path = write_tar(tmp_path / "t.tar", {"./images/a.dcm": b"a", "x" * 300: b"b"}, "w", extra)
    members = list_members(LOCAL, source_file(path))
    assert [member.name for member in members] == ["t.tar!/images/a.dcm", "t.tar!/" + "x" * 300]
    assert read(*(member.location for member in members)) == [b"a", b"b"]
    assert "no longer in its archive" in reason(f"{path}!/link.dcm")


def test_a_link_in_a_zip_is_no_member(tmp_path):
    with zipfile.ZipFile(tmp_path / "l.zip", "w") as packed:
        link = zipfile.ZipInfo("link.dcm")
        link.create_system, link.external_attr = 3, 0o120777 << 16
        packed.writestr(link, "/etc/passwd")
        packed.writestr("a.dcm", b"a")
    assert [member.name for member in list_members(LOCAL, source_file(tmp_path / "l.zip"))] == ["l.zip!/a.dcm"]


def test_a_file_is_opened_for_its_first_part(tmp_path):
    (tmp_path / "plain").write_bytes(b"0123456789")
    write_zip(tmp_path / "x.zip", {"a": b"0123456789" * 10_000})
    for location in ("plain", "x.zip!/a"):
        with open_file(LOCAL, f"{tmp_path}/{location}") as stream:
            assert stream.read(4) == b"0123"
            stream.seek(2)
            assert stream.read(2) == b"23"
    for location in ("absent", "x.zip!/absent", "absent.zip!/a"):
        with pytest.raises(DamagedImage, match=r"^cannot be read \("), open_file(LOCAL, f"{tmp_path}/{location}"):
            pass


def test_a_zip_that_is_replaced_is_opened_anew(tmp_path):
    path = write_zip(tmp_path / "x.zip", {"a": b"old"})
    assert read(f"{path}!/a") == [b"old"]
    write_zip(path, {"a": b"newer"})
    assert read(f"{path}!/a") == [b"newer"]


def test_locations_of_members_are_told_from_paths():
    assert archive_and_member("s3/b/X.Tar.Gz!/a/b.zip") == ("s3/b/X.Tar.Gz", "a/b.zip")
    assert archive_and_member("/a/b.zip!/c.zip!/d") == ("/a/b.zip", "c.zip!/d")
    assert archive_and_member("/a/b!/c.dcm") is None
    assert archive_and_member("/a/b.zip") is None


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_archives_are_listed_on_ray_data(tmp_path, capsys):
    write_tar(tmp_path / "b.tgz")
    write_zip(tmp_path / "a.zip")
    _, _, archives = list_files(str(tmp_path), "--release")
    listed = list_archives(LOCAL, archives)
    assert list(listed) == [f"{tmp_path}/a.zip", f"{tmp_path}/b.tgz"]
    assert listed == {archive.location: list_members(LOCAL, archive) for archive in archives}
    assert "archives: 2/2 archives" in capsys.readouterr().err
    (tmp_path / "b.tgz").write_bytes((tmp_path / "b.tgz").read_bytes()[:-60])
    with pytest.raises(CxrRayError, match=r"^b\.tgz: breaks off after \d files; download it again$"):
        list_archives(LOCAL, archives)
    outcomes = {archive.name: type(members) for archive, members in try_archives(LOCAL, archives)}
    assert outcomes == {"a.zip": list, "b.tgz": CxrRayError}
    assert list_archives(LOCAL, []) == {}
