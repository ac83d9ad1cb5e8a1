"""Checkpoints: whole or not there, verified, rotated, and never code."""

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from avfuse.training.checkpoints import (
    CheckpointError,
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
