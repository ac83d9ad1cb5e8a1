"""Files written aside, JSON lines with half a line, paths that leave a folder, names from outside."""

import errno
import os
from pathlib import Path

import pytest
import torch

from avfuse.files import (
    append_row,
    aside,
    inside,
    leads_out,
    lock,
    printable,
    read_rows,
    some,
    write_rows,
    write_text,
)
from avfuse.weight_files import read_metadata, read_safetensors, write_safetensors


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.mark.parametrize("synced", [False, True])
def test_a_file_is_replaced_whole_or_not_at_all(tmp_path, synced):
    path = tmp_path / "file.txt"
    write_text(path, "old", synced=synced)
    with pytest.raises(RuntimeError, match="half way"):
        with aside(path, synced=synced) as partial:
            partial.write_text("half")
            assert path.read_text() == "old"
            raise RuntimeError("half way")
    assert path.read_text() == "old" and names_in(tmp_path) == {"file.txt"}
    with aside(path, synced=synced) as partial:
        partial.write_text("new")
    assert path.read_text() == "new" and names_in(tmp_path) == {"file.txt"}


def test_locks(tmp_path, monkeypatch, capsys):
    path = tmp_path / "a"
    with path.open("a") as one, path.open("a") as other:
        lock(one, "taken")
        with pytest.raises(ValueError, match="^taken$"):
            lock(other, "taken")

    def flock(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("fcntl.flock", flock)
    with path.open("a") as file:
        for number in errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP:  # noqa: B007
            lock(file, "taken")
            assert f"the file system of {tmp_path} has no locks" in capsys.readouterr().out
        number = errno.EIO
        with pytest.raises(OSError, match="Input/output"):
            lock(file, "taken")


def test_nothing_is_written_through_a_link(tmp_path):
    precious, link = tmp_path / "precious", tmp_path / "link"
    precious.write_text("precious")
    link.symlink_to(precious)
    write_text(link, "new")
    assert precious.read_text() == "precious" and link.read_text() == "new" and not link.is_symlink()


def test_two_writers_of_one_number_do_not_mix(tmp_path):
    """As in two containers that share a disk."""
    path = tmp_path / "file"
    with aside(path) as one:
        one.write_text("one")
        with aside(path) as other:
            other.write_text("other")
        assert path.read_text() == "other" and one.read_text() == "one"
    assert path.read_text() == "one" and names_in(tmp_path) == {"file"}


def test_text_that_utf8_cannot_hold(tmp_path):
    name = os.fsdecode(b"caf\xe9")
    with pytest.raises(UnicodeEncodeError):
        write_text(tmp_path / "a", name)
    write_text(tmp_path / "a", name, errors="surrogateescape")
    assert (tmp_path / "a").read_bytes() == b"caf\xe9" and names_in(tmp_path) == {"a"}


def test_json_lines_survive_half_a_line(tmp_path):
    path = tmp_path / "rows.jsonl"
    assert read_rows(path) == []
    write_rows(path, [{"step": 1}, {"step": 2}])
    append_row(path, {"step": 3})
    assert read_rows(path) == [{"step": 1}, {"step": 2}, {"step": 3}]
    with path.open("ab") as file:
        file.write(b'[1]\n\xff\n{"step": 4}\n' + b"[" * 100_000 + b'\n{"st')
    assert read_rows(path) == [{"step": 1}, {"step": 2}, {"step": 3}, {"step": 4}]


def test_safetensors(tmp_path):
    path = tmp_path / "weights.safetensors"
    tensors = {"a": torch.arange(6.0).view(2, 3).T, "b": torch.tensor(True)}  # one not contiguous
    write_safetensors(path, tensors, {"licence": "MIT"})
    (tmp_path / "plain").touch()
    assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode
    assert read_metadata(path) == {"licence": "MIT"}
    loaded = read_safetensors(path)
    assert loaded.keys() == tensors.keys() and all(torch.equal(loaded[n], tensors[n]) for n in tensors)
    write_safetensors(path, tensors)
    assert "licence" not in read_metadata(path)
    for read in read_safetensors, read_metadata:
        with pytest.raises(ValueError, match="nowhere cannot be read"):
            read(tmp_path / "nowhere")
        with pytest.raises(ValueError, match="plain cannot be read"):
            read(tmp_path / "plain")


def test_paths_that_leave_a_folder(tmp_path, monkeypatch):
    root = tmp_path / "root"
    (root / "folder").mkdir(parents=True)
    (root / "out").symlink_to(tmp_path)
    (root / "circle").symlink_to(root / "circle")
    (root / "in").symlink_to(root / "folder")
    for name in "folder", "folder/new", "in/new", "folder/../folder":
        assert inside(root, name) == root / name and not leads_out(root / name, root)
    for name in "..", "../root-2", "out/file", "folder/../../file", "/etc/passwd":
        assert leads_out(root / name, root)
        with pytest.raises(ValueError, match="leaves the data folder"):
            inside(root, name)
    assert leads_out(root / "a\0b", root)
    with pytest.raises((ValueError, OSError, RuntimeError)):
        inside(root, "a\0b")
    (tmp_path / "link").symlink_to(root)
    assert not leads_out(tmp_path / "link/folder", tmp_path / "link")
    monkeypatch.chdir(tmp_path)
    assert inside(Path("root"), "folder") == Path("root/folder")


def test_names_for_people():
    assert printable("a\nb\x1b[2J\u202ec\udcff é") == r"a\nb\x1b[2J\u202ec\udcff é"
    assert some([]) == ""
    assert some(["a", "b", "c"]) == "a, b, c"
    assert some(["a", "b\n", "c", "d", "e"]) == r"a, b\n, c and 2 more"
    assert some(list("abc"), most=1, separator="; ") == "a and 2 more"
    assert some(list("abc"), most=2, separator="; ") == "a; b and 1 more"
