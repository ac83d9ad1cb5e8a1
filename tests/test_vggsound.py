"""VGGSound as it lies on disk: its fixed classes, its splits, what is missing, and lists that mean harm."""

import pytest
import torch
from trees import IN_VGGSOUND, plant, vggsound, videos, write_list

from avfuse.data.check import check
from avfuse.data.clips import ClipDataset, ClipLoader
from avfuse.data.find import find_data
from avfuse.data.sets import vggsound as reader
from avfuse.inputs import InputSettings

SETTINGS = InputSettings(image_size=32, audio_seconds=1.0, mel_bins=32)


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    return videos(tmp_path_factory.mktemp("shapes"), 6)


@pytest.fixture
def root(tmp_path, sources):
    return vggsound(tmp_path / "vggsound", sources)


def test_clips_have_the_labels_of_the_list(root):
    listing = reader.read(root)
    names = ("dog barking", "playing harp", "playing violin, fiddle", "police car (siren)")
    assert listing.classes == {"class": names}  # sorted, and not those of the folders that are there
    found = {
        clip.path.relative_to(root / "clips").as_posix(): (split, clip.labels["class"])
        for split, clips in listing.found.items()
        for clip in clips
    }
    assert found == IN_VGGSOUND
    assert listing.missing == {"train": ["dog_barking/ggggggggggg_000001_000011.mp4"]}
    assert listing.summary() == [
        "VGGSound: train 3 of 4 clips found (75.0%), test 2 of 2 clips found (100.0%)",
        "test clips are those of vggsound.csv; papers use the 15446 of test.csv: put it into annotations/",
        "vggsound.csv names 4 classes; the published list has 309",
    ]
    assert not listing.wrong and not listing.extra


def test_they_are_read_like_any_others(root, sources):
    said = []
    found = find_data(root, said.append, progress=False, workers=0)
    assert said[0].startswith("VGGSound: train 3 of 4 clips found (75.0%)")
    assert said[-2:] == [
        "splits: train to train on, test to test on, by vggsound.csv",
        "labels: class (4 classes), by annotations/vggsound.csv",
    ]
    assert found.coverage == {"train": (3, 4), "test": (2, 2)}
    assert found.test_name == "clips of vggsound.csv" and len(found.classes["class"]) == 4
    folder = find_data(sources[0].parent, said.append, progress=False, workers=0)
    plain = ClipDataset(folder.train, SETTINGS, train=False)
    with ClipLoader(ClipDataset(found.test, SETTINGS, train=False), workers=1) as loader:
        (batch,) = loader.batches([[(0, 0), (0, 1)]])
    assert batch["label_class"].tolist() == [1, 2] and not batch["failures"]
    for name in ("image", "audio"):  # the fourth and fifth of the clips they were made of
        assert torch.equal(batch[name], torch.stack([plain[3][name], plain[4][name]]))


def test_wrong_rows_are_named_and_the_others_stay(root):
    path = root / reader.LIST
    rows = (
        b"../../../etc/passwd,0,playing harp,train",
        b"/etc/passwd,0,playing harp,train",
        b"aaaaaaaaaaa,0,../..,train",
        b"aaaaaaaaaaa,0,a/../../b,train",
        b"aaaaaaaaaaa,0,..,train",
        b"aaaaaaaaaaa,-1,playing harp,train",
        b"aaaaaaaaaaa,1e3,playing harp,train",
        b"aaaaaaaaaaa,0,playing harp,valid",
        b"aaaaaaaaaaa,0,playing harp,test",  # the same clip again, to test on
        b"aaaaaaaaaaa,0,playing harp",
        b"aaaaaaaaaaa,0,playing harp,train,1",
        b'"aaaaaaaaaaa,0,playing harp,train',
        b'a"a,0,"x"y,train',
        b"aaa\0aaa,0,playing harp,train",
        b"\xff\xfe\xff,0,playing harp,train",
        b"aaaaaaaaaaa,0,\x1b[2Jharp,train",
        b",,,",
        b"\xf0\x9f\x8e\xbb,0,playing harp,train",
        b"x" * 200_000,
    )
    write_list(path, path.read_bytes() + b"\n".join(rows) + b"\n\n")
    listing = reader.read(root)
    assert [int(text.split("line ")[1].split(":")[0]) for text in listing.wrong] == list(
        range(7, 7 + len(rows))
    )
    assert listing.wrong[8].endswith("names the same clip as line 1")
    assert listing.expected == {"train": 4, "test": 2} and len(listing.classes["class"]) == 4
    assert {c.path.relative_to(root / "clips").as_posix() for s in listing.found.values() for c in s} == set(
        IN_VGGSOUND
    )
    assert "19 wrong rows in the lists, not used: " in listing.summary()[3]
    assert "\x1b" not in "".join(listing.summary())


def test_names_of_other_alphabets_are_names(root, sources):
    path = root / reader.LIST
    write_list(path, "\ufeff" + path.read_text() + "ünïcødé_vid,3,čellö,train\n")
    plant(sources[5], root / "clips/čellö/ünïcødé_vid_000003_000013.mp4")
    listing = reader.read(root)
    assert not listing.wrong and listing.found["train"][3].path.name == "ünïcødé_vid_000003_000013.mp4"


def test_nothing_outside_the_folder_is_used(root, sources, tmp_path):
    outside = plant(sources[5], tmp_path / "outside/ggggggggggg_000001_000011.mp4").parent
    (root / "clips/dog_barking").symlink_to(outside)
    inside = root / "clips/playing_harp/aaaaaaaaaaa_000000_000010.mp4"
    inside.unlink()
    inside.symlink_to(outside / "ggggggggggg_000001_000011.mp4")
    listing = reader.read(root)
    assert listing.links == [root / "clips/dog_barking", inside]
    assert listing.expected["train"] == 4 and len(listing.found["train"]) == 2
    assert "2 links to folders or out of the data folder, not followed" in listing.summary()[3]

    for part in ("clips", "annotations/vggsound.csv"):
        elsewhere = tmp_path / f"elsewhere/{part}"
        elsewhere.parent.mkdir(parents=True, exist_ok=True)
        (root / part).rename(elsewhere)
        (root / part).symlink_to(elsewhere)
        with pytest.raises(ValueError, match=f"{part} leads out of the data folder"):
            reader.read(root)
        (root / part).unlink()
        elsewhere.rename(root / part)


def test_what_is_not_there(tmp_path, sources):
    write_list(tmp_path / reader.LIST, "aaaaaaaaaaa,0,playing harp,train\n")
    with pytest.raises(ValueError, match="clips is not there: it should hold the clips of VGGSound"):
        find_data(tmp_path, lambda line: None)
    (tmp_path / "clips").mkdir()
    found = find_data(tmp_path, lambda line: None, progress=False, workers=0)
    assert found.coverage["train"] == (0, 1) and not found.train
    plant(sources[0], tmp_path / "clips/other/extra.mp4")
    assert reader.read(tmp_path).summary()[-1] == "1 videos are in no list, and not used"
    with pytest.raises(ValueError, match="data_set must be one of 'auto', 'vggsound', .* got 'vgg'"):
        find_data(tmp_path, data_set="vgg")
    with pytest.raises(ValueError, match="train_split must be one of train, got 'balanced_train'"):
        find_data(tmp_path, train_split="balanced_train")


def test_the_official_lists_say_what_is_tested_and_trained_on(root):
    """The two test sets differ: what only one of them has is in neither, and is named."""
    write_list(root / "annotations/test.csv", "ddddddddddd_000120.mp4,playing harp\n")
    listing = reader.read(root)
    paths = {split: [clip.path.name for clip in clips] for split, clips in listing.found.items()}
    assert paths["test"] == ["ddddddddddd_000120_000130.mp4"] and len(paths["train"]) == 3
    assert listing.test_list == "test.csv" and listing.extra == 1
    assert listing.notes[0] == (
        "test clips are the 1 of test.csv; vggsound.csv has 2, and 1 differ: eeeeeeeeeee_000000"
    )
    # A clip that one list trains on and the other tests on is tested on.
    write_list(
        root / "annotations/test.csv",
        "ddddddddddd_000120.mp4,playing harp\naaaaaaaaaaa_000000.mp4,playing harp\n"
        'eeeeeeeeeee_000000.mp4,"playing violin, fiddle"\n',
    )
    write_list(root / "annotations/train.csv", "_cccccccccc_000007.mp4,police car (siren)\n")
    listing = reader.read(root)
    paths = {split: [clip.path.name[:11] for clip in clips] for split, clips in listing.found.items()}
    assert paths == {"train": ["_cccccccccc"], "test": ["ddddddddddd", "aaaaaaaaaaa", "eeeeeeeeeee"]}
    assert not listing.wrong

    said = []
    found = find_data(root, said.append, progress=False, workers=0)
    assert found.test_name == "clips of test.csv"
    check(root, workers=0, progress=False)
    assert find_data(root, said.append, progress=False, workers=0).test_name == "clips of test.csv"


def test_flat_copies_are_found_by_id_and_start(root, sources):
    for path in list((root / "clips").rglob("*.mp4")):
        path.rename(root / "clips" / f"{path.name[:-11]}.mp4")  # <id>_<start>.mp4
    listing = reader.read(root)
    labels = {c.path.name: c.labels["class"] for clips in listing.found.values() for c in clips}
    assert labels == {
        path.rpartition("/")[2][:-11] + ".mp4": label for path, (_, label) in IN_VGGSOUND.items()
    }
    assert listing.extra == 0
    # The same name in two folders could be two clips: neither is taken.
    plant(sources[0], root / "clips/other/aaaaaaaaaaa_000000.mp4")
    assert "playing_harp/aaaaaaaaaaa_000000_000010.mp4" in reader.read(root).missing["train"]


def test_a_hint_says_by_what_pattern_most_names_differ(root):
    for path in list((root / "clips").rglob("*.mp4")):
        path.rename(path.with_name(f"{path.name[:11]}-{path.name[12:]}"))
    listing = reader.read(root)
    assert not any(listing.found.values()) and listing.extra == 5
    assert listing.notes[-1].startswith(
        "most clips have other names than the lists give them:"
        " playing_harp/aaaaaaaaaaa_000000_000010.mp4 is not there, but"
        " playing_harp/aaaaaaaaaaa-000000_000010.mp4 is; rename them"
    )
