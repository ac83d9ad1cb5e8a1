"""MUSIC as it lies on disk: several clips of a video, all in one split, which what is there decides."""

import pytest
from trees import plant, videos, write_list

from avfuse.data.find import find_data
from avfuse.data.sets import music as reader

INSTRUMENTS = ("cello", "acoustic guitar", "tuba")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return videos(tmp_path_factory.mktemp("shapes"), 1)[0]


def rows(count: int) -> str:
    lines = (f"v{n:010d},{INSTRUMENTS[n % 3]},solo" for n in range(count))
    return "id,instrument,kind\n" + "\n".join(lines) + "\n"


def test_the_split_of_the_paper(tmp_path):
    """448 solos, of which 358 are to train on and 90 to test on."""
    write_list(tmp_path / reader.LIST, rows(448))
    for n in range(448):
        write_list(tmp_path / f"clips/{INSTRUMENTS[n % 3].replace(' ', '_')}/v{n:010d}.mp4", "")
    listing = reader.read(tmp_path)
    assert {split: len(clips) for split, clips in listing.found.items()} == {"train": 358, "test": 90}
    assert listing.classes == {"class": ("acoustic guitar", "cello", "tuba")}
    for clip in listing.found["test"]:
        name = listing.classes["class"][clip.labels["class"]]
        assert name.replace(" ", "_") == clip.path.parent.name


def test_clips_of_a_video_stay_together(tmp_path, source):
    write_list(tmp_path / reader.LIST, rows(12) + "v0000000001x,cello,solo\nv1,tuba\n,tuba,solo\nv2\n")
    for n in (0, 1, 2, 4, 5, 7, 8):
        for part in range(3):
            plant(source, tmp_path / f"clips/{INSTRUMENTS[n % 3].replace(' ', '_')}/v{n:010d}.{part}.mp4")
    plant(source, tmp_path / "clips/cello/v0000000001x.mp4")  # whose name begins with that of another
    plant(source, tmp_path / "clips/tuba/v0000000000.mp4")  # another instrument
    plant(source, tmp_path / "clips/cello/w.mp4")
    listing = reader.read(tmp_path)
    videos_of = {
        split: {clip.path.name.split(".")[0] for clip in clips} for split, clips in listing.found.items()
    }
    there = ["v0000000000", "v0000000001", "v0000000001x", "v0000000002"]
    there += ["v0000000004", "v0000000005", "v0000000007", "v0000000008"]
    assert videos_of == {"test": {there[0], there[5]}, "train": set(there) - {there[0], there[5]}}
    assert len(listing.found["test"]) == 6 and len(listing.found["train"]) == 16
    assert listing.extra == 2
    assert sorted(name for names in listing.missing.values() for name in names) == [
        *("v0000000003", "v0000000006", "v0000000009", "v0000000010", "v0000000011", "v1"),
    ]
    assert [text.split(": ")[0] for text in listing.wrong] == [
        "music_solo.csv, line 16",
        "music_solo.csv, line 17",
    ]
    assert listing.found == reader.read(tmp_path).found

    found = find_data(tmp_path, lambda line: None, progress=False, workers=0)
    assert found.coverage == {"test": (6, 8), "train": (16, 20)}


def test_the_larger_list(tmp_path, source):
    write_list(tmp_path / reader.LIST_21, rows(3))
    plant(source, tmp_path / "clips/cello/v0000000000_1.mp4")
    said = []
    find_data(tmp_path, said.append, progress=False, workers=0)
    assert said[0] == "MUSIC-21: test 1 of 2 clips found (50.0%), train 0 of 1 clips found (0.0%)"
    with pytest.raises(ValueError, match="music_solo.csv cannot be read: No such file"):
        find_data(tmp_path, data_set="music")
