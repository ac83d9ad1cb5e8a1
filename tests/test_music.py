"""MUSIC as it lies on disk: several clips of a video, all in one split, which what is there decides."""

import pytest
from trees import plant, videos, write_list

from avfuse.data.find import find_data, recognise
from avfuse.data.listing import Listing
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


def test_a_heading_below_a_comment_is_no_row(tmp_path):
    """Its "instrument" would be a class, and move the numbers of those behind it in the alphabet."""
    (tmp_path / "clips").mkdir()
    write_list(tmp_path / reader.LIST, "# of 2018\n\n" + rows(12))
    listing = reader.read(tmp_path)
    assert listing.classes["class"] == tuple(sorted(INSTRUMENTS)) and not listing.wrong
    assert listing.expected.total() == 12


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


# --- published lists ----------------------------------------------------------------------------------------


def published(root, **lists: str):
    """A tree of three videos of each of two instruments, without files, and published lists."""
    for name in ("cello/aaaaaaaaaaa", "cello/bbbbbbbbbbb", "cello/ccccccccccc"):
        write_list(root / f"clips/{name}.mp4", "")
    for name in ("acoustic_guitar/ddddddddddd", "acoustic_guitar/-eeeeeeeee_", "acoustic_guitar/fffffffffff"):
        write_list(root / f"clips/{name}.1.mp4", "")
    for name, text in lists.items():
        write_list(root / f"anno/{name}.csv", text)
    return root


TRAIN = """\
./data/audio/cello/aaaaaaaaaaa.mp3,./data/frames/cello/aaaaaaaaaaa.mp4,1580
./data/audio/acoustic_guitar/ddddddddddd.mp3,./data/frames/acoustic_guitar/ddddddddddd.mp4,493
./data/audio/cello/ggggggggggg.mp3,./data/frames/cello/ggggggggggg.mp4,493
"""  # the form of Sound of Pixels; that of iQuery follows
TEST = "/cello/bbbbbbbbbbb.wav,/cello/bbbbbbbbbbb.mp4,122\n/acoustic_guitar/-eeeeeeeee_.wav,x,65\n"


def test_published_lists_decide(tmp_path):
    write_list(tmp_path / reader.LIST, rows(12))  # which they go before
    listing = reader.read(published(tmp_path, train=TRAIN, test=TEST, val="/cello/ccccccccccc.wav,x,1\n"))
    names = {split: [clip.path.name for clip in clips] for split, clips in listing.found.items()}
    assert names == {
        "train": ["aaaaaaaaaaa.mp4", "ddddddddddd.1.mp4"],
        "test": ["-eeeeeeeee_.1.mp4", "bbbbbbbbbbb.mp4"],
    }
    assert listing.classes == {"class": ("acoustic guitar", "cello")} and listing.test_list == "test.csv"
    assert [clip.labels["class"] for clip in listing.found["test"]] == [0, 1]
    assert listing.missing == {"train": ["ggggggggggg"]} and listing.expected == {"train": 3, "test": 2}
    assert listing.extra == 2 and not listing.wrong
    (tmp_path / "anno/test.csv").unlink()
    assert [clip.path.stem for clip in reader.read(tmp_path).found["test"]] == ["ccccccccccc"]  # of val.csv
    (tmp_path / "anno/val.csv").unlink()
    with pytest.raises(
        ValueError, match="train.csv says what to train on: put test.csv or val.csv beside it"
    ):
        reader.read(tmp_path)


HOSTILE = (
    "../../etc/passwd",
    "/cello/../x.wav",
    "/x.wav",
    "/cello/a\x1b[2J.wav",
    "/ce\x1bllo/aaaaaaaaaaa.wav",
    "/.cello/aaaaaaaaaaa.wav",
    "/cello/" + "x" * 65 + ".wav",
    '"/cello/aaa',
    "",
)


def test_hostile_paths_in_published_lists_are_wrong_rows(tmp_path):
    bad = "".join(f"{path},x,1\n" for path in HOSTILE)
    again = "/cello/bbbbbbbbbbb.mp3,x,1\n"  # tested on
    listing = reader.read(published(tmp_path, train=TRAIN + bad + again, test=TEST + bad))
    assert listing.expected == {"train": 3, "test": 2}
    assert len(listing.wrong) == 2 * len(HOSTILE) + 1
    assert listing.wrong[-1] == "train.csv: bbbbbbbbbbb is in test.csv, too"
    assert "\x1b" not in "".join(listing.summary())


def test_mixtures_are_those_of_the_list(tmp_path):
    text = "/cello/bbbbbbbbbbb.wav, /acoustic_guitar/-eeeeeeeee_.wav\n" * 2  # published ones repeat, too
    text += "/acoustic_guitar/-eeeeeeeee_.wav, /cello/bbbbbbbbbbb.wav\n"
    text += "/cello/bbbbbbbbbbb.wav, /cello/aaaaaaaaaaa.wav\n/cello/bbbbbbbbbbb.wav\n"  # trained on; no pair
    text += "".join(f"{path}, /cello/bbbbbbbbbbb.wav\n" for path in HOSTILE)
    found = reader.read(published(tmp_path, train=TRAIN, test=TEST, test_sep=text)).found["test"]
    listing = Listing("mixtures", tmp_path)
    pairs = [tuple(clip.path.name for clip in pair) for pair in reader.read_mixtures(listing, found)]
    one, other = "bbbbbbbbbbb.mp4", "-eeeeeeeee_.1.mp4"
    assert pairs == [(one, other), (one, other), (other, one)]
    assert listing.missing == {"test": ["aaaaaaaaaaa"]} and len(listing.wrong) == 1 + len(HOSTILE)
    assert listing.expected["test"] == 3 + 1 + len(listing.wrong)


def test_published_lists_are_recognised(tmp_path):
    assert recognise(published(tmp_path, train=TRAIN, test=TEST)) == "music"
