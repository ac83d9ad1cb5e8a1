"""What an earlier version of avfuse saved is read, and means what it meant: tests/golden/b903e02."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from models import relative_error
from safetensors.torch import load_file

from avfuse import AVMAE, AVEncoder, InputSettings, load, presets, train
from avfuse.data import sounding_shapes
from avfuse.data.clips import ClipDataset
from avfuse.data.find import find_data
from avfuse.features import read_features
from avfuse.loading import load_encoder, load_model
from avfuse.released import ReleasedEncoder
from avfuse.tasks.classifier import Classifier, load_classifier
from avfuse.tasks.localize import Localizer
from avfuse.tasks.segment import Segmenter
from avfuse.tasks.separator import Separator
from avfuse.training.checkpoints import damage
from avfuse.training.judge import weights_hash
from avfuse.training.loop import program
from avfuse.training.recipes import parse
from avfuse.training.run_folder import read_rows

GOLDEN = Path(__file__).parent / "golden/b903e02"
INPUTS = InputSettings(image_size=32, mel_bins=16, audio_seconds=1.0, hop=250)
PRECISE = 1e-5  # of float32, on other processors
TASKS = ("classify", "segment", "localize", "separate")


@pytest.fixture(scope="module")
def tensors():
    return load_file(GOLDEN / "expected.safetensors")


@pytest.fixture(scope="module")
def expected():
    return json.loads((GOLDEN / "expected.json").read_text())


@pytest.fixture
def golden(tmp_path, monkeypatch):
    """A copy to write to, which is the current folder."""
    folder = Path(shutil.copytree(GOLDEN, tmp_path / "golden"))
    for manifest in folder.glob("*/avfuse-manifest.jsonl"):
        os.utime(manifest)  # else the folders are newer, as they were just copied
    monkeypatch.chdir(folder)
    return folder


def test_a_released_autoencoder():
    mae, outputs = (
        AVMAE.from_pretrained(GOLDEN / "released"),
        load_file(GOLDEN / "released/outputs.safetensors"),
    )
    assert isinstance(mae.encoder, ReleasedEncoder)
    assert type(mae).from_config(mae.to_config()).to_config() == mae.to_config()
    with torch.no_grad():
        fusion = mae.encoder(outputs["image"], outputs["audio"]).fusion
    assert relative_error(fusion, outputs["fusion"]) < PRECISE


@pytest.mark.parametrize("name", ["encoder", "autoencoder", "pretrain", "classify"])
def test_encoders(tensors, name):
    encoder = load_encoder(GOLDEN / name)
    assert encoder.inputs == INPUTS
    if name != "classify":
        with torch.no_grad():
            tokens = encoder(tensors["image"], tensors["audio"])
        for part in "image", "audio", "fusion":
            assert relative_error(getattr(tokens, part), tensors[f"{name}.{part}"]) < PRECISE, part


def test_saved_models(tensors):
    encoder = AVEncoder.from_pretrained(GOLDEN / "encoder")
    assert encoder.to_config()["interactions"] == "factorized"
    mae = AVMAE.from_pretrained(GOLDEN / "autoencoder")
    masks = {name: tensors[name] for name in ("image_removed", "audio_removed")}
    with torch.no_grad():
        output = mae(tensors["image"], tensors["audio"], **masks)
    for part in "image_pred", "audio_pred", "loss":
        assert relative_error(getattr(output, part), tensors[f"autoencoder.{part}"]) < PRECISE, part


@torch.no_grad()
def test_models_of_the_tasks(tensors):
    image, audio = tensors["image"], tensors["audio"]
    outputs = {
        "classify.logits": load_classifier(GOLDEN / "classify")(image, audio).logits,
        "segment.logits": load_model(Segmenter, GOLDEN / "segment")(image, audio),
        "localize.map": load_model(Localizer, GOLDEN / "localize")(image, audio),
        "separate.logits": load_model(Separator, GOLDEN / "separate")(image[:, None], audio),
    }
    for task, kind in zip(TASKS, (Classifier, Segmenter, Localizer, Separator), strict=True):
        model = load_model(kind, GOLDEN / task)
        for loaded in load(GOLDEN / task), load(GOLDEN / task / "model"):
            assert type(loaded) is kind and weights_hash(loaded) == weights_hash(model)
    for name, output in outputs.items():
        assert relative_error(output, tensors[name]) < PRECISE, name


@pytest.mark.usefixtures("undrawn")
def test_a_run_goes_on_from_its_checkpoint(golden, expected, monkeypatch):
    """With the losses of the run that went through; the rows before the checkpoint stay as they are."""
    monkeypatch.setitem(presets.SIZES, "tiny", (8, 2, 2, INPUTS))
    assert damage(golden / "pretrain/checkpoints/step-00000002") == ""
    settings = moved(golden / "pretrain", golden)
    kept = [row for row in read_rows(golden / "pretrain/metrics.jsonl") if row["step"] <= 2]
    assert program(settings, train.Pretraining) == 0
    rows = read_rows(golden / "pretrain/metrics.jsonl")
    assert rows[: len(kept)] == kept
    losses = {str(row["step"]): row["loss"] for row in rows if "loss" in row}
    assert losses == pytest.approx(expected["losses"], rel=1e-5)
    for name in "held_out_image_loss", "held_out_audio_loss":
        assert rows[-1][name] == pytest.approx(expected["after"][name], rel=1e-5)
    assert load_encoder(golden / "pretrain").settings["norm_eps"] == 1e-5


def moved(run, root):
    """The settings of a pretraining run whose data now lie in `root`, from its command line."""
    config = json.loads((run / "config.json").read_text())
    config["settings"]["data"] = str(root / "shapes")
    (run / "config.json").write_text(json.dumps(config))
    command = "--data shapes --run-dir pretrain --batch-size 2 --workers 0 --epochs 3 --warmup-epochs 1"
    command += " --checkpoint-every 2 --keep-checkpoints 3 --measure-every 0 --audio-mask-ratio 0.75"
    return parse(f"{command} --decoder-dim 8 --decoder-depth 1 --decoder-heads 2".split())


@pytest.mark.parametrize("task", TASKS)
def test_results_of_the_tasks(expected, task):
    results = json.loads((GOLDEN / task / "results.json").read_text())
    assert results["metrics"] == expected["metrics"][task] and results["coverage"]["judged"] == 2
    config = json.loads((GOLDEN / task / "config.json").read_text())
    assert config["settings"]["checkpoint"] == "pretrain" and config["data"]["clips"] == 4


@pytest.mark.parametrize("name", ["clips", "shards", "shapes"])
def test_data(golden, expected, tensors, name):
    said = []
    found = find_data(Path(name), said.append, workers=0)
    clips = [[clip.path.as_posix(), clip.labels] for clip in (*found.train, *found.test)]
    assert clips == expected["clips"][name]
    assert not any("changed" in line or "newer" in line for line in said), said
    item = ClipDataset(found.train, INPUTS, train=False)[0]
    for part in "image", "audio":
        assert relative_error(item[part], tensors[f"clips.{part}"]) < 1e-3, part  # all begin with this clip


def test_masks_and_stems_of_sounding_shapes(tensors):
    entry = sounding_shapes.read_manifest(GOLDEN / "shapes", "test")[0]
    assert torch.equal(
        torch.from_numpy(sounding_shapes.load_masks(GOLDEN / "shapes", entry)[0]), tensors["shapes.masks"]
    )
    assert torch.equal(
        torch.from_numpy(sounding_shapes.load_stems(GOLDEN / "shapes", entry)), tensors["shapes.stem"]
    )


def test_features():
    features, paths = read_features(GOLDEN / "features.safetensors")
    assert paths == ["test/000000.mp4", "train/000000.mp4"]
    assert {name: tuple(tensor.shape) for name, tensor in features.items()} == {
        **dict.fromkeys(("image", "audio", "fusion"), (2, 8)),
        **dict.fromkeys(("image_present", "audio_present"), (2,)),
    }
