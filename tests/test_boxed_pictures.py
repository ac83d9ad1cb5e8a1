"""VGG-SS, and what SLAVC's lists make of it and of Flickr-SoundNet: pictures to test on, and pairs in which
nothing is to be found.
"""

import json
import os

import numpy as np
import pytest
from scene_trees import SHAPES, annotation, write_flickr_soundnet, write_silent, write_vggss

from avfuse.data import sounding_shapes
from avfuse.data.scenes import Boxes, View
from avfuse.data.sets.flickr_soundnet import read_flickr_soundnet
from avfuse.data.sets.vggss import is_vggss, read_vggss
from avfuse.tasks.localize import Localization, LocalizeConfig
from avfuse.training.loop import program

HOSTILE = ("../../outside", "/etc/passwd", "a\x1b[31m", "nul\0", "x" * 300, "", "a b")  # no name of a video
NAMES = tuple(f"{letter * 11}_000030" for letter in "abcd")


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    return sounding_shapes.generate(tmp_path_factory.mktemp("shapes"), **SHAPES)


@pytest.fixture
def root(tmp_path):
    """Four pictures with sounds, as far as a reader looks at them, and no boxes."""
    root = tmp_path / "data"
    for folder, suffix in (("frames", "jpg"), ("audio", "wav")):
        (root / folder).mkdir(parents=True)
        for name in NAMES:
            (root / f"{folder}/{name}.{suffix}").touch()
    return root


def write_boxes(root, entries: list) -> None:
    (root / "vggss.json").write_text(json.dumps(entries), encoding="utf-8")


def entry(name: str, *boxes) -> dict:
    return {"file": name, "class": "dog barking", "bbox": list(boxes or [[0.1, 0.2, 0.5, 0.75]])}


def named(split) -> list[tuple[str, str, int]]:
    """Picture, sound and number of boxes of each scene."""
    return [(s.path.stem, s.sound.stem, len(s.moments[0].truth.boxes)) for s in split.scenes]


def reasons(split) -> list[str]:
    return [f"{error.path.name}: {error.reason}" for error in split.missing]


# --- boxes --------------------------------------------------------------------------------------------------


def published(boxes: list[list[float]]) -> np.ndarray:
    """The steps of SLAVC's evaluation: cut off, scaled to 224, rounded down, counted once."""
    truth = np.zeros((224, 224))
    for box in boxes:
        x0, y0, x1, y1 = (np.clip(np.array(box), 0, 1) * 224).astype(int)
        truth[y0:y1, x0:x1] = 1
    return truth


def test_boxes_are_those_of_the_published_evaluation(root):
    random = np.random.default_rng(0)
    several = [
        [[0.1, 0.2, 0.5, 0.75]],
        [[0.4, 0.5, -2.9e17, 0.9]],
        [[0.2, 1.0, 0.75, 1.0]],
        [[-3, 0, 1e999, 1]],
    ]
    for _ in range(40):  # corners as they were drawn, in pictures 320 wide
        corners = np.sort(random.integers(0, 321, (random.integers(1, 4), 2, 2)), axis=1) / 320
        several.append(corners.reshape(-1, 4).tolist())
    names = [f"{number:011d}_000000" for number in range(len(several))]
    write_boxes(root, [entry(name, *boxes) for name, boxes in zip(names, several, strict=True)])
    for name in names:
        (root / f"frames/{name}.jpg").touch()
        (root / f"audio/{name}.wav").touch()
    split = read_vggss(root)
    assert [scene.path.stem for scene in split.scenes] == names and not split.missing
    for scene, boxes in zip(split.scenes, several, strict=True):
        height, width = (int(n) for n in random.integers(50, 700, 2))
        sounding, _ = scene.moments[0].truth.read(View(height, width, (0, 0, height, width)), (224, 224))
        assert np.array_equal(sounding, published(boxes))
    assert [published(boxes).sum() for boxes in several[1:3]] == [0, 0]  # and count as boxed
    assert all(scene.moments[0].truth.boxes for scene in split.scenes)


@pytest.mark.parametrize(
    "wrong, reason",
    [
        ("text", "TypeError"),
        ({"file": NAMES[0]}, "KeyError('bbox')"),
        ({"bbox": [[0, 0, 1, 1]]}, "KeyError('file')"),
        (entry(NAMES[0]) | dict(bbox=[]), "there is no box"),
        (entry(NAMES[0], [0, 0, 1]), "is no box"),
        (entry(NAMES[0], [0, 0, 1, "1"]), "is no box"),
        (entry(NAMES[0], [0, 0, 1, True]), "is no box"),
        (entry(NAMES[0], [0, 0, 1, float("nan")]), "is no box"),
        (entry(NAMES[0]) | dict(bbox=[7]), "TypeError"),
        (entry(NAMES[1]), "has an entry before"),
        (entry(7), "TypeError"),
        *((entry(name), "is no name of a video") for name in HOSTILE),
    ],
)
def test_entries_that_are_wrong_are_counted_and_named(root, wrong, reason):
    write_boxes(root, [entry(NAMES[1]), wrong])
    split = read_vggss(root)
    assert named(split) == [(NAMES[1], NAMES[1], 1)] and split.expected == 2
    (said,) = reasons(split)
    assert said.startswith("vggss.json: entry 1: ") and reason in said
    train = read_vggss(root, "train", test_share=0)  # wrong ones are of the test split
    assert train.expected == 1 and not train.missing


def test_lists_of_boxes_must_be_lists(root, tmp_path):
    assert not is_vggss(root)
    for text in ("{", "{}", "7", "[" * 10_000, '"\ud800"'):
        (root / "vggss.json").write_bytes(text.encode("utf-8", "surrogatepass"))
        with pytest.raises(ValueError, match="vggss.json"):
            read_vggss(root)
    (root / "vggss.json").rename(tmp_path / "outside.json")
    (root / "vggss.json").symlink_to(tmp_path / "outside.json")
    with pytest.raises(ValueError, match="leaves the data folder"):
        read_vggss(root)


def test_files_that_are_missing_or_lead_out_are_counted_and_named(root, tmp_path):
    write_boxes(root, [entry(name) for name in (*NAMES, "e" * 11)])
    (root / f"frames/{NAMES[0]}.jpg").unlink()
    (root / f"audio/{NAMES[1]}.wav").unlink()
    (tmp_path / "outside.jpg").touch()
    (root / f"frames/{NAMES[2]}.jpg").unlink()
    (root / f"frames/{NAMES[2]}.jpg").symlink_to(tmp_path / "outside.jpg")
    split = read_vggss(root)
    assert (split.found, split.expected) == (1, 5) and named(split) == [(NAMES[3], NAMES[3], 1)]
    assert [text.split(": ", 1)[1][:14] for text in reasons(split)] == [
        *("does not exist", "does not exist", "is refused: pa", "does not exist")
    ]
    assert "1 of 5 annotated pictures" in split.summary()


# --- SLAVC's lists ------------------------------------------------------------------------------------------


def test_a_list_says_what_is_tested_on(root):
    write_boxes(root, [entry(name) for name in NAMES])
    (root / "vggss_test.csv").write_text(f"{NAMES[2]}\n{NAMES[0]}\n{'e' * 11}\n")
    test, train = (read_vggss(root, split, test_share=0.5) for split in ("test", "train"))
    assert named(test) == [(NAMES[0], NAMES[0], 1), (NAMES[2], NAMES[2], 1)]
    assert (test.found, test.expected) == (2, 3) and "has no boxes of eeeeeeeeeee" in reasons(test)[0]
    assert named(train) == [(NAMES[1], NAMES[1], 1), (NAMES[3], NAMES[3], 1)] and train.expected == 2


def test_flickr_soundnet_by_its_list(root):
    (root / "Annotations").mkdir()
    for name in NAMES:
        (root / f"Annotations/{name}.xml").write_text(annotation([[1, 2, 30, 40]]))
    (root / "flickr_test.csv").write_text(f"{NAMES[1]},202\n{NAMES[3]},0\n")  # a second column, as published
    test, train = (read_flickr_soundnet(root, split) for split in ("test", "train"))
    assert [scene.path.stem for scene in test.scenes] == [NAMES[1], NAMES[3]]
    assert [scene.path.stem for scene in train.scenes] == [NAMES[0], NAMES[2]]
    write_silent(root, "flickr", [(NAMES[1], NAMES[3]), (NAMES[3], NAMES[0])])  # whose sound is trained on
    more = read_flickr_soundnet(root, negatives=True)
    assert named(more)[2:] == [(NAMES[1], NAMES[3], 0)] and more.expected == 3
    (root / f"Annotations/{NAMES[0]}.xml").unlink()  # then it is no longer: published pairs have such clips
    more = read_flickr_soundnet(root, negatives=True)
    assert named(more)[2:] == [(NAMES[1], NAMES[3], 0), (NAMES[3], NAMES[0], 0)] and more.expected == 4


def test_negatives_follow_and_have_no_box(root):
    write_boxes(root, [entry(name) for name in NAMES])
    write_silent(root, "vggss", [(NAMES[0], NAMES[2]), (NAMES[1], NAMES[1]), (NAMES[2], "e" * 11)])
    split = read_vggss(root, negatives=True)
    assert named(split)[:4] == [(name, name, 1) for name in NAMES]
    assert named(split)[4:] == [
        (NAMES[0], NAMES[2], 0),
        (NAMES[1], NAMES[1], 0),
    ]  # published ones, too, repeat
    assert (split.found, split.expected) == (6, 7) and reasons(split) == ["eeeeeeeeeee.wav: does not exist"]
    sounding, classes = split.scenes[4].moments[0].truth.read(View(60, 90, (0, 0, 60, 90)), (224, 224))
    assert not sounding.any() and not classes.any()
    assert len(read_vggss(root, "train", test_share=0, negatives=True).scenes) == 4


@pytest.mark.parametrize("name", [name for name in HOSTILE if "\0" not in name])
def test_hostile_names_in_lists_are_wrong_rows(root, name):
    write_boxes(root, [entry(one) for one in NAMES])
    write_silent(root, "vggss", [(NAMES[0], name), (name, NAMES[0]), (NAMES[0], NAMES[1])])
    split = read_vggss(root, negatives=True)
    assert named(split)[4:] == [(NAMES[0], NAMES[1], 0)] and (split.found, split.expected) == (5, 7)
    assert all("is no name of a video" in reason for reason in reasons(split))
    assert split.summary().isprintable() or name == HOSTILE[2]  # which `as_found` escapes
    (root / "vggss_test.csv").write_text(f"{NAMES[1]}\n{name or ','}\n")
    split = read_vggss(root)
    assert named(split) == [(NAMES[1], NAMES[1], 1)] and split.expected == 2


@pytest.mark.parametrize(
    "rows, reason",
    [
        (f"{NAMES[0]},{NAMES[1]},sounding\n", "line 2: 'sounding' is not 'non-sounding'"),
        (f"{NAMES[0]},{NAMES[1]}\n", "line 2: 2 fields, not 3"),
        (f'"{NAMES[0]}\n{NAMES[1]}",{NAMES[1]},non-sounding\n', "line 2: "),  # a name of two lines
        (f"{NAMES[2]},{NAMES[3]},non-sounding\n" * 2, "line 3: names the same clip as line 2"),
    ],
)
def test_rows_that_are_wrong_are_counted_and_named(root, rows, reason):
    write_boxes(root, [entry(name) for name in NAMES])
    (root / "vggss_test_plus_silent.csv").write_text("video,audio,label\n" + rows)
    split = read_vggss(root, negatives=True)
    assert split.expected == split.found + len(split.missing) and reasons(split)[0].startswith(
        f"vggss_test_plus_silent.csv: {reason}"
    )


def test_a_list_that_is_not_there_or_leads_out_is_an_error(root, tmp_path):
    write_boxes(root, [entry(name) for name in NAMES])
    with pytest.raises(ValueError, match="vggss_test_plus_silent.csv cannot be read: No such file"):
        read_vggss(root, negatives=True)
    (tmp_path / "outside.csv").write_text("a\n")
    (root / "vggss_test.csv").symlink_to(tmp_path / "outside.csv")
    with pytest.raises(ValueError, match="leads out of the data folder"):
        read_vggss(root)
    (root / "vggss_test.csv").unlink()
    os.mkfifo(root / "vggss_test.csv")
    with pytest.raises(ValueError, match="is not a file"):
        read_vggss(root)


# --- runs ---------------------------------------------------------------------------------------------------


def run(folder, **options) -> int | str:
    settings = dict(epochs=1, warmup_epochs=0, batch_size=2, workers=0, checkpoint="none", run=folder)
    return program(LocalizeConfig(**settings | options), Localization)


def test_from_training_on_boxes_to_slavc(shapes, tmp_path):
    """Trained on Flickr-SoundNet, judged as it is on extended VGG-SS: its headline, LocAcc, AP and max-F1."""
    write_flickr_soundnet(tmp_path / "flickr", shapes, names=tuple("abcdef"))
    names = write_vggss(tmp_path / "vggss", shapes)
    assert run(tmp_path / "trained", data=tmp_path / "flickr") == 0
    options = dict(data=tmp_path / "vggss", test_share=1.0, epochs=0, checkpoint=str(tmp_path / "trained"))
    assert "cannot be read: No such file" in run(tmp_path / "run", protocol="slavc", **options)
    write_silent(tmp_path / "vggss", "vggss", [(names[0], names[4]), (names[3], "e" * 11)])
    said = run(tmp_path / "run", protocol="slavc", **options)
    assert "more than --max-unreadable" in said  # one of eight is not there
    options |= dict(max_unreadable=0.2)
    results = {}
    for protocol in "flickr-soundnet", "slavc":
        assert run(tmp_path / protocol, protocol=protocol, **options) == 0
        results[protocol] = json.loads((tmp_path / protocol / "results.json").read_text())
    before, after = results["flickr-soundnet"], results["slavc"]
    assert before["coverage"] == dict(judged=6, expected=6) and after["coverage"] == dict(
        judged=7, expected=8
    )
    assert before["weights_sha256"] == after["weights_sha256"] and after["split"] == "pictures, 1 of VGG-SS"
    assert after["metrics"].keys() - before["metrics"].keys() == {
        f"{prefix}{name}" for prefix in ("", "attention_") for name in ("ap", "max_f1")
    }
    for name, value in before["metrics"].items():  # those of the pictures with a box are the same
        assert after["metrics"][name] == pytest.approx(value), name
    assert "SLAVC" in after["protocol"] and "SLAVC" not in before["protocol"]
    assert after["conditions"]["silence"].keys() == {"pointing", "ciou", "auc", "ap", "max_f1", "judged"}
    assert "max_f1" in (tmp_path / "slavc/index.html").read_text()


def test_mistakes_are_explained(shapes, tmp_path):
    assert "--protocol slavc takes boxes" in run(tmp_path / "run", data=shapes, protocol="slavc")
    for share in (0.0, 1.5):
        with pytest.raises(ValueError, match=r"--test-share must be in \(0, 1\]"):
            LocalizeConfig(test_share=share)
    with pytest.raises(ValueError, match="--test-share must be below 1, or nothing is trained on"):
        LocalizeConfig(test_share=1.0)
    write_vggss(tmp_path / "vggss", shapes)
    assert isinstance(read_vggss(tmp_path / "vggss").scenes[0].moments[0].truth, Boxes)
