"""How pretraining is judged, against hand-computed cases and whatever the batches; rows of judged clips."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from avfuse.data.find import Found
from avfuse.mae import patchify
from avfuse.train import INPUTS, Pretraining
from avfuse.training.judge import first_clips, to_columns, to_rows
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
    task.conclude(run, task.model, 0, "before", [])
    assert "none of the held-out clips to measure on could be read" in capsys.readouterr().out


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
    found = Found([], list("abcde"), "", [], 9, {}, coverage=dict(train=(4, 5), test=(5, 7)))
    assert first_clips(found, 3).test == ["a", "b", "c"]
    assert first_clips(found, 3).coverage == dict(train=(4, 5), test=(3, 3))
    assert first_clips(found, 6).coverage["test"] == (5, 6)  # one of the first six is not there
    assert first_clips(found, 9).coverage == found.coverage
