"""Lists and folders of data sets, whatever their layout: which rows and which files count."""

import errno
import os
from collections import Counter
from pathlib import Path

import pytest

from avfuse.data.listing import Files, Listing, check_class, is_run, rows, walk


def write(path: Path, text: str = "") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def test_only_the_first_line_of_a_list_is_a_heading(tmp_path):
    path = write(tmp_path / "list.csv", "Video_ID,class\nvideo , harp \n")
    listing = Listing("a set", tmp_path)
    assert list(rows(listing, path, tuple)) == [("video", "harp")] and not listing.wrong


def test_a_quote_in_the_middle_of_a_field_is_no_row(tmp_path):
    listing, path = Listing("a set", tmp_path), write(tmp_path / "list.csv", 'a,"har"p\nb,"har p"\n')
    assert list(rows(listing, path, tuple)) == [("b", "har p")]
    assert [text.partition(":")[0] for text in listing.wrong] == ["list.csv, line 1"]


def test_a_folder_is_no_list(tmp_path):
    with pytest.raises(ValueError, match="list.csv is not a file"):
        list(rows(Listing("a set", tmp_path), write(tmp_path / "list.csv" / "x").parent, tuple))


def test_nothing_is_no_class():
    with pytest.raises(ValueError, match="'' is no class"):
        check_class("")


def test_a_path_decides_between_files_of_one_name(tmp_path):
    _, second, other = (write(tmp_path / f"clips/{name}.mp4") for name in ("a/x", "b/x", "b/y"))
    first = write(tmp_path / "clips/b/z.mp4")
    files = Files(Listing("a set", tmp_path))
    assert files.take("b/x.mp4", "x") == second and files.take("c/x.mp4", "x") is None
    assert files.take("c/x.mp4", "x", "z", "y") == first and files.take("b/y.mp4", "z") == other


def test_what_makes_a_folder_that_of_a_run():
    assert is_run(["run.json", ".lock"]) and is_run(["run.json", "metrics.jsonl", "a.mp4"])
    assert not is_run(["run.json", "a.mp4"]) and not is_run(["metrics.jsonl", ".lock", "a.mp4"])


def test_files_of_other_suffixes_are_told_by_their_number(tmp_path):
    passed_over = Counter({".txt": 1, ".rm": 1, "": 3})
    told = Listing("a set", tmp_path, passed_over=passed_over).others()
    assert told == ["passed over by suffix: 3 without one, 1 .rm, 1 .txt"]


def test_a_walk_passes_over_what_is_hidden_or_written_by_runs_below(tmp_path):
    for name in "run.json", ".lock", "b.MP4", "a/c.m2ts", "a/d.TXT", ".e.mp4", ".f/f.mp4", "avfuse-g.mp4":
        write(tmp_path / name)
    for name in "run.json", ".lock", "h.mp4", "sounds/i.mp4":
        write(tmp_path / "a/run" / name)
    paths, links, unlisted, others = walk(tmp_path)
    assert [path.relative_to(tmp_path).as_posix() for path in paths] == ["a/c.m2ts", "b.MP4"]
    assert not links and not unlisted and others == {".txt": 1, ".json": 1}


def test_links_that_lead_away_are_told_in_order(tmp_path):
    root, away = tmp_path / "set", write(tmp_path / "away/a.mp4")
    write(root / "clips/x.mp4")
    for name in "c", "b":
        (root / "clips" / name).symlink_to(away.parent)
    (root / "clips/d.mp4").symlink_to(away)
    (root / "clips/e.mp4").symlink_to(write(root / "beside.mp4"))  # within the root of the data
    paths, links, _, _ = walk(root / "clips", root=root)
    assert [path.name for path in paths] == ["e.mp4", "x.mp4"]
    assert [path.name for path in links] == ["b", "c", "d.mp4"]


def test_folders_that_cannot_be_listed_are_named(tmp_path, monkeypatch):
    shut, look = write(tmp_path / "shut/a.mp4").parent, os.scandir

    def scan(folder):
        if Path(folder) == shut:
            raise PermissionError(errno.EACCES, "Permission denied", str(shut))
        return look(folder)

    monkeypatch.setattr(os, "scandir", scan)
    paths, _, unlisted, _ = walk(write(tmp_path / "b.mp4").parent)
    assert paths == [tmp_path / "b.mp4"]
    assert [str(error) for error in unlisted] == [f"{shut}: cannot be listed: Permission denied"]
