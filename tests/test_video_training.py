"""Clips of several frames all the way: pretraining, resuming, tasks that begin with such a model, answers;
and those that cannot be told of frames.
"""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from models import relative_error

import avfuse
from avfuse import InputSettings, presets
from avfuse.data import sounding_shapes
from avfuse.files import read_rows
from avfuse.loading import load_encoder
from avfuse.predict import PredictConfig
from avfuse.predict import main as predict
from avfuse.tasks.classify import Classification
from avfuse.tasks.options import ClassifyConfig, RetrieveConfig, SegmentConfig, SeparateConfig
from avfuse.tasks.retrieve import Retrieval
from avfuse.tasks.segment import Segmentation
from avfuse.tasks.separate import Separation
from avfuse.train import Pretraining
from avfuse.training.checkpoints import list_checkpoints
from avfuse.training.loop import program, set_up, train
from avfuse.training.recipes import TrainConfig
from avfuse.training.starts import TIME_PEAK

pytestmark = pytest.mark.usefixtures("undrawn")

INPUTS = InputSettings(image_size=32, mel_bins=16, hop=500)  # 4 tokens a frame, 6 of sound


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    root = tmp_path_factory.mktemp("synchrony")
    return sounding_shapes.generate(
        root, scene="synchrony", train=6, test=4, size=64, workers=1, progress=False
    )


@pytest.fixture(scope="module", autouse=True)
def small_model():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(presets.SIZES, "tiny", (16, 2, 2, INPUTS))
        yield


def options_of(data, run) -> dict:
    return dict(data=data, run=run, epochs=2, warmup_epochs=0, batch_size=3, workers=0, min_steps=0)


@pytest.fixture
def options(shapes, tmp_path):
    return options_of(shapes, tmp_path / "run")


def pretraining(options, **changes) -> TrainConfig:
    decoder = dict(decoder_dim=16, decoder_depth=1, decoder_heads=2, measure_every=0)
    return TrainConfig(**options | decoder | dict(frames=4, pair_bias="time") | changes)


@pytest.fixture(scope="module")
def pretrained(shapes, tmp_path_factory, small_model):
    """Settings of two runs that went through, without tubes and with them; their pictures are drawn."""
    configs = {}
    for tubes in False, True:
        options = options_of(shapes, tmp_path_factory.mktemp("pretrained") / "run")
        configs[tubes] = pretraining(options, tubes=tubes)
        assert program(configs[tubes], Pretraining) == 0
    return configs


@pytest.mark.parametrize("tubes", [False, True])
def test_pretraining_and_what_begins_with_it(pretrained, options, tmp_path, tubes):
    config = pretrained[tubes]
    encoder = load_encoder(config.run)
    assert (encoder.frames, encoder.inputs.image_frames, encoder.settings["pair_bias"]) == (4, 4, "time")
    assert all(block.time_bias.table.any() for block in encoder.fusion_blocks.values()), "it was trained"
    assert {"reconstructions-000004.png", "attention-000004.png"} <= {
        x.name for x in config.run.glob("pictures/*")
    }

    more = options | dict(checkpoint=str(config.run))
    named = ClassifyConfig(**more | dict(run=tmp_path / "classify", label="colour", mixup=0.8))
    assert program(named, Classification) == 0
    classifier = avfuse.load(named.run)
    assert classifier.encoder.frames == 4
    clip = next((options["data"] / "test").glob("*.mp4"))
    image, audio = avfuse.read_clip(clip, classifier.encoder.inputs)
    assert image.shape == (1, 4, 3, 32, 32)
    with torch.no_grad():
        odds = classifier(image, audio).logits.softmax(1)[0]
    said = classifier.predict(clip)["both"]
    assert said == pytest.approx({name: odds[n].item() for n, name in enumerate(classifier.class_names)})

    found = RetrieveConfig(**more | dict(run=tmp_path / "retrieve", epochs=0, k=(1,)))
    assert program(found, Retrieval) == 0
    longer = ClassifyConfig(**more | dict(run=tmp_path / "eight", label="colour", frames=8))
    task = set_up(longer, Classification).task
    assert task.model.encoder.frames == 8
    of_four = load_encoder(config.run)
    for name, weight in of_four.fusion_blocks.state_dict().items():
        assert torch.equal(task.model.encoder.fusion_blocks.state_dict()[name], weight)


def test_a_run_resumes_with_the_losses_of_one_that_went_through(options, tmp_path):
    config = pretraining(options, checkpoint_every=1, keep_checkpoints=9)
    train(set_up(config, Pretraining))
    part = replace(config, run=tmp_path / "part")
    shutil.copytree(config.run, part.run)
    for later in list_checkpoints(part.run)[:-2]:  # the newest first: those of the first two steps are left
        shutil.rmtree(later)
    train(set_up(part, Pretraining))
    whole, resumed = (
        {row["step"]: row["loss"] for row in read_rows(run / "metrics.jsonl") if "loss" in row}
        for run in (config.run, part.run)
    )
    assert len(list_checkpoints(part.run)) == 4 and resumed == whole


def test_a_model_of_one_frame_becomes_one_of_several(options, tmp_path):
    config = pretraining(options, frames=0, pair_bias="")
    assert program(config, Pretraining) == 0
    more = pretraining(options, run=tmp_path / "more", checkpoint=str(config.run))
    encoder = set_up(more, Pretraining).task.model.encoder
    assert encoder.frames == 4 and encoder.settings["pair_bias"] == "time"
    weights = load_encoder(config.run).state_dict()
    for name, weight in encoder.state_dict().items():
        if name.endswith("time_bias.table"):  # highest where frame and sound are at one time
            assert weight[:, weight.shape[1] // 2].eq(TIME_PEAK).all() and weight.amin() == 0
        else:
            assert torch.equal(weight, weights.get(name, torch.zeros_like(weight))), name


def test_what_is_read_is_what_is_answered(pretrained, tmp_path):
    config = pretrained[False]
    clip = next((config.data / "test").glob("*.mp4"))
    out, pictures = tmp_path / "said.json", tmp_path / "pictures"
    said = PredictConfig(model=str(config.run), videos=(clip,), out=out, pictures=pictures)
    assert predict(said) == 0 and len(list(pictures.glob("*.png"))) == 1
    encoder = load_encoder(config.run)
    with torch.no_grad():
        tokens = encoder(*avfuse.read_clip(clip, encoder.inputs))
    (answer,) = json.loads(out.read_text())
    assert relative_error(torch.tensor(answer["fusion"]), tokens.fusion.mean(1)[0]) < 1e-4
    assert relative_error(torch.tensor(answer["image"]), tokens.image.mean((1, 2))[0]) < 1e-4


def test_tasks_of_single_frames_refuse_several(pretrained, options, tmp_path):
    config = pretrained[False]
    for name, kind, settings, task in (
        ("segmentation", "segment", SegmentConfig, Segmentation),
        ("separation", "separate", SeparateConfig, Separation),
    ):
        asked = settings(**options | dict(run=tmp_path / kind, checkpoint=str(config.run)))
        assert f"image_frames must be 1 for {name}, got 4" in program(asked, task)
