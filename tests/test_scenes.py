"""Annotated frames: picture and truth show the same place, and no name in an annotation leads outside."""

import csv
import json
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from scene_trees import SHAPES, annotation, write_avsbench, write_flickr_soundnet, write_metadata, write_sound
from videos import read_audio, read_frame, write_video

from avfuse.data import sounding_shapes
from avfuse.data.clips import Failure
from avfuse.data.scenes import (
    FRAMES,
    Boxes,
    Moment,
    PngMask,
    Scene,
    SceneDataset,
    View,
    as_found,
    middle_moments,
    moment_by_moment,
)
from avfuse.data.sets.avsbench import is_avsbench, read_avsbench, read_classes
from avfuse.data.sets.flickr_soundnet import MAX_BYTES, is_flickr_soundnet, read_boxes, read_flickr_soundnet
from avfuse.data.sounding_shapes.truths import SHAPE_CLASSES, ShapeBoxes, ShapeMasks, sounding_shapes_scenes
from avfuse.data.transforms import Spectrogram
from avfuse.inputs import InputSettings
from avfuse.presets import SMALL_INPUTS

PLAIN = replace(SMALL_INPUTS, image_mean=(0.0, 0.0, 0.0), image_std=(1.0, 1.0, 1.0))  # images stay in 0..1
LEAVING = ("../../outside", "a/../../../outside", "linked", "nul\0", "x" * 300)  # or no name at all


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    return sounding_shapes.generate(tmp_path_factory.mktemp("shapes"), **SHAPES)


@pytest.fixture
def tree(tmp_path, shapes):
    """A function that writes a tree of a layout into a folder of its own."""

    def write(write_layout, **options):
        root = tmp_path / "data"
        return root, write_layout(root, shapes, **options)

    return write


def overlap(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a & b).sum() / (a | b).sum()).item()


# --- one picture and its truth ------------------------------------------------------------------------------


@pytest.fixture
def blob(tmp_path):
    """A scene whose picture is white exactly where its mask says that something sounds."""
    mask = np.zeros((60, 90), np.uint8)
    mask[12:33, 20:65] = 3
    mask[20:50, 55:70] = 2
    Image.fromarray(mask).save(tmp_path / "mask.png")
    Image.fromarray(255 * (mask > 0).astype(np.uint8)).convert("RGB").save(tmp_path / "picture.png")
    write_sound(tmp_path / "sound.wav", np.sin(np.arange(80_000) / 9).astype(np.float32) / 2)
    moment = Moment(truth=PngMask(tmp_path / "mask.png", 4), seconds=2.0, picture=tmp_path / "picture.png")
    return Scene(path=tmp_path / "picture.png", sound=tmp_path / "sound.wav", moments=(moment,))


@pytest.mark.parametrize(
    ("options", "size"),
    [
        *(({"train": True}, size) for size in (96, (48, 80))),
        *(({"train": False, "frame": f}, size) for f in FRAMES for size in (96, (48, 80), (80, 48))),
    ],
)
def test_picture_and_truth_show_the_same_place(blob, options, size):
    settings = replace(PLAIN, image_size=size)
    dataset = SceneDataset([blob], settings, **options)
    seen = [dataset[(epoch, 0)] for epoch in range(8)]
    for item in seen:
        white = item["image"][0] > 0.5
        assert white.shape == settings.image_shape
        assert overlap(white, item["sounding"] > 0) > 0.95
        assert torch.equal(item["sounding"] > 0, item["classes"] > 0)
        assert set(item["classes"].unique().tolist()) == {0, 2, 3}
    distinct = {item["image"].numpy().tobytes() for item in seen}
    assert len(distinct) == (8 if options["train"] else 1)


def test_a_blank_is_like_an_item_and_present_in_nothing(blob):
    dataset = SceneDataset([blob], replace(PLAIN, image_size=(48, 80)), train=True)
    blank, item = dataset.blank(), dataset[0]
    assert blank.keys() == item.keys() - {"index"}
    for name, value in blank.items():
        assert (value.shape, value.dtype) == (item[name].shape, item[name].dtype) and not value.any(), name


@pytest.mark.parametrize("shape", [(180, 320), (320, 181), (50, 50)])
def test_the_central_part_reaches_the_edges(blob, tmp_path, shape):
    """As of Resize(224) and CenterCrop(224), not of 256 and 224."""
    mask, side = np.zeros(shape, np.uint8), min(shape)
    mask[: shape[0] // 2] = 3
    mask[0, (shape[1] - side) // 2] = 0  # the corner of the central square, a single pixel
    Image.fromarray(mask).save(tmp_path / "mask.png")
    Image.fromarray(255 * (mask > 0).astype(np.uint8)).convert("RGB").save(tmp_path / "picture.png")
    settings = replace(PLAIN, image_size=side)
    item = SceneDataset([blob], settings, train=False, frame="central")[0]
    expected = mask[(shape[0] - side) // 2 :, (shape[1] - side) // 2 :][:side, :side] > 0
    assert torch.equal(item["sounding"] > 0, torch.from_numpy(expected))


def test_the_truth_has_the_size_of_the_protocol(blob):
    item = SceneDataset([blob], PLAIN, train=False, size=224)[0]
    assert item["image"].shape == (3, 96, 96) and item["sounding"].shape == item["classes"].shape == (
        224,
        224,
    )
    rows, columns = (np.arange(224) + 0.5) * 60 / 224, (np.arange(224) + 0.5) * 90 / 224  # whole and squeezed
    mask = np.asarray(Image.open(blob.moments[0].truth.path))
    assert np.array_equal(item["classes"].numpy(), mask[rows.astype(int)][:, columns.astype(int)])


def test_the_sound_is_that_around_the_moment(blob):
    settings = PLAIN
    for seconds, start in ((2.0, 0.5), (2.5, 1.0), (0.5, -1.0), (4.9, 3.4)):  # of 5 s, windows of 3 s
        scene = replace(blob, moments=(replace(blob.moments[0], seconds=seconds),))
        waveform = torch.from_numpy(read_audio(blob.sound, start, 3.0, 16_000))
        item = SceneDataset([scene], settings, train=False)[0]
        torch.testing.assert_close(item["audio"], Spectrogram(settings)(waveform))
    middle = replace(blob, moments=(replace(blob.moments[0], seconds=None),))
    waveform = torch.from_numpy(read_audio(blob.sound, 1.0, 3.0, 16_000))
    torch.testing.assert_close(
        SceneDataset([middle], settings, train=False)[0]["audio"], Spectrogram(settings)(waveform)
    )


def test_training_draws_from_seed_epoch_and_index(shapes):
    scenes = sounding_shapes_scenes(shapes, "train", ShapeMasks).scenes
    dataset = SceneDataset(scenes, SMALL_INPUTS, train=True, seed=3)
    again = pickle.loads(pickle.dumps(dataset))
    first, same, later = dataset[(1, 2)], again[(1, 2)], dataset[(2, 2)]
    for name, tensor in first.items():
        assert torch.equal(tensor, same[name]), name
    assert not torch.equal(first["audio"], later["audio"]) and not torch.equal(first["image"], later["image"])
    other = SceneDataset(scenes, SMALL_INPUTS, train=True, seed=4)[(1, 2)]
    assert not torch.equal(first["image"], other["image"])


def test_boxes_are_those_of_the_published_evaluation():
    random = np.random.default_rng(0)
    for _ in range(50):
        corners = np.sort(random.integers(0, 257, (3, 2, 2)), axis=1)  # 3 people: (x0, y0), (x1, y1)
        expected = np.zeros((224, 224))
        for (x0, y0), (x1, y1) in corners:
            x0, y0, x1, y1 = (int(224 * int(v) / 256) for v in (x0, y0, x1, y1))
            expected[y0:y1, x0:x1] += 1
        expected = np.minimum(expected / 2, 1)
        truth = Boxes(tuple((x0, y0, x1, y1) for (x0, y0), (x1, y1) in corners.tolist()))
        height, width = (int(n) for n in random.integers(50, 400, 2))  # squeezed: no matter
        sounding, classes = truth.read(View(height, width, (0, 0, height, width)), (224, 224))
        assert np.array_equal(sounding, expected.astype(np.float32))
        assert np.array_equal(classes, expected > 0)


@pytest.mark.parametrize("mirrored", [False, True])
def test_boxes_follow_crops_as_masks_do(mirrored, tmp_path):
    mask = np.zeros((100, 100), np.uint8)
    mask[30:70, 40:90] = 1
    Image.fromarray(mask).save(tmp_path / "mask.png")
    view = View(100, 100, (20, 10, 60, 50), mirrored)
    of_mask, _ = PngMask(tmp_path / "mask.png", 2).read(view, (96, 96))
    of_boxes, _ = Boxes(((40, 30, 90, 70),), canvas=100, annotators=1).read(view, (96, 96))
    assert 0 < of_mask.sum() < 96 * 96
    assert overlap(torch.from_numpy(of_mask > 0), torch.from_numpy(of_boxes > 0)) > 0.95


def test_sounding_shapes(shapes):
    entry = sounding_shapes.read_manifest(shapes, "test")[1]
    split = sounding_shapes_scenes(shapes, "test", ShapeMasks)
    assert split.found == split.expected == 3 * 10 and not split.missing
    scene = split.scenes[1]
    masks, boxes = sounding_shapes.load_masks(shapes, entry)
    for frame, moment in enumerate(scene.moments):
        sounding, classes = moment.truth.read(View(64, 64, (0, 0, 64, 64)), (64, 64))
        assert np.array_equal(sounding > 0, masks[0, frame])
        assert set(np.unique(classes)) == {0, SHAPE_CLASSES.index(entry.shape)}
        shown = read_frame(scene.path, moment.seconds)
        assert np.array_equal(shown, sounding_shapes.read_frames(scene.path)[frame])
        box, _ = ShapeBoxes(moment.truth.path, frame, moment.truth.classes).read(
            View(64, 64, (0, 0, 64, 64)), (64, 64)
        )
        x0, y0, x1, y1 = boxes[0, frame]
        assert box[y0:y1, x0:x1].all() and box.sum() == (x1 - x0) * (y1 - y0)
    middle = middle_moments(split)
    assert middle.found == middle.expected == 3 and middle.scenes[1].moments == scene.moments[5:6]


# --- several frames -----------------------------------------------------------------------------------------


FOUR = replace(PLAIN, image_frames=4)


def test_a_frame_is_that_which_the_reader_gives_then(shapes):
    scene = sounding_shapes_scenes(shapes, "test", ShapeMasks).scenes[0]
    frames = sounding_shapes.read_frames(scene.path)
    assert len(scene.frames) == len(frames) == 10  # two a second
    for seconds, number in (
        *((n / 2, n) for n in range(10)),
        *((n / 2 + 0.5 - 1e-3, n) for n in range(10)),
        (1.5 - 1e-9, 3),  # meant to be 1.5
        (-1.0, 0),
        (5.1, 9),
    ):
        assert scene.frame_at(seconds).truth.frame == number
        assert np.array_equal(read_frame(scene.path, seconds), frames[number])


@pytest.mark.parametrize("frame", FRAMES)
@pytest.mark.parametrize("truth", [ShapeMasks, ShapeBoxes])
def test_every_frame_has_the_truth_of_its_time(shapes, frame, truth):
    """In evaluation: the middle 3 of 5 s, two frames a second; as each frame alone."""
    split = middle_moments(sounding_shapes_scenes(shapes, "test", truth))
    dataset = SceneDataset(moment_by_moment(split.scenes), FOUR, train=False, size=32, frame=frame)
    for index, scene in enumerate(dataset.clips):
        item = dataset[index]
        assert item["image"].shape == (4, 3, 96, 96)
        assert item["sounding"].shape == item["classes"].shape == (4, 32, 32)
        with scene.open() as reader:
            start = (reader.streams.seconds - 3) / 2  # its sound is a little longer
        for n, time in enumerate(FOUR.frame_times):
            number = int((start + time) * 2)
            alone = replace(scene, moments=scene.frames[number : number + 1])
            still = SceneDataset([alone], PLAIN, train=False, size=32, frame=frame)[0]
            for name in "image", "sounding", "classes":
                assert torch.equal(item[name][n], still[name]), (name, n)
        waveform = torch.from_numpy(read_audio(scene.path, start, 3.0, 16_000))
        assert torch.equal(item["audio"], Spectrogram(FOUR)(waveform))


@pytest.fixture
def film(tmp_path):
    """A scene whose frames, five a second for four seconds, are white where something sounds: a square that
    is elsewhere in each.
    """
    masks = np.zeros((20, 60, 90), np.uint8)
    for number, mask in enumerate(masks):
        mask[number : number + 30, 3 * number : 3 * number + 30] = 1
    video = np.repeat(255 * masks[..., None], 3, axis=3)
    path = write_video(tmp_path / "film.mp4", seconds=4.0, fps=5, video=video, crf="10")
    frames = []
    for number, mask in enumerate(masks):
        Image.fromarray(mask).save(tmp_path / f"{number}.png")
        truth = PngMask(tmp_path / f"{number}.png", 2)
        frames.append(Moment(truth=truth, seconds=(number + 0.5) / 5))
    return Scene(path=path, sound=path, moments=tuple(frames), frames=tuple(frames))


@pytest.mark.parametrize("size", [96, (48, 80)])
@pytest.mark.parametrize("train", [True, False])
def test_all_frames_show_the_same_place_as_their_truths(film, train, size):
    dataset = SceneDataset([film], replace(FOUR, image_size=size), train=train)
    seen = [dataset[(epoch, 0)] for epoch in range(8)]
    for item in seen:
        white = item["image"][:, 0] > 0.5
        for n in range(4):
            assert overlap(white[n], item["sounding"][n] > 0) > 0.9
            assert n == 0 or overlap(white[n], item["sounding"][n - 1] > 0) < 0.9
    assert len({item["image"].numpy().tobytes() for item in seen}) == (8 if train else 1)
    assert len({item["audio"].numpy().tobytes() for item in seen}) == (8 if train else 1)


def test_after_its_end_a_film_shows_its_last_frame_and_truth(film):
    item = SceneDataset([film], replace(FOUR, audio_seconds=12.0), train=False)[0]
    last, _ = film.frames[-1].truth.read(View(60, 90, (0, 0, 60, 90)), (96, 96))
    for n, number in enumerate((7, 19, 19, 19)):  # at 1.5, 4.5, 7.5 and 10.5 s of 4
        truth, _ = film.frames[number].truth.read(View(60, 90, (0, 0, 60, 90)), (96, 96))
        assert np.array_equal(item["sounding"][n].numpy(), truth)
        assert overlap(item["image"][n, 0] > 0.5, torch.from_numpy(truth) > 0) > 0.9


def test_a_blank_of_several_frames_is_like_an_item(film):
    dataset = SceneDataset([film], FOUR, train=True, size=24)
    blank, item = dataset.blank(), dataset[0]
    assert blank.keys() == item.keys() - {"index"}
    for name, value in blank.items():
        assert (value.shape, value.dtype) == (item[name].shape, item[name].dtype) and not value.any(), name


def test_pictures_that_change_in_size_are_a_failure(film, monkeypatch):
    frames = lambda reader, times: (np.zeros((60 + n, 90, 3), np.uint8) for n in range(len(times)))  # noqa: E731
    monkeypatch.setattr("avfuse.data.decode.ClipReader.frames", frames)
    item = SceneDataset([film], FOUR, train=False)[0]
    assert isinstance(item, Failure) and item.reason == "changes the size of its pictures"


def test_single_pictures_are_no_films(blob, film):
    with pytest.raises(ValueError, match=r"image_frames must be 1 for .*picture.png, .* got 4"):
        SceneDataset([film, blob], FOUR, train=True)


def test_clips_that_are_gone_are_counted(shapes, tmp_path):
    other = sounding_shapes.generate(tmp_path / "shapes", **SHAPES)
    (other / "test/000001.masks.npz").unlink()
    (other / "test/000002.mp4").unlink()
    split = sounding_shapes_scenes(other, "test", ShapeMasks)
    assert (split.found, split.expected) == (10, 30)
    assert [error.path.name for error in split.missing] == ["000001.masks.npz", "000002.mp4"]
    middle = middle_moments(split)
    assert (middle.found, middle.expected) == (1, 3)
    told = []
    whole = as_found(split, middle, "held-out", told.append, shape=SHAPE_CLASSES)
    assert "1 of 3 annotated pictures" in told[1] and "000001.masks.npz" in told[1]
    assert len(whole.unreadable) == 4 and whole.looked_at == 6
    assert whole.coverage == dict(train=(10, 30), test=(1, 3))  # of results.json, too


# --- annotations that are not what they should be -----------------------------------------------------------


def spoiled(blob, **changes):
    """The reason why a scene with these changes of its moment is a failure."""
    scene = replace(blob, moments=(replace(blob.moments[0], **changes),))
    item = SceneDataset([scene], PLAIN, train=False)[0]
    assert isinstance(item, Failure) and item.path == scene.path
    return item.reason


def test_masks_that_cannot_be_used_are_failures(blob, tmp_path):
    def mask(array, name="bad.png"):
        Image.fromarray(array).save(tmp_path / name)
        return PngMask(tmp_path / name, 4)

    whole = (tmp_path / "mask.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.png").write_text("no picture")
    Image.new("L", (90, 60)).save(tmp_path / "jpeg.png", format="JPEG")
    assert "RGB" in spoiled(blob, truth=mask(np.zeros((60, 90, 3), np.uint8)))
    assert "I;16" in spoiled(blob, truth=mask(np.zeros((60, 90), np.uint16)))
    assert "holds class 4, while there are 4" in spoiled(blob, truth=mask(np.full((60, 90), 4, np.uint8)))
    assert "(60, 90)" in spoiled(blob, truth=mask(np.zeros((90, 60), np.uint8)))
    for name in ("cut.png", "text.png", "jpeg.png", "gone.png"):
        assert name in spoiled(blob, truth=PngMask(tmp_path / name, 4))


def test_pictures_that_cannot_be_used_are_failures(blob, tmp_path, monkeypatch):
    (tmp_path / "text.jpg").write_text("no picture")
    assert "text.jpg" in spoiled(blob, picture=tmp_path / "text.jpg")
    assert "gone.jpg" in spoiled(blob, picture=tmp_path / "gone.jpg")
    Image.new("RGB", (90, 60)).save(tmp_path / "film.jpg", format="GIF")  # neither JPEG nor PNG
    assert "film.jpg" in spoiled(blob, picture=tmp_path / "film.jpg")
    monkeypatch.setattr("avfuse.data.scenes.MAX_PIXELS", 60 * 90 - 1)
    assert "too large" in spoiled(blob)


def test_mask_files_that_cannot_be_used_are_failures(blob, tmp_path):
    masks, boxes = np.packbits(np.ones((1, 2, 60, 90), bool)), np.zeros((1, 2, 4), np.int16)
    good = dict(masks=masks, shape=(1, 2, 60, 90), boxes=boxes)
    for number, (change, frame, classes) in enumerate(
        [
            ({}, 2, (1,)),  # there are two frames
            ({}, 0, (1, 2)),  # and one object
            ({"shape": (1, 2, 60)}, 0, (1,)),
            ({"shape": (1, 2, 60, -90)}, 0, (1,)),
            ({"boxes": np.zeros((1, 2, 3))}, 0, (1,)),
            ({"masks": np.array([{}], object)}, 0, (1,)),  # pickled
            ({"shape": (1, 2, 61, 90)}, 0, (1,)),
        ]
    ):
        path = tmp_path / f"{number}.npz"
        np.savez_compressed(path, **good | change)
        for truth in (ShapeMasks, ShapeBoxes):
            assert path.name in spoiled(blob, truth=truth(path, frame, classes))
    (tmp_path / "text.npz").write_text("no archive")
    assert "text.npz" in spoiled(blob, truth=ShapeMasks(tmp_path / "text.npz", 0, (1,)))


def test_wrong_arguments_are_refused(blob, shapes):
    with pytest.raises(ValueError, match="no annotated moment"):
        SceneDataset([replace(blob, moments=())], PLAIN, train=True)
    with pytest.raises(ValueError, match="frame must be one of 'whole', 'central', got 'half'"):
        SceneDataset([blob], PLAIN, train=True, frame="half")
    with pytest.raises(ValueError, match="size"):
        SceneDataset([blob], PLAIN, train=True, size=0)
    with pytest.raises(ValueError, match="split"):
        sounding_shapes_scenes(shapes, "val", ShapeMasks)


# --- AVSBench -----------------------------------------------------------------------------------------------


def test_avsbench(tree, shapes):
    root, uids = tree(write_avsbench)
    assert is_avsbench(root) and not is_avsbench(shapes)
    assert read_classes(root) == SHAPE_CLASSES
    train, test = (read_avsbench(root, split) for split in ("train", "test"))
    assert (train.found, train.expected, len(train.scenes)) == (3, 3, 3)  # the first picture of each
    assert (test.found, test.expected, len(test.scenes)) == (15, 15, 3)
    assert read_avsbench(root, "val").expected == read_avsbench(root, "test", "MS3").expected == 0
    assert [scene.path.parent.name for scene in test.scenes] == uids[3:]
    assert [moment.seconds for moment in test.scenes[0].moments] == [0.5, 1.5, 2.5, 3.5, 4.5]
    dataset = SceneDataset(moment_by_moment(test.scenes), InputSettings(), train=False)
    assert len(dataset) == 15
    for index, entry in enumerate(sounding_shapes.read_manifest(shapes, "test")):
        item = dataset[5 * index + 2]
        assert item["image"].shape == (3, 224, 224) and item["audio"].shape == (1, 128, 192)
        assert set(item["classes"].unique().tolist()) <= {0, SHAPE_CLASSES.index(entry.shape)}


def test_avsbench_names_what_is_missing(tree):
    root, uids = tree(write_avsbench)
    (root / f"v1s/{uids[3]}/labels_semantic/2.png").unlink()
    (root / f"v1s/{uids[3]}/frames/4.jpg").unlink()
    (root / f"v1s/{uids[4]}/audio.wav").unlink()
    test = read_avsbench(root, "test")
    assert (test.found, test.expected, len(test.scenes)) == (8, 15, 2)
    assert [moment.seconds for moment in test.scenes[0].moments] == [0.5, 1.5, 3.5]
    assert [error.path.name for error in test.missing] == ["2.png", "4.jpg", "audio.wav"]
    assert "8 of 15 annotated pictures in 2 clips; 3 files missing or refused" in test.summary()


def test_avsbench_takes_no_clip_twice(tree):
    root, uids = tree(write_avsbench)
    rows = list(csv.DictReader((root / "metadata.csv").open()))
    write_metadata(root, [*rows, rows[5], rows[0] | dict(split="test"), rows[1] | dict(uid="other")])
    train, test = (read_avsbench(root, split) for split in ("train", "test"))
    assert [scene.path.parent.name for scene in (*train.scenes, *test.scenes)] == uids
    assert (test.found, test.expected) == (15, 25)
    assert [error.path.name for error in test.missing] == [uids[5], uids[0]]
    assert {error.reason for error in test.missing} == {"has a row before in metadata.csv"}


def test_avsbench_opens_nothing_outside(tree, tmp_path):
    names = ("ключ ♪", "with space", "umläut")  # unusual, and allowed
    root, uids = tree(write_avsbench, names=names)
    row = dict(vid="x", s_min=0, s_sec=0, a_obj="x", split="test", label="v1s")
    (root / "v1s" / uids[3]).rename(tmp_path / "outside")
    (root / "v1s/linked").symlink_to(tmp_path / "outside")
    (root / "v1s/a").mkdir()
    rows = [row | dict(uid=uid) for uid in (*LEAVING, str(tmp_path / "outside"))]  # which is one inside here
    write_metadata(root, [row | dict(uid=uid, split="train") for uid in uids[:3]] + rows)
    whole = read_avsbench(root, "train")
    assert [scene.path.parent.name for scene in whole.scenes] == list(names) and not whole.missing
    test = read_avsbench(root, "test")
    assert not test.scenes and test.expected == 5 * len(rows)
    assert len(test.missing) == len(rows)
    assert sum("is refused" in error.reason for error in test.missing) == len(LEAVING)


def test_avsbench_lists_must_be_right(tree):
    root, _ = tree(write_avsbench)
    index = {name: number for number, name in enumerate(SHAPE_CLASSES, start=1)}
    for wrong in (
        index | {"background": 0},
        index | {"cross": 99},
        index | {"cross": "7"},
        index | {"cross": True},
        {"background": 2, "x": 1},
        list(index),
        "{",
    ):
        text = wrong if isinstance(wrong, str) else json.dumps(wrong)
        (root / "label2idx.json").write_text(text)
        with pytest.raises(ValueError, match="label2idx.json"):
            read_avsbench(root, "test")
    (root / "label2idx.json").write_text(json.dumps(dict(background=1, circle=2)))  # another list of classes
    items = [SceneDataset(moment_by_moment(read_avsbench(root, "test").scenes), PLAIN, train=False)[0]]
    assert isinstance(items[0], Failure) or set(items[0]["classes"].unique().tolist()) <= {0, 1}
    for line in ("a,b,0,0,x,test,v3", "a,b,0,0,x,holdout,v1s", "a,b"):
        (root / "metadata.csv").write_text(f"vid,uid,s_min,s_sec,a_obj,split,label\n{line}\n")
        with pytest.raises(ValueError, match="metadata.csv, line 2"):
            read_avsbench(root, "test")
    (root / "metadata.csv").write_text("vid,uid\n")
    with pytest.raises(ValueError, match="columns"):
        read_avsbench(root, "test")
    for wrong in (dict(split="dev"), dict(split="test", subset="S5")):
        with pytest.raises(ValueError, match="must be one of"):
            read_avsbench(root, **wrong)


# --- Flickr-SoundNet ----------------------------------------------------------------------------------------


def test_flickr_soundnet(tree, shapes):
    root, ids = tree(write_flickr_soundnet, names=("ключ ♪", "a b"))
    assert is_flickr_soundnet(root) and not is_flickr_soundnet(shapes)
    whole = read_flickr_soundnet(root)
    assert whole.found == whole.expected == 6
    assert [scene.path.stem for scene in whole.scenes] == sorted(ids)
    dataset = SceneDataset(whole.scenes, PLAIN, train=False, size=224)
    entry, item = sounding_shapes.read_manifest(shapes, "train")[2], dataset[sorted(ids).index("train2")]
    mask = torch.from_numpy(sounding_shapes.load_masks(shapes, entry)[0][0, 5])
    shown = torch.nn.functional.interpolate(mask[None, None].float(), size=(224, 224))[0, 0] > 0
    assert item["sounding"].unique().tolist() == [0, 0.5, 1]  # two people, not quite of one mind
    assert (item["sounding"][shown] > 0).float().mean() > 0.95


def test_flickr_soundnet_splits_do_not_move(tree):
    root, ids = tree(write_flickr_soundnet, names=tuple("abcdef"))
    parts = [
        {scene.path.stem for scene in read_flickr_soundnet(root, split, test_share=0.5).scenes}
        for split in ("train", "test")
    ]
    assert parts[0] and parts[1] and not parts[0] & parts[1] and parts[0] | parts[1] == set(ids)
    (root / f"Annotations/{sorted(parts[1])[0]}.xml").unlink()
    after = read_flickr_soundnet(root, "test", test_share=0.5)
    assert {scene.path.stem for scene in after.scenes} == parts[1] - {sorted(parts[1])[0]}
    assert {scene.path.stem for scene in read_flickr_soundnet(root, "train", test_share=0.5).scenes} == parts[
        0
    ]


def test_flickr_soundnet_names_what_is_missing(tree, tmp_path):
    root, ids = tree(write_flickr_soundnet)
    (root / f"frames/{ids[0]}.jpg").unlink()
    (root / f"audio/{ids[1]}.wav").unlink()
    (tmp_path / "outside.jpg").write_bytes((root / f"frames/{ids[2]}.jpg").read_bytes())
    (root / f"frames/{ids[2]}.jpg").unlink()
    (root / f"frames/{ids[2]}.jpg").symlink_to(tmp_path / "outside.jpg")
    (tmp_path / "outside.xml").write_text((root / f"Annotations/{ids[3]}.xml").read_text())
    (root / f"Annotations/{ids[3]}.xml").unlink()
    (root / f"Annotations/{ids[3]}.xml").symlink_to(tmp_path / "outside.xml")
    split = read_flickr_soundnet(root)
    assert (split.found, split.expected) == (2, 6)
    reasons = {error.path.stem: error.reason for error in split.missing}
    assert reasons[ids[0]] == reasons[ids[1]] == "does not exist"
    assert "refused" in reasons[ids[2]] and "refused" in reasons[ids[3]]


def test_annotations(tmp_path):
    path = tmp_path / "a.xml"
    path.write_text(annotation([[1, 2, 30, 40], [5, 6, 70, 80]]))
    assert read_boxes(path) == ((1, 2, 30, 40), (5, 6, 70, 80))
    path.write_text("<a><b><bbox><i>0</i><a>1</a><b>2</b><c>3</c><d>4</d></bbox></b></a>")  # by their order
    assert read_boxes(path) == ((1, 2, 3, 4),)
    path.write_text(annotation([[1, 2, 30, 40]]), encoding="utf-16")
    assert read_boxes(path) == ((1, 2, 30, 40),)
    path.write_text(annotation([[-9, 2, 10**400, 40], [30, 40, 1, 2]]))  # cut off; one without a pixel
    assert read_boxes(path) == ((0, 2, 256, 40), (30, 40, 1, 2))


LAUGHS = '<!DOCTYPE a [<!ENTITY l "1"><!ENTITY m "&l;&l;&l;&l;">]>'


@pytest.mark.parametrize(
    "content, reason",
    [
        (LAUGHS.encode() + annotation([[1, 2, 3, 4]]).replace(">1<", ">&m;<").encode(), "document type"),
        ((LAUGHS + annotation([[1, 2, 3, 4]])).encode("utf-16"), "document type"),
        (b'<!DOCTYPE a SYSTEM "file:///etc/passwd"><a/>', "document type"),
        (b"<a>&other;</a>", "cannot|can be read"),
        (annotation([]).encode(), "has no box"),
        (annotation([[30, 40, 1, 2]]).encode(), "has no box in the picture"),
        (annotation([[300, 2, 400, 40], [-9, -9, 0, 0]]).encode(), "has no box in the picture"),
        (annotation([["nan", 2, 3, 4]]).encode(), "nan"),
        (annotation([[1, 2, 3, 4]]).replace("<ymin>2", "<ymin>two").encode(), "two"),
        (annotation([[1, 2, 3, 4]]).replace("<ymax>4</ymax>", "").encode(), "can be read"),
        (annotation([[1, 2, 3, 4]]).encode()[:-20], "can be read"),
        (b"", "can be read"),
        (b"<a>" + b" " * MAX_BYTES + b"</a>", "bytes"),
    ],
)
def test_annotations_that_cannot_be_used(content, reason, tmp_path):
    (tmp_path / "a.xml").write_bytes(content)
    with pytest.raises(Exception, match=reason) as caught:
        read_boxes(tmp_path / "a.xml")
    assert type(caught.value).__name__ == "ClipError"


def test_flickr_soundnet_needs_its_folders(tmp_path, tree):
    with pytest.raises(ValueError, match="frames, audio and Annotations"):
        read_flickr_soundnet(tmp_path)
    root, _ = tree(write_flickr_soundnet)
    with pytest.raises(ValueError, match="split must be"):
        read_flickr_soundnet(root, "val")
    with pytest.raises(ValueError, match="test_share"):
        read_flickr_soundnet(root, "test", test_share=1.5)
