"""Hearing and seeing tested: sounds and pictures that are exchanged, on models whose answers are known."""

import json
import math
import random
import re
import wave
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils.data import Dataset

from avfuse.data.clips import Clip, ClipDataset, Failure, collate
from avfuse.data.find import Found
from avfuse.data.transforms import Spectrogram
from avfuse.inputs import InputSettings
from avfuse.tasks.classifier import Classified, presence
from avfuse.tasks.classify import Classification, ClassifyConfig
from avfuse.tasks.segment import Segmentation, SegmentConfig
from avfuse.tasks.separate import SeparateConfig, Separation
from avfuse.training import judge
from avfuse.training.conditions import CONDITIONS, BesideOthers, derangement, has_sound

SETTINGS = InputSettings(image_size=16, mel_bins=32, hop=750, audio_seconds=1.5)
FRONT_ENDS = {
    "log-mel": SETTINGS,
    "normalised": InputSettings(audio_mean=-3.0, audio_std=2.5, audio_seconds=1.5),
    "kaldi": InputSettings.audiomae(audio_seconds=1.5, padded_frames=200),  # 50 frames of zeros
}


def batch_of(audio, *, present=None, first=0, **others) -> dict:
    present = torch.ones(len(audio), dtype=torch.bool) if present is None else torch.tensor(present)
    return dict(audio=audio, audio_present=present, index=torch.arange(first, first + len(audio))) | others


def change(name, batch, settings=SETTINGS) -> dict:
    return CONDITIONS[name].change(
        {n: t for n, t in batch.items() if n in ("image", "audio")}, batch, settings
    )


# --- what changes -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", FRONT_ENDS.values(), ids=FRONT_ENDS)
@pytest.mark.parametrize("level", [0.3, 0.01])
def test_noise_is_as_loud_as_the_sound(settings, level):
    """White noise in the place of white noise: no bin is louder or softer. Of a tone: noise of its level."""
    spectrogram, generator = Spectrogram(settings), torch.Generator().manual_seed(7)
    own = level * torch.randn(4, settings.samples, generator=generator)
    times = torch.arange(settings.samples) / settings.sample_rate
    tone = level * math.sqrt(2) * torch.sin(2 * math.pi * 1000 * times).expand(4, -1)
    low = level * math.sqrt(2) * torch.sin(2 * math.pi * 120 * times).expand(4, -1)  # Kaldi weakens it
    decibel = settings.audio_std * 10 / (1 if settings.front_end == "log-mel" else math.log(10))
    whole = slice(0, 140)
    truth = spectrogram(own)
    for sound in own, tone, low:
        noise = change("noise", batch_of(spectrogram(sound)), settings)["audio"]
        assert noise.shape == truth.shape and not torch.equal(noise, truth)
        difference = (noise - truth)[..., whole].mean().item() * decibel
        assert abs(difference) < 0.5, f"{difference} dB"


@pytest.mark.parametrize("settings", FRONT_ENDS.values(), ids=FRONT_ENDS)
def test_silence_is_that_of_a_silent_file(settings, tmp_path):
    path = tmp_path / "silent.wav"
    write_silence(path, settings)
    item = ClipDataset([Clip(path)], settings, train=False)[0]
    batch = batch_of(torch.randn(2, 1, settings.mel_bins, settings.frames))
    silent = change("silence", batch, settings)["audio"]
    torch.testing.assert_close(silent, item["audio"].expand(2, -1, -1, -1))
    still = change("noise", batch_of(silent), settings)["audio"]  # noise as loud as nothing
    torch.testing.assert_close(still, silent, atol=1e-3, rtol=1e-3)


def write_silence(path: Path, settings) -> None:
    with wave.open(str(path), "wb") as file:
        file.setparams((1, 2, settings.sample_rate, 0, "NONE", ""))
        file.writeframes(bytes(2 * settings.samples))


@pytest.mark.parametrize("name", ["silence", "noise", "other_sound"])
def test_a_clip_without_sound_stays_without(name):
    audio = torch.randn(3, 2, 1, 32, 32)  # two windows of each
    other = torch.randn_like(audio)
    changed = change(name, batch_of(audio, present=[True, False, True], other_audio=other))["audio"]
    assert torch.equal(changed[1], audio[1])
    for row in 0, 2:
        assert not torch.isclose(changed[row], audio[row]).all((1, 2, 3)).any()
    if name == "noise":
        assert not torch.equal(changed[0, 0], changed[0, 1]) and not torch.equal(changed[0], changed[2])
    if name == "other_sound":
        assert torch.equal(changed[0], other[0])


def test_noise_is_that_of_the_clip_whatever_its_batch():
    """And that of no other clip, be their sounds the same."""
    audio = torch.randn(1, 1, 32, 32).expand(4, -1, -1, -1)
    whole = change("noise", batch_of(audio))["audio"]
    assert not any(torch.allclose(whole[n], whole[n - 1], atol=0.1) for n in range(4))
    parts = [change("noise", batch_of(audio[n : n + 1], first=n))["audio"] for n in range(4)]
    torch.testing.assert_close(torch.cat(parts), whole)


def test_all_frames_are_grey_and_sounds_stay():
    batch = batch_of(torch.randn(2, 1, 32, 32), image=torch.randn(2, 3, 4, 3, 16, 16))
    grey = change("grey_picture", batch)
    assert torch.equal(grey["image"], torch.zeros(2, 3, 4, 3, 16, 16)) and grey["audio"] is batch["audio"]


def test_a_mixture_has_sound_if_one_of_its_clips_has():
    present = [[True, True], [False, True], [False, False]]
    assert has_sound(batch_of(torch.zeros(3, 1, 4, 4), present=present)).tolist() == [True, True, False]


# --- the sound of another -----------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [(1, 1), (3, 3, 3), (5, 1, 1, 1, 1, 1), (2, 3, 4), (4, 4), (1,) * 9])
@pytest.mark.parametrize("sorted_by_kind", [True, False])
def test_each_clip_gets_the_sound_of_one_of_another_kind(sizes, sorted_by_kind):
    kinds = [kind for kind, size in enumerate(sizes) for _ in range(size)]
    if not sorted_by_kind:
        kinds = kinds[::2] + kinds[1::2]
    numbered = dict(enumerate(kinds, start=10))
    others = derangement(numbered)
    assert others.keys() == numbered.keys() and sorted(others.values()) == sorted(numbered)
    assert all(numbered[clip] != numbered[other] for clip, other in others.items())
    assert others == derangement({clip: f"/elsewhere/{kind}" for clip, kind in numbered.items()})


@pytest.mark.parametrize("sizes", [(2,), (7,), (5, 2), (6, 1)])
def test_where_most_are_of_one_kind_each_still_gets_that_of_another_clip(sizes):
    kinds = dict(enumerate(kind for kind, size in enumerate(sizes) for _ in range(size)))
    others = derangement(kinds)
    assert sorted(others.values()) == sorted(kinds) and all(a != b for a, b in others.items())
    changed = Counter(kinds[a] != kinds[b] for a, b in others.items())
    assert changed[True] == 2 * min(sizes[1:], default=0)  # as many as can be


def test_clips_of_several_classes_get_the_sound_of_one_that_has_none_of_them():
    pick = random.Random(1)
    kinds = {n: tuple(sorted({pick.randrange(20), *([0] if n % 4 == 0 else [])})) for n in range(300)}
    others = derangement(kinds)
    assert sorted(others.values()) == sorted(kinds)
    assert all({*kinds[clip]}.isdisjoint(kinds[other]) for clip, other in others.items())
    alike = dict.fromkeys(range(5), (0, 1)) | {5: (), 6: ()}
    assert all(clip != other for clip, other in derangement(alike).items())


def test_kinds_side_by_side_do_not_stay_so():
    """As they would by half a turn through a sorted list."""
    steps = {(other - clip) % 20 for clip, other in derangement({n: n for n in range(20)}).items()}
    assert len(steps) > 5


def test_one_clip_alone_has_no_other():
    assert derangement({}) == derangement({3: 0}) == {}


# --- models whose answers are known -------------------------------------------------------------------------

TONES = (259, 1100, 2682, 5650)  # Hz: each in the middle of a quarter of the mel scale
LABELS = (0, 1, 2, 3, 0, 1, 2, 3, 0, 1)
BROKEN, MUTE, BLIND = 4, 5, 6


class Pixels(Dataset):
    """Clips that show their class as a brightness and play it as a tone; one is broken, one has no sound, and
    one no pictures. `windows` and `frames` as a model asks for them.
    """

    def __init__(self, clips, windows=(1,), frames=(), broken=()):
        self.clips, self.windows, self.frames, self.broken = clips, windows, frames, {BROKEN, *broken}
        self.read = Counter()

    def __len__(self):
        return len(self.clips)

    def __getitem__(self, key):
        index = key[1]
        self.read[index] += 1
        if index in self.broken:
            return Failure(index, self.clips[index].path, "broken")
        item = self.blank()
        del item["label_kind"]
        times, label = torch.arange(SETTINGS.samples) / SETTINGS.sample_rate, LABELS[index]
        if index != MUTE:
            tone = Spectrogram(SETTINGS)(0.5 * torch.sin(2 * math.pi * TONES[label] * times))
            item |= dict(audio=tone.expand_as(item["audio"]), audio_present=torch.tensor(True))
        if index != BLIND:
            item |= dict(image=torch.full_like(item["image"], label + 1.0), image_present=torch.tensor(True))
        return item | dict(index=torch.tensor(index), label_kind=torch.tensor(label))

    def blank(self):
        image = torch.zeros(*self.windows, *self.frames, 3, 16, 16)
        absent = dict.fromkeys(("image_present", "audio_present", "label_kind"), torch.tensor(False))
        return dict(image=image, audio=torch.zeros(*self.windows, 1, 32, 32)) | absent


class Known(nn.Module):
    """A classifier that only hears, or only sees: the class of a clear tone or a brightness, else class 0."""

    features = ("fusion",)

    def __init__(self, sense):
        super().__init__()
        self.sense, self.encoder = sense, SimpleNamespace(inputs=SETTINGS)

    def forward(self, image, audio, image_present=None, audio_present=None):
        there = presence(image, audio, image_present, audio_present)
        given, said = {"eyes": image, "ears": audio}[self.sense], torch.zeros(len(there["fusion"])).long()
        if given is not None and self.sense == "ears":
            quarters = (10 ** given.mean(-1)).unflatten(-1, (4, -1)).sum(-1)[:, 0]
            share, band = (quarters / quarters.sum(1, keepdim=True)).max(1)
            said = torch.where(share > 0.9, band, 0)
        elif given is not None:
            said = (given.flatten(1).mean(1) - 1).round().long().clamp(min=0)
        logits = nn.functional.one_hot(said, 4).float()
        return Classified(logits, dict(fusion=logits), dict(fusion=there["fusion"]))


class Known4(Classification):
    """Of four kinds."""

    def __init__(self, sense, make=Pixels, modalities="both"):
        clips = [Clip(Path(f"{n}.mp4"), {"kind": label}) for n, label in enumerate(LABELS)]
        self.config = ClassifyConfig(checkpoint="none", workers=0, quiet=True, modalities=modalities)
        self.found, self.model = Found(clips, clips, "", [], 10, {}), Known(sense)
        self.label, self.classes, self.is_multi_label, self.make = "kind", "abcd", False, make

    def dataset(self, clips, *, train):
        return self.make(clips)


def run_of(task, *, batch=3, process=0, processes=1):
    accelerator = SimpleNamespace(device="cpu", process_index=process, num_processes=processes)
    accelerator.is_main_process = process == 0
    schedule = SimpleNamespace(micro_batch=batch)
    return SimpleNamespace(
        accelerator=accelerator, schedule=schedule, task=task, found=task.found, config=task.config
    )


def accuracies(task, **options) -> dict[str, float]:
    run = run_of(task, **options)
    judged, failures = judge.judge_all(run, task.model)
    assert [failure.index for failure in failures] == [BROKEN]
    changed, failures = judge.judge_conditions(run, task.model, judged)
    assert not failures and all(len(rows) == 9 for rows in changed.values())
    own = task.summarize([row for row, _ in judged.values()])["accuracy"]
    return dict(own=own) | {name: of["accuracy"] for name, of in task.tested(changed).items()}


VIEWS = dict(one=dict(), windows=dict(windows=(3,)), frames=dict(windows=(2,), frames=(4,)))


@pytest.mark.parametrize("batch", [1, 4, 64])
@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_a_model_that_only_hears_or_only_sees(view, batch):
    """Of nine clips two are of class 0, which is what both say when they are given nothing to go by."""
    ears, eyes = (Known4(sense, lambda clips: Pixels(clips, **view)) for sense in ("ears", "eyes"))
    right = dict(own=8, silence=2, noise=2, other_sound=0, grey_picture=8)  # the mute one it cannot tell
    assert accuracies(ears, batch=batch) == {name: pytest.approx(n / 9) for name, n in right.items()}
    right = dict(own=8, silence=8, noise=8, other_sound=8, grey_picture=2)
    assert accuracies(eyes, batch=batch) == {name: pytest.approx(n / 9) for name, n in right.items()}


@pytest.mark.parametrize(
    "modalities, names", [("image", {"grey_picture"}), ("audio", {"silence", "noise", "other_sound"})]
)
def test_what_a_model_is_not_given_is_not_tested(modalities, names):
    datasets = []
    task = Known4("eyes", lambda clips: datasets.append(Pixels(clips)) or datasets[-1], modalities)
    assert accuracies(task).keys() == {"own", *names}
    twice = modalities == "audio"  # a clip and the one that gets its sound
    assert set(datasets[-1].read.values()) == ({1, 2} if twice else {1})


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_share_the_work_and_find_the_same(processes, monkeypatch):
    """What each would send to the others, put together."""

    def sent(processes) -> list:
        rows, task = [], Known4("ears")
        judged, _ = judge.judge_all(run_of(task), task.model)
        with monkeypatch.context() as patch:
            patch.setattr(judge, "gather_object", lambda ours: rows.extend(ours) or ours)
            for process in range(processes):
                run = run_of(task, batch=2, process=process, processes=processes)
                judge.judge_conditions(run, task.model, judged)
        said = [(name, clip, int(row["target"]), row[""].tolist()) for name, clip, row in rows]
        return sorted(said)

    assert len(sent(1)) == 4 * 9 and sent(processes) == sent(1)
    task, rows = Known4("ears"), []
    monkeypatch.setattr(judge, "gather_object", lambda ours: rows.extend(ours) or rows)
    for process in reversed(range(processes)):
        judged, _ = judge.judge_all(run_of(task, process=process, processes=processes), task.model)
    assert len(rows) == 9 and list(judged) == [0, 1, 2, 3, 5, 6, 7, 8, 9]
    rows.clear()
    for process in reversed(range(processes)):
        run = run_of(task, process=process, processes=processes)
        changed, _ = judge.judge_conditions(run, task.model, judged)
    assert [row["target"].item() for row in changed["silence"]] == [LABELS[clip] for clip in judged]


def test_no_other_sound_where_there_is_none():
    task = Known4("ears")
    task.found = task.found._replace(test=task.found.test[:1])
    judged, _ = judge.judge_all(run_of(task), task.model)
    changed, _ = judge.judge_conditions(run_of(task), task.model, judged)
    assert [*changed] == ["silence", "noise", "grey_picture"]


def test_a_clip_that_cannot_be_read_again_is_told_and_left_out():
    """And so is the one that should get its sound."""
    datasets = [Pixels, lambda clips: Pixels(clips, broken=[7])]
    task = Known4("ears", lambda clips: datasets.pop(0)(clips))
    run = run_of(task)
    judged, _ = judge.judge_all(run, task.model)
    changed, failures = judge.judge_conditions(run, task.model, judged)
    assert {failure.index for failure in failures} == {7} and len(failures) == 2
    assert {of["judged"] for of in task.tested(changed).values()} == {7}


def test_nothing_is_left_of_a_condition_that_no_clip_can_be_judged_under():
    datasets = [Pixels, lambda clips: Pixels(clips, broken=range(10))]
    task = Known4("ears", lambda clips: datasets.pop(0)(clips))
    judged, _ = judge.judge_all(run_of(task), task.model)
    changed, failures = judge.judge_conditions(run_of(task), task.model, judged)
    assert changed == {} and len(failures) == 9


class Watched(Known4):
    """Keeps what it is asked to draw and to save; pictures fail after training."""

    protocol = "by hand"

    def over_windows(self, model, inputs, given):
        self.ways.add((model.training, torch.is_grad_enabled()))
        return super().over_windows(model, inputs, given)

    def draw(self, folder, model, inputs, batch, step):
        self.scores(model, inputs)
        self.drawn.append((step, batch["index"].tolist()))
        if step == 5:
            raise OSError("no room")

    def save(self, folder, model):
        self.saved.append(model.facts["metrics"])


def test_what_measures_leave(tmp_path, capsys):
    """Before, during and after training; clip 7 cannot be read again under the conditions, so that neither it
    nor the one that gets its sound is judged there.
    """
    (tmp_path / "run" / "before" / "model").mkdir(parents=True)
    (tmp_path / "run" / "metrics.jsonl").touch()
    broken = iter([(), (), (), [0, 1], (), [7], (), ()])  # to judge and to draw; [7] under the conditions
    task = Watched("ears", lambda clips: Pixels(clips, broken=next(broken)))
    task.config.run, task.config.batch_size, task.config.data = tmp_path / "run", 64, tmp_path / "link"
    task.config.checkpoint, task.config.seed = str(tmp_path / "run/before/model"), 3
    (tmp_path / "link").symlink_to("run")
    found = task.found._replace(train=task.found.train[:8], test_name="held-out clips")
    task.found = found._replace(coverage=dict(train=(8, 12), test=(10, 11)))
    task.drawn, task.saved, task.ways, rows, logged = [], [], set(), [], []
    run = run_of(task, batch=64)
    run.metrics = SimpleNamespace(write=lambda **row: rows.append(row))
    run.accelerator.log = lambda numbers, step: logged.append((step, numbers))
    unread = []
    for run.schedule.micro_batch, step, when in (64, 0, "before"), (2, 3, "during"), (64, 5, "after"):
        failures = task.measure(run, task.model.train(), step, when)
        unread.append([failure.index for failure in failures])
    assert unread == [[BROKEN], [BROKEN], [BROKEN, 7, 7]]
    whole = [0, 1, 2, 3, 5]  # of one batch that is read
    assert task.drawn == [(0, whole), (3, [2, 3]), (5, whole)]
    assert task.ways == {(False, False)}
    task.measure(run_of(task, process=1, processes=2), task.model, 5, "during")  # the first tells of it
    assert [step for step, _ in logged] == [row["step"] for row in rows] == [0, 3, 5]
    before, during, after = rows
    assert before["judged"] == 9 and before["clips"] == "held-out clips" and "conditions" not in during
    conditions = after["conditions"]
    assert [*conditions] == ["silence", "noise", "other_sound", "grey_picture"]
    assert all(of.keys() == {"accuracy", "judged"} and of["judged"] == 7 for of in conditions.values())

    (saved,) = task.saved
    assert saved == dict(accuracy=pytest.approx(8 / 9)) and saved.items() < logged[2][1].items()
    facts = task.model.facts
    assert facts["recipe"] | dict(checkpoint="before", steps=5, batch_size=8, seed=3) == facts["recipe"]
    assert (facts["data"]["name"], facts["data"]["clips"]) == ("run", 8)
    assert facts["data"]["measured_on"] == "9 held-out clips"
    assert facts["data"]["coverage"] == dict(train="8 of 12", test="9 of 11")
    assert (tmp_path / "run" / "index.html").exists()
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["coverage"] == dict(judged=9, expected=11) and results["conditions"] == conditions
    assert (results["step"], results["seed"], results["split"]) == (5, 3, "held-out clips")
    assert results["checkpoint"] == task.config.checkpoint and results["metrics"] == after["metrics"]
    task.found = found
    assert task.results(task.model, 5, 9, {})["coverage"] == dict(judged=9, expected=10)
    said = capsys.readouterr().out
    assert said.index("before training, 9 held-out") < said.index("after training, 9 held-out")
    assert said.count("heard and seen") == 1 and re.search(r"its own +0\.889 +9\n", said)
    assert "pictures could not be drawn: no room" in said and "WARNING" not in said


def test_clips_are_alike_by_their_labels():
    alike, other = (Clip(Path(name), dict(kind=kind)) for name, kind in (("a", 1), ("b", 2)))
    assert judge.JudgedTask.kind(None, alike) == judge.JudgedTask.kind(None, Clip(Path("c"), dict(kind=1)))
    kinds = [judge.JudgedTask.kind(None, clip) for clip in (alike, other, Clip(Path("a")), Clip(Path("b")))]
    assert len({*kinds}) == 4


def test_blanks_have_another_sound_too():
    dataset = BesideOthers(Pixels([Clip(Path("a"))] * 10), {0: 1})
    read = collate([dataset[0, 0]], dataset.blank)
    blank = collate([dataset[0, BROKEN]], dataset.blank)
    assert len(blank["index"]) == 0 and blank["other_audio"].shape == read["other_audio"].shape
    assert torch.equal(read["other_audio"][0], dataset[0, 1]["audio"]) and len(dataset) == 10


# --- other tasks --------------------------------------------------------------------------------------------


class Marker(nn.Module):
    """Marks what is bright where it hears a sound, or is told that there is none."""

    def forward(self, image, audio, audio_present=None):
        hears = audio.amax((1, 2, 3)) > -6
        hears = hears if audio_present is None else hears | ~audio_present
        return torch.where(hears[:, None, None, None], image[:, :1] - 0.5, -1.0)


def test_a_segmenter_in_silence_and_told_that_there_is_none():
    found = Found([], [], "test", [], 0, dict(object=("background", "a")))
    task = Segmentation(SegmentConfig(checkpoint="none", target="binary"), found)
    task.model.__class__, image = type("M", (Marker,), {}), torch.zeros(2, 3, 8, 8)
    image[:, :, :4] = 1
    tone = Spectrogram(SETTINGS)(torch.sin(torch.arange(SETTINGS.samples) / 4.0)).expand(2, -1, -1, -1)
    truth = torch.zeros(2, 224, 224).long()
    truth[:, :112] = 1
    batch = batch_of(tone, image=image, classes=truth, other_audio=tone)
    inputs = task.inputs(batch)
    own = task.summarize(task.judge(task.model, inputs, batch))["miou"]
    assert own > 0.95  # but for the edge
    for name, expected in dict(
        silence=0.0, noise=own, other_sound=own, no_sound=own, grey_picture=0.0
    ).items():
        changed = CONDITIONS[name].change(inputs, batch, SETTINGS)
        assert task.summarize(task.judge_again(task.model, changed, batch))["miou"] == pytest.approx(expected)
    assert set(task.conditions) == set(CONDITIONS)


def test_masks_are_laid_over_the_mixture_whatever_the_separator_hears(monkeypatch):
    task = Separation(SeparateConfig(checkpoint="none", decoder_dim=16), Found([], [], "", [], 0, {}))
    settings, told = task.model.encoder.inputs, []
    sounds = torch.randn(1, 2, settings.samples)
    mixture = Spectrogram(settings)(sounds.sum(1))
    present = torch.ones(1, 2, dtype=torch.bool)
    batch = dict(image=torch.randn(1, 2, 3, 96, 96), audio=mixture, sounds=sounds, index=torch.tensor([0]))
    batch |= dict(image_present=present, audio_present=present, other_audio=mixture.flip(-1))
    monkeypatch.setattr(
        task.model, "separate", lambda *given: told.append(given) or (given[2][:, None], None)
    )
    monkeypatch.setattr(task, "judge_pair", lambda *_: dict(skipped=1))
    for name in task.conditions:
        task.judge_again(task.model, CONDITIONS[name].change(task.inputs(batch), batch, settings), batch)
    for name, (image, audio, laid_over) in zip(task.conditions, told, strict=True):
        assert torch.equal(laid_over, sounds.sum(1)), name
        assert torch.equal(audio, mixture) == (name == "grey_picture")
        assert bool(image.any()) == (name != "grey_picture")
    assert "no_sound" not in task.conditions  # its model takes both
