"""AudioSet as it lies on disk: several classes a clip, several lists to train on."""

import pytest
from trees import CLASS_LIST, COMMENTS, IN_AUDIOSET, audioset, plant, videos, write_list

from avfuse.data.clips import ClipDataset, ClipLoader
from avfuse.data.find import find_data
from avfuse.data.sets import audioset as reader
from avfuse.inputs import InputSettings

SETTINGS = InputSettings(image_size=32, audio_seconds=1.0, mel_bins=32)


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    return videos(tmp_path_factory.mktemp("shapes"), 4)


@pytest.fixture
def root(tmp_path, sources):
    return audioset(tmp_path / "audioset", sources)


def by_path(listing, root):
    return {
        clip.path.relative_to(root / "clips").as_posix(): (split, clip.labels["class"])
        for split, clips in listing.found.items()
        for clip in clips
    }


def test_clips_have_all_their_classes(root):
    listing = reader.read(root)
    assert listing.classes == {"class": ("Speech", "Male speech, man speaking", "Music", "Singing")}
    assert by_path(listing, root) == IN_AUDIOSET
    assert listing.missing["unbalanced_train"] == ["gg/ggggggggggg_000000_000010.mp4"]
    assert listing.summary() == [
        "AudioSet: unbalanced_train 2 of 3 clips found (66.7%), balanced_train 1 of 1 clips found (100.0%), "
        "eval 1 of 1 clips found (100.0%)",
        "class_labels_indices.csv has 4 classes; the published one has 527",
    ]


def test_items_say_which_classes_are_heard(root):
    found = find_data(root, lambda line: None, progress=False, workers=0)
    assert found.coverage == {"train": (3, 4), "test": (1, 1)}
    with ClipLoader(ClipDataset(found.train, SETTINGS, train=True), workers=1) as loader:
        (batch,) = loader.batches([[(0, 0), (0, 1), (0, 2)]])
    assert batch["label_class"].tolist() == [[1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]]


def test_one_split_can_be_chosen(root):
    found = find_data(root, lambda line: None, progress=False, workers=0, train_split="balanced_train")
    assert [clip.path.name for clip in found.train] == ["ccccccccccc_000005_000015.mp4"]
    assert found.coverage == {"train": (1, 1), "test": (1, 1)}
    (root / "annotations/unbalanced_train_segments.csv").unlink()
    assert find_data(root, lambda line: None, progress=False, workers=0).coverage["train"] == (1, 1)


def test_wrong_rows_are_named_and_the_others_stay(root):
    path = root / "annotations/balanced_train_segments.csv"
    rows = (
        'eeeeeeeeeee, 0.000, 10.000, "/m/none"',
        'eeeeeeeeeee, 0.000, 10.000, ""',
        'eeeeeeeeeee, nan, 10.000, "/m/09x0r"',
        'eeeeeeeeeee, 0.000, 1e99, "/m/09x0r"',
        'eeeeeeeeeee, -1, 10.000, "/m/09x0r"',
        'eeeeeeeeeee, x, 10.000, "/m/09x0r"',
        'eeeeeeeeeee, 1_0, 20.000, "/m/09x0r"',  # Python would take it for ten
        '../../passwd, 0.000, 10.000, "/m/09x0r"',
        "eeeeeeeeeee, 0.000, 10.000, /m/09x0r,/m/04rlf",  # without quotes there are five fields
        'ccccccccccc, 5.000, 15.000, "/m/09x0r"',  # the clip of another row
    )
    write_list(path, path.read_text() + "\n".join(rows) + "\n")
    eval_list = root / "annotations/eval_segments.csv"
    write_list(eval_list, eval_list.read_text() + 'bbbbbbbbbbb, 0.000, 10.000, "/m/04rlf"\n')
    listing = reader.read(root)
    assert [int(text.split("line ")[1].split(":")[0]) for text in listing.wrong[:-1]] == list(range(5, 15))
    assert listing.wrong[-1] == (
        "eval_segments.csv: bb/bbbbbbbbbbb_000000_000010.mp4 is in another list, too"
    )
    assert by_path(listing, root) == IN_AUDIOSET


def test_a_file_by_the_id_of_a_video_alone_is_that_of_one_row(root, sources):
    """Or one row would train on what another tests on, under the classes of another segment."""
    path = root / "annotations/eval_segments.csv"
    write_list(path, path.read_text() + 'ggggggggggg, 30.000, 40.000, "/m/09x0r"\n')
    plant(sources[0], root / "clips/ggggggggggg.mp4")
    listing = reader.read(root)
    assert by_path(listing, root)["ggggggggggg.mp4"] == ("unbalanced_train", (2,))
    assert listing.missing == {"eval": ["gg/ggggggggggg_000030_000040.mp4"]}
    assert len(listing.found["eval"]) == 1
    assert "1 rows would take the file of a row before, and count as missing" in listing.notes


def test_lists_that_cannot_be_used(root):
    write_list(root / reader.CLASS_LIST, CLASS_LIST.replace("3,/m", "7,/m"))
    with pytest.raises(ValueError, match="its classes are not numbered 0 to 3"):
        reader.read(root)
    write_list(root / reader.CLASS_LIST, "")
    with pytest.raises(ValueError, match="its classes are not numbered 0 to 0"):
        reader.read(root)
    write_list(root / reader.CLASS_LIST, CLASS_LIST)
    for split in reader.SPLITS:
        write_list(root / f"annotations/{split}_segments.csv", COMMENTS)
    assert reader.read(root).extra == 4
    for split in reader.SPLITS:
        (root / f"annotations/{split}_segments.csv").unlink()
    with pytest.raises(ValueError, match="annotations holds none of unbalanced_train, balanced_train, eval"):
        reader.read(root)


@pytest.mark.parametrize("name", ["Y{id}", "{id}", "Y{id}_{times}", "any/{id}_{times}"])
def test_files_may_have_the_names_that_downloads_give_them(root, name):
    for path in list((root / "clips").rglob("*.mp4")):
        new = root / "clips" / (name.format(id=path.stem[:11], times=path.stem[12:]) + ".mp4")
        new.parent.mkdir(exist_ok=True)
        path.rename(new)
    listing = reader.read(root)
    labels = {c.path.stem: c.labels["class"] for clips in listing.found.values() for c in clips}
    assert listing.extra == 0 and len(labels) == 4
    assert {name.rpartition("/")[2]: l for name, (_, l) in IN_AUDIOSET.items()} == {
        next(p.rpartition("/")[2] for p in IN_AUDIOSET if p.rpartition("/")[2][:11] in stem): label
        for stem, label in labels.items()
    }
