"""What commit b903e02 wrote is read: models, a checkpoint, a manifest, a run folder (tests/golden/b903e02).

Its models are tiny; `outputs.safetensors` has inputs, and what they made of them. In the settings of the run,
paths were shortened.
"""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file

import avfuse
from avfuse import AVMAE, AVEncoder
from avfuse.data import manifest
from avfuse.data.find import find_data
from avfuse.loading import load_model
from avfuse.released import ReleasedEncoder
from avfuse.tasks.classifier import Classifier
from avfuse.training.checkpoints import load_checkpoint
from avfuse.training.recipes import TrainConfig
from avfuse.training.report import write_report
from avfuse.training.run_folder import check_run, read_run

FOLDER = Path(__file__).parent / "golden" / "b903e02"
OUTPUTS = load_file(FOLDER / "outputs.safetensors")


@torch.no_grad()
@pytest.mark.parametrize("name", ["autoencoder", "released"])
def test_autoencoders(name):
    mae = AVMAE.from_pretrained(FOLDER / name)
    assert isinstance(mae.encoder, ReleasedEncoder) == (name == "released")
    assert mae.image_decoder.pos_embed.requires_grad == (name == "released")
    assert type(mae).from_config(mae.config()).config() == mae.config()
    assert bool(mae.facts) == (name == "autoencoder")
    for encoder in mae.encoder, avfuse.load_encoder(FOLDER / name):
        fusion = encoder(OUTPUTS["image"], OUTPUTS["audio"]).fusion
        torch.testing.assert_close(fusion, OUTPUTS[f"{name}.fusion"])


def test_an_autoencoder_is_no_encoder():
    with pytest.raises(ValueError, match="holds a model of class AVMAE, not AVEncoder"):
        AVEncoder.from_pretrained(FOLDER / "autoencoder")


@torch.no_grad()
def test_a_classifier():
    classifier = load_model(Classifier, FOLDER / "classifier")
    assert classifier.class_names == ("a", "b", "c")
    logits = classifier(OUTPUTS["image"], OUTPUTS["audio"]).logits
    torch.testing.assert_close(logits, OUTPUTS["classifier.logits"])


def test_a_checkpoint(tmp_path):
    shutil.copytree(FOLDER / "run", tmp_path / "run")
    model = torch.nn.Linear(3, 2)
    accelerator = Accelerator(cpu=True)
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters()))
    assert load_checkpoint(accelerator, tmp_path / "run") == 7
    saved = load_file(FOLDER / "run/checkpoints/step-00000007/model.safetensors")
    assert all(torch.equal(tensor, saved[name]) for name, tensor in model.state_dict().items())
    assert optimizer.state_dict()["state"][0]["step"] == 1


def test_a_manifest(tmp_path):
    shutil.copy(FOLDER / manifest.FILE, tmp_path)
    found = find_data(tmp_path)
    assert [str(clip.path.relative_to(tmp_path)) for clip in found.train] == [
        "train/000000.mp4",
        "train/000001.mp4",
    ]
    assert found.train[1].size == 13530 and found.train[1].streams.fps == 10


def test_a_run_folder(tmp_path):
    run = tmp_path / "run"
    shutil.copytree(FOLDER / "run", run)
    settings = read_run(run)["settings"]
    names = vars(TrainConfig()).keys() & settings.keys()
    config = TrainConfig(**{name: settings[name] for name in names})
    config = replace(config, run=run, data=Path(settings["data"]), fusion_layers=())
    check_run(config)
    with pytest.raises(ValueError, match="other settings .--ema 0.9 -> 0.0"):
        check_run(replace(config, ema=0.0))
    page = write_report(run).read_text()
    assert "Finished: step 6 of 6" in page and "layer_decay" in page
