"""Clips that are held out of a folder without test/: how many, which, and that they stay the same."""

import json
import os
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from videos import write_video

from avfuse.data.class_folders import with_classes
from avfuse.data.clips import Clip
from avfuse.data.container import Part
from avfuse.data.find import Found, find_data
from avfuse.data.hold_out import Sides, hold_out
from avfuse.data.table import ClipTable
from avfuse.tasks.classify import Classification, ClassifyConfig
from avfuse.tasks.retrieve import Retrieval, RetrieveConfig
from avfuse.train import Pretraining
from avfuse.training.loop import program, set_up
from avfuse.training.recipes import TrainConfig
from avfuse.training.run_folder import check_run, has_trained_on_all
from avfuse.training.task import Task

pytestmark = pytest.mark.usefixtures("undrawn")

ROOT = Path("/videos")


def split(names, *, share=0.2, seed=0, labels=None) -> tuple[list[str], list[str]]:
    clips = ClipTable([Clip(ROOT / name, labels(name) if labels else {}) for name in names])
    sides = hold_out(clips, ROOT, share=share, seed=seed)
    return tuple([clip.path.relative_to(ROOT).as_posix() for clip in side] for side in sides)


def test_draws_stay_what_they_were():
    """Those of runs that began long ago."""
    flat = [f"{n:06d}.mp4" for n in range(17)]
    assert split(flat)[1] == ["000002.mp4", "000008.mp4", "000016.mp4"]
    assert split([f"a/{name}" for name in flat])[1] == ["a/000003.mp4", "a/000006.mp4", "a/000008.mp4"]


MANY = [f"{kind}/{kind}_{number:03d}.mp4" for kind in ("cat", "dog") for number in range(500)]


def test_about_the_share_is_held_out_of_every_class_and_in_order():
    train, test = split(MANY)
    assert sorted(train + test) == MANY and train == sorted(train) and test == sorted(test)
    for kind in "cat", "dog":
        assert 0.15 < sum(name.startswith(kind) for name in test) / 500 < 0.25
    assert 0.45 < len(split(MANY, share=0.5)[1]) / 1000 < 0.55


def test_the_seed_and_the_name_decide():
    test = split(MANY)[1]
    assert split(MANY)[1] == test != split(MANY, seed=1)[1]
    assert set(split(MANY[::2])[1]) == {name for name in MANY[::2] if name in test}  # others come and go
    assert split([f"birds/{n}.mp4" for n in range(99)] + MANY)[1][-len(test) :] == test


@pytest.mark.parametrize("share", [0.2, 0.4])
@pytest.mark.parametrize("names", ["{}/{}", "clips/{1}", "{}/{}x/1"], ids=str)
@pytest.mark.parametrize("count", [29, 30, 92])
def test_of_few_clips_the_nearest_number_is_held_out(names, count, share):
    """Of each of four classes one at least, and of each as many as of the others."""
    names = [names.format("abcd"[n % 4], n) + ".mp4" for n in range(count)]
    for seed in range(20):
        train, test = split(names, share=share, seed=seed)
        assert len(test) == round(share * count)
        if names[0].startswith("a/"):
            assert {name[0] for name in test} == {name[0] for name in train} == set("abcd")
            held = Counter(name[0] for name in test).values()
            assert max(held) - min(held) <= 1


def test_of_a_small_class_as_large_a_part_is_held_out_as_of_a_large_one():
    names = [f"many/{n}.mp4" for n in range(100)] + [f"few/{n}.mp4" for n in range(20)]
    for seed in range(20):
        held = Counter(name.partition("/")[0] for name in split(names, share=0.3, seed=seed)[1])
        assert held.total() == 36 and held["few"] in (6, 7)


def test_the_share_counts_clips_however_many_a_recording_has():
    sizes = [30, 12, 7, 5, 4, 3, 3, 2, 2, 1, 1, 1]
    names = [f"a/talk{chr(97 + r)}_{n}.mp4" for r, size in enumerate(sizes) for n in range(size)]
    for seed in range(20):
        train, test = split(names, seed=seed)
        assert abs(len(test) - 14.2) < 2
        left = {sum(name.startswith(one[:7]) for name in train) for one in train}
        assert min(abs(len(test) + size - 14.2) for size in left) >= abs(len(test) - 14.2)


@pytest.mark.parametrize("names", [["a/1.mp4"], ["a/1.mp4", "b/2.mp4"], ["1.mp4", "a/2.mp4", "b/3.mp4"]])
def test_classes_of_one_clip_are_not_all_held_out(names):
    for seed in range(20):
        train, test = split(names, share=0.9, seed=seed)
        assert len(train) == 1 and len(test) == len(names) - 1


def test_a_class_is_not_held_out_whole_for_the_share():
    names = [f"{kind}/{n}.mp4" for kind in "ab" for n in range(2)]
    for seed in range(20):
        train, test = split(names, share=0.9, seed=seed)
        assert {name[0] for name in train} == {name[0] for name in test} == set("ab")


@pytest.mark.parametrize("count", [2, 3, 7])
@pytest.mark.parametrize("seed", range(20))
def test_every_class_is_on_both_sides(count, seed):
    names = [f"{kind}/{n}.mp4" for kind in "abc" for n in range(count)]
    for side in split(names, seed=seed):
        assert {name[0] for name in side} == set("abc")
    several = split(
        [f"{n}.mp4" for n in range(4 * count)], seed=seed, labels=lambda name: {"kind": int(name[:-4]) % 4}
    )
    for side in several:
        assert {int(name[:-4]) % 4 for name in side} == {0, 1, 2, 3}


@pytest.mark.parametrize(
    "pattern",
    [
        "{}_{:03d}",
        "{}{:03d}",
        "{}-Scene-{:03d}",
        "{} part {}",
        "{}.{}",
        "{}_{:06d}_000500",
        "{}_CLIP{}",
        "{} ({})",
    ],
)
@pytest.mark.parametrize("seed", range(5))
def test_pieces_of_a_recording_stay_together(pattern, seed):
    recordings = ["talk", "visit-b", "HARBOUR", "x7_aaaaaaa", "interview with J"]
    names = [f"{c}/{pattern.format(r, n)}.mp4" for c in "ab" for r in recordings for n in range(6)]
    train, test = split(names, seed=seed)
    assert train and test
    for recording in recordings:  # in both classes: what is said and what is played are cut out of one film
        assert len({name in test for name in names if f"/{recording}" in name}) == 1, recording


@pytest.mark.parametrize(
    "pattern",
    [
        "lecture{:02d}-Scene-{:03d}",
        "P{:02d}_{:03d}",
        "speaker_{:02d}_clip_{:03d}",
        "lecture {:02d} part {}",
        "IMG_{:04d}-Scene-{:03d}",
        "8542{}_{:06d}_000090",
        "{}_{}",
        "VID_20240501_1200{:02d}-Scene-{:03d}",
        "GX01{:04d}_{:03d}",
        "2024-05-{:02d} {}",
    ],
)
@pytest.mark.parametrize("seed", range(5))
def test_recordings_whose_names_end_in_numbers_stay_together(pattern, seed):
    of = {f"{c}/{pattern.format(r, n)}.mp4": r for c in "ab" for r in range(1, 10) for n in range(4)}
    train, test = split(of, seed=seed)
    assert train and test and not {of[name] for name in train} & {of[name] for name in test}


def test_two_recordings_of_marked_pieces():
    names = [f"{c}/take{r}-Scene-{n:03d}.mp4" for c in "ab" for r in "12" for n in range(6)]
    train, test = split(names)
    assert {name[6] for name in train}.isdisjoint(name[6] for name in test) and test


def test_shards_of_a_folder_with_train_alone_hold_out_what_it_does():
    names = [f"{kind}/{n}.mp4" for kind, count in (("dog", 26), ("cat", 5), ("cow", 5)) for n in range(count)]
    clips = [Clip(ROOT / f"0.tar/{n}.mp4", source=f"Train/{name}") for n, name in enumerate(names)]
    clips = [replace(clip, part=Part(ROOT / "0.tar", 0, 1)) for clip in clips]
    test = hold_out(ClipTable(clips), ROOT, share=0.2, seed=0)[1]
    assert [clip.source.removeprefix("Train/") for clip in test] == split(names)[1]
    # As a class among others it is none.
    names = [f"{kind}/{n}.mp4" for kind in ("train", "car") for n in range(10)]
    clips = [replace(clips[0], source=name) for name in names]
    test = hold_out(ClipTable(clips), ROOT, share=0.2, seed=0)[1]
    assert [clip.source for clip in test] == split(names)[1] and len(test) == 4


@pytest.mark.parametrize("seed", range(5))
def test_recordings_may_have_folders_of_their_own(seed):
    names = [f"{c}/{c}{r}/{n:05d}.mp4" for c in "ab" for r in "xyzuvw" for n in range(6)]  # as in VoxCeleb
    for side, other in zip(split(names, seed=seed), split(names, seed=seed)[::-1], strict=True):
        assert {name[0] for name in side} == set("ab")
        assert not {name[:5] for name in side} & {name[:5] for name in other}


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(
    "names",
    [
        [f"{c}/{r}/{n}" for c in "ab" for r in "xyz" for n in ("intro", "middle", "end")],
        [f"{c}/{r}/IMG_{n:04d}" for c in "ab" for r in ("monday", "friday") for n in range(4)],
        [f"a/1/{n:02d}" for n in range(10)]
        + ["a/2/00", "a/2/01"]
        + [f"b/{r}/{n}" for r in "34" for n in range(6)],
        [f"{c}/2024/{day}/{n}" for c in "ab" for day in ("may", "june", "july") for n in "xyz"],
    ],
    ids=["words", "cameras", "uneven", "deeper"],
)
def test_a_folder_below_the_class_is_one_recording(names, seed):
    train, test = split([f"{name}.mp4" for name in names], seed=seed)
    folders = [{name.rpartition("/")[0] for name in side} for side in (train, test)]
    assert train and test and not folders[0] & folders[1]


def test_a_folder_that_holds_all_of_a_class_is_none():
    """As in CLASS/clips/001."""
    train, test = split([f"{c}/clips/{n}.mp4" for c in "ab" for n in range(20)])
    assert {name[0] for name in train} == {name[0] for name in test} == {*"ab"} and len(test) == 8


@pytest.mark.parametrize("tags", [(0, 1, 2), (1, 0), (3,)], ids=str)
def test_several_labels_part_no_recording(tags):
    names = [f"{r}{t}x_{n}.mp4" for r in "abcde" for t in range(4) for n in range(3)]
    labels = [
        lambda name: {"tags": (9, *(10 * tag + int(name[1]) for tag in tags))},
        lambda name: {"shape": int(name[1]), "colour": "abcde".index(name[0])},
    ]
    for of in labels:
        train, test = split(names, labels=of)
        assert train and test and not {name[:2] for name in train} & {name[:2] for name in test}


@pytest.mark.parametrize(
    "names",
    [
        [f"dog_{n:02d}" for n in range(30)],
        [f"dog_{n:02d}" for n in range(29)] + ["poodle"],
        [f"IMG_{n}" for n in range(2000, 2015)] + [f"MVI_{n}" for n in range(3000, 3015)],
        [f"VID_20260{n}01_1200{n}0" for n in range(1, 10)] + [f"PXL_20260{n}01_110000123" for n in range(9)],
        [f"{n:04d}" for n in range(30)],
        [f"dog_{year}_{n:03d}" for year in (2022, 2023) for n in range(15)],
        [f"202305{day}_1230{n:02d}" for day in (11, 12, 13, 14, 15, 16) for n in range(5)],
        [f"2015-0{month}-01 00-42-{n:02d}" for month in range(1, 7) for n in range(5)],
    ],
    ids=lambda names: names[0],
)
def test_numbers_and_names_by_cameras_are_no_pieces(names):
    held = [
        len(split([f"dog/{name}.mp4" for name in names], seed=seed)[1]) / len(names) for seed in range(40)
    ]
    assert 0 < min(held) and max(held) < 0.6 and 0.15 < sum(held) / 40 < 0.25


def test_a_single_recording_cannot_be_parted():
    assert split(["a.mp4"]) == (["a.mp4"], [])


def test_long_names_take_no_time():
    for name in "1" * 250 + "x", "-part" * 50, "1-" * 120 + "x", " _.-" * 60 + "1x":
        assert len(split([f"{name}.mp4", "b.mp4"])[1]) == 1


# --- in a run -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("own")
    for number in range(10):
        write_video(root / ("bird", "cat")[number % 2] / f"{number}.mp4", 3.0)
    return root


def find(folder, **options) -> tuple[list, list[str], list]:
    said = []
    found = find_data(folder, said.append, workers=0, progress=False, **options)
    return found, said


def test_what_is_held_out_is_said_first(folder):
    found, said = find(folder, test_share=0.2)
    held = len(found.test)
    assert said[0] == (
        f"{folder} names no clips to test on: 2 of 10 are held out, 20.0% (--test-share 0.2, by the names of "
        "recordings and --seed 0)"
    )
    assert not {clip.path for clip in found.train} & {clip.path for clip in found.test} and found.held_out
    assert found.coverage == dict(train=(10 - held, 10 - held), test=(held, held))
    whole, said = find(folder)
    assert len(whole.train) == len(whole.test) == 10
    options = dict(data=folder, checkpoint="none", workers=0)
    for config in (
        ClassifyConfig(test_share=0.0, **options),
        RetrieveConfig(**options),
    ):  # which trains on none
        Task.find(config, said.append)
        assert ("training clips themselves" in said[-1]) == isinstance(config, ClassifyConfig)


def test_clips_are_looked_for_as_the_settings_say(folder, tmp_path, monkeypatch):
    given, nothing = {}, Found([], [], "", [], 0, {})
    monkeypatch.setattr(
        "avfuse.training.task.find_data", lambda *_, **options: given.update(options) or nothing
    )
    asked = dict(data_set="folder", train_split="a", missing="keep", test_share=0.3, seed=5, workers=3)
    options = dict(checkpoint="none", run=tmp_path / "run", quiet=True, clip_timeout=7.0)
    Task.find(ClassifyConfig(data=folder, **asked, **options), print)
    assert given.items() >= (asked | dict(timeout=7.0, progress=False)).items()


@pytest.mark.parametrize("name", ["test", "val", "validation", "eval"])
def test_a_folder_that_names_them_is_taken_at_its_word(folder, tmp_path, name):
    shutil.copytree(folder, tmp_path / "train")
    shutil.copytree(folder / "cat", tmp_path / name)
    found, said = find(tmp_path, test_share=0.2)
    assert (len(found.train), len(found.test)) == (10, 5) and not found.held_out
    assert said[-1] == f"splits: train/ to train on, {name}/ to test on, by the names of folders"
    said = []
    Pretraining.find(TrainConfig(data=tmp_path, workers=0, run=tmp_path / "run"), said.append)
    assert said[-1].startswith("labels: none, and pretraining needs none")


def test_train_alone_holds_the_classes(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "train")
    config = ClassifyConfig(checkpoint="none", data=tmp_path, workers=0)
    found = Classification.find(config, lambda _: None)
    assert found.classes == {"class": ("bird", "cat")} and found.held_out
    assert {clip.labels["class"] for clip in found.test} == {0, 1}
    assert [c.path.name for c in found.test] == [c.path.name for c in find(folder, test_share=0.2)[0].test]


def test_pretraining_and_tasks_hold_out_the_same_and_keep_it(folder, tmp_path):
    options = dict(data=folder, epochs=1, warmup_epochs=0, batch_size=4, workers=0)
    pretraining = TrainConfig(run=tmp_path / "pretrain", **options)
    classify = ClassifyConfig(run=tmp_path / "classify", checkpoint="none", **options)
    held = []
    for config, task in (pretraining, Pretraining), (classify, Classification):
        assert program(config, task) == 0
        held.append((config.run / "held-out.txt").read_text())
        results = json.loads((config.run / "results.json").read_text())
        assert results["split"] == "held-out clips (a share of 0.2, seed 0)"
        assert results["coverage"]["judged"] == len(held[-1].splitlines()) == results["coverage"]["expected"]
    assert held[0] == held[1]


def test_a_run_that_held_out_another_number_goes_on_with_that(folder, tmp_path, monkeypatch):
    """As runs did for which each recording was drawn by itself, however few there were."""
    options = dict(data=folder, epochs=1, warmup_epochs=0, batch_size=4, workers=0, run=tmp_path / "run")
    with monkeypatch.context() as before:
        before.setattr("avfuse.data.hold_out.ALONE", 0)
        assert program(TrainConfig(**options, seed=6), Pretraining) == 0
    held = (tmp_path / "run/held-out.txt").read_text()
    assert len(held.splitlines()) == 4 != len(find(folder, test_share=0.2, seed=6)[0].test)
    assert program(TrainConfig(**options, seed=6), Pretraining) == 0
    assert (tmp_path / "run/held-out.txt").read_text() == held


def test_a_run_of_before_goes_on_without(folder, tmp_path):
    options = dict(data=folder, epochs=1, warmup_epochs=0, batch_size=4, workers=0, run=tmp_path / "run")
    assert program(TrainConfig(test_share=0.0, **options), Pretraining) == 0
    path = tmp_path / "run" / "run.json"
    content = json.loads(path.read_text())
    del content["settings"]["test_share"]
    path.write_text(json.dumps(content))
    for _ in range(2):
        assert program(TrainConfig(**options), Pretraining) == 0  # no clip has been taken away
    assert not (tmp_path / "run" / "held-out.txt").exists()


def test_retrieval_looks_at_all_clips(folder, tmp_path):
    config = RetrieveConfig(data=folder, checkpoint="none", run=tmp_path / "run", workers=0, k=(1,))
    assert len(Retrieval.find(config, lambda _: None).test) == 10


# --- a run that begins with another -------------------------------------------------------------------------


def test_clips_stay_on_their_side_and_draw_their_pieces_along():
    names = [f"{kind}/{n}.mp4" for kind in "ab" for n in range(20)]
    train, test = split(names)
    more = [f"a/x{n}y.mp4" for n in range(60)] + [
        "c/talk_1.mp4",
        "c/talk_2.mp4",
        "c/walk_1.mp4",
        "c/walk_2.mp4",
    ]
    clips = ClipTable([Clip(ROOT / name) for name in names + more])
    before = Sides("held-out clips", "/elsewhere", train, [*test, "c/talk_2.mp4"])
    sides = before.of(clips, ROOT)
    then = hold_out(clips, ROOT, share=0.2, seed=7, sides=sides)
    then = [{clip.path.relative_to(ROOT).as_posix() for clip in side} for side in then]
    assert then[0] >= {*train} and then[1] >= {*test, "c/talk_1.mp4", "c/talk_2.mp4"}
    assert 3 < len([name for name in then[1] if "x" in name]) < 25  # those that are new are drawn
    assert "c/walk_1.mp4" in then[0] and split(names, seed=7)[1] != test


def test_a_trained_clip_is_known_from_any_folder_above_or_below(tmp_path):
    before = Sides("held-out clips", str(tmp_path), ["cat/1.mp4"], ["cat/2.mp4"])
    for root in tmp_path, tmp_path / "cat", tmp_path.parent:
        clips = [Clip(tmp_path / "cat" / f"{n}.mp4") for n in (1, 2, 3)]
        assert before.of(clips, root) == ["train", "test", None], root
    moved = [Clip(ROOT / "cat" / f"{n}.mp4") for n in (1, 2, 3)]
    assert before.of(moved, ROOT) == ["train", "test", None]


@pytest.fixture(scope="module")
def pretrained(folder, tmp_path_factory):
    run = tmp_path_factory.mktemp("runs") / "pretrain"
    options = dict(data=folder, epochs=1, warmup_epochs=0, batch_size=4, workers=0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Pretraining, "draw", lambda *_: None)
        assert program(TrainConfig(run=run, **options), Pretraining) == 0
    return run


@pytest.mark.parametrize("source", ["", "model"])
@pytest.mark.parametrize(
    "more", [dict(seed=1), dict(test_share=0.5), dict(seed=3, data_set="folder")], ids=str
)
def test_a_task_tests_on_no_clip_that_its_encoder_was_trained_on(folder, pretrained, tmp_path, source, more):
    said = []
    options = dict(data=folder, checkpoint=str(pretrained / source), run=tmp_path / "run", workers=0)
    found = Classification.find(ClassifyConfig(**options, **more), said.append)
    held = (pretrained / "held-out.txt").read_text().splitlines()
    assert [str(clip.path) for clip in found.test] == held and len(found.train) == 10 - len(held)
    assert said[0].endswith("(10 clips stay on the side that they had)")
    assert not any("WARNING" in line for line in said)  # of an encoder that was trained on all clips
    assert found.test_name == "held-out clips (a share of 0.2, seed 0)"


def test_what_was_held_out_is_passed_on_from_run_to_run(folder, pretrained, tmp_path):
    options = dict(data=folder, epochs=1, warmup_epochs=0, batch_size=4, workers=0)
    source = pretrained
    for seed in 1, 2:
        config = ClassifyConfig(checkpoint=str(source), run=tmp_path / str(seed), seed=seed, **options)
        for _ in "begun", "resumed":
            assert program(config, Classification) == 0
        assert (config.run / "held-out.txt").read_text() == (pretrained / "held-out.txt").read_text()
        source = config.run
    # A run on other clips in between knows what the one before it was trained on.
    other = tmp_path / "other"
    for number in range(6):
        write_video(other / ("bird", "cat")[number % 2] / f"{number}.mp4", 2.0)
    between = ClassifyConfig(checkpoint=str(source), run=tmp_path / "between", **options | dict(data=other))
    found = Classification.find(between, print)
    assert 0 < len(found.test) < len(found.train) < 6  # of the same names, and not of the same size
    for _ in "begun", "resumed":
        assert program(between, Classification) == 0
    after = ClassifyConfig(checkpoint=str(between.run), run=tmp_path / "after", seed=5, **options)
    found, trained = (
        Classification.find(after, print),
        set(json.loads((source / "sides.json").read_text())["train"]),
    )
    assert found.test and not trained & {os.path.relpath(clip.path, folder) for clip in found.test}
    (source / "sides.json").write_text("[]")
    with pytest.raises(ValueError, match="sides.json is damaged"):
        Classification.find(ClassifyConfig(checkpoint=str(source), run=tmp_path / "3", **options), print)


def test_a_start_that_was_killed_before_it_wrote_the_sides_goes_on(folder, pretrained, tmp_path):
    options = dict(data=folder, epochs=1, warmup_epochs=0, batch_size=4, workers=0, seed=5)
    config = ClassifyConfig(checkpoint=str(pretrained), run=tmp_path / "run", **options)
    set_up(config, Classification).lock.close()
    (config.run / "sides.json").unlink()
    assert program(config, Classification) == 0
    assert (config.run / "held-out.txt").read_text() == (pretrained / "held-out.txt").read_text()


def test_clips_that_came_after_a_run_began_are_named(folder, pretrained, tmp_path):
    shutil.copytree(folder, tmp_path / "own")
    shutil.copytree(pretrained, tmp_path / "run")
    for name in "owl", "wren":  # one of them is not held out
        shutil.copy(folder / "bird" / "0.mp4", tmp_path / "own" / "bird" / f"{name}.mp4")
    options = dict(epochs=1, warmup_epochs=0, batch_size=4, workers=0)
    config = TrainConfig(data=tmp_path / "own", run=tmp_path / "run", **options)
    with pytest.raises(ValueError, match="new: .*(owl|wren).mp4.*choose another --run-dir") as refused:
        set_up(config, Pretraining)
    assert f"with --checkpoint {config.run} to begin with this model" in str(refused.value)


def test_clips_to_test_on_that_changed_are_told(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "own" / "train")
    for name in "bird/a.mp4", "cat/b.mp4":
        write_video(tmp_path / "own" / "test" / name, 3.0)
    options = dict(epochs=1, warmup_epochs=0, batch_size=4, workers=0)
    config = ClassifyConfig(
        data=tmp_path / "own", checkpoint="none", model="micro", run=tmp_path / "run", **options
    )
    assert program(config, Classification) == 0
    (tmp_path / "own" / "test" / "bird" / "a.mp4").unlink()
    with pytest.raises(ValueError, match="--data has changed, in what is tested on, since the run in"):
        set_up(config, Classification)


def test_a_run_does_not_delete_what_it_begins_with(pretrained, folder):
    for source in pretrained, pretrained / "model":
        config = TrainConfig(data=folder, run=pretrained, checkpoint=str(source), restart=True, workers=0)
        with pytest.raises(ValueError, match="--restart would delete --checkpoint"):
            check_run(config)


def test_what_runs_leave_is_no_clip_of_the_folder_around_them(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "own")
    sounds = tmp_path / "own" / "runs" / "separate" / "sounds"
    write_video(sounds / "1.wav", video=False, codecs=("", "pcm_s16le"))
    for name in "run.json", ".lock":
        (sounds.parent / name).write_text("{}")
    found, _ = find(tmp_path / "own")
    assert not [clip for clip in (*found.train, *found.test) if "runs" in clip.path.parts]


def test_retrieval_leaves_out_what_the_encoder_was_trained_on(folder, pretrained, tmp_path):
    said, config = [], RetrieveConfig(data=folder, checkpoint=str(pretrained), run=tmp_path / "r", workers=0)
    found = Retrieval.find(config, said.append)
    held = (pretrained / "held-out.txt").read_text().splitlines()
    assert [str(clip.path) for clip in found.test] == held
    assert f"left out, but for --seen keep: {10 - len(held)} of 10 clips, on which" in "".join(said)
    assert Retrieval(config, found).ks == [1]
    found = Retrieval.find(replace(config, seen="keep"), said.append)
    assert len(found.test) == 10 and "WARNING: recall is better than it is" in "".join(said)


def test_a_run_that_held_out_none_is_warned_of(folder, tmp_path):
    options = dict(data=folder, epochs=1, warmup_epochs=0, batch_size=4, workers=0)
    config = TrainConfig(run=tmp_path / "all", test_share=0.0, **options)
    assert program(config, Pretraining) == 0
    said, begun = [], dict(data=folder, checkpoint=str(config.run), workers=0)
    Classification.find(ClassifyConfig(run=tmp_path / "c", **begun), said.append)
    assert len(Retrieval.find(RetrieveConfig(run=tmp_path / "r", **begun), said.append).test) == 10
    assert sum("WARNING" in line and "10 of 10 clips, on which" in line for line in said) == 1
    assert sum("WARNING" in line and "has trained on all" in line for line in said) == 1
    for other, is_told in (folder / "cat", True), (folder / "val", False), (folder.parent, False):
        assert has_trained_on_all(config.run, other) == is_told


# --- what folders are taken for -----------------------------------------------------------------------------


def told(root, names, test_names=(), **options) -> list[str]:
    train, test = ([Clip(root / name) for name in of] for of in (names, test_names or names))
    for clip in train + test:
        clip.path.parent.mkdir(parents=True, exist_ok=True)
    said = []
    with_classes(Found(train, test, "held-out clips", [], 0, {}), root, say=said.append, **options)
    return said


def test_folders_are_told_as_classes_with_their_clips(tmp_path):
    said = told(tmp_path, ["cat/1.mp4", "dog/1.mp4", "dog/2.mp4"], ["cat/2.mp4", "dog/3.mp4"])
    assert said == ["2 classes, as folders are called, and their clips: cat (2), dog (3)"]
    assert told(tmp_path, ["cat/1.mp4", "dog/1.mp4", "cat/2.mp4", "dog/2.mp4"])[0].endswith(
        "cat (2), dog (2)"
    )


def test_recordings_that_are_taken_for_classes_are_warned_of(tmp_path):
    said = told(tmp_path, [f"rec{n}/001.mp4" for n in range(5)] + ["cat/1.mp4", "cat/2.mp4"])
    assert "WARNING: most of these folders hold a single clip" in said[1]


def test_a_class_whose_only_clip_is_held_out_is_named(tmp_path):
    said = told(tmp_path, ["cat/1.mp4", "cat/2.mp4", "dog/1.mp4", "dog/2.mp4"], ["owl/1.mp4", "cat/3.mp4"])
    assert said[1:] == [
        "WARNING: no clip to train on, so what cannot be learned: owl",
        "no clip to test on: dog",
    ]


def test_a_folder_without_clips_is_no_class_and_named(tmp_path):
    (tmp_path / "runs" / "model").mkdir(parents=True)  # as a run that was begun in the data folder leaves
    said = told(tmp_path, ["cat/1.mp4", "cat/2.mp4", "dog/1.mp4", "dog/2.mp4"])
    assert said == [
        "no clip to use in these folders, which are no classes: runs",
        "2 classes, as folders are called, and their clips: cat (2), dog (2)",
    ]


def test_a_class_that_only_the_test_side_has_clips_of_stays(tmp_path):
    for name in "train/cat/1.mp4", "train/dog/1.mp4", "test/cat/2.mp4", "test/owl/1.mp4":
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / "train" / "owl").mkdir()
    train = [Clip(tmp_path / "train" / name) for name in ("cat/1.mp4", "dog/1.mp4")]
    test = [Clip(tmp_path / "test" / name) for name in ("cat/2.mp4", "owl/1.mp4")]
    found = with_classes(Found(train, test, "test clips", [], 0, {}), tmp_path, say=lambda _: None)
    assert found.classes == {"class": ("cat", "dog", "owl")}


@pytest.mark.parametrize(
    "names, said",
    [
        ("bel bell", "bel and bell"),
        ("Rain rain", "Rain and rain"),
        ("dog-bark dog_bark", "dog-bark and dog_bark"),
        ("durms drums", "drums and durms"),
        ("guitar guiter", "guitar and guiter"),
        ("bat cat", ""),
        ("class1 class2", ""),
        ("female male", ""),
        ("viola violin", ""),
    ],
)
def test_folders_that_may_be_meant_as_one_class_are_named(tmp_path, names, said):
    one, other = names.split()
    lines = told(tmp_path, [f"{one}/1.mp4", f"{one}/2.mp4", f"{other}/1.mp4", f"{other}/2.mp4"])
    warning = "WARNING: folders of their own that may be meant as one class: "
    assert lines[1:] == ([warning + said] if said else [])


def test_all_classes_of_a_small_folder_are_named(tmp_path):
    said = told(tmp_path, [f"{name}/{n}.mp4" for name in ("ant", "bee", "cow", "dog", "elk") for n in (1, 2)])
    assert said[0].endswith("ant (2), bee (2), cow (2), dog (2), elk (2)")


def test_a_recording_that_fits_exactly_goes_before_one_that_is_too_large():
    sizes = dict(a=1, b=3, c=2, d=9)
    names = [f"a/talk{r}_{n:03d}.mp4" for r, size in sizes.items() for n in range(size)]
    for seed in range(12):
        assert len(split(names, seed=seed)[1]) == 3


@pytest.mark.parametrize("seed", range(5))
def test_five_recordings_are_enough_to_stay_together_and_four_may_be_years(seed):
    def parted(count):
        of = {f"a/rec{r}_{n:03d}.mp4": r for r in range(1, count + 1) for n in range(6)}
        train, test = split(of, seed=seed)
        return {of[name] for name in train} & {of[name] for name in test}

    assert not parted(5) and parted(4)


@pytest.mark.parametrize("seed", range(5))
def test_recordings_of_two_pieces_stay_together(seed):
    of = {f"a/rec{r}_{n:03d}.mp4": r for r in range(1, 9) for n in range(2)}
    train, test = split(of, seed=seed)
    assert test and not {of[name] for name in train} & {of[name] for name in test}


@pytest.mark.parametrize("seed", range(5))
def test_two_clips_that_are_named_after_their_class_are_two_recordings(seed):
    names = [f"{kind}/{kind}_{n}.mp4" for kind in ("cat", "dog") for n in range(2)]
    for side in split(names, seed=seed):
        assert {name[:3] for name in side} == {"cat", "dog"}


def test_a_new_class_beside_clips_that_stay_keeps_one_to_train_on():
    clips = ClipTable([Clip(ROOT / name) for name in ("a/1.mp4", "b/1.mp4", "b/2.mp4")])
    for seed in range(5):
        train, _ = hold_out(clips, ROOT, share=0.9, seed=seed, sides=["train", None, None])
        assert sorted(clip.path.parent.name for clip in train) == ["a", "b"]
