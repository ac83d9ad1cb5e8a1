"""Scenes of synchrony: what names the object that sounds, by oracles that know how all pulses are; their
files; and the demo made of them.
"""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from avfuse.data import find, sounding_shapes
from avfuse.data.sounding_shapes import (
    generate,
    load_masks,
    load_stems,
    read_frames,
    read_manifest,
    read_sound,
)
from avfuse.data.sounding_shapes.synthesis import (
    COLOURS,
    RGB,
    SHAPES,
    SwitchingShape,
    draw,
    play,
    sample_scene,
    shape_from,
)
from avfuse.tasks.localize import Localization
from avfuse.tasks.options import ClassifyConfig, LocalizeConfig, SegmentConfig, SeparateConfig
from avfuse.tasks.options import parse as parse_classify
from avfuse.training.plan import plan
from avfuse.training.recipes import TrainConfig, parse
from avfuse.training.settings import checked
from avfuse.training.task import Task

SECONDS, WINDOW = 4.0, 3.0  # of a clip, and of what is read of it
OBJECTS = 4
SCENES = 2000


@pytest.fixture(scope="module")
def scenes():
    return [sample_scene(np.random.default_rng((8, n)), scene="synchrony") for n in range(SCENES)]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    root = tmp_path_factory.mktemp("synchrony")
    return generate(root, scene="synchrony", train=32, test=2, size=64, workers=2, progress=False)


def seen_and_heard(scenes, times):
    """Pulses of all objects (scenes, objects, T), that of the sound (scenes, T), and which one sounds."""
    seen = np.array([[thing.pulse(times) for thing in scene.objects] for scene in scenes])
    sounding = np.array([scene.sounding[0] for scene in scenes])
    return seen, seen[np.arange(len(scenes)), sounding], sounding


def frame_times(frames, start=(SECONDS - WINDOW) / 2):
    """One in the middle of each of so many equal parts of the window."""
    return start + (np.arange(frames) + 0.5) * WINDOW / frames


def best(scores, seed=0):
    """The highest of each row, any one of several."""
    return (scores + 1e-9 * np.random.default_rng(seed).uniform(size=scores.shape)).argmax(-1)


def is_chance(right, chance):
    """Whether a share of right answers lies within three standard errors."""
    return abs(np.mean(right) - chance) < 3 * np.sqrt(chance * (1 - chance) / len(right))


# ---------------------------------------------------------------------------------------------------- oracles


@pytest.mark.parametrize("start", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("frames", [8, 16])
def test_several_frames_and_the_sound_name_the_object(scenes, frames, start):
    seen, heard, sounding = seen_and_heard(scenes, frame_times(frames, start))
    seen = seen - seen.mean(-1, keepdims=True)
    likeness = (seen * (heard - heard.mean(-1, keepdims=True))[:, None]).sum(-1)
    likeness = likeness / np.linalg.norm(seen, axis=-1).clip(1e-6)
    assert np.mean(best(likeness) == sounding) > 0.99


@pytest.mark.parametrize("start", np.linspace(0, SECONDS - WINDOW, 5))
def test_the_frame_in_the_middle_of_a_window_and_the_sound_are_at_chance(scenes, start):
    """The likelihood of what is seen is the same whichever object the sound follows: all are alike there, and
    all else that is seen is drawn without regard to the pulses.
    """
    seen, heard, sounding = seen_and_heard(scenes, frame_times(1, start))
    assert np.allclose(seen, 0.5, atol=1e-12) and np.allclose(heard, 0.5, atol=1e-12)
    likeness = -abs(seen - heard[:, None])[..., 0].round(9)
    assert is_chance(best(likeness) == sounding, 1 / OBJECTS)


def test_a_frame_beside_the_rest_tells_something(scenes):
    """It cannot be otherwise where evidence adds up over frames; this test keeps the claim from growing."""
    seen, heard, sounding = seen_and_heard(scenes, np.array([1.0]))
    right = np.mean(best(-abs(seen - heard[:, None])[..., 0]) == sounding)
    assert 1 / OBJECTS + 0.1 < right < 0.7


def test_pictures_alone_are_at_chance(scenes):
    """Every order in which their objects can be put, by what is seen of them in all frames."""
    seen, _, sounding = seen_and_heard(scenes, np.arange(0, SECONDS, 0.05))
    centred = seen - seen.mean(-1, keepdims=True)
    alike = centred @ centred.mT
    orders = {
        "depth": np.tile(np.arange(OBJECTS), (SCENES, 1)),
        "size": [[thing.size for thing in scene.objects] for scene in scenes],
        "left": [[thing.centre[0] for thing in scene.objects] for scene in scenes],
        "high": [[thing.centre[1] for thing in scene.objects] for scene in scenes],
        "colour": [[COLOURS.index(thing.colour) for thing in scene.objects] for scene in scenes],
        "mean": seen.mean(-1),
        "spread": centred.std(-1),
        "first": seen[..., 0],
        "last": seen[..., -1],
        "steady": -abs(np.diff(seen)).sum(-1),
        "like the others": alike.sum(-1),
    }
    for name, values in orders.items():
        assert is_chance(best(np.array(values, float)) == sounding, 1 / OBJECTS), name
        assert is_chance(best(-np.array(values, float)) == sounding, 1 / OBJECTS), name


def test_the_sound_alone_is_at_chance(scenes):
    """The colour that went with the most similar sound, by pulse, pitch and timbre, in another scene."""
    _, heard, sounding = seen_and_heard(scenes, np.arange(0, SECONDS, 0.05))
    things = [scene.objects[n] for scene, n in zip(scenes, sounding, strict=True)]
    colours = np.array([COLOURS.index(thing.colour) for thing in things])
    timbre = np.array([SHAPES.index(thing.shape) for thing in things])
    tone = np.log([thing.tone for thing in things])
    known, new = slice(SCENES // 2), slice(SCENES // 2, None)
    for sound in (heard, tone[:, None], np.eye(len(SHAPES))[timbre] + 0.1 * tone[:, None]):
        apart = ((sound[new, None] - sound[None, known]) ** 2).sum(-1)
        assert is_chance(colours[known][apart.argmin(1)] == colours[new], 1 / len(COLOURS))


def test_objects_differ_in_colour_and_rhythm_alone(scenes):
    for scene in scenes[:200]:
        things = scene.objects
        assert len(things) == OBJECTS and len({(thing.shape, thing.tone) for thing in things}) == 1
        assert len({thing.colour for thing in things}) == len({thing.changes for thing in things}) == OBJECTS
        for thing in things:  # half of the slots large, so that none is louder than another as a whole
            assert sorted(thing.levels) == sorted([0.0] * 4 + [0.5] + [1.0] * 4)
            assert np.diff(thing.changes).min() > 0.15 and 0 < thing.changes[0] < thing.changes[-1] < SECONDS


def test_pictures_do_not_depend_on_what_sounds_nor_the_sound_on_colours(scenes):
    scene = scenes[0]
    other = replace(scene, sounding=((scene.sounding[0] + 1) % OBJECTS,))
    assert np.array_equal(*(draw(one, frame_times(3), 64)[0] for one in (scene, other)))
    painted = replace(scene, objects=tuple(replace(thing, colour="red") for thing in scene.objects))
    sounds = (play(one, SECONDS, 16_000, np.random.default_rng(0)) for one in (scene, painted))
    assert np.array_equal(*sounds)


@pytest.mark.parametrize("objects, seconds", [(1, 4.0), (2, 3.0), (4, 2.0), (4, 10.0)])
def test_other_numbers_of_objects_and_seconds(objects, seconds):
    rng = np.random.default_rng(0)
    scene = sample_scene(rng, scene="synchrony", objects=objects, seconds=seconds)
    pulses = np.array([thing.pulse(np.array([seconds / 2])) for thing in scene.objects])
    assert pulses.shape == (objects, 1) and (pulses == 0.5).all()
    assert len({thing.levels for thing in scene.objects}) == objects


# ------------------------------------------------------------------------------------------------------ files


def test_decoded_files_name_the_object_too(built):
    entries = read_manifest(built, "train")
    right = [named(built, entry) == entry.colour for entry in entries]
    assert np.mean(right) > 0.95


def named(root, entry, frames=16):
    """The colour whose visible area goes with the loudness, from a decoded file."""
    pictures, sound = read_frames(root / entry.file), read_sound(root / entry.file)
    times = frame_times(frames)
    shown = pictures[np.floor(times * entry.fps + 1e-9).astype(int)].astype(float)
    sounds = [sound[int((t - 0.08) * entry.sample_rate) : int((t + 0.08) * entry.sample_rate)] for t in times]
    loudness = np.log([np.sqrt((part**2).mean()) for part in sounds])
    hues = np.array([hue(np.array(RGB[colour], float)) for colour in COLOURS])
    nearest = (hue(shown) @ hues.T).argmax(-1)
    is_colour = np.ptp(shown, axis=-1) > 60  # the background is nearly grey
    present = {thing["colour"] for thing in entry.objects}
    areas = {c: (is_colour & (nearest == COLOURS.index(c))).sum((1, 2)) for c in present}
    return max(areas, key=lambda colour: np.corrcoef(np.sqrt(areas[colour]), loudness)[0, 1])


def hue(rgb):
    """Colours (..., 3) without their light and grey, of length 1."""
    pure = rgb - rgb.mean(-1, keepdims=True)
    return pure / np.linalg.norm(pure, axis=-1, keepdims=True).clip(1e-6)


def test_masks_boxes_and_stems_are_those_of_the_sounding_object(built):
    for entry in read_manifest(built, "train")[:6]:
        (n,) = entry.sounding
        thing = shape_from(entry.objects[n])
        assert isinstance(thing, SwitchingShape)
        assert (entry.shape, entry.colour) == (thing.shape, thing.colour)
        masks, boxes = load_masks(built, entry)
        assert masks.shape == (1, 40, 64, 64)
        pulse = thing.pulse(np.arange(40) / 10)
        sides = np.sqrt(masks[0].sum((1, 2)))
        assert np.corrcoef(sides, pulse)[0, 1] > 0.9 and sides.max() > 1.5 * sides.min()
        assert (boxes[0, pulse == 1, 2:] - boxes[0, pulse == 1, :2]).mean() > 1.5 * (
            boxes[0, pulse == 0, 2:] - boxes[0, pulse == 0, :2]
        ).mean()
        stems, sound = load_stems(built, entry), read_sound(built / entry.file)[:64_000]
        assert stems.shape == (1, 64_000) and np.corrcoef(stems[0], sound)[0, 1] > 0.98  # noise through AAC
        assert [other["stem"] is not None for other in entry.objects] == [k == n for k in range(OBJECTS)]


def test_manifests_say_the_scene_and_folders_hold_one(built, tmp_path):
    assert json.loads((built / "dataset.json").read_text())["settings"]["scene"] == "synchrony"
    with pytest.raises(ValueError, match="scene=synchrony, not binding"):
        generate(built, train=32, test=2, size=64, progress=False)
    some = dict(train=1, test=0, seconds=2, size=32, workers=1, progress=False)
    generate(tmp_path, **some)
    assert "scene" not in json.loads((tmp_path / "dataset.json").read_text())["settings"]
    with pytest.raises(ValueError, match="scene=binding, not synchrony"):
        generate(tmp_path, scene="synchrony", **some)
    kept = (built / "manifest.jsonl").read_bytes()
    again = dict(scene="synchrony", train=32, test=2, size=64, progress=False)
    (built / "dataset.json").unlink()
    generate(built, **again)  # an interrupted build goes on
    assert (built / "manifest.jsonl").read_bytes() == kept


@pytest.mark.parametrize(
    "setting, message",
    [
        (dict(sounding=2), "sounding must be 1 in scenes of synchrony, got 2"),
        (dict(seconds=1), "seconds must be 2 or more in scenes of synchrony, got 1"),
        (dict(objects=5), "objects must be 1 to 4, got 5"),
        (dict(scene="silence"), "scene must be one of .*got silence"),
    ],
)
def test_settings_that_make_no_sense_are_named(tmp_path, setting, message):
    with pytest.raises(ValueError, match=message):
        generate(tmp_path, **dict(scene="synchrony") | setting)
    assert not list(tmp_path.iterdir())


def test_a_contact_sheet_is_drawn(built, tmp_path):
    from avfuse.data.sounding_shapes.sheet import contact_sheet

    assert contact_sheet(built, tmp_path / "sheet.png", clips=2).read_bytes().startswith(b"\x89PNG")


# --------------------------------------------------------------------------------------------------- training


def test_each_scene_has_a_demo_of_its_own(built, monkeypatch):
    asked = []

    def record(root, **settings):
        asked.append((root, settings["scene"]))
        return built

    monkeypatch.setattr(sounding_shapes, "generate", record)
    quiet = dict(quiet=True, workers=0)
    for config in (TrainConfig(**quiet), TrainConfig(scene="synchrony", **quiet)):
        found = Task.find(config, lambda line: None)
    assert len(found.train) == 32
    Localization.find(LocalizeConfig(scene="synchrony", **quiet), lambda line: None)
    synchrony = (Path("data/synchrony"), "synchrony")
    assert asked == [(Path("data/sounding-shapes"), "binding"), synchrony, synchrony]
    asked.clear()
    Localization.find(LocalizeConfig(**quiet), lambda line: None)
    Task.find(SeparateConfig(**quiet), lambda line: None)
    many = (Path("data/sounding-shapes-2048"), "binding")
    assert asked == [many, (Path("data/sounding-shapes-solos"), "binding")]
    with pytest.raises(ValueError, match="demo must be .*'silence'"):
        find.find_data(None, demo="silence")


def test_scenes_have_defaults_of_their_own():
    """Which options given beside them override, and which no other scene has."""
    command = ["--scene", "synchrony"]
    pretraining, classification = parse(command), parse_classify(command)
    assert (pretraining.model, pretraining.frames, pretraining.pair_bias) == ("micro", 8, "time")
    assert (classification.label, classification.mixup, classification.model) == ("colour", 0.0, "micro")
    assert parse([*command, "--model", "tiny", "--frames", "4"]).frames == 4
    assert parse_classify([*command, "--mixup", "0.5"]).mixup == 0.5
    probe = parse_classify([*command, "--probe"])
    assert (probe.label, probe.model, probe.probe, probe.base_lr) == ("colour", "micro", True, 8e-3)
    assert parse([]).model == "tiny" and parse_classify([]).mixup == 0.8
    assert "at 2,048 clips (the demo's)" in plan(pretraining)


def test_a_scene_is_not_for_data_that_are_given(tmp_path):
    with pytest.raises(ValueError, match="--scene synchrony .* leave out --data"):
        checked(parse)(["--scene", "synchrony", "--data", str(tmp_path)])
    assert checked(parse)(["--scene", "synchrony"]).scene == "synchrony"


def test_tasks_begin_from_the_demo_of_their_scene(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for run in ("demo", "synchrony-demo"):
        (tmp_path / "runs" / run / "model").mkdir(parents=True)
    scenes = "binding", "synchrony"
    assert [LocalizeConfig(scene=scene).checkpoint for scene in scenes] == [
        "runs/demo",
        "runs/synchrony-demo",
    ]
    (tmp_path / "runs/segment/model").mkdir(parents=True)  # has learned what others need not learn again
    assert [LocalizeConfig(scene=scene).checkpoint for scene in scenes] == [
        "runs/segment",
        "runs/synchrony-demo",
    ]
    assert SeparateConfig().checkpoint == "runs/segment"
    assert (ClassifyConfig().checkpoint, SegmentConfig().checkpoint) == ("runs/demo", "none")
