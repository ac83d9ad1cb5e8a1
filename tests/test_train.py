"""The training program end to end on tiny generated data: artefacts, resume, faults, wrong settings."""

import json
import math
import os
import shutil
import subprocess
import sys
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from safetensors.torch import save_file
from videos import hostile_folder, write_video

from avfuse import AVMAE
from avfuse.data import sounding_shapes
from avfuse.data.clips import ClipDataset, ClipLoader
from avfuse.files import read_rows
from avfuse.tasks.options import ClassifyConfig
from avfuse.train import INPUTS, Pretraining, main
from avfuse.training import loop
from avfuse.training.checkpoints import list_checkpoints
from avfuse.training.faults import RunError
from avfuse.training.judge import weights_hash
from avfuse.training.plan import make_model
from avfuse.training.recipes import TrainConfig
from avfuse.training.report import write_report
from avfuse.training.run_folder import check_run
from avfuse.training.settings import raised_warmup_cosine, warmup_cosine

pytestmark = pytest.mark.usefixtures("undrawn")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("shapes")
    return sounding_shapes.generate(root, train=10, test=5, workers=1, progress=False)


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory):
    """The configuration of a run that went through."""
    config = tiny(data, tmp_path_factory.mktemp("runs") / "whole")
    main(config)
    return config


def tiny(data, run, **changes) -> TrainConfig:
    config = TrainConfig(
        data=data,
        run=run,
        epochs=3,
        warmup_epochs=1,
        batch_size=4,
        workers=0,
        checkpoint_every=2,
        measure_every=4,
        max_unreadable=1.0,
        decoder_dim=32,
        decoder_depth=1,
        decoder_heads=2,
        fusion_layers=(1, 3),
        test_share=0.0,
    )
    return replace(config, **changes)


def rows(run) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def losses(run) -> dict[int, float]:
    return {row["step"]: row["loss"] for row in rows(run) if "loss" in row}


def test_run_folder_holds_everything(finished):
    run = finished.run
    assert json.loads((run / "run.json").read_text())["settings"]["epochs"] == 3
    assert sorted(losses(run)) == [1, 2, 3, 4, 5, 6]  # 10 clips are two batches of 4 in each epoch
    assert all(math.isfinite(loss) for loss in losses(run).values())
    assert [path.name for path in list_checkpoints(run)] == ["step-00000006", "step-00000004"]
    assert (run / "index.html").exists()
    assert list((run / "tensorboard").rglob("events.out.*"))
    pictures = [f"{kind}-{step:06d}" for kind in ("reconstructions", "attention") for step in (0, 4, 6)]
    assert sorted(path.stem for path in (run / "pictures").iterdir()) == sorted(pictures)
    for name in pictures:
        assert (run / "pictures" / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_measures_before_during_and_after_are_recorded(finished):
    before, during, after = (row for row in rows(finished.run) if "when" in row)
    moments = [(row["when"], row["step"]) for row in (before, during, after)]
    assert moments == [("before", 0), ("during", 4), ("after", 6)]
    for row in before, during, after:
        assert row["clips"] == "held-out clips"
        assert set(row["probes"]) == {"shape", "colour", "shape and colour"}
        for probe in row["probes"]["shape"].values():
            assert 0 <= probe["accuracy"] <= 1 and 0 <= probe["chance"] <= 1
    assert after["held_out_image_loss"] < before["held_out_image_loss"]
    assert after["held_out_image_zero"] == before["held_out_image_zero"]


def test_rows_tell_the_epoch_of_their_step(finished):
    assert [row["epoch"] for row in rows(finished.run) if "loss" in row] == [0, 0, 1, 1, 2, 2]


def test_the_last_step_is_measured_once(data, tmp_path):
    main(tiny(data, tmp_path / "run", epochs=1, measure_every=1, probe_clips=1, keep_checkpoints=1))
    assert [path.name for path in list_checkpoints(tmp_path / "run")] == ["step-00000002"]
    moments = [(row["when"], row["step"]) for row in rows(tmp_path / "run") if "when" in row]
    assert moments == [("before", 0), ("during", 1), ("after", 2)]


def test_saved_model_is_the_trained_one(finished):
    mae = AVMAE.from_pretrained(finished.run / "model")
    assert mae.encoder.fusion_layers == (1, 3)
    clips = sounding_shapes.clips(finished.data, "test")
    loader = ClipLoader(
        ClipDataset(clips, mae.encoder.inputs, train=False, extras=mae.mask_sampler()), workers=0
    )
    (batch,) = loader.batches([[(0, index) for index in range(5)]])
    with torch.no_grad():
        output = mae(**{name: batch[name] for name in INPUTS})
    recorded = rows(finished.run)[-1]
    assert recorded["held_out_clips"] == 5
    assert output.image_loss.item() == pytest.approx(recorded["held_out_image_loss"], rel=1e-5)
    assert output.audio_loss.item() == pytest.approx(recorded["held_out_audio_loss"], rel=1e-5)
    results = json.loads((finished.run / "results.json").read_text())
    assert results["weights_sha256"] == weights_hash(mae) and results["task"] == "pretraining"
    assert results["coverage"] == dict(judged=5, expected=5) and results["step"] == 6
    assert mae.facts["metrics"]["held_out_image_loss"] == recorded["held_out_image_loss"]
    assert mae.facts["metrics"]["probe_shape_sum"] == recorded["probes"]["shape"]["sum"]["accuracy"]
    card = (finished.run / "model/README.md").read_text()
    assert "| held-out loss | loss | predicting zero | share |" in card and "| measured on | 5 " in card
    assert str(finished.data.parent) not in card and str(finished.run.parent) not in card


def test_resumes_with_the_losses_of_an_uninterrupted_run(finished, tmp_path, monkeypatch):
    config = replace(finished, run=tmp_path / "interrupted", workers=2)  # workers change nothing either
    config = replace(config, checkpoint_every=3)  # in the middle of the second epoch
    save = loop.save_checkpoint

    def save_then_die(*args):
        save(*args)
        raise KeyboardInterrupt

    monkeypatch.setattr(loop, "save_checkpoint", save_then_die)
    with pytest.raises(KeyboardInterrupt):
        main(config)
    monkeypatch.setattr(loop, "save_checkpoint", save)
    assert [path.name for path in list_checkpoints(config.run)] == ["step-00000003"]
    with (config.run / "metrics.jsonl").open("a") as file:  # a step after the checkpoint, cut off with it
        file.write(
            json.dumps(dict(step=5, loss=99.0)) + '\n{"step": 6, "lo'
        )  # killed in the middle of a line
    (config.run / "checkpoints" / "step-00000006.partial").mkdir()  # a checkpoint that was never completed
    main(config)
    assert losses(config.run) == losses(finished.run)
    assert [row.get("when") for row in rows(config.run)].count("before") == 1


def test_finished_run_is_left_as_it_is(finished):
    before = rows(finished.run)
    main(finished)
    assert rows(finished.run) == before


def test_other_settings_need_another_folder(finished):
    with pytest.raises(ValueError, match="--seed 0 -> 4.*--restart"):
        main(replace(finished, seed=4))
    with pytest.raises(ValueError, match="--warmup-epochs 1 -> 2.*--restart"):
        main(replace(finished, warmup_epochs=2))


def test_a_finished_run_can_be_given_more_epochs(finished, tmp_path, capsys, monkeypatch):
    config = replace(finished, run=tmp_path / "run", epochs=5, warmup_epochs=2, given=("epochs",))
    shutil.copytree(finished.run, config.run)
    with pytest.raises(ValueError, match="--warmup-epochs 1 -> 2.*--restart"):  # unless it comes of --epochs
        main(replace(config, given=("epochs", "warmup_epochs")))
    save = loop.save_checkpoint

    def save_then_die(*args):
        save(*args)
        raise KeyboardInterrupt

    monkeypatch.setattr(loop, "save_checkpoint", save_then_die)
    with pytest.raises(KeyboardInterrupt):  # after step 8 of 10
        main(config)
    assert "the learning rate rises from 0 in 1 epochs to what it is in a run of 5" in capsys.readouterr().out
    assert "Not finished (running or stopped): step 8 of 10" in write_report(config.run).read_text()
    monkeypatch.setattr(loop, "save_checkpoint", save)
    assert main(config) == 0
    assert "the learning rate rises" not in capsys.readouterr().out
    steps = [row for row in rows(config.run) if "loss" in row]
    assert [row["step"] for row in steps] == list(range(1, 11))
    assert {row["step"]: row["loss"] for row in steps[:6]} == losses(finished.run)
    rates = [row["lr"] / 1.5e-3 * 4 for row in steps]  # base_lr 6e-3, sqrt(4 x 64) / 256
    assert rates == pytest.approx([warmup_cosine(step, 2, 10, extended_at=6) for step in range(10)])
    assert rates[6] > 0 and rates[8] == pytest.approx(warmup_cosine(8, 2, 10))
    assert [row["step"] for row in rows(config.run) if row.get("when") == "after"] == [6, 10]
    assert main(config) == 0 and len(losses(config.run)) == 10
    with pytest.raises(ValueError, match="holds a run of 5 epochs, more than --epochs 3: it may get more"):
        main(replace(config, epochs=3))


def test_a_run_that_has_not_ended_is_not_extended(finished, tmp_path):
    config = replace(finished, run=tmp_path / "run", epochs=5)
    shutil.copytree(finished.run, config.run)
    shutil.rmtree(config.run / "checkpoints" / "step-00000006")
    with pytest.raises(ValueError, match="has not come to the end of its 3 epochs.*--epochs 3 goes on"):
        main(config)


def test_three_clips_are_gone_through_often_enough(tmp_path, capsys, monkeypatch):
    shares = []
    monkeypatch.setattr(loop, "share_cores", lambda *given: shares.append(given))
    for name in "abc":
        write_video(tmp_path / "videos" / f"{name}.mp4")
    config = replace(tiny(tmp_path / "videos", tmp_path / "run"), epochs=60, warmup_epochs=6, min_steps=70)
    config = replace(config, batch_size=64)
    run = loop.set_up(replace(config, threads=3), Pretraining)
    said = capsys.readouterr().out
    assert shares == [(3, 0)]  # threads of torch, beside no workers
    assert run.optimizer.defaults["betas"] == (0.9, 0.95)  # as of MAE
    assert "70 epochs instead of 60, so that there are --min-steps 70" in said and run.schedule.steps == 70
    assert "learning rate 0.00032: with batches below 64 it falls by the square root" in said
    assert json.loads((tmp_path / "run" / "run.json").read_text())["settings"]["epochs"] == 70
    run.lock.close()
    again = loop.set_up(config, Pretraining)  # the same command
    other = loop.set_up(replace(config, seed=1, run=tmp_path / "other"), Pretraining)
    assert again.schedule.steps == 70
    hashes = [weights_hash(begun.task.model) for begun in (run, again, other)]
    assert hashes[0] == hashes[1] != hashes[2]


def test_a_run_on_other_data_is_not_offered_for_deletion(finished, tmp_path):
    """Above all not that of the demo, for somebody's own data."""
    for name in "ab":
        write_video(tmp_path / "videos" / f"{name}.mp4")
    mine = replace(finished, data=tmp_path / "videos", workers=0)
    for changed, said in (mine, "--data has changed"), (replace(mine, seed=1), "holds a run with other"):
        with pytest.raises(ValueError, match=said) as refused:
            main(changed)
        assert "choose another --run-dir" in str(refused.value) and "--restart" not in str(refused.value)


def test_a_run_of_another_command_is_called_one(finished):
    """Its settings differ in all that the other does not have, which would be a long list of None."""
    with pytest.raises(
        ValueError, match="holds a run of another command .*it has no --batch-norm, "
    ) as refused:
        check_run(ClassifyConfig(data=finished.data, run=finished.run))
    assert "None" not in str(refused.value) and "with --checkpoint" in str(refused.value)


def test_data_are_looked_for_before_all_else(finished, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "make_accelerator", None)
    with pytest.raises(ValueError, match="--data .*nowhere does not exist"):
        main(replace(finished, seed=1, data=tmp_path / "nowhere"))  # in a run folder with other settings
    (tmp_path / "a.mp4").touch()
    with pytest.raises(ValueError, match="--data .*a.mp4 is not a folder"):
        main(replace(finished, data=tmp_path / "a.mp4"))


def test_a_run_folder_that_cannot_be_written_is_refused_before_the_data_are_looked_at(tmp_path, monkeypatch):
    monkeypatch.setattr(Pretraining, "find", lambda *_: pytest.fail("the work began"))
    (tmp_path / "file").touch()
    (tmp_path / "shut").mkdir()
    config = TrainConfig(data=tmp_path, run=tmp_path / "file/runs/a")
    with pytest.raises(
        ValueError, match="--run-dir .*/file/runs/a cannot be written: .*/file is not a folder"
    ):
        loop.set_up(config, Pretraining)
    with pytest.raises(ValueError, match="--run-dir .* is the folder of --data"):
        loop.set_up(replace(config, run=tmp_path / "shut/.."), Pretraining)
    monkeypatch.setattr("os.access", lambda path, mode: Path(path) != tmp_path / "shut")  # as of a guest
    config = replace(config, run=tmp_path / "shut/runs/a")
    with pytest.raises(ValueError, match="--run-dir .*/runs/a cannot be written: .*/shut is read-only"):
        loop.set_up(config, Pretraining)


def test_restart_deletes_only_run_folders(finished, tmp_path):
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "thesis.tex").write_text("")
    with pytest.raises(ValueError, match="not a run folder"):
        main(replace(finished, run=tmp_path / "precious", restart=True))
    assert (tmp_path / "precious" / "thesis.tex").exists()


@pytest.mark.parametrize("name", ["run.json", "config.json"])
@pytest.mark.parametrize(
    "config",
    ['{"architectures": ["other"]}', '{"settings": {"epo', "[]", '{"settings": {}, "inputs": {"a": 1}}'],
)
def test_restart_refuses_a_folder_of_another_program(finished, tmp_path, config, name):
    (tmp_path / name).write_text(config)
    (tmp_path / "notes.txt").write_text("precious")
    with pytest.raises(ValueError, match=f"{name} is damaged, or not"):
        main(replace(finished, run=tmp_path, restart=True))
    assert (tmp_path / "notes.txt").read_text() == "precious"


def test_restart_keeps_what_no_run_wrote(finished, tmp_path):
    config = replace(finished, run=tmp_path / "run", epochs=1)
    main(config)
    (config.run / "notes.txt").write_text("precious")
    main(replace(config, restart=True, seed=1, max_unreadable=0.0))
    assert (config.run / "notes.txt").exists()
    assert sorted(losses(config.run)) == [1, 2]


@pytest.mark.parametrize("mistake", [dict(data="nowhere"), dict(fusion_layers=(9,)), dict(decoder_heads=5)])
def test_failed_start_neither_claims_nor_deletes(finished, tmp_path, mistake):
    if "data" in mistake:
        mistake = dict(data=tmp_path / "nowhere")
    before = rows(finished.run)
    for run, restart in (finished.run, True), (tmp_path / "new", False):
        with pytest.raises(ValueError):
            main(replace(finished, run=run, restart=restart, **mistake))
    assert rows(finished.run) == before and (finished.run / "model" / "model.safetensors").exists()
    assert not (tmp_path / "new").exists()


def test_clips_that_cannot_be_used_are_named(tmp_path, capsys):
    folder = tmp_path / "videos"
    for name in ("a", "b", "c"):
        write_video(folder / f"{name}.mp4")
    write_video(folder / "silent.mp4", audio=False)
    (folder / "garbage.mp4").write_bytes(b"not a video" * 100)
    main(tiny(folder, tmp_path / "run", epochs=1, batch_size=64))
    said = capsys.readouterr().out
    assert "1 without sound dropped: silent.mp4" in said
    assert "batch size 3" in said and "training clips" in said
    (bad,) = map(json.loads, (tmp_path / "run" / "quarantine.jsonl").read_text().splitlines())
    assert bad["path"].endswith("garbage.mp4") and bad["reason"]
    assert [row["clips"] for row in rows(tmp_path / "run") if "loss" in row] == [3]
    with pytest.raises(RunError, match="1 of 5 clips could not be read, more than --max-unreadable 0.01"):
        main(tiny(folder, tmp_path / "strict", epochs=1, max_unreadable=0.01))


def test_a_run_that_could_not_begin_goes_on_once_its_clips_are_mended(tmp_path):
    """As its error says. It may not, once something has been learned from those that could be read."""
    folder, run = tmp_path / "videos", tmp_path / "run"
    _, bad, _ = (write_video(folder / f"{name}.mp4") for name in "abc")
    whole = bad.read_bytes()
    bad.write_bytes(whole[:200])
    config = tiny(folder, run, epochs=1, batch_size=1, max_unreadable=0.1)
    with pytest.raises(RunError, match="1 of 3 clips .* Once they can be, .* the same command goes on"):
        main(config)
    bad.write_bytes(whole)
    main(config)
    assert [row["clips"] for row in rows(run) if "loss" in row] == [1, 1, 1]
    bad.write_bytes(whole[:200])
    with pytest.raises(ValueError, match=r"--data has changed .*\(3 clips then, 2 now"):
        main(replace(config, max_unreadable=1.0))


def test_clip_that_breaks_after_the_scan_is_left_out(tmp_path, monkeypatch):
    folder = tmp_path / "videos"
    paths = [write_video(folder / f"{name}.mp4") for name in "abcd"]
    make_loader = loop.make_loader

    def break_then_make(*args, **kwargs):
        paths[1].write_bytes(paths[1].read_bytes()[:200])
        return make_loader(*args, **kwargs)

    monkeypatch.setattr(loop, "make_loader", break_then_make)
    main(tiny(folder, tmp_path / "run", epochs=2))
    assert [row["clips"] for row in rows(tmp_path / "run") if "loss" in row] == [3, 3]
    monkeypatch.undo()
    with pytest.raises(ValueError, match="--data has changed since the run"):
        main(tiny(folder, tmp_path / "run", epochs=2))
    (bad,) = map(json.loads, (tmp_path / "run" / "quarantine.jsonl").read_text().splitlines())
    assert bad["path"] == str(paths[1])


def test_the_learning_rate_goes_on_in_a_step_without_clips(tmp_path, monkeypatch):
    paths = [write_video(tmp_path / "videos" / f"{name}.mp4") for name in "abc"]
    options = dict(epochs=1, batch_size=1, measure_every=0, checkpoint_every=100)
    config = tiny(tmp_path / "videos", tmp_path / "run", **options)
    run = loop.set_up(config, Pretraining)
    paths[1].write_bytes(b"")  # that of the second step
    take = loop.train_step

    def take_step(run, step, batches, signals, progress):
        signals.save = step == 2
        return take(run, step, batches, signals, progress)

    monkeypatch.setattr(loop, "train_step", take_step)
    loop.train(run)
    rates = {row["step"]: row["lr"] for row in rows(config.run) if "loss" in row}
    assert rates == {1: pytest.approx(rates[3] / 3), 3: rates[3]}  # of a warm-up of three steps
    assert [path.name for path in list_checkpoints(config.run)] == ["step-00000003", "step-00000002"]


def test_a_clip_that_breaks_among_those_to_test_on_is_named(tmp_path):
    paths = [write_video(tmp_path / "videos" / f"{name}.mp4") for name in ("train/a", "test/b", "test/c")]
    run = loop.set_up(tiny(tmp_path / "videos", tmp_path / "run", epochs=1, measure_every=0), Pretraining)
    paths[1].write_bytes(b"")
    loop.train(run)
    (bad,) = read_rows(run.config.run / "quarantine.jsonl")
    assert (bad["path"], bad["when"]) == (str(paths[1]), "before")


def test_clips_are_judged_in_batches_of_those_that_fit_in_memory(monkeypatch):
    loader = SimpleNamespace(batches=iter)
    monkeypatch.setattr(loop, "make_loader", lambda *args, **options: nullcontext(loader))
    run = SimpleNamespace(task=None, config=None, found=SimpleNamespace(test=None), schedule=None)

    def batches(clips, micro_batch):
        run.schedule = SimpleNamespace(micro_batch=micro_batch)
        return [[index for _, index in batch] for batch in loop.evaluation_batches(run, range(clips))]

    assert batches(5, 2) == [[0, 1], [2, 3], [4]] and batches(3, 64) == [[0, 1, 2]]
    assert list(map(len, batches(150, 1000))) == [64, 64, 22]
    assert batches(0, 2) == []  # of a process beyond the last clip


def test_a_clip_changed_in_place_is_named_on_resume(tmp_path, capsys):
    """Its name and size are as before, only the time at which it was written tells."""
    folder = tmp_path / "videos"
    paths = [write_video(folder / f"{name}.mp4") for name in "abcd"]
    main(tiny(folder, tmp_path / "run", epochs=2))
    main(tiny(folder, tmp_path / "run", epochs=2))
    assert "have been written since" not in capsys.readouterr().out
    os.utime(paths[2], ns=(0, paths[3].stat().st_mtime_ns + 10**9))
    main(tiny(folder, tmp_path / "run", epochs=2))
    out = capsys.readouterr().out
    assert f"1 files of --data have been written since the run {tmp_path / 'run'} began: {paths[2]}." in out


def test_a_hostile_folder_trains_on_what_is_good_and_names_the_rest(tmp_path):
    folder = tmp_path / "folder"
    hostile_folder(folder)  # 200 files: 104 good or harmless, 40 that lack a stream, 56 that cannot be read
    config = tiny(folder, tmp_path / "run", epochs=1, batch_size=200, micro_batch=32, workers=2)
    config = replace(config, probe_clips=4, measure_every=0)  # of which none can be read
    with pytest.raises(RunError, match="of 200 clips could not be read, more than --max-unreadable 0.01"):
        main(replace(config, max_unreadable=0.01))
    main(config)
    assert [row["clips"] for row in rows(config.run) if "loss" in row] == [104]
    named = [Path(row["path"]).name for row in read_rows(config.run / "quarantine.jsonl")]
    usable = ("good", "misnamed", "dark", "silent", *(f"lying{n}.mkv" for n in range(8)))
    broken = [path.name for path in folder.iterdir() if not path.name.startswith(usable)]
    assert sorted(named) == sorted(broken) and len(broken) == 56


def test_keeps_clips_with_an_absent_modality(tmp_path, capsys):
    folder = tmp_path / "videos"
    write_video(folder / "both.mp4")
    write_video(folder / "silent.mp4", audio=False)
    write_video(folder / "blind.mp4", video=False)
    main(tiny(folder, tmp_path / "run", epochs=1, missing="keep"))
    assert "1 without sound kept: silent.mp4" in capsys.readouterr().out
    assert all(math.isfinite(loss) for loss in losses(tmp_path / "run").values())


@pytest.mark.parametrize("interactions", ["bilinear", "factorized", "token", "joint", "cross", "none"])
def test_every_interaction_trains(data, tmp_path, monkeypatch, interactions):
    monkeypatch.undo()  # attention is drawn here, and nothing else
    monkeypatch.setattr("avfuse.train.draw_reconstructions", lambda *_: None)
    monkeypatch.setattr("avfuse.training.judge.write_report", lambda *_: None)
    config = tiny(
        data, tmp_path / "run", interactions=interactions, epochs=1, fusion_layers=(), probe_clips=4
    )
    main(config)
    shown = interactions not in ("joint", "cross", "none")  # whose fusion tokens look at nothing
    assert (config.run / "pictures" / "attention-000002.png").exists() == shown


def test_a_single_clip_to_measure_on_has_no_neighbour(data, tmp_path):
    main(tiny(data, tmp_path / "run", epochs=1, probe_clips=1))
    assert [row["probes"] for row in rows(tmp_path / "run") if "when" in row] == [{}, {}]


@pytest.mark.gpu
@pytest.mark.parametrize("micro_batch", [0, 2])
def test_recording_steps_changes_no_loss(finished, tmp_path, micro_batch):
    main(replace(finished, run=tmp_path / "run", cuda_graphs=True, micro_batch=micro_batch))
    assert losses(tmp_path / "run") == pytest.approx(losses(finished.run), rel=1e-5)


def test_steps_that_cannot_be_recorded_are_refused(data, tmp_path, monkeypatch):
    config = tiny(data, tmp_path / "run", cuda_graphs=True)
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="--cuda-graphs needs a CUDA device"):
            main(config)
    for option in "--grad-checkpointing", "--contrastive":
        changes = {option[2:].replace("-", "_"): 1, "fusion_layers": (2, 3)}
        with pytest.raises(ValueError, match=f"--cuda-graphs cannot record a step with {option}"):
            main(replace(config, **changes))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="--cuda-graphs is for one process"):
        Pretraining.find(config, print)
    assert not (tmp_path / "run").exists()


def test_batches_of_recorded_steps_are_of_one_kind(data, tmp_path):
    """Whether or not a clip of the batch lacks a modality."""
    task = object.__new__(Pretraining)
    batch = {name: torch.ones(2, dtype=torch.bool) for name in INPUTS}
    for missing, graphs, more in ("keep", True, 2), ("keep", False, 0), ("drop", True, 0):
        task.config = tiny(data, tmp_path, missing=missing, cuda_graphs=graphs)
        assert len(task.inputs(batch)) == 4 + more


def test_recomputing_activations_changes_no_loss(finished, tmp_path):
    main(replace(finished, run=tmp_path / "run", grad_checkpointing=True))
    assert losses(tmp_path / "run") == pytest.approx(losses(finished.run), rel=1e-6)


@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_bfloat16_trains_to_nearly_the_same_and_is_judged_in_float32(finished, tmp_path, monkeypatch, ema):
    forward, measure, seen = AVMAE.forward, Pretraining.measure, []

    def observe(*args, **options):
        seen.append(torch.is_autocast_enabled("cpu"))
        return forward(*args, **options)

    def judge(*args):
        trained = len(seen)
        failures = measure(*args)
        assert len(seen) > trained and not any(seen[trained:])
        del seen[trained:]
        return failures

    monkeypatch.setattr(AVMAE, "forward", observe)
    monkeypatch.setattr(Pretraining, "measure", judge)
    AcceleratorState._reset_state()  # which holds one precision for all of a process
    main(replace(finished, run=tmp_path / "run", precision="bf16", ema=ema))
    AcceleratorState._reset_state()
    assert seen == [True] * 6
    assert losses(tmp_path / "run") == pytest.approx(losses(finished.run), rel=0.02)
    assert losses(tmp_path / "run") != losses(finished.run)


@pytest.mark.parametrize("allowed", [0.01, 0.0])
def test_gradients_are_clipped(data, tmp_path, monkeypatch, allowed):
    """What the optimizer is given has the norm that is allowed, with 0 any; what is recorded is the norm
    before.
    """
    norms = []
    run = loop.set_up(tiny(data, tmp_path / "run", clip_grad=allowed, epochs=1), Pretraining)
    step = run.optimizer.step

    def observe():
        gradients = [p.grad for p in run.task.model.parameters() if p.grad is not None]
        norms.append(torch.stack([gradient.norm() for gradient in gradients]).norm().item())
        step()

    monkeypatch.setattr(run.optimizer, "step", observe)
    loop.train(run)
    recorded = [row["grad_norm"] for row in rows(tmp_path / "run") if "loss" in row]
    assert len(recorded) == 2 and all(norm > 0.1 for norm in recorded)
    assert norms == pytest.approx([allowed] * 2 if allowed else recorded, rel=1e-3)


def test_the_average_of_the_weights_is_what_is_kept(data, tmp_path, monkeypatch):
    """By hand from the weights after every step; also across an interruption."""
    config = tiny(data, tmp_path / "run", ema=0.7, checkpoint_every=3)
    expected = None

    def run_until(stop):
        nonlocal expected
        run = loop.set_up(config, Pretraining)
        update = run.optimizer.step

        def observe():
            nonlocal expected
            update()
            weights = {name: tensor.clone() for name, tensor in run.task.model.state_dict().items()}
            if expected is None:  # the average begins as the first weights
                expected = weights
            else:
                expected = {name: 0.7 * expected[name] + 0.3 * weights[name] for name in weights}

        monkeypatch.setattr(run.optimizer, "step", observe)
        if stop:
            monkeypatch.setattr(loop, "save_checkpoint", stop)
        loop.train(run)

    save = loop.save_checkpoint

    def save_then_die(*args):
        save(*args)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(loop, "save_checkpoint", save)
        run_until(save_then_die)
    monkeypatch.setattr(loop, "save_checkpoint", save)
    run_until(None)
    kept = AVMAE.from_pretrained(config.run / "model").state_dict()
    for name, tensor in expected.items():
        torch.testing.assert_close(kept[name], tensor, rtol=1e-5, atol=1e-7)


def test_pretrained_transformers_begin_with_their_weights_and_are_ramped(data, tmp_path):
    vit = make_model(TrainConfig()).encoder.image
    torch.save({"state_dict": vit.state_dict()}, tmp_path / "image.pth")
    run = loop.set_up(tiny(data, tmp_path / "run", image_weights=tmp_path / "image.pth"), Pretraining)
    branches = {name: getattr(run.task.model.encoder, name) for name in ("image", "audio")}
    for name, tensor in vit.state_dict().items():
        assert torch.equal(branches["image"].state_dict()[name], tensor)
    ramped = {id(p) for group in run.optimizer.param_groups if group["ramp"] for p in group["params"]}
    assert ramped == {id(p) for p in branches["image"].parameters() if p.requires_grad}
    rates = [group["lr"] for group in run.optimizer.param_groups if not group["ramp"]]
    assert rates == pytest.approx([1.5e-3 / 4 / 2] * len(rates))  # of the first of two steps of warm-up
    assert {group["lr"] for group in run.optimizer.param_groups if group["ramp"]} == {0.0}
    loop.train(run)
    factors = [raised_warmup_cosine(step, 2, 6) / warmup_cosine(step, 2, 6) for step in range(6)]
    assert factors == pytest.approx([0.0, 0.25, 0.75, 1.0, 1.0, 1.0])  # half a cosine over 3 of 6 steps
    assert main(tiny(data, tmp_path / "run", image_weights=tmp_path / "image.pth")) == 0  # and can be resumed
    with pytest.raises(ValueError, match="--audio-weights .*image.pth does not fit"):
        main(tiny(data, tmp_path / "other", audio_weights=tmp_path / "image.pth"))


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("now", ["told", "gone", "not yet said by the run"])
def test_a_run_goes_on_with_the_normalisation_that_it_began_with(data, tmp_path, now):
    tiny_encoder, halves = make_model(TrainConfig()).encoder, [0.5, 0.5, 0.5]
    save_file(tiny_encoder.image.state_dict(), tmp_path / "model.safetensors")
    told = tmp_path / "preprocessor_config.json"
    told.write_text(json.dumps(dict(image_mean=halves, image_std=halves)))
    config = tiny(data, tmp_path / "run", image_weights=tmp_path, epochs=1, measure_every=0)
    assert main(config) == 0
    if now == "gone":
        told.unlink()
    if now == "not yet said by the run":
        record = json.loads((config.run / "run.json").read_text())
        assert record.pop("inputs")["image_mean"] == halves
        (config.run / "run.json").write_text(json.dumps(record))
    assert main(replace(config, epochs=2, given=("epochs",))) == 0
    mean = AVMAE.from_pretrained(config.run).encoder.inputs.image_mean
    assert mean == (tiny_encoder.inputs.image_mean if "yet" in now else (0.5, 0.5, 0.5))


def test_damaged_records_do_not_end_a_run(finished, tmp_path):
    config = replace(finished, run=tmp_path / "run", checkpoint_every=3)
    main(config)
    whole = losses(config.run)
    junk = (
        b'\xff\xfe\n[]\n123\n{}\n{"step": null}\n{"step": 0, "loss": null}\n' + b"[" * 100_000 + b'\n{"path'
    )
    for name in "metrics.jsonl", "quarantine.jsonl":
        with (config.run / name).open("ab") as file:
            file.write(junk)
    shutil.rmtree(config.run / "checkpoints" / "step-00000006")
    assert main(config) == 0
    assert {step: loss for step, loss in losses(config.run).items() if loss} == whole
    assert (config.run / "quarantine.jsonl").read_text() == ""


def test_checkpoints_without_their_settings_are_not_gone_on_with(finished, tmp_path):
    shutil.copytree(finished.run, tmp_path / "run")
    (tmp_path / "run" / "run.json").unlink()
    with pytest.raises(ValueError, match="holds checkpoints of a run whose run.json is gone"):
        main(replace(finished, run=tmp_path / "run", seed=7))


def test_runs_whose_settings_are_in_config_json_go_on(finished, tmp_path):
    """As this file was called before; settings that there were then, and no longer are, do not matter."""
    run, whole = tmp_path / "run", losses(finished.run)
    shutil.copytree(finished.run, run)
    before = json.loads((run / "run.json").read_text())
    (run / "run.json").unlink()
    before["settings"] |= dict(run=str(run), clips=None)
    (run / "config.json").write_text(json.dumps(before))
    shutil.rmtree(run / "checkpoints" / "step-00000006")
    with pytest.raises(ValueError, match="other settings .--seed 0 -> 7"):
        main(replace(finished, run=run, seed=7))
    assert (run / "config.json").exists() and not (run / "run.json").exists()
    assert main(replace(finished, run=run)) == 0
    assert losses(run) == whole
    assert json.loads((run / "run.json").read_text())["data"] == before["data"]
    assert not (run / "config.json").exists()


def test_restart_takes_config_json_for_a_runs_only_if_it_is(finished, tmp_path):
    config = replace(finished, run=tmp_path / "run", epochs=1)
    main(config)
    (config.run / "config.json").write_text('{"library": "avfuse"}')  # of a model that was saved here
    main(replace(config, restart=True, seed=1))
    assert (config.run / "config.json").exists()
    (config.run / "config.json").unlink()
    (config.run / "run.json").rename(config.run / "config.json")
    main(replace(config, restart=True, seed=2))
    assert not (config.run / "config.json").exists() and (config.run / "run.json").exists()


def test_splitting_the_model_among_processes_is_refused(data, tmp_path, monkeypatch):
    for kind in DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM:
        monkeypatch.setattr(Accelerator, "distributed_type", kind)
        said = f"{kind.value} splits the model.* configure Accelerate for DDP .* torchrun"
        with pytest.raises(ValueError, match=said):
            main(tiny(data, tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_accumulation_by_accelerate_is_refused(data, tmp_path, monkeypatch):
    """Which would divide every loss."""
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "2")
    with pytest.raises(ValueError, match="gradient accumulation is a matter of --micro-batch"):
        main(tiny(data, tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_a_restart_is_refused_for_no_more_unreadable_clips_than_a_start():
    """In floating point 0.29 * 100 is less than 29."""
    found = SimpleNamespace(train=["a"], test=["b"], unreadable=[None] * 29, looked_at=100)
    kind, main_process = SimpleNamespace(find=lambda *_: found), SimpleNamespace(is_main_process=True)
    config = SimpleNamespace(restart=True, max_unreadable=0.29)
    assert loop.look_for_clips(config, main_process, kind) is found
    found.unreadable.append(None)
    with pytest.raises(ValueError, match="30 of 100 clips cannot be read"):
        loop.look_for_clips(config, main_process, kind)


def test_more_processes_than_gpus_are_refused(data, tmp_path, monkeypatch):
    monkeypatch.setattr(Accelerator, "distributed_type", DistributedType.MULTI_GPU)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    with pytest.raises(ValueError, match="3 processes share 2 GPUs here: start one for each"):
        main(tiny(data, tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_restart_deletes_nothing_before_all_is_in_order(data, tmp_path):
    folder, config = tmp_path / "videos", tiny(tmp_path / "videos", tmp_path / "run", epochs=1)
    for name in "abcd":
        write_video(folder / f"{name}.mp4")
    main(config)
    before = rows(config.run)
    (folder / "e.mp4").touch()
    with pytest.raises(ValueError, match="1 of 5 clips cannot be read.*nothing was deleted"):
        main(replace(config, restart=True, max_unreadable=0.01))
    (config.run / "faults").symlink_to(tmp_path)
    with pytest.raises(ValueError, match="--restart does not delete links: .*faults is one"):
        main(replace(config, restart=True))
    (config.run / "faults").unlink()
    assert rows(config.run) == before
    run = loop.set_up(replace(config, restart=True, max_unreadable=0.2, epochs=2), Pretraining)
    assert rows(config.run) == [] and not run.extended_at  # 1 of 5 is no more than 0.2


@pytest.mark.parametrize("options", [dict(), dict(restart=True), dict(epochs=3)])
def test_a_model_that_would_be_loaded_in_place_of_the_one_that_is_trained(data, tmp_path, options):
    """As `avfuse.load(run)` takes one that a user saved beside model/; without its config.json it is none."""
    config = tiny(data, tmp_path / "run", epochs=1)
    main(config)
    before = rows(config.run)
    shutil.copy(config.run / "model/model.safetensors", config.run)
    assert check_run(replace(config, **options))
    shutil.copy(config.run / "model/config.json", config.run)
    with pytest.raises(ValueError, match="--run-dir .*run is the folder of a saved model .* move it away"):
        main(replace(config, **options))
    assert rows(config.run) == before


def test_a_folder_whose_name_is_no_text(data, tmp_path):
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/r\xff"))
    with pytest.raises(ValueError, match=r"--run-dir .*r\\udcff has a name that is not UTF-8"):
        main(tiny(data, folder))
    assert not folder.exists()


def test_a_disk_that_was_away_does_not_end_a_run_for_good(tmp_path):
    folder, config = tmp_path / "videos", tiny(tmp_path / "videos", tmp_path / "run", max_unreadable=0.3)
    for name in "abcd":
        write_video(folder / f"{name}.mp4")
    run = loop.set_up(config, Pretraining)
    contents = {path: path.read_bytes() for path in folder.iterdir()}
    for path in contents:
        path.write_bytes(b"")
    with pytest.raises(RunError, match="more than --max-unreadable 0.3.* the same command goes on"):
        loop.train(run)
    for path, content in contents.items():
        path.write_bytes(content)
    assert main(config) == 0
    assert len(losses(config.run)) == 3
    assert (
        len((config.run / "quarantine.jsonl").read_text().splitlines()) == 4
    )  # what happened stays on record


def test_a_run_folder_serves_one_process(data, tmp_path):
    run = loop.set_up(tiny(data, tmp_path / "run"), Pretraining)
    with pytest.raises(ValueError, match="--run-dir .* is in use by another process"):
        main(tiny(data, tmp_path / "run", restart=True))
    assert loop.train(run) == 0
    assert main(tiny(data, tmp_path / "run")) == 0


def test_what_began_and_ended_in_the_folder_meanwhile_is_seen(data, tmp_path, monkeypatch):
    config, build = tiny(data, tmp_path / "run", epochs=1), loop.build

    def meanwhile(*args):
        monkeypatch.setattr(loop, "build", build)
        assert main(replace(config, seed=1)) == 0
        return build(*args)

    monkeypatch.setattr(loop, "build", meanwhile)
    with pytest.raises(ValueError, match=r"holds a run with other settings \(--seed 1 -> 0\)"):
        main(config)
    assert json.loads((config.run / "run.json").read_text())["settings"]["seed"] == 1


def test_what_killed_processes_left_half_written_goes(finished, tmp_path):
    run = tmp_path / "run"
    for name in ".run.json.7.part", ".metrics.jsonl.7.part", "model/.model.safetensors.7.part":
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_text("{")
    shutil.rmtree(run / "model")  # a folder without run.json, beside which there is nothing else
    assert main(replace(finished, run=run, epochs=1, restart=True)) == 0
    assert not list(run.rglob("*.part"))
    (run / "model/.model.safetensors.7.part").write_text("{")
    assert main(replace(finished, run=run, epochs=1)) == 0
    assert not list(run.rglob("*.part"))


def test_a_run_goes_on_when_it_and_its_data_were_moved_and_the_clock_went_back(
    finished, tmp_path, monkeypatch
):
    run, data = tmp_path / "moved run", tmp_path / "moved data"
    shutil.copytree(finished.run, run)
    shutil.copytree(finished.data, data)
    shutil.rmtree(run / "checkpoints" / "step-00000006")
    for path in run.rglob("*"):
        os.utime(path, (2**32, 2**32))  # the year 2106
    monkeypatch.setattr(time, "time", lambda: 2.0**30)  # 2004
    config = replace(finished, data=data, run=run)
    clip = next(data.rglob("train/*.mp4"))
    content = clip.read_bytes()
    clip.write_bytes(content + b"\0" * 8)  # another size: it is no longer the same data
    with pytest.raises(ValueError, match=r"--data has changed since .*\(10 clips then, 10 now\)"):
        main(config)
    clip.write_bytes(content)
    assert main(config) == 0
    assert losses(run) == losses(finished.run)


@pytest.mark.parametrize("name", [".lock", "run.json", "config.json", "metrics.jsonl", "quarantine.jsonl"])
@pytest.mark.parametrize("kind", ["pipe", "device", "folder", "link to nothing"])
def test_pipes_and_devices_in_a_run_folder_are_not_opened(data, tmp_path, name, kind):
    path = tmp_path / name
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to("/dev/zero" if kind == "device" else "nowhere")
    with pytest.raises(ValueError, match=rf"--run-dir .*: {name} is no regular file"):
        check_run(tiny(data, tmp_path))


def test_warmup_cosine_by_hand():
    assert [warmup_cosine(step, warmup=4, total=12) for step in range(4)] == [0.25, 0.5, 0.75, 1.0]
    assert warmup_cosine(4, warmup=4, total=12) == 1.0
    assert warmup_cosine(8, warmup=4, total=12) == pytest.approx(0.5)
    assert warmup_cosine(12, warmup=4, total=12) == pytest.approx(0.0)
    assert warmup_cosine(0, warmup=0, total=1) == 1.0


@pytest.mark.parametrize("rate", [warmup_cosine, raised_warmup_cosine])
def test_before_a_run_was_extended_its_rates_were_those_of_the_shorter_one(rate):
    """They are needed once more where its last checkpoint is damaged."""
    longer = [rate(step, warmup=2, total=20, extended_at=10) for step in range(20)]
    assert longer[:10] == [rate(step, warmup=2, total=10) for step in range(10)]
    assert longer[12:] == [rate(step, warmup=2, total=20) for step in range(12, 20)]


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        (dict(epochs=0), "--epochs"),
        (dict(batch_size=0), "--batch-size"),
        (dict(workers=-1), "--workers"),
        (dict(micro_batch=-1), "--micro-batch"),
        (dict(checkpoint_every=0), "--checkpoint-every"),
        (dict(max_unreadable=math.nan), "--max-unreadable"),
        (dict(clip_timeout=0.0), "--clip-timeout"),
        (dict(ema=1.0), "--ema"),
        (dict(seed=2**32), "--seed"),
        (dict(clip_timeout=math.inf), "--clip-timeout"),
        (dict(warmup_epochs=4), "--warmup-epochs 4 are more than --epochs 3"),
        (dict(image_weights=Path("nowhere.safetensors")), "--image-weights nowhere.safetensors"),
        (dict(base_lr=-1.0), "--base-lr"),
        (dict(weight_decay=-1.0), "--weight-decay"),
        (dict(clip_grad=-1.0), "--clip-grad"),  # which would turn every gradient round
        (dict(layer_decay=0.0), "--layer-decay"),
        (dict(fusion_layers=(4,)), "fusion_layers"),
        (dict(image_mask_ratio=1.0), "image_mask_ratio"),
        (dict(decoder_heads=5), "decoder_heads"),
    ],
)
def test_wrong_settings_are_named(data, tmp_path, changes, named):
    with pytest.raises(ValueError, match=named):
        main(tiny(data, tmp_path / "run", **changes))


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU has it")
def test_half_precision_needs_a_gpu(data, tmp_path):
    AcceleratorState._reset_state()  # which holds one precision for all of a process
    try:
        with pytest.raises(ValueError, match="fp16 .*GPU"):
            main(tiny(data, tmp_path / "run", precision="fp16"))
    finally:
        AcceleratorState._reset_state()


def test_command_line_says_what_is_wrong_without_a_traceback(tmp_path):
    arguments = ["--data", str(tmp_path / "nowhere"), "--run-dir", str(tmp_path / "run")]
    command = [sys.executable, "-m", "avfuse.train", *arguments]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 1
    assert "error: " in result.stderr and "nowhere" in result.stderr and "Traceback" not in result.stderr
