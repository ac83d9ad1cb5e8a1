"""Localization: the protocol of Flickr-SoundNet by hand and by its published steps; what the model uses; and
the same over time.
"""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from models import make_vit, randomized, relative_error
from PIL import Image
from scene_trees import SHAPES, write_flickr_soundnet
from sklearn.metrics import auc, average_precision_score, precision_recall_curve

import avfuse
from avfuse import AVEncoder, presets
from avfuse.data import sounding_shapes
from avfuse.data.clips import Failure, collate
from avfuse.data.find import Found
from avfuse.files import read_rows
from avfuse.inputs import InputSettings
from avfuse.loading import load_model
from avfuse.predict import PredictConfig
from avfuse.predict import main as predict
from avfuse.presets import create_encoder
from avfuse.tasks.localize import (
    Localization,
    LocalizeConfig,
    Localizer,
    average_precision,
    best_map,
    confidence,
    consensus_iou,
    judge_baselines,
    max_f1,
    pointing,
    precision_and_recall,
    resized,
    success_area,
    success_rate,
)
from avfuse.tasks.scenes import model_inputs
from avfuse.training.checkpoints import list_checkpoints
from avfuse.training.conditions import CONDITIONS
from avfuse.training.judge import weights_hash
from avfuse.training.loop import program, set_up, train
from avfuse.training.pictures import save
from avfuse.vit import audio_times

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
    assert pointing(maps.where(maps < 0.9, torch.nan), torch.ones(3, 2, 2)).tolist() == [False, True, False]


SURE = [
    0.9,
    0.8,
    0.7,
    0.6,
    0.5,
    0.4,
]  # of six pictures: found, without a box, found, elsewhere, found, without


def test_slavc_by_hand():
    """The six, at thresholds that each of them just reaches."""
    found, boxed = torch.tensor([[1, 0, 1, 0, 1, 0], [1, 0, 1, 1, 1, 0]]).bool()
    order = torch.tensor([3, 0, 5, 1, 4, 2])  # theirs does not matter
    rows = [column[order] for column in (found, torch.tensor(SURE), boxed)]
    precision, recall = precision_and_recall(*rows, torch.tensor(SURE))
    assert precision.tolist() == pytest.approx([1, 1 / 2, 2 / 3, 2 / 4, 3 / 5, 3 / 6])
    assert recall.tolist() == pytest.approx([1 / 4, 1 / 4, 2 / 4, 2 / 3, 1, 1])
    # from the second threshold on recall rises by 1/4, 1/6, 1/3 and 0; the best precision from there
    assert average_precision(*rows) == pytest.approx((2 / 3) / 4 + (2 / 3) / 6 + (3 / 5) / 3)
    assert max_f1(*rows) == pytest.approx(2 * 3 / 5 / (1 + 3 / 5))


def test_slavc_where_nothing_is_found_or_boxed():
    none, some = torch.zeros(4).bool(), torch.ones(4).bool()
    sure = torch.tensor([0.1, 0.2, 0.3, 0.4])
    assert average_precision(none, sure, some) == 0 and max_f1(none, sure, some) == 0
    assert average_precision(none, sure, none) == 0 and max_f1(none, sure, none) == 0
    precision, recall = precision_and_recall(none, sure, none, torch.tensor([0.5]))
    assert precision.tolist() == recall.tolist() == [1]  # none is called, none is there


@pytest.mark.parametrize("count", [2, 60, 199, 400, 1000])
def test_slavc_is_that_of_scikit_learn_where_every_source_is_found(count):
    """Then precision and recall are the usual ones: at SLAVC's thresholds those of scikit-learn."""
    random = np.random.default_rng(count)
    boxed = random.random(count) < 0.5
    boxed[:2] = True, False
    sure = np.round(random.normal(size=count) + boxed, 2)  # with ties
    precision, recall, thresholds = precision_recall_curve(boxed, sure)
    at = dict(zip(thresholds.tolist(), zip(precision[:-1], recall[:-1], strict=True), strict=True))
    rows = torch.from_numpy(boxed), torch.from_numpy(sure), torch.from_numpy(boxed)
    for threshold, (p, r) in at.items():
        ours = precision_and_recall(*rows, torch.tensor([threshold], dtype=torch.float64))
        assert [value.item() for value in ours] == pytest.approx([p, r])
    used = np.sort(sure)[:-1][:: -max(1, count // 200)]
    p, r = np.array([at[threshold] for threshold in used.tolist()]).T
    expected = sum(p[n:].max() * (r[n + 1] - r[n]) for n in range(len(used) - 1))
    assert average_precision(*rows) == pytest.approx(expected)
    tenths = [at[threshold] for threshold in np.sort(sure)[:: max(1, count // 10)].tolist()]
    assert max_f1(*rows) == pytest.approx(max(2 * p * r / (p + r) for p, r in tenths))
    if count > 100:  # what is left: the best precision from each point on, and the first points
        assert average_precision(*rows) == pytest.approx(average_precision_score(boxed, sure), abs=0.03)


def test_confidence_is_the_mean_of_the_highest_quarter():
    maps = torch.tensor([[[1.0, -4.0], [3.0, 2.0]], [[7.0, 7.0], [7.0, 7.0]]])
    assert confidence(maps).tolist() == [3, 7]
    torch.testing.assert_close(
        confidence(torch.arange(64.0).view(1, 8, 8)), torch.arange(48.0, 64).mean()[None]
    )


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
        same += [control.model(b["image"], b["audio"]) for b in (batch, changed)]  # as when it was loaded
    assert all(torch.equal(logits, same[0]) for logits in same) and not torch.allclose(*differ)
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


@pytest.mark.usefixtures("undrawn")
def test_a_run_on_flickr_soundnet(shapes, tmp_path):
    write_flickr_soundnet(tmp_path / "data", shapes, names=tuple("abcdef"))
    assert run(tmp_path / "run", data=tmp_path / "data", modalities="image", test_share=0.2) == 0
    results = json.loads((tmp_path / "run/results.json").read_text())
    assert "control" in results["task"] and results["coverage"]["expected"] == 3
    assert results["conditions"].keys() == {"grey_picture"}  # it never hears anything


@pytest.mark.usefixtures("undrawn")
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


# --- over time ----------------------------------------------------------------------------------------------

FRAMES = InputSettings(image_size=32, mel_bins=32, audio_seconds=1.0, hop=500, image_frames=4)
NEAR = {  # which of 4 columns of audio tokens are around each of so many frames of the same second
    1: [(0, 1, 2, 3)],
    2: [(0, 1), (2, 3)],
    3: [(0,), (1, 2), (3,)],
    4: [(0,), (1,), (2,), (3,)],
    5: [(0,), (1,), (1, 2), (2,), (3,)],
    8: [(0,), (0,), (1,), (1,), (2,), (2,), (3,), (3,)],
    14: [(0,)] * 3 + [(0, 1)] + [(1,)] * 3 + [(2,)] * 3 + [(2, 3)] + [(3,)] * 3,
}


def localizer(interactions="dense", pair_bias="time", **options) -> Localizer:
    """Of 4 frames of 4 x 4 tokens and 4 rows of 4 columns of audio tokens, random in float64."""
    torch.manual_seed(0)
    encoder = AVEncoder(
        make_vit((3, 32, 32)),
        make_vit((1, 32, 32)),
        interactions=interactions,
        pair_bias=pair_bias,
        fusion_tokens=4,
        inputs=FRAMES,
        **options,
    )
    return randomized(Localizer(encoder, dim=8))


def film(frames=4, batch=2):
    torch.manual_seed(1)
    return torch.randn(batch, frames, 3, 32, 32).double(), torch.randn(batch, 1, 32, 32).double()


def by_hand(model, tokens, clip, frame, place, columns):
    """The logit of one place of one frame: its cosine with the mean of the audio tokens in these columns."""
    heard = [4 * row + column for row in range(4) for column in columns]
    sound = model.audio_head(sum(tokens.audio[clip, n] for n in heard) / len(heard))
    seen = model.image_head(tokens.image[clip, frame, place])
    cosine = (seen * sound).sum() / (seen.square().sum() * sound.square().sum()).sqrt()
    return (model.scale * cosine + model.offset).item()


@pytest.mark.parametrize("frames", NEAR)
@torch.no_grad()
def test_maps_are_of_cosines_with_the_sound_around_each_frame(frames):
    model, (image, audio) = localizer(), film(frames)
    logits, tokens = model(image, audio), model.encoder(image, audio)
    assert logits.shape == (2, frames, 4, 4)
    for clip in range(2):
        for frame, columns in enumerate(NEAR[frames]):
            for place in range(16):
                truth = by_hand(model, tokens, clip, frame, place, columns)
                assert abs(logits[clip, frame, place // 4, place % 4].item() - truth) < 1e-12
    alone = torch.cat([model(image[n : n + 1], audio[n : n + 1]) for n in range(2)])
    assert relative_error(alone, logits) < 1e-12


@torch.no_grad()
def test_absent_sound_is_not_looked_at():
    model, (image, audio) = localizer(), film()
    silent = torch.tensor([True, False])
    logits = model(image, audio, silent)
    other = torch.stack([audio[0], torch.full_like(audio[1], torch.nan)])
    assert torch.equal(model(image, other, silent), logits) and logits.isfinite().all()
    tokens = model.encoder(image, audio, audio_present=silent)
    for frame, columns in enumerate(NEAR[4]):
        for place in range(16):
            truth = by_hand(model, tokens, 1, frame, place, columns)
            assert abs(logits[1, frame, place // 4, place % 4].item() - truth) < 1e-12
    assert relative_error(model(image, audio)[0], logits[0]) < 1e-12
    assert relative_error(model(image, audio)[1], logits[1]) > 1e-3


@torch.no_grad()
def test_weights_of_one_frame_say_the_same_of_one_frame():
    torch.manual_seed(0)
    inputs = replace(FRAMES, image_frames=1)
    one = AVEncoder(make_vit((3, 32, 32)), make_vit((1, 32, 32)), fusion_tokens=4, inputs=inputs)
    of_one = randomized(Localizer(one, dim=8))
    several = Localizer(of_one.encoder.with_frames(4, pair_bias="time"), dim=8).double().eval()
    several.load_state_dict(several.state_dict() | of_one.state_dict())
    image, audio = film(1)
    assert relative_error(several(image, audio)[:, 0], of_one(image[:, 0], audio)) < 1e-12
    for name, attention in zip(("cosines", "attention"), several.look(image, audio), strict=True):
        still = dict(zip(("cosines", "attention"), of_one.look(image[:, 0], audio), strict=True))[name]
        assert relative_error(attention[:, 0], still) < 1e-12, name


@pytest.mark.parametrize("frames", [2, 3, 8, 20, 64, 100])
def test_what_is_around_a_frame_has_its_time(frames):
    """Of audio tokens that hold their times; those of filter banks of 10 s go on for 0.24 s, of zeros."""
    inputs = InputSettings.audiomae(image_size=32, image_frames=frames)
    image, audio = make_vit((3, 32, 32), depth=1), make_vit((1, 128, 1024), patch_size=16, depth=1)
    model = Localizer(AVEncoder(image, audio, inputs=inputs))
    times = audio_times(inputs, audio.patch_embed)
    assert times[-1] > 10
    around = model.around(times[None, :, None], frames)[0, :, 0]
    assert (around - torch.tensor(inputs.frame_times)).abs().max() <= 0.08 + 1e-4  # half a token
    assert around.diff().min() >= 0


@pytest.mark.parametrize("interactions", ["dense", "factorized", "token", "joint", "cross", "none"])
def test_gradients_of_several_frames_reach_the_encoder(interactions):
    model = localizer(interactions, pair_bias="time" if interactions == "dense" else False)
    model(*film()).square().mean().backward()
    for name in "image.patch_embed.proj.weight", "audio.patch_embed.proj.weight", "frame_embed":
        gradient = model.encoder.get_parameter(name).grad
        assert gradient.isfinite().all() and gradient.abs().max() > 0, name
    if interactions == "dense":
        assert model.encoder.fusion_blocks["0"].time_bias.table.grad.abs().max() > 0


@pytest.mark.parametrize("interactions", ["dense", "bilinear", "factorized", "token"])
def test_attention_over_all_frames_is_that_of_the_encoder(interactions):
    model, (image, audio) = localizer(interactions, pair_bias=False), film(3)
    logits, attention = model.look(image, audio)
    weights, _ = model.encoder.fusion_attention(image, audio)
    assert attention.shape == logits.shape == (2, 3, 4, 4)
    assert relative_error(attention.flatten(1), weights.mean((1, 2))) < 1e-12
    if interactions != "token":  # where image and audio share one softmax
        assert relative_error(attention.sum((1, 2, 3)), torch.ones(2).double()) < 1e-12


def test_a_saved_localizer_of_several_frames_says_the_same(tmp_path):
    model, (image, audio) = localizer().float(), film()
    model.save_pretrained(tmp_path / "model")
    loaded = avfuse.load(tmp_path / "model")
    assert type(loaded) is Localizer and loaded.encoder.frames == 4
    assert torch.equal(loaded(image.float(), audio.float()), model(image.float(), audio.float()))


@pytest.fixture(scope="module")
def films(tmp_path_factory):
    root = tmp_path_factory.mktemp("synchrony")
    options = dict(scene="synchrony", train=4, test=4, size=64, workers=1, progress=False)
    return sounding_shapes.generate(root, **options)


@pytest.fixture
def over_time(films, tmp_path, monkeypatch):
    """Settings of a small run on scenes of synchrony."""
    monkeypatch.setitem(presets.SIZES, "tiny", (16, 2, 2, INPUTS))
    common = dict(data=films, run=tmp_path / "run", checkpoint="none", frames=4, pair_bias="time")
    return LocalizeConfig(**common, epochs=2, warmup_epochs=0, batch_size=2, workers=0, min_steps=0)


@torch.no_grad()
def test_every_frame_is_judged_at_its_own_time(over_time):
    found = Localization.find(over_time, lambda _: None)
    assert found.coverage == dict(train=(160, 160), test=(4, 4)) and len(found.test) == 4
    task = Localization(over_time, found)
    task.model.double().eval()
    dataset = task.dataset(found.test, train=False)
    batch = collate([dataset[n] for n in range(4)], dataset.blank)
    inputs = {name: x.double() if x.is_floating_point() else x for name, x in task.inputs(batch).items()}
    assert task.counts(inputs) == dict(map_loss=4 * 4 * 224 * 224)
    logits, attention = task.model.look(inputs["image"], inputs["audio"])
    rows = task.judge(task.model, inputs, batch)
    for clip, entry in enumerate(sounding_shapes.read_manifest(over_time.data, "test")):
        _, boxes = sounding_shapes.load_masks(over_time.data, entry)
        for n, number in enumerate((8, 16, 23, 31)):  # 0.875, 1.625, 2.375, 3.125 s, ten a second
            x0, y0, x1, y1 = (int(3.5 * edge) for edge in boxes[0, number])
            truth = torch.zeros(1, 224, 224)
            truth[0, y0:y1, x0:x1] = 1
            assert torch.equal(inputs["sounding"][clip, n], truth[0].double())
            assert rows[clip]["area"][n] == truth.double().mean().item()
            assert rows[clip]["best"][n] == consensus_iou(best_map(truth), truth).item()
            for prefix, maps in ("", logits), ("attention_", attention):
                shown = resized(maps[clip, n][None], (224, 224))
                assert rows[clip][f"{prefix}ciou"][n] == consensus_iou(shown, truth).item()
                assert rows[clip][f"{prefix}pointing"][n] == pointing(shown, truth).item()
    metrics = task.summarize(rows)
    frames = [{name: value[n] for name, value in row.items()} for row in rows for n in range(4)]
    assert metrics == pytest.approx(task.summarize(frames))  # as of so many pictures
    loss = task.losses(task.model, inputs)["map_loss"]
    odds = resized(logits, (224, 224)).double().sigmoid()
    right = torch.where(inputs["sounding"] > 0, odds, 1 - odds)
    assert loss.item() == pytest.approx(-right.log().mean().item(), rel=1e-5)


def test_the_control_of_several_frames_hears_nothing(over_time):
    found = Localization.find(over_time, lambda _: None)
    control = Localization(replace(over_time, modalities="image"), found)
    dataset = control.dataset(found.test, train=False)
    batch = collate([dataset[n] for n in range(2)], dataset.blank)
    changed = batch | dict(audio=torch.randn_like(batch["audio"]))
    inputs = control.inputs(batch)
    assert not inputs["audio"].any()
    with torch.no_grad():
        same = [control.model.eval()(**model_inputs(control.inputs(b))) for b in (batch, changed)]
    assert torch.equal(*same)


def test_a_batch_of_several_frames_without_clips_counts_nothing(over_time):
    task = Localization(over_time, found := Localization.find(over_time, lambda _: None))
    blank = task.dataset(found.train, train=True).blank
    inputs = task.inputs(collate([Failure(0, "x", "gone")], blank))
    assert task.counts(inputs) == dict(map_loss=0)
    assert task.losses(task.model, inputs)["map_loss"].isfinite()


@pytest.mark.parametrize("modalities", ["both", "image"])
def test_a_run_over_time_from_end_to_end(over_time, modalities, tmp_path):
    config = replace(over_time, modalities=modalities)
    assert program(config, Localization) == 0
    results = json.loads((config.run / "results.json").read_text())
    assert "; 4 frames of each clip" in results["protocol"]
    assert results["coverage"] == dict(judged=4, expected=4)
    model = load_model(Localizer, config.run)
    assert weights_hash(model) == results["weights_sha256"]
    assert (model.encoder.frames, model.encoder.settings["pair_bias"]) == (4, "time")
    assert all(0 <= value <= 1 for value in results["metrics"].values())
    pictures = sorted(path.name for path in (config.run / "pictures").glob("*.png"))
    assert pictures == ["localization-000000.png", "localization-000004.png"]
    for frames, end in (1, "audio_head; not taken: positions of frames"), (8, "which is all there is"):
        more = replace(config, run=tmp_path / str(frames), checkpoint=str(config.run), frames=frames)
        said = []
        task = set_up(more, Localization).task
        task.begin(said.append)
        assert task.model.encoder.frames == frames
        assert "image_head" in said[0] and said[0].endswith(end)


@pytest.mark.usefixtures("undrawn")
def test_a_run_over_time_resumes_with_the_losses_of_one_that_went_through(over_time, tmp_path):
    config = replace(over_time, checkpoint_every=1, keep_checkpoints=9)
    train(set_up(config, Localization))
    part = replace(config, run=tmp_path / "part")
    shutil.copytree(config.run, part.run)
    for later in list_checkpoints(part.run)[:-2]:  # the newest first: those of the first two steps are left
        shutil.rmtree(later)
    train(set_up(part, Localization))
    whole, resumed = (
        {row["step"]: row["loss"] for row in read_rows(run / "metrics.jsonl") if "loss" in row}
        for run in (config.run, part.run)
    )
    assert len(whole) == 4 and resumed == whole
    hashes = [weights_hash(load_model(Localizer, run)) for run in (config.run, part.run)]
    assert hashes[0] == hashes[1]


def test_flickr_soundnet_has_single_frames(shapes, tmp_path):
    write_flickr_soundnet(tmp_path / "data", shapes, names=tuple("abcdef"))
    message = run(tmp_path / "run", data=tmp_path / "data", frames=2, test_share=0.2)
    assert "image_frames must be 1 for Flickr-SoundNet" in message and "got 2" in message


def test_the_answer_of_several_frames_is_a_map_of_each_and_when(films, tmp_path):
    model = localizer().float()
    path = next((films / "test").glob("*.mp4"))
    answer = model.predict(path, start=0.5)
    image, audio = avfuse.read_clip(path, FRAMES, start=0.5)
    with torch.no_grad():
        logits = model(image, audio)
    assert answer["map"].shape == (4, 32, 32) and answer["moments"].shape == (4,)
    for n in range(4):
        assert relative_error(answer["map"][n], resized(logits[:, n].sigmoid(), (32, 32))[0]) < 1e-6
        assert answer["moments"][n] == answer["map"][n].max()
    with pytest.raises(ValueError, match="it has no sound, and both are needed"):
        model.predicted(image, None)

    model.save_pretrained(tmp_path / "model")
    out, looks = tmp_path / "answers.json", tmp_path / "looks"
    config = PredictConfig(str(tmp_path / "model"), (path,), every=2.0, out=out, pictures=looks)
    assert predict(config) == 0
    said = json.loads(out.read_text())
    assert [window["start"] for window in said] == [0.0, 2.0]
    for window in said:
        again = model.predict(path, start=window["start"])
        assert torch.tensor(window["moments"]).allclose(again["moments"])
        assert torch.tensor(window["map"]).allclose(again["map"])
    assert len(list(looks.glob("*.png"))) == 2
    assert all(Image.open(look).width > 600 for look in looks.iterdir())  # four frames side by side


def test_strips_show_every_frame_and_when(over_time, monkeypatch, tmp_path):
    drawn = []
    monkeypatch.setattr("avfuse.tasks.localize.save", lambda *saved: drawn.append(saved) or save(*saved))
    task = Localization(over_time, found := Localization.find(over_time, lambda _: None))
    dataset = task.dataset(found.test, train=False)
    batch = collate([dataset[n] for n in range(4)], dataset.blank)
    inputs = task.inputs(batch)
    with torch.no_grad():
        task.draw(tmp_path, task.model.eval(), inputs, batch, 7)
        logits, attention = task.model.look(inputs["image"], inputs["audio"])
    ((figure, path),) = drawn
    assert path == tmp_path / "localization-000007.png" and Image.open(path).width > 600
    assert len(figure.axes) == 3 * 6  # frames, two maps with a curve each, and sound, of three clips
    for clip in range(3):
        frames, cosines, likely, looks, share, sound = figure.axes[6 * clip : 6 * clip + 6]
        assert [axis.get_title() for axis in (frames, sound)] == ["frames", "sound"]
        assert frames.images[0].get_array().shape == (64, 4 * 64, 3)
        for axis, maps in (cosines, logits), (looks, attention):
            shown = resized(maps[clip], (224, 224))
            places = [divmod(int(map_.argmax()), 224) for map_ in shown]
            crosses = [tuple(line.get_xydata()[0]) for line in axis.lines]
            assert crosses == [(224 * n + x + 0.5, y + 0.5) for n, (y, x) in enumerate(places)]
            inside = [bool(batch["sounding"][clip, n][place]) for n, place in enumerate(places)]
            assert [line.get_color() for line in axis.lines] == ["w" if there else "r" for there in inside]
        heights = [axis.patches[0].get_data().values for axis in (likely, share)]
        np.testing.assert_allclose(heights[0], logits[clip].sigmoid().amax((1, 2)), rtol=1e-6)
        np.testing.assert_allclose(heights[1], 4 * attention[clip].sum((1, 2)), rtol=1e-5)
        assert likely.get_xlim() == share.get_xlim() == (0, 3) and likely.get_ylim() == (0, 1)
