"""How pretraining is judged, against hand-computed cases and whatever the batches; rows of judged clips."""

import hashlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from avfuse.data.find import Found
from avfuse.mae import patchify
from avfuse.tasks.classify import Classification
from avfuse.tasks.localize import Localization
from avfuse.tasks.retrieve import Retrieval, recalls
from avfuse.tasks.segment import Segmentation
from avfuse.tasks.separate import Separation
from avfuse.train import INPUTS, Pretraining
from avfuse.training.conditions import condition_table
from avfuse.training.judge import JudgedTask, aligned, first_clips, to_columns, to_rows, weights_hash
from avfuse.training.neighbours import nearest_neighbour_probes
from avfuse.training.recipes import TrainConfig


@pytest.fixture(scope="module")
def task():
    torch.manual_seed(0)
    config = TrainConfig(decoder_dim=32, decoder_depth=1, decoder_heads=2)
    task = Pretraining(config, Found([], [], "held-out clips", [], 0, {}))
    task.model.eval()
    return task


def batch_of(task, clips, seed=0):
    generator = torch.Generator().manual_seed(seed)
    masks = [task.model.mask_sampler()(generator) for _ in range(clips)]
    return {
        "image": torch.randn(clips, 3, 96, 96, generator=generator),
        "audio": torch.randn(clips, 1, 64, 128, generator=generator),
        "image_present": torch.ones(clips, dtype=torch.bool),
        "audio_present": torch.ones(clips, dtype=torch.bool),
        "label_kind": torch.arange(clips) % 2,
        "index": torch.arange(clips),
        "failures": [],
        **{name: torch.stack([mask[name] for mask in masks]) for name in masks[0]},
    }


def split(batch, *sizes):
    """The same clips in batches of other sizes."""
    parts = {name: value.split(sizes) for name, value in batch.items() if name != "failures"}
    return [{name: part[n] for name, part in parts.items()} | {"failures": []} for n in range(len(sizes))]


@torch.no_grad()
def judged(task, *batches):
    return [row for batch in batches for row in task.judge(task.model, task.inputs(batch), batch)]


def test_held_out_loss_counts_each_clip_once(task):
    batch = batch_of(task, 5)
    batch["audio_present"][1] = False
    whole = task.summarize(judged(task, batch))
    parts = task.summarize(judged(task, *split(batch, 1, 4)))
    assert whole["held_out_clips"] == parts["held_out_clips"] == 5
    assert parts.pop("probes") == whole.pop("probes")
    assert parts == pytest.approx(whole, rel=1e-5)
    with torch.no_grad():  # the model's own means, over the clips that have the modality
        output = task.model(**{name: batch[name] for name in INPUTS})
    assert whole["held_out_image_loss"] == pytest.approx(output.image_loss.item(), rel=1e-5)
    assert whole["held_out_audio_loss"] == pytest.approx(output.audio_loss.item(), rel=1e-5)


def test_a_loss_that_is_not_finite_is_told_but_not_that_of_an_absent_modality(task):
    rows = judged(task, batch_of(task, 2))
    rows[0]["audio_loss"] = np.float32("nan")
    assert np.isnan(task.summarize(rows)["held_out_audio_loss"])
    rows[0]["audio_present"] = np.bool_(False)
    assert task.summarize(rows)["held_out_audio_loss"] == pytest.approx(rows[1]["audio_loss"].item())
    rows[1]["audio_present"] = np.bool_(False)
    metrics = task.summarize(rows)  # nothing is said of what no clip has
    assert not [name for name in metrics if name.startswith("held_out_audio")]
    assert [row[0] for row in task.tables(metrics)[0]] == ["held-out loss", "image"]


def test_loss_of_predicting_zero(task):
    batch = batch_of(task, 3)
    metrics = task.summarize(judged(task, batch))
    patches = patchify(batch["image"], (16, 16)).double()
    normal = (patches - patches.mean(-1, keepdim=True)) / (patches.var(-1, keepdim=True) + 1e-6).sqrt()
    expected = normal.square().mean(-1)[batch["image_removed"]].mean().item()
    assert metrics["held_out_image_zero"] == pytest.approx(expected, rel=1e-5)


def test_nothing_is_recorded_where_no_clip_can_be_read(task, tmp_path, capsys, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("there is nothing to write")

    run = SimpleNamespace(config=SimpleNamespace(run=tmp_path), found=task.found)
    run.accelerator, run.metrics = SimpleNamespace(log=refuse), SimpleNamespace(write=refuse)
    (tmp_path / "metrics.jsonl").touch()
    monkeypatch.setattr(Pretraining, "show", lambda *_: None)
    monkeypatch.setattr(Pretraining, "save", lambda _, folder, model: (folder / "model").touch())
    for when in "before", "after":
        task.conclude(run, task.model, 0, when, [])
        said = f"{when} training: none of the held-out clips to measure on could be read"
        assert said in capsys.readouterr().out and (tmp_path / "model").exists() == (when == "after")
    assert not (tmp_path / "results.json").exists()


def test_pooled_features_do_not_depend_on_the_batches(task):
    batch = batch_of(task, 4)
    batch["image_present"][2] = False
    whole = to_columns(judged(task, batch))
    parts = to_columns(judged(task, *split(batch, 3, 1)))
    assert whole["fusion"].shape == (4, 192) and whole["label_kind"].tolist() == [0, 1, 0, 1]
    for name in whole:
        torch.testing.assert_close(parts[name], whole[name])


def test_absent_image_does_not_reach_the_fusion_feature(task):
    batch = batch_of(task, 2)
    batch["image_present"][:] = False
    first = to_columns(judged(task, batch))
    batch["image"] = torch.randn_like(batch["image"])
    second = to_columns(judged(task, batch))
    torch.testing.assert_close(first["fusion"], second["fusion"])


def test_rows_and_columns_are_the_same_numbers():
    columns = dict(a=torch.arange(3), b=torch.randn(3, 2, 2), c=torch.tensor([True, False, True]))
    back = to_columns(to_rows(columns))
    assert all(torch.equal(back[name], column) for name, column in columns.items())


def test_first_clips_are_those_that_count():
    found = Found(
        [], list("abcde"), "", [], 9, {"kind": ("x", "y")}, coverage=dict(train=(4, 5), test=(5, 7))
    )
    assert first_clips(found, 3).test == ["a", "b", "c"]
    assert first_clips(found, 3).coverage == dict(train=(4, 5), test=(3, 3))
    assert first_clips(found, 6).coverage["test"] == (5, 6)  # one of the first six is not there
    assert first_clips(found, 9).coverage == found.coverage


@pytest.mark.parametrize("count, taken", [(2, "ac"), (3, "abd"), (4, "abcd"), (5, "abcde"), (9, "abcde")])
def test_clips_of_a_plain_folder_are_taken_from_all_of_it(count, taken):
    """They come class by class, and the first would be of one."""
    found = Found([], list("abcde"), "", [], 9, {}, coverage=dict(test=(5, 5)))
    found = first_clips(found, count)
    assert "".join(found.test) == taken and found.coverage["test"] == (len(taken), min(count, 5))


def test_what_is_absent_counts_for_no_probe(task):
    batch = batch_of(task, 4)
    batch["image_present"][2] = False
    columns = to_columns(judged(task, batch))
    assert not columns["image"][2].any() and columns["image"][[0, 1, 3]].any(1).all()
    assert columns["audio"].any(1).all() and columns["fusion"].any(1).all()


def test_clips_that_lack_a_modality_do_not_find_each_other():
    """Of two classes, one without pictures: to find another row of zeros is no recall."""
    labels = torch.arange(20) % 2
    features = {name: torch.randn(20, 8) for name in ("image", "audio", "fusion")} | dict(label_kind=labels)
    features["image"][labels == 1] = 0
    features["image"][labels == 0, 0] += 10  # all alike
    probes = nearest_neighbour_probes(features)["kind"]
    assert probes["image"]["accuracy"] == 0.5
    assert recalls(features, [1])["kind_recall@1_image"] == 0.5


@pytest.mark.parametrize(
    "image, audio, said", [(0.5, 0.9, ""), (1.02, 0.9, "image 1.020"), (1.0, 0.995, "both")]
)
def test_a_model_no_better_than_predicting_zero_is_doubted(task, image, audio, said):
    losses = dict(held_out_image_loss=image, held_out_audio_loss=audio)
    doubt = task.doubt(losses | dict(held_out_image_zero=1.0, held_out_audio_zero=1.0))
    named = "image 1.000 and audio 0.995" if said == "both" else said
    assert doubt == (named and f"no better than predicting zero: the loss of {named}")
    silent = dict(held_out_image_loss=image, held_out_image_zero=2.0)  # no clip has sound
    silent |= dict(held_out_audio_loss=0.1, held_out_audio_zero=0.0)  # or all are silent
    assert task.doubt(silent) == ""


def test_doubt_is_told_at_the_end_alone(task, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(Pretraining, "show", lambda *_: None)
    monkeypatch.setattr(Pretraining, "doubt", lambda *_: "useless")
    run = SimpleNamespace(config=SimpleNamespace(run=tmp_path, ema=0.0), found=task.found)
    run.accelerator, run.metrics = (
        SimpleNamespace(log=lambda *_, **__: 0),
        SimpleNamespace(write=lambda **_: 0),
    )
    (tmp_path / "metrics.jsonl").touch()
    rows = judged(task, batch_of(task, 2))
    task.conclude(run, task.model, 3, "during", rows)
    assert "WARNING" not in capsys.readouterr().out
    task.conclude(run, task.model, 3, "after", rows)
    assert "WARNING: useless: more clips, more --epochs" in capsys.readouterr().out
    for run.config.ema, step, said in (0.9999, 240, "98% of the average"), (0.99, 100, "37% of the average"):
        task.conclude(run, task.model, step, "after", rows)
        assert f"WARNING: useless: {said}" in capsys.readouterr().out
    run.config.ema = 0.9
    task.conclude(run, task.model, 240, "after", rows)
    assert "WARNING: useless: more clips" in capsys.readouterr().out
    task.conclude(run, task.model, 0, "after", rows)  # trains nothing
    told = capsys.readouterr().out
    assert told.startswith("2 held-out clips:\n") and "WARNING: useless\n" in told


@pytest.mark.parametrize("clips, chance, is_few", [(5, 0.6, True), (5, 0.5, False), (50, 0.6, False)])
def test_too_few_test_clips_are_not_put_down_to_training(clips, chance, is_few):
    """The interval of all right begins at n / (n + 1.96^2): 0.566 of 5."""
    task = object.__new__(Classification)
    task.is_multi_label = False
    said = task.advice(dict(clips=clips, chance=chance))
    assert ("test on more" in said, "--epochs" in said) == (is_few, not is_few)


def test_tasks_doubt_what_is_no_better_than_chance():
    def doubt(kind, metrics, **attributes):
        return kind.doubt(SimpleNamespace(**attributes), metrics)

    named = dict(chance=0.5, accuracy=1.0, interval_high=1.0)
    for low, said in (0.51, False), (0.5, True), (0.3, True):
        assert bool(doubt(Classification, named | dict(interval_low=low), is_multi_label=False)) == said
    for area, said in (0.51, False), (0.5, True), (None, False):
        assert bool(doubt(Classification, dict(AUC=area), is_multi_label=True)) == said
    found = {"kind_recall@1_sum": 0.5, "kind_recall@1_chance": 0.4, "kind_recall@5_sum": 0.7}
    assert doubt(Retrieval, found | {"kind_recall@5_chance": 0.6}) == ""
    assert doubt(Retrieval, found | {"kind_recall@5_chance": 0.8}) == "no better than chance: kind_recall@5"
    assert doubt(Retrieval, {"kind_recall@5_sum": 1.0, "kind_recall@5_chance": 1.0}) == ""  # of few clips
    assert doubt(Separation, dict(sdr=0.1, mixture_sdr=0.2)) and not doubt(Separation, dict(pairs=0))
    assert not doubt(Separation, dict(sdr=0.3, mixture_sdr=0.2))
    assert doubt(Separation, dict(sdr=None, mixture_sdr=0.2)).startswith("no sound at all")
    assert doubt(Localization, dict(pointing=0.1, pointing_chance=0.1))
    assert doubt(Segmentation, dict(miou_without_background=0.0), semantic=True)
    for silent, said in (0.1, ""), (0.3, "silent, 0.300"):
        metrics = dict(miou=0.3, miou_everywhere=0.2, miou_nowhere=silent)
        assert doubt(Segmentation, metrics, semantic=False).endswith(said)
        assert bool(doubt(Segmentation, metrics, semantic=False)) == bool(said)


# --- what people read ---------------------------------------------------------------------------------------


def table(task, metrics, **config) -> list[list[str]]:
    """The words of each line that a task prints of its metrics, columns parted by two spaces or more."""
    made = object.__new__(task)
    made.is_multi_label, made.semantic = "mAP" in metrics, "miou_without_background" in metrics
    made.config = SimpleNamespace(modalities="both", **config)
    lines = "\n".join(map(aligned, made.tables(metrics))).splitlines()
    return [[cell.strip() for cell in line.split("  ") if cell] for line in lines]


def test_columns_are_aligned():
    rows = [("", "accuracy", "clips"), ("all \x1b heads", 0.5, "12"), ("chance", None, "")]
    assert aligned(rows) == "                  accuracy  clips\n  all \\x1b heads     0.500     12\n  chance"


def test_metrics_stand_beside_what_they_compare_with(task):
    hits = dict(
        accuracy=0.98, accuracy_image_head=0.5, accuracy_audio_input=0.9, standard_error=0.01, chance=0.2
    ) | dict(clips=50, interval_low=0.9, interval_high=0.996)
    assert table(Classification, hits) == [
        ["accuracy", "95 % interval", "right"],
        ["all heads", "0.980", "0.90 to 1.00", "49 of 50"],
        ["image head", "0.500"],
        ["given the audio alone", "0.900"],
        ["most frequent class", "0.200"],
    ]
    confused = table(
        Classification, hits | dict(confusion_image=0.1, confusion_audio=0.2, confusion_each=0.3)
    )
    assert confused[5:] == [
        ["wrong by both, right by image alone", "0.100"],
        ["wrong by both, right by audio alone", "0.200"],
        ["wrong by both, right by each alone", "0.300"],
    ]
    several = dict(mAP=0.5, AUC=None, d_prime=None, classes_without_positives=0, mAP_fusion_head=0.25)
    assert table(Classification, several) == [
        ["mAP", "AUC", "d'"],
        ["all heads", "0.500"],
        ["fusion head", "0.250"],
        ["chance", "0.500", "0.000"],
    ]
    recall = {
        f"shape_recall@1_{n}": v
        for n, v in zip(("image", "audio", "fusion", "sum", "chance"), (0.1, 0.2, 0.3, 0.4, 0.5), strict=True)
    }
    assert table(Retrieval, dict(clips=9) | recall) == [
        ["image", "audio", "fusion", "sum", "chance"],
        ["shape recall@1", "0.100", "0.200", "0.300", "0.400", "0.500"],
    ]
    assert table(Retrieval, dict(clips=9)) == []
    assert table(Segmentation, dict(miou=0.5, f_score=0.6, miou_everywhere=0.1, miou_nowhere=0.2)) == [
        ["image and sound (control: --modalities image)", "mIoU", "F"],
        ["model", "0.500", "0.600"],
        ["all called sounding", "0.100"],
        ["all called silent", "0.200"],
    ]
    pointed = dict(pointing=0.6, ciou=0.5, auc=0.4, pointing_chance=0.1, best_possible_auc=0.9)
    assert table(Localization, pointed)[1:] == [
        ["cosine map", "0.600", "0.500", "0.400"],
        ["a random place", "0.100"],
        ["best possible", "0.900"],
    ]
    always = {f"{kind}_{name}": 0.3 for kind in ("whole", "centre") for name in ("pointing", "ciou", "auc")}
    assert table(Localization, pointed | always)[2:4] == [
        ["the whole picture", "0.300", "0.300", "0.300"],
        ["the centre", "0.300", "0.300", "0.300"],
    ]
    ratios = dict(pairs=2, skipped=1, sdr=7.2, sir=10.0, sar=17.0, mixture_sdr=0.1, nmf_sdr=None)
    assert table(Separation, ratios)[:4] == [
        ["dB, 2 pairs, 1 skipped", "SDR", "SIR", "SAR"],
        ["model", "7.200", "10.000", "17.000"],
        ["mixture as it is", "0.100"],
        ["NMF"],
    ]


def test_metrics_stand_beside_those_of_what_is_not_the_clips_own():
    tested = dict(silence=dict(miou=0.1, f=None, judged=9), later=dict(miou=0.2, judged=12))
    assert aligned(condition_table(dict(miou=0.7, f=0.8, judged=12), tested)).splitlines() == [
        "  heard and seen   miou      f  judged",
        "  its own         0.700  0.800      12",
        "  silence         0.100              9",
        "  later           0.200             12",
    ]


def test_losses_stand_beside_those_of_predicting_zero(task):
    losses = dict(
        held_out_image_loss=0.5, held_out_image_zero=1.0, held_out_audio_loss=0.7, held_out_audio_zero=0.0
    )
    probe = dict(image=dict(accuracy=0.5, interval=(0.4, 0.6), chance=0.25))
    assert table(Pretraining, losses | dict(probes=dict(kind=probe))) == [
        ["held-out loss", "loss", "predicting zero", "share"],
        ["image", "0.500", "1.000", "0.500"],
        ["audio", "0.700", "0.000"],
        ["both", "1.200", "1.000", "1.200"],
        ["nearest clip, kind", "accuracy", "95 % interval"],
        ["image", "0.500", "0.40 to 0.60"],
        ["random clip", "0.250"],
    ]


def test_weights_are_hashed_by_name_with_their_types_and_shapes():
    linear = torch.nn.Linear(3, 2)
    bias, weight = (x.detach().numpy().tobytes() for x in (linear.bias, linear.weight))
    by_hand = b"bias torch.float32 (2,)" + bias + b"weight torch.float32 (2, 3)" + weight
    assert weights_hash(linear) == hashlib.sha256(by_hand).hexdigest()


def test_trackers_are_given_numbers_alone():
    assert JudgedTask.numbers(None, dict(zero=0, none=None)) == dict(zero=0)


def test_rows_keep_no_memory_of_their_batch():
    columns = dict(each=torch.arange(6.0).view(3, 2), whole=torch.tensor([1, 2, 3]))
    rows = to_rows(columns)
    assert all(row["each"].base is None and row["whole"].base is None for row in rows)
    assert all(torch.equal(column, columns[name]) for name, column in to_columns(rows).items())
