"""Sounding Shapes: what is seen and heard in the files, chance levels, and builds that are interrupted."""

import json
import subprocess
import sys
from contextlib import suppress
from dataclasses import replace

import av
import numpy as np
import psutil
import pytest

from avfuse.data.sounding_shapes import (
    Settings,
    build,
    clips,
    generate,
    load_masks,
    load_stems,
    read_frames,
    read_manifest,
    read_sound,
)
from avfuse.data.sounding_shapes.synthesis import (
    COLOURS,
    SHAPES,
    MovingShape,
    ShapeScene,
    draw,
    play,
    sample_scene,
)

SMALL = {"train": 3, "test": 2, "seconds": 1.0, "size": 64, "progress": False}
PRIMARIES = {
    "red": "r",
    "yellow": "rg",
    "green": "g",
    "cyan": "gb",
    "blue": "b",
    "magenta": "rb",
}  # light there is
BACKGROUND = {"dark": [40, 40, 40], "light": [170, 170, 170], "angle": 0.0, "waves": []}


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Twelve clips of the default kind."""
    return generate(tmp_path_factory.mktemp("shapes"), train=9, test=3, workers=2, progress=False)


@pytest.fixture
def small(tmp_path):
    return generate(tmp_path / "small", workers=1, **SMALL)


def entries_of(root):
    return read_manifest(root, "train") + read_manifest(root, "test")


def still(shape="circle", colour="red", *, x=0.5, y=0.5, size=0.15):
    """An object that neither moves nor pulses visibly within a second."""
    return MovingShape(shape, colour, size, (x, y), (0.0, 0.0), (0.1, 0.1), (0.0, 0.0), 1e-6, np.pi / 2)


def peak_frequency(sound, sample_rate):
    """Hz of the strongest partial, to a fraction of a hertz."""
    power = abs(np.fft.rfft(sound * np.hanning(len(sound)), n=8 * sample_rate))
    return power.argmax() / 8


# -------------------------------------------------------------------------------------------------- the files


def test_clips_are_h264_and_aac_of_the_asked_size_and_length(built):
    for entry in entries_of(built):
        with av.open(built / entry.file) as container:
            video, audio = container.streams.video[0], container.streams.audio[0]
            assert (video.codec_context.name, audio.codec_context.name) == ("h264", "aac")
            assert (video.width, video.height, video.average_rate) == (128, 128, 10)
            assert (audio.rate, audio.channels) == (16_000, 1)
            keys = [frame.key_frame for frame in container.decode(video=0)]
        assert [n for n, key in enumerate(keys) if key] == [0, 16, 32]
        assert len(keys) == 40
        sound = read_sound(built / entry.file)
        assert 64_000 <= len(sound) < 64_000 + 1024  # a whole number of AAC frames
        assert 0.7 < abs(sound).max() < 0.95  # loud, and never clipped
        parts = sound[:64_000].reshape(-1, 4_000)  # quarters of a second
        assert np.sqrt((parts**2).mean(1)).min() > 0.005  # never silent


def test_masks_have_the_label_colour_in_the_decoded_picture(built):
    for entry in entries_of(built):
        frames = read_frames(built / entry.file).astype(int)
        masks, _ = load_masks(built, entry)
        assert masks.shape == (1, 40, 128, 128) and masks.dtype == bool
        lights = frames > (frames.max(-1, keepdims=True) + frames.min(-1, keepdims=True)) / 2
        coloured = (lights == [light in PRIMARIES[entry.colour] for light in "rgb"]).all(-1)
        coloured &= frames.max(-1) - frames.min(-1) > 70  # the background is nearly grey
        inside, around = shrunk(masks[0], 2), ~shrunk(~masks[0], 3)
        assert inside.sum() > 1000
        assert coloured[inside].mean() > 0.98
        assert (coloured & ~around).sum() < 0.01 * masks.sum()  # no other object has its colour


def shrunk(masks, pixels):
    """Masks (T, H, W) without their outermost pixels; beyond the frame counts as inside."""
    for _ in range(pixels):
        padded = np.pad(masks, ((0, 0), (1, 1), (1, 1)), constant_values=True)
        masks = (
            masks & padded[:, :-2, 1:-1] & padded[:, 2:, 1:-1] & padded[:, 1:-1, :-2] & padded[:, 1:-1, 2:]
        )
    return masks


def test_boxes_are_tight_around_masks(built):
    for entry in entries_of(built)[:4]:
        masks, boxes = load_masks(built, entry)
        for mask, box in zip(masks[0], boxes[0], strict=True):
            rows, columns = np.nonzero(mask)
            assert box.tolist() == [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]


def test_pitch_follows_the_seen_height_and_loudness_the_seen_size(tmp_path):
    root = generate(tmp_path, train=24, test=0, objects=1, progress=False)
    tones = [entry for entry in entries_of(root) if entry.shape in ("circle", "square")]
    assert len(tones) > 3
    for entry in tones:
        masks, boxes = load_masks(root, entry)
        sound = read_sound(root / entry.file)
        whole = (boxes[0] > 0).all(-1) & (boxes[0, :, 2:] < 128).all(-1)  # not cut by the frame
        seen = np.flatnonzero(whole[1:-1]) + 1
        parts = [sound[1600 * t - 800 : 1600 * t + 800] for t in seen]
        heights = (boxes[0, seen, 1] + boxes[0, seen, 3]) / 2 / 128
        heard = [peak_frequency(part, 16_000) for part in parts]
        expected = 150 * 10 ** ((0.875 - heights) / 0.75)  # half a pixel is 1.2 %
        np.testing.assert_allclose(heard, expected, rtol=0.05)
        loudness = [np.log(np.sqrt((part**2).mean())) for part in parts]
        assert np.corrcoef(loudness, np.sqrt(masks[0, seen].sum((1, 2))))[0, 1] > 0.9


@pytest.mark.parametrize("sounding", [1, 2])
def test_stems_add_up_to_the_sound_of_the_clip(tmp_path, sounding):
    root = generate(tmp_path, train=3, test=0, objects=4, sounding=sounding, workers=1, progress=False)
    for entry in entries_of(root):
        stems = load_stems(root, entry)
        assert stems.shape == (sounding, 64_000) and stems.dtype == np.float32
        assert (abs(stems[:, [0, -1]]) < 0.001).all()  # no click at either end
        assert abs(stems.sum(0)).max() < 0.81
        decoded = read_sound(root / entry.file)[:64_000]
        assert np.corrcoef(stems.sum(0), decoded)[0, 1] > 0.99  # in step, too: AAC's delay is not heard
        assert load_masks(root, entry)[0].shape[0] == sounding


def test_labels_are_those_of_the_first_sounding_object(built):
    for entry in entries_of(built):
        objects = entry.objects
        assert entry.shape == objects[entry.sounding[0]]["shape"]
        assert entry.colour == objects[entry.sounding[0]]["colour"]
        assert [n for n, thing in enumerate(objects) if thing["sounding"]] == sorted(entry.sounding)
        assert [thing["stem"] is not None for thing in objects] == [thing["sounding"] for thing in objects]
        assert len({thing["shape"] for thing in objects}) == len({thing["colour"] for thing in objects}) == 3


def test_clips_carry_labels_as_class_numbers(built):
    pytest.importorskip("avfuse.data.clips")
    listed, entries = clips(built, "test"), read_manifest(built, "test")
    assert [clip.path for clip in listed] == [built / entry.file for entry in entries]
    for clip, entry in zip(listed, entries, strict=True):
        assert (SHAPES[clip.labels["shape"]], COLOURS[clip.labels["colour"]]) == (entry.shape, entry.colour)


# ---------------------------------------------------------------------------------------- pictures and sounds


@pytest.mark.parametrize("y, hertz", [(0.125, 1500.0), (0.5, 474.34), (0.875, 150.0)])
def test_pitch_at_known_heights(y, hertz):
    scene = ShapeScene((still(y=y),), (0,), BACKGROUND)
    sound = play(scene, 1.0, 16_000, np.random.default_rng(0))[0]
    assert peak_frequency(sound, 16_000) == pytest.approx(hertz, rel=0.002)


def test_masks_leave_out_what_is_hidden():
    behind = still("square", "red", x=0.5, y=0.5, size=0.2)
    beside, before = still("circle", "blue", x=0.7), still("circle", "blue", size=0.4)
    times = np.arange(2) / 10
    frames, masks = draw(ShapeScene((behind, beside), (0,), BACKGROUND), times, 128)
    _, alone = draw(ShapeScene((behind,), (0,), BACKGROUND), times, 128)
    assert 0.3 * alone.sum() < masks.sum() < 0.9 * alone.sum()
    seen = frames[shrunk(masks[0], 1)].astype(int)
    assert (seen[:, 0] > seen[:, 2] + 60).all()  # red, not blue
    _, hidden = draw(ShapeScene((behind, before), (0,), BACKGROUND), times, 128)
    assert not hidden.any()
    assert not build._boxes(hidden).any()


def test_each_shape_has_its_own_timbre():
    """Mean log spectra, relative to the pitch, tell any two shapes apart at every height."""
    spectra = []
    for y in (0.3, 0.6):
        for shape in SHAPES:
            sound = play(
                ShapeScene((still(shape, y=y),), (0,), BACKGROUND), 1.0, 16_000, np.random.default_rng(0)
            )[0]
            spans = np.lib.stride_tricks.sliding_window_view(sound / 32768, 800)[::200] * np.hanning(800)
            level = np.log10(abs(np.fft.rfft(spans)) ** 2 + 1e-7)
            spectra.append(level.mean(0))
    for same_height in (spectra[:6], spectra[6:]):
        apart = [np.abs(a - b).mean() for n, a in enumerate(same_height) for b in same_height[:n]]
        assert min(apart) > 0.5  # 5 dB, on average over all frequencies


# ---------------------------------------------------------------------------------------------- chance levels


def test_nothing_visible_tells_which_object_sounds():
    """Counts over 2,000 scenes against independence, at the 0.1 % level of chi-squared."""
    scenes = [sample_scene(np.random.default_rng((5, n)), seconds=4.0) for n in range(2000)]
    times = np.arange(40) / 10
    ranks = {name: np.zeros(3) for name in ("order", "size", "left", "high", "fast", "pulse", "colour")}
    table = np.zeros((len(SHAPES), len(COLOURS)))
    for scene in scenes:
        loud = scene.sounding[0]
        x, y = np.stack([thing.position(times) for thing in scene.objects]).transpose(1, 0, 2)
        seen = {
            "order": range(3),
            "size": [thing.size for thing in scene.objects],
            "left": x[:, 0],
            "high": y[:, 0],
            "fast": np.hypot(np.diff(x), np.diff(y)).sum(1),
            "pulse": [thing.pulse_rate for thing in scene.objects],
            "colour": [COLOURS.index(thing.colour) for thing in scene.objects],
        }
        for name, values in seen.items():
            ranks[name][np.argsort(values).tolist().index(loud)] += 1
        table[SHAPES.index(scene.objects[loud].shape), COLOURS.index(scene.objects[loud].colour)] += 1
    for name, counts in ranks.items():
        assert chi_squared(counts) < 13.8, name  # 2 degrees of freedom
    assert chi_squared(table.sum(0)) < 20.5 and chi_squared(table.sum(1)) < 20.5  # 5: classes are balanced
    assert chi_squared(table) < 66.6  # 35: the shape says nothing about the colour


def chi_squared(counts):
    expected = counts.sum() / counts.size
    return ((counts - expected) ** 2 / expected).sum()


def test_objects_stay_in_the_middle_and_apart():
    times = np.arange(40) / 10
    gaps = []
    for n in range(200):
        things = sample_scene(np.random.default_rng((6, n))).objects
        places = np.stack([thing.position(times) for thing in things])  # (objects, 2, T)
        assert places.min() >= 0.125 - 1e-3 and places.max() <= 0.875 + 1e-3
        radii = np.stack([thing.radius(times) for thing in things])
        for a, b in ((0, 1), (0, 2), (1, 2)):
            gaps.append((np.linalg.norm(places[a] - places[b], axis=0) - radii[a] - radii[b]).min())
    assert min(gaps) > -0.1 and np.quantile(gaps, 0.05) > -0.03


# ----------------------------------------------------------------------------------------------------- builds


def test_manifest_is_the_same_bytes_whatever_the_workers(tmp_path, small):
    parallel = generate(tmp_path / "parallel", workers=2, **SMALL)
    assert (parallel / "manifest.jsonl").read_bytes() == (small / "manifest.jsonl").read_bytes()
    assert (parallel / "dataset.json").read_bytes() == (small / "dataset.json").read_bytes()
    np.testing.assert_array_equal(*(read_frames(root / "train/000002.mp4") for root in (parallel, small)))
    described = json.loads((small / "dataset.json").read_text())
    assert described["classes"] == {"shape": list(SHAPES), "colour": list(COLOURS)}
    assert described["settings"] == {
        **{"train": 3, "test": 2, "seed": 0, "objects": 3, "sounding": 1},
        **{"seconds": 1.0, "fps": 10, "size": 64, "sample_rate": 16_000},
    }
    assert not list(small.rglob("*.part"))


def test_no_scene_appears_twice():
    """Neither within a split, nor across splits, nor under another seed. A larger data set only adds."""
    scene = build._scene
    names = [(seed, split, number) for seed in (0, 1) for split in ("train", "test") for number in range(150)]
    scenes = [scene(Settings(seed=seed), split, number)[0] for seed, split, number in names]
    assert len({str(one) for one in scenes}) == len(names)
    assert scene(Settings(train=1000), "train", 7)[0] == scenes[names.index((0, "train", 7))]


def test_a_finished_build_is_left_alone_and_other_settings_are_refused(small, capsys):
    (small / "train/000000.mp4").write_bytes(b"kept")
    generate(small, **{**SMALL, "progress": True})
    assert "already built" in capsys.readouterr().out
    assert (small / "train/000000.mp4").read_bytes() == b"kept"
    with pytest.raises(ValueError, match="seed=0, not 1"):
        generate(small, seed=1, **SMALL)
    (small / "dataset.json").unlink()
    with pytest.raises(ValueError, match="unfinished"):
        generate(small, seed=1, **SMALL)


def test_a_folder_of_other_clips_is_refused(tmp_path):
    (tmp_path / "train").mkdir()
    with pytest.raises(ValueError, match="something else"):
        generate(tmp_path, **SMALL)


def test_an_interrupted_build_resumes_and_keeps_finished_clips(small):
    manifest, lost = (small / "manifest.jsonl").read_bytes(), read_frames(small / "test/000001.mp4")
    (small / "train/000000.mp4").write_bytes(b"kept")
    (small / "test/000001.mp4").unlink()
    (small / "dataset.json").unlink()
    with pytest.raises(FileNotFoundError, match="finished"):
        read_manifest(small, "train")
    generate(small, **SMALL)
    assert (small / "train/000000.mp4").read_bytes() == b"kept"
    np.testing.assert_array_equal(read_frames(small / "test/000001.mp4"), lost)
    assert (small / "manifest.jsonl").read_bytes() == manifest and (small / "dataset.json").exists()


def test_a_failing_build_leaves_no_half_written_clip(tmp_path, monkeypatch):
    def write_half(path, *_):
        path.write_bytes(b"half")
        raise OSError("no space left")

    with monkeypatch.context() as patched:
        patched.setattr(build, "_write_mp4", write_half)
        with pytest.raises(OSError, match="no space"):
            generate(tmp_path, workers=1, **SMALL)
    assert not [*tmp_path.rglob("*.mp4"), *tmp_path.rglob("*.part"), *tmp_path.rglob("dataset.json")]
    generate(tmp_path, workers=1, **SMALL)
    assert len(read_frames(tmp_path / read_manifest(tmp_path, "train")[0].file)) == 10


def test_a_killed_build_leaves_no_process_behind(tmp_path):
    code = "from avfuse.data.sounding_shapes import generate; import sys; generate(sys.argv[1], workers=2)"
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stderr=subprocess.DEVNULL)
    while process.poll() is None and not list(tmp_path.rglob("*.mp4")):
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=0.1)
    descendants = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.wait()
    assert len(descendants) > 2 and not psutil.wait_procs(descendants, timeout=30)[1]


@pytest.mark.parametrize(
    "setting",
    [
        {"train": -1},
        {"objects": 5},
        {"sounding": 4},
        {"size": 63},
        {"seconds": 0.25},
        {"seconds": float("inf")},
        {"fps": 0},
        {"sample_rate": 15_000},
        {"workers": 0},
    ],
)
def test_wrong_settings_are_named(tmp_path, setting):
    (name,) = setting
    with pytest.raises(ValueError, match=f"^{name} must be .*got {setting[name]}"):
        generate(tmp_path, **setting)
    assert not list(tmp_path.iterdir())


# -------------------------------------------------------------------------------------------------- untrusted


@pytest.mark.parametrize("path", ["../x.mp4", "/etc/hostname", "train/../../x"])
@pytest.mark.parametrize("field", ["file", "masks", "stem"])
def test_paths_that_leave_the_folder_are_refused(small, path, field):
    lines = [json.loads(line) for line in (small / "manifest.jsonl").read_text().splitlines()]
    holder = lines[1]["objects"][lines[1]["sounding"][0]] if field == "stem" else lines[1]
    holder[field] = path
    (small / "manifest.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(ValueError, match="line 2: .*leaves"):
        read_manifest(small, "train")


def test_an_entry_made_by_hand_is_checked_too(small):
    entry = replace(read_manifest(small, "train")[0], masks="../masks.npz")
    with pytest.raises(ValueError, match="leaves"):
        load_masks(small, entry)


def test_pickled_masks_are_refused(small):
    entry = read_manifest(small, "train")[0]
    np.savez(small / entry.masks, masks=np.array([{}], object), shape=[1], boxes=[0])
    with pytest.raises(ValueError, match="allow_pickle"):
        load_masks(small, entry)


def test_unknown_splits_and_broken_lines_are_named(small):
    with pytest.raises(ValueError, match="split must be one of .*'val'"):
        read_manifest(small, "val")
    (small / "manifest.jsonl").write_text('{"file": "train/000000.mp4"}\n')
    with pytest.raises(ValueError, match="line 1"):
        read_manifest(small, "train")


# ----------------------------------------------------------------------------------------------- command line


def test_command_line(tmp_path):
    def run(*options):
        command = [sys.executable, "-m", "avfuse.data.sounding_shapes", str(root), *options]
        return subprocess.run(command, capture_output=True, text=True, timeout=300)

    root = tmp_path / "out"
    options = ["--train", "2", "--test", "1", "--seconds", "1", "--size", "64", "--workers", "1"]
    assert run(*options).returncode == 0
    assert len(read_manifest(root, "train")) == 2
    assert (root / "contact_sheet.png").read_bytes().startswith(b"\x89PNG")
    done = run("--no-contact-sheet", "--seed", "3")
    assert done.returncode == 1 and done.stderr.startswith("error: ") and "seed=0, not 3" in done.stderr
