"""Localization: the protocol of Flickr-SoundNet by hand and by its published steps; what the model uses."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from scene_trees import SHAPES, write_flickr_soundnet
from sklearn.metrics import auc

from avfuse.data import sounding_shapes
from avfuse.data.clips import Failure, collate
from avfuse.data.find import Found
from avfuse.inputs import InputSettings
from avfuse.loading import load_model
from avfuse.presets import create_encoder
from avfuse.tasks.localize import (
    Localization,
    LocalizeConfig,
    Localizer,
    best_map,
    consensus_iou,
    judge_baselines,
    pointing,
    resized,
    success_area,
    success_rate,
)
from avfuse.tasks.scenes import model_inputs
from avfuse.training.conditions import CONDITIONS
from avfuse.training.judge import weights_hash
from avfuse.training.loop import program

INPUTS = InputSettings(image_size=64, mel_bins=32, hop=750)  # 16 + 8 tokens


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    return sounding_shapes.generate(tmp_path_factory.mktemp("shapes"), **SHAPES)


def encoder(**options):
    torch.manual_seed(0)
    return create_encoder("tiny", inputs=INPUTS, **options)


def task_of(config=None, **options) -> Localization:
    config = LocalizeConfig(checkpoint="none", **options) if config is None else config
    return Localization(config, Found([], [], "test", [], 0, {}))


def find_scenes(folder, **options) -> Found:
    return Localization.find(LocalizeConfig(checkpoint="none", data=folder, **options), lambda _: None)


@pytest.fixture
def batch(shapes):
    """Six pictures as evaluation reads them."""
    whole = find_scenes(shapes)
    dataset = task_of().dataset(whole.train + whole.test, train=False)
    return collate([dataset[index] for index in range(6)], dataset.blank)


# --- metrics ------------------------------------------------------------------------------------------------


def test_consensus_iou_by_hand():
    maps = torch.tensor(
        [[[0.1, 0.2], [0.3, 0.4]]]
    )  # the upper median is 0.3: the lower row is called sounding
    for truth, expected in (
        ([[0.0, 0.0], [1.0, 1.0]], 1.0),
        ([[0.0, 0.0], [1.0, 0.0]], 1 / 2),  # 1 found, 1 called wrongly
        ([[1.0, 0.0], [1.0, 0.0]], 1 / 3),  # 1 of 2 found, 1 called wrongly
        ([[1.0, 1.0], [0.0, 0.0]], 0.0),
        (
            [[0.5, 0.0], [0.5, 0.0]],
            0.5 / 2,
        ),  # only one person drew it: it weighs half, what is wrong does not
        ([[0.5, 0.0], [1.0, 0.5]], 1.5 / 2),  # half a person's worth is missed
        ([[0.0, 0.0], [0.0, 0.0]], 0.0),  # no box
    ):
        assert consensus_iou(maps, torch.tensor([truth])).item() == pytest.approx(expected)
    everywhere = torch.full((1, 2, 2), 7.0)  # a map that says nothing calls everything sounding
    assert consensus_iou(everywhere, torch.tensor([[[0.0, 0.0], [1.0, 0.0]]])).item() == pytest.approx(1 / 4)


def published(score_map: np.ndarray, truth: np.ndarray) -> float:
    """The steps of the public evaluation: scale to 0..1, cut at the middle of the sorted values, count."""
    spread = score_map.max() - score_map.min()
    score_map = (score_map - score_map.min()) / spread if spread else score_map
    threshold = sorted(score_map.flatten())[score_map.size // 2]
    infer = np.zeros(score_map.shape)
    infer[score_map >= threshold] = 1
    return np.sum(infer * truth) / (np.sum(truth) + np.sum(infer * (truth == 0)))


def test_consensus_iou_is_the_published_one():
    random = np.random.default_rng(0)
    maps = random.normal(size=(40, 14, 14))
    truth = (
        random.integers(0, 3, (40, 14, 14))
        / 2
        * (random.random((40, 1, 1)) + random.random((40, 14, 14)) > 1)
    )
    ours = consensus_iou(torch.from_numpy(maps), torch.from_numpy(truth))
    for mine, one_map, one_truth in zip(ours.tolist(), maps, truth, strict=True):
        assert mine == pytest.approx(published(one_map, one_truth), abs=1e-12)
    scaled = consensus_iou(3 + 100 * torch.from_numpy(maps), torch.from_numpy(truth))
    torch.testing.assert_close(ours, scaled, atol=0, rtol=0)


def test_success():
    ciou = torch.tensor([0.0, 0.5, 0.49, 1.0], dtype=torch.float64)
    assert success_rate(ciou) == 0.5
    shares = [(ciou.numpy() >= n / 20).mean() for n in range(21)]
    assert success_area(ciou) == pytest.approx(auc(np.arange(21) / 20, shares))
    # by hand: 1 at 0, 3/4 from .05 to .45, 1/2 at .5, 1/4 to 1; trapezoids
    area = (1 / 2 + 9 * 3 / 4 + 1 / 2 + 9 * 1 / 4 + 1 / 8) / 20
    assert success_area(ciou) == pytest.approx(area)
    assert success_area(torch.ones(3, dtype=torch.float64)) == pytest.approx(1)


def test_pointing_by_hand():
    maps = torch.tensor([[[0.0, 0.9], [0.1, 0.2]], [[-1.0, -5.0], [-0.5, -2.0]], [[1.0, 1.0], [1.0, 1.0]]])
    truth = torch.tensor([[[0.0, 0.5], [0.0, 0.0]], [[1.0, 1.0], [0.0, 1.0]], [[0.0, 0.0], [0.0, 0.0]]])
    assert pointing(maps, truth).tolist() == [True, False, False]


def test_no_map_beats_the_best():
    torch.manual_seed(0)
    truth = (torch.rand(20, 12, 12) < torch.rand(20, 1, 1) / 2).double()
    best = consensus_iou(best_map(truth), truth)
    bound = truth.sum((1, 2)) / 72  # half of 144 pixels are called sounding, all that sound among them
    torch.testing.assert_close(best, bound)
    for _ in range(10):
        assert (consensus_iou(torch.rand(20, 12, 12), truth) <= best).all()


def test_baselines_by_hand():
    """On 4 x 4 places, half of which are a disc: four in the middle, and all beside them but the corners."""
    truth = torch.zeros(4, 4, 4)
    truth[0, 1:3, 1:3] = 1  # the middle
    truth[1, 0, 0] = 1  # a corner
    truth[2] = 1  # everywhere
    truth[3, 1] = 0.5  # a row, of which one of two people is sure
    found = judge_baselines(truth)
    assert found["whole_ciou"].tolist() == pytest.approx([4 / 16, 1 / 16, 1, 2 / (2 + 12)])
    assert found["whole_pointing"].tolist() == pytest.approx([4 / 16, 1 / 16, 1, 4 / 16])
    # the upper median is the distance of those beside the middle: 12 places are called sounding
    assert found["centre_ciou"].tolist() == pytest.approx([4 / 12, 0, 12 / 16, 2 / (2 + 8)])
    assert found["centre_pointing"].tolist() == [True, False, True, True]


def test_the_central_half_is_a_disc():
    """But for the edge of pixels."""
    size = 224
    places = (torch.arange(size) + 0.5) / size - 0.5
    disc = (places[:, None] ** 2 + places**2 <= 0.5 / torch.pi).double()[None]
    assert judge_baselines(disc)["centre_ciou"].item() == pytest.approx(1, abs=0.01)


def test_maps_keep_their_place():
    places = torch.zeros(1, 4, 6)
    places[0, 1, 4] = 1
    row, column = divmod(resized(places, (24, 24))[0].argmax().item(), 24)
    assert 6 <= row < 12 and 16 <= column < 20
    row, column = divmod(resized(places, (12, 24))[0].argmax().item(), 24)
    assert 3 <= row < 6 and 16 <= column < 20


# --- model --------------------------------------------------------------------------------------------------


def test_map_is_of_cosines():
    model = Localizer(encoder(), dim=16).eval()
    image, audio = torch.randn(3, 3, 64, 64), torch.randn(3, 1, 32, 64)
    with torch.no_grad():
        logits = model(image, audio)
        tokens = model.encoder(image, audio)
        for clip in range(3):
            sound = model.audio_head(tokens.audio[clip].mean(0))
            for place in range(16):
                cosine = torch.cosine_similarity(model.image_head(tokens.image[clip, place]), sound, dim=0)
                assert logits[clip, place // 4, place % 4].item() == pytest.approx(
                    10 * cosine.item() - 3, abs=1e-4
                )
        alone = torch.cat([model(image[n : n + 1], audio[n : n + 1]) for n in range(3)])
        torch.testing.assert_close(alone, logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("interactions", ["dense", "factorized", "token", "joint", "cross", "none"])
def test_gradients_reach_the_encoder(interactions):
    model = Localizer(encoder(interactions=interactions), dim=16)
    model(torch.randn(2, 3, 64, 64), torch.randn(2, 1, 32, 64)).square().mean().backward()
    for name, parameter in model.named_parameters():
        last = str(model.encoder.depth - 1)
        unread = (
            f"fusion_blocks.{last}." in name
            or "fusion_norm" in name
            or interactions in ("joint", "cross", "none")
            and "fusion_tokens" in name
        )
        if not unread:  # the last fusion block feeds nothing
            assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


def test_attention_map_is_the_mean_over_heads_and_tokens_of_the_same_pass():
    model, image, audio = Localizer(encoder(fusion_layers=(1, 2))).eval(), *pixels()
    passes = []
    model.encoder.register_forward_hook(lambda *_: passes.append(1))
    logits, attention = model.look(image, audio)
    assert len(passes) == 1
    torch.testing.assert_close(logits, model(image, audio))
    weights, _ = model.encoder.fusion_attention(image, audio, 2)
    torch.testing.assert_close(attention.flatten(1), weights.mean((1, 2)))
    torch.testing.assert_close(attention.sum((1, 2)), torch.ones(2))
    for interactions in "joint", "cross", "none":
        assert Localizer(encoder(interactions=interactions)).look(image, audio)[1] is None


def pixels():
    return torch.randn(2, 3, 64, 64), torch.randn(2, 1, 32, 64)


# --- task ---------------------------------------------------------------------------------------------------


def test_batches_do_not_change_the_rows(batch):
    task = task_of()
    inputs = task.inputs(batch)
    with torch.no_grad():
        task.model.eval()
        rows = task.judge(task.model, inputs, batch)
        for index, row in enumerate(rows):
            alone = {
                name: value[index : index + 1] for name, value in batch.items() if torch.is_tensor(value)
            }
            (judged,) = task.judge(task.model, task.inputs(alone), alone)
            assert judged.keys() == row.keys() >= {"ciou", "pointing", "attention_ciou", "attention_pointing"}
            for name, value in row.items():
                assert judged[name] == pytest.approx(value, abs=2e-3), name  # a place may change sides
    assert task.summarize(rows) == task.summarize([*rows])


def test_summary_by_hand():
    columns = dict(best=np.ones(4), ciou=np.array([0.5, 0.4, 0.0, 1.0]), pointing=np.array([1, 1, 0, 0]) > 0)
    columns |= dict(area=np.array([0.1, 0.1, 0.2, 0.2]))
    rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    summary = task_of().summarize(rows)
    assert (
        summary["ciou"] == 0.5
        and summary["pointing"] == 0.5
        and summary["best_possible_auc"] == pytest.approx(1)
    )
    assert "attention_ciou" not in summary and summary["pointing_chance"] == pytest.approx(0.15)


def test_the_control_hears_nothing(batch):
    control, other = task_of(modalities="image"), task_of()
    changed = batch | dict(audio=torch.randn_like(batch["audio"]))
    control.model.eval(), other.model.eval()
    with torch.no_grad():
        same = [control.model(**model_inputs(control.inputs(b))) for b in (batch, changed)]
        differ = [other.model(**model_inputs(other.inputs(b))) for b in (batch, changed)]
    assert torch.equal(*same) and not torch.allclose(*differ)
    assert "control" in control.name and "control" not in other.name


def test_a_batch_without_clips_counts_nothing(shapes):
    task = task_of()
    scenes = find_scenes(shapes).train
    blank = task.dataset(scenes, train=True).blank
    inputs = task.inputs(collate([Failure(0, "x", "gone")], blank))
    assert task.counts(inputs) == dict(map_loss=0)
    loss = task.losses(task.model, inputs)["map_loss"]
    (0 * loss).backward()
    assert loss.isfinite()


def test_counts_are_pixels(batch):
    task = task_of()
    assert task.counts(task.inputs(batch)) == dict(map_loss=6 * 224 * 224)


def run(folder, **options):
    settings = dict(epochs=1, warmup_epochs=0, batch_size=2, workers=0, checkpoint="none", run=folder)
    config = LocalizeConfig(**settings | options)
    return program(config, Localization)


def test_a_run_from_end_to_end(shapes, tmp_path):
    assert run(tmp_path / "run", data=shapes) == 0
    results = json.loads((tmp_path / "run/results.json").read_text())
    assert results["protocol"].startswith("Flickr-SoundNet") and results["coverage"] == dict(
        judged=3, expected=3
    )
    assert weights_hash(load_model(Localizer, tmp_path / "run")) == results["weights_sha256"]
    metrics = results["metrics"]
    names = ("pointing", "ciou", "auc")
    prefixed = {f"{prefix}{name}" for prefix in ("", "attention_", "whole_", "centre_") for name in names}
    assert metrics.keys() == prefixed | {"best_possible_auc", "pointing_chance"}
    assert metrics["whole_pointing"] == pytest.approx(metrics["pointing_chance"])
    assert results["conditions"].keys() == set(CONDITIONS)
    assert all(of.keys() == {*names, "judged"} for of in results["conditions"].values())
    assert all(0 <= value <= 1 for value in metrics.values())
    pictures = sorted(path.name for path in (tmp_path / "run/pictures").glob("*.png"))
    assert pictures == ["localization-000000.png", "localization-000001.png"]
    card = (tmp_path / "run/model/README.md").read_text()
    assert (
        "| measured on | 3 " in card
        and "| a random place |" in card
        and "| the centre |" in card
        and str(tmp_path) not in card
    )


def test_a_run_on_flickr_soundnet(shapes, tmp_path):
    write_flickr_soundnet(tmp_path / "data", shapes, names=tuple("abcdef"))
    assert run(tmp_path / "run", data=tmp_path / "data", modalities="image", test_share=0.2) == 0
    results = json.loads((tmp_path / "run/results.json").read_text())
    assert "control" in results["task"] and results["coverage"]["expected"] == 3
    assert results["conditions"].keys() == {"grey_picture"}  # it never hears anything


def test_pictures_that_are_missing_stop_a_run_unless_allowed(shapes, tmp_path):
    write_flickr_soundnet(tmp_path / "data", shapes, names=tuple("abcdef"))
    (tmp_path / "data/audio/b.wav").unlink()
    assert "more than --max-unreadable" in run(tmp_path / "a", data=tmp_path / "data", test_share=0.2)
    assert run(tmp_path / "b", data=tmp_path / "data", test_share=0.2, max_unreadable=0.5) == 0
    assert "b.wav" in (tmp_path / "b/quarantine.jsonl").read_text()
    assert find_scenes(tmp_path / "data", test_share=0.999).coverage["test"] == (5, 6)


def test_mistakes_are_explained(shapes, tmp_path):
    assert "neither Sounding Shapes nor Flickr-SoundNet" in run(tmp_path / "run", data=tmp_path)
    for wrong in (dict(test_share=0.0), dict(test_share=1.0), dict(dim=0)):
        with pytest.raises(ValueError, match="must be"):
            LocalizeConfig(**wrong)
    for wrong, message in (
        (dict(missing="keep"), "--missing keep: each annotated picture needs its sound"),
        (dict(train_split="unbalanced_train"), "--train-split must be train"),
        (dict(data_set="vggsound"), "--data-set vggsound has no annotated pictures"),
    ):
        with pytest.raises(ValueError, match=message):
            LocalizeConfig(**wrong)
    assert "is not Sounding Shapes" in run(tmp_path / "run", data=tmp_path, data_set="sounding-shapes")
    assert len(find_scenes(shapes, data_set="sounding-shapes", train_split="train").train) == 3
    base = LocalizeConfig(checkpoint=str(tmp_path / "nothing"), data=shapes)
    with pytest.raises(ValueError, match="nothing"):
        task_of(base)
    saved = encoder()
    saved.save_pretrained(tmp_path / "other")
    other = task_of(replace(base, checkpoint=str(tmp_path / "other")))  # sizes are those of the checkpoint
    assert other.dataset(find_scenes(shapes).test, train=False)[0]["image"].shape == (
        3,
        64,
        64,
    )
