"""Checkpoints: whole or not there, verified, rotated, and never code."""

import errno
import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import save_file

from avfuse.training import checkpoints
from avfuse.training.checkpoints import (
    CheckpointError,
    lack,
    list_checkpoints,
    load_checkpoint,
    save_checkpoint,
    seal,
)


@pytest.fixture
def state():
    """A model with an optimizer that has a history, as Accelerate holds them."""
    accelerator = Accelerator(cpu=True)
    model = torch.nn.Linear(5, 3)
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=0.1))
    accelerator.backward(model(torch.randn(2, 5)).sum())
    optimizer.step()
    return accelerator, model, optimizer


def snapshot(state) -> dict:
    _, model, optimizer = state
    moments = optimizer.state_dict()["state"][0]
    return {"weight": model.weight.detach().clone(), "moment": moments["exp_avg"].clone()}


def spoil(state) -> None:
    accelerator, model, optimizer = state
    accelerator.backward(model(torch.randn(2, 5)).square().sum())
    optimizer.step()


def assert_equal(ours: dict, truth: dict) -> None:
    assert all(torch.equal(ours[name], truth[name]) for name in truth)


def test_latest_is_restored_and_old_ones_go(state, tmp_path):
    for step in (3, 12, 100):
        spoil(state)
        save_checkpoint(state[0], tmp_path, step, keep=2)
        truth = snapshot(state)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000100", "step-00000012"]
    spoil(state)
    assert not torch.equal(snapshot(state)["weight"], truth["weight"])
    assert load_checkpoint(state[0], tmp_path) == 100
    assert_equal(snapshot(state), truth)


def test_counts_of_steps_stay_where_the_optimizer_has_them(state, tmp_path, monkeypatch):
    """With several GPUs Accelerate would load them onto one, and each step would wait to read them."""
    save_checkpoint(state[0], tmp_path, 1, keep=1)
    places, load = [], Accelerator.load_state

    def load_state(accelerator, folder, map_location=None):
        places.append(map_location)
        load(accelerator, folder, map_location=map_location)

    monkeypatch.setattr(Accelerator, "load_state", load_state)
    assert load_checkpoint(state[0], tmp_path) == 1 and places == ["cpu"]


def test_one_alone_is_kept_where_that_is_asked(state, tmp_path):
    for step in (1, 2):
        save_checkpoint(state[0], tmp_path, step, keep=1)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000002"]


def test_all_of_it_is_on_the_disk_before_it_has_its_name(state, tmp_path, monkeypatch):
    synced, synced_before, replace = [], [], os.replace
    monkeypatch.setattr(os, "fsync", lambda file: synced.append(os.fstat(file).st_ino))
    monkeypatch.setattr(os, "replace", lambda *paths: synced_before.extend(synced) or replace(*paths))
    folder = save_checkpoint(state[0], tmp_path, 1, keep=1)
    assert {path.stat().st_ino for path in [folder, *folder.rglob("*")]} <= {*synced_before}
    assert synced[-1] == folder.parent.stat().st_ino  # and the name after that


def test_random_states_are_restored(state, tmp_path):
    save_checkpoint(state[0], tmp_path, 1, keep=1)
    truth = torch.rand(3)
    load_checkpoint(state[0], tmp_path)
    assert torch.equal(torch.rand(3), truth)


def test_an_average_of_the_weights_is_kept(state, tmp_path):
    average = torch.optim.swa_utils.AveragedModel(torch.nn.Linear(5, 3))
    truth = {name: tensor.clone() for name, tensor in average.state_dict().items()}
    save_checkpoint(state[0], tmp_path, 1, keep=1, average=average)
    average.update_parameters(torch.nn.Linear(5, 3))
    assert load_checkpoint(state[0], tmp_path, average) == 1
    assert_equal(dict(average.state_dict()), truth)


def test_a_damaged_average_is_passed_over(state, tmp_path):
    average = torch.optim.swa_utils.AveragedModel(torch.nn.Linear(5, 3))
    for step in (1, 2):
        folder = save_checkpoint(state[0], tmp_path, step, keep=2, average=average)
    (folder / "average.safetensors").unlink()
    assert load_checkpoint(state[0], tmp_path, average) == 1


def test_nothing_to_load(state, tmp_path):
    (tmp_path / "checkpoints" / "step-00000004.partial").mkdir(parents=True)
    assert load_checkpoint(state[0], tmp_path) == 0
    assert not list((tmp_path / "checkpoints").iterdir())


@pytest.mark.parametrize(
    "name", ["model.safetensors", "optimizer.bin", "random_states_0.pkl", "manifest.json"]
)
@pytest.mark.parametrize("damage", ["flip", "cut", "delete"])
def test_a_damaged_one_is_named_and_passed_over(state, tmp_path, capsys, name, damage):
    save_checkpoint(state[0], tmp_path, 1, keep=2)
    truth = snapshot(state)
    spoil(state)
    save_checkpoint(state[0], tmp_path, 2, keep=2)
    path = tmp_path / "checkpoints" / "step-00000002" / name
    content = bytearray(path.read_bytes())
    if damage == "flip":
        content[len(content) // 2] ^= 1
    path.unlink() if damage == "delete" else path.write_bytes(
        content[: len(content) // (1 + (damage == "cut"))]
    )
    if (name, damage) == ("manifest.json", "flip") and not has_changed(path):
        pytest.skip("the flipped bit is white space")
    assert load_checkpoint(state[0], tmp_path) == 1
    assert "step-00000002 is damaged" in capsys.readouterr().out
    assert_equal(snapshot(state), truth)
    save_checkpoint(state[0], tmp_path, 3, keep=2)  # what was passed over is not among those that are kept
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000003", "step-00000001"]


def test_several_are_passed_over_again_and_again(state, tmp_path):
    save_checkpoint(state[0], tmp_path, 1, keep=3)
    for _ in range(2):
        for step in (2, 3):
            (save_checkpoint(state[0], tmp_path, step, keep=3) / "model.safetensors").unlink()
        assert load_checkpoint(state[0], tmp_path) == 1
        assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000001"]


def test_a_copy_by_another_name_is_no_checkpoint(state, tmp_path, capsys):
    folder = save_checkpoint(state[0], tmp_path, 1, keep=2)
    shutil.copytree(folder, folder.with_name("step-00000001 (copy)"))
    shutil.copytree(folder, folder.with_name("step-00000007"))
    assert load_checkpoint(state[0], tmp_path) == 1
    assert "step-00000007 is damaged (it is of step 1)" in capsys.readouterr().out


@pytest.mark.parametrize("text", ["[]", '{"step": 2, "files": []}', "[" * 100_000], ids=lambda text: text[:5])
def test_a_manifest_that_is_none_is_passed_over(state, tmp_path, text):
    save_checkpoint(state[0], tmp_path, 1, keep=2)
    (save_checkpoint(state[0], tmp_path, 2, keep=2) / "manifest.json").write_text(text)
    assert load_checkpoint(state[0], tmp_path) == 1


def has_changed(manifest: Path) -> bool:
    try:
        return bool(json.loads(manifest.read_text()))
    except ValueError:
        return True


def test_when_none_can_be_read_the_run_does_not_begin_anew(state, tmp_path):
    save_checkpoint(state[0], tmp_path, 1, keep=2)
    (tmp_path / "checkpoints" / "step-00000001" / "optimizer.bin").unlink()
    with pytest.raises(CheckpointError, match="no checkpoint in .* can be read; --restart begins anew"):
        load_checkpoint(state[0], tmp_path)


@pytest.mark.parametrize("name", ["optimizer.bin", "random_states_0.pkl", "model.safetensors"])
def test_a_malicious_pickle_is_refused(state, tmp_path, name):
    """Even with a manifest that vouches for it."""

    class Malicious:
        def __reduce__(self):
            return Path.touch, (tmp_path / "it ran",)

    folder = save_checkpoint(state[0], tmp_path, 1, keep=1)
    torch.save({"state": Malicious()}, folder / name)
    (folder / "manifest.json").unlink()
    seal(folder, 1)
    if name == "random_states_0.pkl":  # which Accelerate passes over
        load_checkpoint(state[0], tmp_path)
    else:
        with pytest.raises(CheckpointError, match="does not fit this run"):
            load_checkpoint(state[0], tmp_path)
    assert not (tmp_path / "it ran").exists()


@pytest.mark.parametrize("what", ["weights of another size", "no optimizer", "other groups", "no average"])
def test_a_whole_one_of_another_model_is_refused(state, tmp_path, what):
    average = torch.optim.swa_utils.AveragedModel(torch.nn.Linear(5, 3))
    folder = save_checkpoint(state[0], tmp_path, 1, keep=1, average=None if what == "no average" else average)
    if what == "weights of another size":
        save_file(torch.nn.Linear(4, 3).state_dict(), folder / "model.safetensors")
    elif what != "no average":
        groups = dict(state={}, param_groups=[]) if what == "other groups" else {}
        torch.save(groups, folder / "optimizer.bin")
    (folder / "manifest.json").unlink()
    seal(folder, 1)
    with pytest.raises(CheckpointError, match="step-00000001 does not fit this run"):
        load_checkpoint(state[0], tmp_path, average)


def test_a_full_disk_leaves_the_one_before(tmp_path):
    """In a process that may write no file above 4 kB from some moment on."""
    program = """
        import resource, sys, torch
        from accelerate import Accelerator
        from pathlib import Path
        from avfuse.training.checkpoints import CheckpointError, list_checkpoints
        from avfuse.training.checkpoints import load_checkpoint, save_checkpoint

        run, accelerator = Path(sys.argv[1]), Accelerator(cpu=True)
        model = accelerator.prepare(torch.nn.Linear(100, 100))
        truth = model.weight.detach().clone()
        save_checkpoint(accelerator, run, 1, keep=1)
        torch.nn.init.zeros_(model.weight)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
        try:
            save_checkpoint(accelerator, run, 2, keep=1)
        except CheckpointError as error:
            assert "could not be written" in str(error) and "step-00000001" in str(error), error
        else:
            raise SystemExit("was written")
        assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-00000001"]
        assert load_checkpoint(accelerator, run) == 1
        assert torch.equal(model.weight, truth)
        print("as before")
    """
    command = [sys.executable, "-c", textwrap.dedent(program), str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.stdout.endswith("as before\n"), result.stderr


@pytest.mark.parametrize("strange", ["zeros", "pipe", "link", "folder linked", "itself", "manifest", "extra"])
def test_only_regular_files_of_its_own_are_read(state, tmp_path, capsys, strange):
    """A manifest that vouches for a device, a pipe or a link; none of them is opened."""
    save_checkpoint(state[0], tmp_path, 1, keep=2)
    truth = snapshot(state)
    spoil(state)
    folder = save_checkpoint(state[0], tmp_path, 2, keep=2)
    path = folder / {"manifest": "manifest.json", "extra": "extra.bin"}.get(strange, "model.safetensors")
    if strange == "folder linked":
        os.rename(folder, tmp_path / "elsewhere")
        folder.symlink_to(tmp_path / "elsewhere")
    elif strange == "pipe":
        path.unlink()
        os.mkfifo(path)
    else:
        path.unlink(missing_ok=True)
        targets = {"zeros": "/dev/zero", "itself": path, "manifest": "/dev/zero", "extra": "/dev/zero"}
        path.symlink_to(targets.get(strange, tmp_path / "checkpoints/step-00000001/model.safetensors"))
    assert load_checkpoint(state[0], tmp_path) == 1
    assert "is neither a file nor a folder): passing it over" in capsys.readouterr().out
    assert_equal(snapshot(state), truth)


@pytest.mark.parametrize(
    "name",
    ["/dev/zero", "../step-00000001/model.safetensors", "./model.safetensors", "a\0b", "", ".", "x\x1b[2J"],
)
def test_a_manifest_names_files_beside_it(state, tmp_path, capsys, name):
    save_checkpoint(state[0], tmp_path, 1, keep=2)
    folder = save_checkpoint(state[0], tmp_path, 2, keep=2)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"] = {name: manifest["files"]["model.safetensors"]} | manifest["files"]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert load_checkpoint(state[0], tmp_path) == 1
    (said,) = capsys.readouterr().out.splitlines()
    assert "there is no file" in said and said.isprintable()


@pytest.mark.parametrize("kind", ["file", "link", "pipe", "folder"])
def test_whatever_is_called_partial_is_cleared_away(state, tmp_path, kind):
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "file").touch()
    checkpoints = tmp_path / "run" / "checkpoints"
    checkpoints.mkdir(parents=True)

    def put(path):
        make = {
            "file": Path.touch,
            "link": lambda path: path.symlink_to(precious),
            "pipe": os.mkfifo,
            "folder": Path.mkdir,
        }
        make[kind](path)

    put(checkpoints / "x.partial")
    assert load_checkpoint(state[0], tmp_path / "run") == 0
    assert not list(checkpoints.iterdir())
    for name in "step-00000003.partial", "step-00000003", "damaged-step-00000002":
        put(checkpoints / name)
    save_checkpoint(state[0], tmp_path / "run", 3, keep=2)
    assert load_checkpoint(state[0], tmp_path / "run") == 3
    assert list(precious.iterdir()) == [precious / "file"]


@pytest.mark.parametrize("which", ["weights", "average"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_weights_that_are_not_finite_are_named(state, tmp_path, which, value):
    average = torch.optim.swa_utils.AveragedModel(torch.nn.Linear(5, 3))
    save_checkpoint(state[0], tmp_path, 1, keep=2, average=average)
    with torch.no_grad():
        (state[1] if which == "weights" else average.module).bias[1] = value
    save_checkpoint(state[0], tmp_path, 2, keep=2, average=average)
    name = "bias" if which == "weights" else "module.bias"
    with pytest.raises(
        CheckpointError, match=rf"step-00000002 holds weights .* not finite: {name}\. Delete it"
    ):
        load_checkpoint(state[0], tmp_path, average)
    shutil.rmtree(tmp_path / "checkpoints" / "step-00000002")
    assert load_checkpoint(state[0], tmp_path, average) == 1


def test_a_full_disk_is_called_full_whatever_failed(tmp_path):
    """The files before the one that fails fit below the limit of a process, which stands for the disk."""
    program = """
        import os, resource, sys, torch
        from accelerate import Accelerator
        from pathlib import Path
        from avfuse.training import checkpoints

        accelerator = Accelerator(cpu=True)
        model = torch.nn.Linear(100, 100)
        average = torch.optim.swa_utils.AveragedModel(torch.nn.Linear(100, 100))
        model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters()))
        accelerator.backward(model(torch.ones(1, 100)).sum())
        optimizer.step()
        for fails in sys.argv[2:]:  # each in a process of its own
            if not os.fork():
                break
            assert os.wait()[1] == 0
        else:
            sys.exit()
        run = Path(sys.argv[1], fails)
        (run / "checkpoints").mkdir(parents=True)
        most = 100 if fails == "manifest.json" else 4096
        limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
        if fails == "optimizer.bin":
            accelerator.register_save_state_pre_hook(lambda _, weights, __: weights.clear() or limit())
        elif fails == "model.safetensors":
            limit()
        else:
            name = "save_file" if fails == "average.safetensors" else "seal"
            real = getattr(checkpoints, name)
            setattr(checkpoints, name, lambda *a: limit() or real(*a))
        try:
            checkpoints.save_checkpoint(accelerator, run, 2, 1, average)
        except checkpoints.CheckpointError as error:
            print(error, flush=True)
        assert not list((run / "checkpoints").iterdir())
    """
    files = "model.safetensors", "optimizer.bin", "average.safetensors", "manifest.json"
    command = [sys.executable, "-c", textwrap.dedent(program), str(tmp_path), *files]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    # Weights, two moments, an average: 4 x 10,100 numbers of 4 bytes.
    reason = r"the disk is full \(File too large\): a checkpoint needs 0\.2 MB, and [\d.]+ MB are free\."
    found = re.findall(reason + " There is none before it", result.stdout)
    assert result.returncode == 0 and len(found) == len(files), (result.stdout, result.stderr)


def test_other_faults_are_no_full_disk(state, tmp_path):
    """The folder that should hold them is a file."""
    (tmp_path / "checkpoints").touch()
    with pytest.raises(CheckpointError, match="could not be written: .*checkpoints") as failed:
        save_checkpoint(state[0], tmp_path, 2, keep=1)
    assert "disk is full" not in str(failed.value)


def test_the_last_whole_one_is_named_where_the_next_cannot_be_written(state, tmp_path, monkeypatch):
    for step in (1, 2):
        save_checkpoint(state[0], tmp_path, step, keep=2)
    monkeypatch.setattr(checkpoints, "sync", lambda path: os.stat(path / "nothing"))
    with pytest.raises(CheckpointError, match="The last whole one is step-00000002"):
        save_checkpoint(state[0], tmp_path, 3, keep=2)


def test_an_old_one_that_cannot_be_deleted_does_not_end_the_run(state, tmp_path, monkeypatch):
    save_checkpoint(state[0], tmp_path, 1, keep=1)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda path, **_: os.rmdir(path))  # as of files that are in use
        save_checkpoint(state[0], tmp_path, 2, keep=1)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000002", "step-00000001"]
    save_checkpoint(state[0], tmp_path, 3, keep=1)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000003"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO, 0])
def test_a_disk_without_room_is_told_from_other_faults(tmp_path, monkeypatch, number):
    def allocate(*_):
        if number:
            raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "posix_fallocate", allocate)
    assert ("the disk is full" in lack(tmp_path, 10**6)) == (number in (errno.ENOSPC, errno.EDQUOT))
