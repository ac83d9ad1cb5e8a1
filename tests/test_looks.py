"""Do fusion tokens look at what sounds? Boxes against the frames and masks of files, shares by hand."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from avfuse import create_encoder
from avfuse.data.clips import ClipDataset
from avfuse.data.find import find_data
from avfuse.data.sounding_shapes import generate
from avfuse.data.sounding_shapes.read import load_masks, read_frames, read_manifest
from avfuse.data.transforms import evaluation_image
from avfuse.train import Pretraining
from avfuse.training.looks import Sources, looks, most_looking, said_of
from avfuse.training.recipes import TrainConfig


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("shapes")
    return generate(root, train=1, test=3, size=96, seconds=4.0, workers=1, progress=False)


def found_in(folder):
    return find_data(folder, lambda line: None, progress=False, workers=0)


@pytest.mark.parametrize("frames", [1, 2])
def test_boxes_are_those_of_the_frames_that_are_shown(folder, frames):
    """Which frame of the file that is, is told by its pixels; the truth is a white box around its mask, as
    the model would see it; corners are rounded to pixels, of which a patch has 16 x 16.
    """
    encoder, clips = create_encoder("tiny", frames=frames), found_in(folder).test
    sources, dataset = Sources(clips, encoder), ClipDataset(clips, encoder.inputs, train=False)
    boxes = sources.boxes(torch.arange(3)).view(3, frames, 6, 6)
    settings = encoder.inputs
    for index, entry in enumerate(read_manifest(folder, "test")):
        pictures = torch.from_numpy(read_frames(folder / entry.file)).permute(0, 3, 1, 2)
        seen = torch.stack([evaluation_image(picture, settings) for picture in pictures])
        masks = load_masks(folder, entry)[0][0]
        for at, shown in enumerate(dataset[index]["image"].view(frames, 3, 96, 96)):
            ys, xs = masks[(seen - shown).abs().mean((1, 2, 3)).argmin()].nonzero()
            white = torch.zeros(3, 96, 96, dtype=torch.uint8)
            white[:, ys.min() : ys.max() + 1, xs.min() : xs.max() + 1] = 255
            truth = evaluation_image(white, settings)[0] * settings.image_std[0] + settings.image_mean[0]
            truth = truth.view(6, 16, 6, 16).mean((1, 3))
            torch.testing.assert_close(boxes[index, at], truth, atol=0.1, rtol=0)
            assert boxes[index, at].sum().item() == pytest.approx(truth.sum().item(), rel=0.15)


def test_shares_of_attention_by_hand():
    """Two heads and two tokens look at three patches: the box holds half of the first and all of the last."""
    weights = torch.tensor([[[[0.2, 0.3, 0.5], [0.0, 0.0, 1.0]], [[1.0, 0.0, 0.0], [0.4, 0.6, 0.0]]]])
    even = torch.full_like(weights, 1 / 3)
    encoder = SimpleNamespace(
        fusion_layers=(1, 3), fusion_attention=lambda layer, **inputs: ((weights, even)[layer == 3], None)
    )
    found = looks(encoder, {}, torch.tensor([[0.5, 0.0, 1.0]]))
    assert found["look_1"].item() == pytest.approx(0.4 * 0.5 + 0.375)
    assert found["look_3"].item() == pytest.approx(0.5) and found["even"].item() == 0.5
    assert most_looking(**found) == 1
    assert said_of(even=0.2, look_1=0.31, look_3=0.1) == (
        "Fusion tokens look at what sounds: in layer 1, 31% of their attention to the picture lies in its "
        "box, which is 20% of it."
    )
    assert said_of(even=0.2, look_3=0.29).startswith(
        "Fusion tokens do not look at what sounds: in layer 3, 29%"
    )


def test_pretraining_tells_it_of_sounding_shapes_alone(folder, tmp_path, monkeypatch):
    found = found_in(folder)
    task = Pretraining(TrainConfig(data=folder), found)
    dataset = task.dataset(found.test, train=False)
    items = [dataset[index] for index in range(3)]
    batch = {name: torch.stack([item[name] for item in items]) for name in items[0]}
    rows = task.judge(task.model.eval(), task.inputs(batch), batch)
    even = task.sources.boxes(torch.arange(3)).mean().item()
    metrics = task.summarize(rows)
    assert metrics["looks"]["even"] == pytest.approx(even, rel=1e-5)
    assert list(metrics["looks"]) == ["even", "look_0", "look_1", "look_2", "look_3"]
    assert metrics["looks"]["look_0"] == pytest.approx(even, rel=0.5)  # fresh weights look about everywhere
    assert task.numbers(metrics)["look_3_at_source"] == metrics["looks"]["look_3"]
    assert task.tables(metrics)[-1][-1] == ("its share of the picture", metrics["looks"]["even"])

    drawn = []
    monkeypatch.setattr("avfuse.train.draw_reconstructions", lambda *_: None)
    monkeypatch.setattr("avfuse.train.draw_attention", lambda *_, layer: drawn.append(layer))
    for index in 0, 2:  # the layer of all clips is drawn of each
        one = {name: value[index : index + 1] for name, value in batch.items()}
        task.draw(tmp_path, task.model, task.inputs(one), one, step=0)
    assert [f"in layer {layer}," in said_of(**metrics["looks"]) for layer in drawn] == [True, True]

    (folder / read_manifest(folder, "test")[1].masks).write_bytes(b"damaged")
    damaged = task.judge(task.model, task.inputs(batch), batch)
    assert np.isnan([row["look_0"] for row in damaged]).tolist() == [False, True, False]
    assert task.summarize(damaged)["looks"]["even"] < 1
    copied = tmp_path / "bird"
    copied.mkdir()
    for clip in found.test:
        (copied / clip.path.name).write_bytes(clip.path.read_bytes())
    assert not Sources(found_in(tmp_path).test, task.model.encoder).entries
