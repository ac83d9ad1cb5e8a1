"""Plain folders of videos: how their splits are found, and what of them is used."""

from pathlib import Path

import pytest
from videos import write_video

from avfuse.data.check import check
from avfuse.data.class_folders import with_classes
from avfuse.data.find import find_data
from avfuse.data.sets.folders import read, split_folders


def made(root: Path, *names: str) -> Path:
    """A folder with empty files of these names."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


def found(root: Path) -> dict[str, list[str]]:
    listing = read(root)
    return {split: [c.path.relative_to(root).as_posix() for c in of] for split, of in listing.found.items()}


@pytest.mark.parametrize("train", ["train", "Train", "TRAIN"])
@pytest.mark.parametrize("test", ["test", "Test", "eval", "val", "VAL", "valid", "Validation"])
def test_splits_are_found_however_they_are_written(tmp_path, train, test):
    root = made(tmp_path, f"{train}/cat/a.mp4", f"{test}/cat/b.mp4")
    assert found(root) == {"train": [f"{train}/cat/a.mp4"], "test": [f"{test}/cat/b.mp4"]}


def test_the_usual_way_to_write_them_comes_first(tmp_path):
    root = made(tmp_path, "train/a.mp4", "Train/b.mp4", "val/c.mp4", "test/d.mp4")
    assert split_folders(root) == {"train": root / "train", "test": root / "test"}


def test_clips_beside_the_splits_are_named(tmp_path):
    root = made(tmp_path, "train/a.mp4", "test/b.mp4", "val/c.mp4", "val/x/d.wav", "e.MP4", "runs/log.txt")
    (root / "link").symlink_to(root / "val")
    listing = read(root)
    assert "clips beside train/ and test/ are not used: e.MP4, val/ (2)" in listing.summary()
    assert found(made(tmp_path / "all", "train/a.mp4", "val/b.mp4"))["test"] == ["val/b.mp4"]
    assert read(tmp_path / "all").notes == []


def test_what_runs_and_notes_leave_beside_train_is_no_split(tmp_path):
    """Else a run in that folder would have other clips and classes when it is repeated."""
    root = made(tmp_path, "train/cat/a.mp4", "runs/classify/pictures/a.png", "notes/log.txt")
    assert split_folders(root) == {"train": root / "train"}
    for file in "sounds/a.wav", "run.json", "metrics.jsonl":
        made(root / "runs/separate", file)
        made(root / "separate", file)
    assert split_folders(root) == {"train": root / "train"}
    made(root, "dog/a.mp4")
    assert split_folders(root) == {"train": root}


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_split_that_leads_out_is_refused(tmp_path, split):
    root = made(tmp_path / "data", "train/a.mp4", "test/b.mp4")
    (root / split).rename(tmp_path / "away")
    (root / split).symlink_to(tmp_path / "away")
    for look in read, split_folders:
        with pytest.raises(ValueError, match=f"{split} leads out of the data folder: it is not read"):
            look(root)
    (root / split).unlink()
    (tmp_path / "away").rename(root / "all")
    (root / split).symlink_to("all")  # inside it may
    assert len(found(root)[split]) == 1


def test_links_may_lead_to_anywhere_in_the_folder(tmp_path):
    root = made(tmp_path / "data", "all/a.mp4", "all/b.mp4", "train/cat/.keep", "test/cat/.keep")
    outside = made(tmp_path / "else", "c.mp4")
    (root / "train/cat/a.mp4").symlink_to("../../all/a.mp4")
    (root / "test/cat/b.mp4").symlink_to(root / "all/b.mp4")
    (root / "test/cat/c.mp4").symlink_to(outside / "c.mp4")
    (root / "test/dog").symlink_to(root / "all")  # folders are not followed
    assert found(root) == {"train": ["train/cat/a.mp4"], "test": ["test/cat/b.mp4"]}
    assert read(root).links == [root / "test/cat/c.mp4", root / "test/dog"]


def test_a_manifest_of_other_splits_is_told(tmp_path):
    quiet, said = dict(progress=False, workers=0), []
    for name in "Train/cat/a.mp4", "Train/dog/b.mp4", "Trial/cat/c.mp4", "Trial/dog/d.mp4":
        write_video(tmp_path / name, 1.0)
    check(tmp_path, **quiet)
    (tmp_path / "Test").mkdir()
    found = find_data(tmp_path, said.append, **quiet)
    assert "avfuse-manifest.jsonl was written when Test/ was no split" in said[0]
    with pytest.raises(ValueError, match=r"c\.mp4 is not in .*Train: python -m avfuse\.data check .*, anew"):
        with_classes(found, tmp_path, say=said.append)
