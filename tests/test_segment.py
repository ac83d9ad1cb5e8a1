"""Segmentation: both protocols by hand, against torchmetrics and scikit-learn, and what the model may use."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from scene_trees import SHAPES, write_avsbench
from sklearn.metrics import fbeta_score, jaccard_score

from avfuse.data import sounding_shapes
from avfuse.data.clips import Failure, collate
from avfuse.data.find import Found
from avfuse.data.sounding_shapes.truths import SHAPE_CLASSES
from avfuse.inputs import InputSettings
from avfuse.loading import load_model
from avfuse.presets import create_encoder
from avfuse.tasks.localize import Localization, LocalizeConfig
from avfuse.tasks.scenes import model_inputs, show_map
from avfuse.tasks.segment import (
    Segmentation,
    SegmentConfig,
    Segmenter,
    avsbench_iou,
    both_iou,
    class_mean,
    class_scores,
    colour,
    f_curve,
    highest_of_mean,
    mean_iou,
    mean_of_highest,
    mean_over_videos,
)
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


def task_of(**options) -> Segmentation:
    config = SegmentConfig(**dict(checkpoint="none", target="binary") | options)
    return Segmentation(config, Found([], [], "test", [], 0, dict(shape=SHAPE_CLASSES)))


def find_scenes(folder) -> Found:
    return Segmentation.find(SegmentConfig(checkpoint="none", data=folder), lambda _: None)


@pytest.fixture
def batch(shapes):
    """Six pictures as evaluation reads them."""
    whole = find_scenes(shapes)
    dataset = task_of().dataset(whole.train + whole.test, train=False)
    return collate([dataset[index] for index in range(6)], dataset.blank)


def picture(*rows: str) -> torch.Tensor:
    """(1, H, W): "#" sounds"""
    return torch.tensor([[[pixel == "#" for pixel in row] for row in rows]])


def random_pictures(count=12, size=20):
    """Probabilities and truths, among them ones without anything that sounds."""
    torch.manual_seed(0)
    truth = torch.rand(count, size, size) < torch.rand(count, 1, 1) / 2
    truth[::4] = False
    prob = (0.5 * truth + torch.randn(count, size, size) * 0.4 + 0.2).sigmoid()
    prob[1] = 0.0  # nothing is called sounding
    prob[2] = 1.0  # everything is
    prob[4] = 0.1  # nothing sounds, and nothing is called so
    return prob, truth


# --- IoU, two protocols -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "pred, truth, avsbench, both",
    [
        (("##..", "...."), ("##..", "...."), 1, (1, 1)),
        (("##..", "...."), (".##.", "...."), 1 / 3, (5 / 7, 1 / 3)),
        (("....", "...."), ("##..", "...."), 0, (6 / 8, 0)),  # all background: the protocols differ most
        (("####", "####"), ("##..", "...."), 2 / 8, (0, 2 / 8)),
        (("#...", "...."), ("....", "...."), 7 / 8, (math.nan, math.nan)),  # nothing sounds
        (("....", "...."), ("....", "...."), 1, (math.nan, math.nan)),
        (("####", "####"), ("####", "####"), 1, (math.nan, 1)),
    ],
)
def test_iou_by_hand(pred, truth, avsbench, both):
    pred, truth = picture(*pred).float(), picture(*truth)
    assert avsbench_iou(pred, truth).item() == pytest.approx(avsbench)
    assert both_iou(pred, truth)[0].tolist() == pytest.approx(both, nan_ok=True)


def test_the_mean_of_what_counts():
    iou = torch.tensor([[0.5, 0.25], [math.nan, 1.0], [math.nan, math.nan]])
    assert mean_iou(iou) == pytest.approx((0.5 + 0.625) / 2)  # of each kind over its own pictures
    assert mean_iou(iou[2:]) == 0 and mean_iou(torch.tensor([0.5, 1.0])) == 0.75


def released(prob, truth) -> tuple[float, float]:
    """The steps of DeepAVFusion's `AVSegmEvaluator` for one class: its mIoU and F."""
    ious, classes, scores = [], [], []
    for p, t in zip(prob, truth, strict=True):
        if not t.any():
            continue
        called = p > 0.5
        both = np.array([(~called & ~t).sum(), (called & t).sum()])
        either = np.array([(~called | ~t).sum(), (called | t).sum()])
        ious.append(both / (either + 1e-10))
        classes.append(either > 0)
        best = 0.0
        for threshold in np.linspace(0, 1 - 1e-10, 256, dtype=np.float32):
            right, all_called = (t & (p >= threshold)).sum(), (p >= threshold).sum()
            precision, recall = right / (all_called + 1e-10), right / (t.sum() + 1e-10)
            best = max(best, 1.3 * precision * recall / (0.3 * precision + recall + 1e-10))
        scores.append(best)
    return np.mean(np.sum(ious, axis=0) / np.sum(classes, axis=0)), np.mean(scores)


def test_the_released_protocol_is_that_of_its_program():
    prob, truth = random_pictures(count=20)
    truth[5:9], truth[9], prob[9] = False, True, 1.0  # silent, and all called sounding
    iou, f = released(prob.numpy(), truth.numpy())
    assert mean_iou(both_iou(prob, truth)) == pytest.approx(iou, abs=1e-6)
    assert mean_of_highest(f_curve(prob, truth, "deepavfusion")) == pytest.approx(f, abs=1e-6)


def test_half_is_silence():
    assert avsbench_iou(torch.full((1, 2, 2), 0.5), picture("..", "..")).item() == 1


def test_iou_is_that_of_the_libraries():
    from torchmetrics.functional import jaccard_index  # a second to import

    prob, truth = random_pictures()
    both = both_iou(prob, truth)
    for p, t, ours, mine in zip(prob, truth, avsbench_iou(prob, truth), both, strict=True):
        pred = p > 0.5
        if t.any():
            assert ours.item() == pytest.approx(jaccard_score(t.flatten(), pred.flatten(), zero_division=0))
        else:
            assert ours.item() == pytest.approx((~pred).double().mean().item())
        expected = jaccard_index(pred.long(), t.long(), task="multiclass", num_classes=2, average="macro")
        assert mine.isnan().all() if not t.any() else mine.mean().item() == pytest.approx(expected.item())


# --- F, two protocols ---------------------------------------------------------------------------------------


def test_f_curve_is_that_of_scikit_learn():
    prob, truth = random_pictures()
    prob[3] = (prob[3] * 254).round() / 254  # pixels that lie on the thresholds
    curves = f_curve(prob, truth, "avsbench")
    assert curves.shape == (12, 255)
    for number in (1, 2, 3, 5, 6):
        for place in (0, 1, 64, 127, 200, 253, 254):
            called = prob[number] >= torch.linspace(0, 1, 255)[place]
            expected = fbeta_score(
                truth[number].flatten(), called.flatten(), beta=math.sqrt(0.3), zero_division=0
            )
            assert curves[number, place].item() == pytest.approx(expected, abs=1e-6), (number, place)
    assert curves[0].isnan().all() and curves[4].isnan().all()  # nothing sounds


def test_the_protocols_differ_in_where_they_take_the_maximum():
    truth = picture("#.", "..").repeat(2, 1, 1)
    prob = torch.tensor(
        [[[0.9, 0.8], [0.8, 0.8]], [[0.3, 0.2], [0.2, 0.2]]]
    )  # right above .8, right above .2
    curves = f_curve(prob, truth, "avsbench")
    assert mean_of_highest(curves) == pytest.approx(1)
    # one threshold for both: from .8 to .9 the first is right and the second finds nothing; or from .2 to .3
    # the second is right, while of the first a quarter of what is called sounding is: P = 1/4, R = 1
    both = (1 + 1.3 / 4 / (0.3 / 4 + 1)) / 2
    assert highest_of_mean(curves) == pytest.approx(both)


def official(prob, truth, videos) -> tuple[float, float]:
    """The steps of AVSBench's test program, one video at a time: its mean IoU and F."""
    ious, scores = [], []
    for video in dict.fromkeys(videos):
        curves, iou = [], []
        for p, t in ((p, t) for p, t, of in zip(prob, truth, videos, strict=True) if of == video):
            called, pixels = p > 0.5, p.size
            both, either = (called & t).sum(), (called | t).sum()
            if not t.any():
                both, either = (~called & ~t).sum(), pixels
            iou.append(both / (either + 1e-7))
            at = [p >= threshold for threshold in np.linspace(0, 1 - 1e-10, 255, dtype=np.float32)]
            precision = np.array([(called & t).sum() / (called.sum() + 1e-20) for called in at])
            recall = np.array([(called & t).sum() / (t.sum() + 1e-20) for called in at])
            with np.errstate(invalid="ignore"):
                f = 1.3 * precision * recall / (0.3 * precision + recall)
            curves += [np.where(np.isnan(f), 0, f)] if t.any() else []
        ious.append(np.mean(iou))
        scores.append(np.mean(curves, axis=0).max() if curves else 0.0)
    return np.mean(ious), np.mean(scores)


def test_official_f_is_that_of_each_video():
    prob, truth = random_pictures(count=20)
    videos = np.repeat(np.arange(4), 5)
    truth[5:10] = False  # a video in which nothing sounds
    iou, f = official(prob.numpy(), truth.numpy(), videos)
    assert avsbench_iou(prob, truth).mean().item() == pytest.approx(iou, abs=1e-6)
    curves = f_curve(prob, truth, "avsbench")
    assert mean_over_videos(curves, torch.from_numpy(videos)) == pytest.approx(f, abs=1e-6)
    assert mean_over_videos(curves, torch.arange(20)) == pytest.approx(
        mean_of_highest(curves) * truth.flatten(1).any(1).double().mean().item()
    )
    assert mean_over_videos(curves, torch.zeros(20)) == pytest.approx(highest_of_mean(curves))


def test_pictures_in_which_nothing_sounds_leave_f_alone():
    prob, truth = random_pictures()
    curves = f_curve(prob, truth, "avsbench")
    sounding = truth.flatten(1).any(1)
    assert highest_of_mean(curves) == highest_of_mean(curves[sounding]) > 0
    assert mean_of_highest(curves) == mean_of_highest(curves[sounding]) >= highest_of_mean(curves)
    assert highest_of_mean(curves[~sounding]) == mean_of_highest(curves[~sounding]) == 0


# --- classes ------------------------------------------------------------------------------------------------


def test_class_scores_are_those_of_scikit_learn():
    torch.manual_seed(0)
    truth = torch.randint(0, 4, (6, 10, 10))
    pred = torch.where(torch.rand(6, 10, 10) < 0.6, truth, torch.randint(0, 5, (6, 10, 10)))
    pred[3], truth[4] = 0, 0
    iou, f, seen = class_scores(pred, truth, 6)
    for number in range(6):
        options = dict(labels=list(range(6)), average=None, zero_division=0)
        true, called = truth[number].flatten(), pred[number].flatten()
        np.testing.assert_allclose(iou[number], jaccard_score(true, called, **options))
        np.testing.assert_allclose(
            f[number], fbeta_score(true, called, beta=math.sqrt(0.3), **options), atol=1e-12
        )
        present = set(true.tolist()) | set(called.tolist())
        assert {label for label, there in enumerate(seen[number]) if there} == present
    assert not seen[:, 5].any()


def test_class_mean_by_hand():
    pred = torch.tensor([[[0, 0, 1, 1]], [[0, 0, 0, 0]]])
    truth = torch.tensor([[[0, 1, 1, 1]], [[0, 0, 2, 2]]])
    iou, f, seen = class_scores(pred, truth, 4)
    # background: 1/2 and 2/4, in two pictures; class 1: 2/3, in one; class 2: 0, in one; class 3: nowhere
    assert class_mean(iou, seen) == pytest.approx(((1 / 2 + 1 / 2) / 2 + 2 / 3 + 0 + 0) / 4)
    background = 1.3 * 0.5 * 1 / (0.3 * 0.5 + 1)  # P = 1/2, R = 1, in both
    assert class_mean(f, seen) == pytest.approx((background + 1.3 * (2 / 3) / (0.3 + 2 / 3)) / 4)


# --- model --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("outputs", [1, 7])
def test_segmenter(outputs):
    model = Segmenter(encoder(), outputs, dim=8).eval()
    image, audio = torch.randn(3, 3, 64, 64), torch.randn(3, 1, 32, 64)
    with torch.no_grad():
        logits = model(image, audio)
        assert logits.shape == (3, outputs, 64, 64)
        alone = torch.cat([model(image[n : n + 1], audio[n : n + 1]) for n in range(3)])
        torch.testing.assert_close(alone, logits, atol=1e-5, rtol=1e-5)
        assert not torch.allclose(model(image, audio.flip(0)), logits)


@pytest.mark.parametrize("interactions", ["dense", "factorized", "token", "joint", "cross", "none"])
def test_gradients_reach_the_encoder(interactions):
    model = Segmenter(encoder(interactions=interactions), dim=8)
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


def test_the_decoder_keeps_places():
    model = Segmenter(encoder(), dim=8).eval()
    tokens = torch.zeros(1, 16, 2, 2, requires_grad=True)
    upper = model.decoder[:1](tokens)  # one token in, two pixels out
    (gradient,) = torch.autograd.grad(upper[0, :, 0, 3].sum(), tokens)  # top right, its norm apart
    assert gradient[0, :, 0, 1].abs().sum() > gradient[0, :, 1, 0].abs().sum()


# --- task ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, dict(protocol="deepavfusion"), dict(target="semantic")])
def test_batches_do_not_change_the_rows(batch, options):
    task = task_of(**options)
    task.model.eval()
    with torch.no_grad():
        rows = task.judge(task.model, task.inputs(batch), batch)
        for index, row in enumerate(rows):
            alone = {
                name: value[index : index + 1] for name, value in batch.items() if torch.is_tensor(value)
            }
            (judged,) = task.judge(task.model, task.inputs(alone), alone)
            for name, value in row.items():
                np.testing.assert_allclose(judged[name], value, atol=2e-3, err_msg=name)
    summary = task.summarize(rows)
    assert {"miou", "f_score"} <= summary.keys() and all(0 <= value <= 1 for value in summary.values())


def test_losses_by_hand(batch):
    for options in ({}, dict(target="semantic")):
        task = task_of(**options)
        task.model.eval()
        inputs = task.inputs(batch) | dict(classes=batch["classes"][:, :96, :96])
        with torch.no_grad():
            logits = task.model(**model_inputs(inputs))
            loss = task.losses(task.model, inputs)["mask_loss"]
        if task.semantic:
            right = logits.softmax(1).gather(1, inputs["classes"][:, None])
        else:
            right = torch.where(inputs["classes"] > 0, logits[:, 0].sigmoid(), 1 - logits[:, 0].sigmoid())
        torch.testing.assert_close(loss, -right.log().mean())


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


@pytest.mark.parametrize("target", ["binary", "semantic"])
def test_a_batch_without_clips_counts_nothing(shapes, target):
    task = task_of(target=target)
    scenes = find_scenes(shapes).train
    blank = task.dataset(scenes, train=True).blank
    inputs = task.inputs(collate([Failure(0, "x", "gone")], blank))
    assert task.counts(inputs) == dict(mask_loss=0)
    loss = task.losses(task.model, inputs)["mask_loss"]
    (0 * loss).backward()
    assert loss.isfinite()


def run(folder, **options):
    settings = dict(epochs=1, warmup_epochs=0, batch_size=2, workers=0, checkpoint="none", run=folder)
    config = SegmentConfig(**settings | dict(target="binary") | options)
    return program(config, Segmentation)


@pytest.mark.parametrize("target", ["binary", "semantic"])
def test_a_run_from_end_to_end(shapes, tmp_path, target):
    assert run(tmp_path / "run", data=shapes, target=target) == 0
    results = json.loads((tmp_path / "run/results.json").read_text())
    assert results["protocol"].startswith("avsbench") and results["coverage"] == dict(judged=3, expected=3)
    assert results["task"] == f"{target} segmentation"
    assert weights_hash(load_model(Segmenter, tmp_path / "run")) == results["weights_sha256"]
    assert all(0 <= value <= 1 for value in results["metrics"].values())
    assert results["conditions"].keys() == set(CONDITIONS)
    names = {"miou", "f_score"} | ({"miou_without_background"} if target == "semantic" else set())
    assert all(of.keys() == names | {"judged"} for of in results["conditions"].values())
    pictures = sorted(path.name for path in (tmp_path / "run/pictures").glob("*.png"))
    assert pictures == ["segmentation-000000.png", "segmentation-000001.png"]
    card = (tmp_path / "run/model/README.md").read_text()
    assert "| measured on | 3 held-out clips |" in card and str(tmp_path) not in card
    assert ("| all called sounding |" in card) == (target == "binary")
    assert ("outputs: background; circle; square;" in card) == (target == "semantic")


@pytest.mark.usefixtures("undrawn")
def test_runs_on_avsbench(shapes, tmp_path):
    write_avsbench(tmp_path / "data", shapes)
    assert run(tmp_path / "a", data=tmp_path / "data", protocol="deepavfusion") == 0
    results = json.loads((tmp_path / "a/results.json").read_text())
    assert results["protocol"].startswith("deepavfusion: central picture, 224 x 224")
    assert results["coverage"]["expected"] == 15  # each picture of each clip
    assert "AVSBench S4 test" in results["split"]
    assert "video_f_score" not in results["metrics"]
    assert run(tmp_path / "c", data=tmp_path / "data") == 0
    metrics = json.loads((tmp_path / "c/results.json").read_text())["metrics"]
    assert metrics["video_f_score"] >= metrics["f_score"]  # a maximum for each of three videos, or for all
    assert run(tmp_path / "b", data=tmp_path / "data", target="semantic", subset="AVSS") == 0
    results = json.loads((tmp_path / "b/results.json").read_text())
    assert "mean over 7 classes with background" in results["protocol"]


@pytest.mark.usefixtures("undrawn")
def test_a_class_list_that_does_not_match_stops_the_run(shapes, tmp_path):
    write_avsbench(tmp_path / "data", shapes)
    (tmp_path / "data/label2idx.json").write_text(json.dumps(dict(background=1)))
    assert "more than --max-unreadable" in run(tmp_path / "run", data=tmp_path / "data", target="semantic")
    quarantine = (tmp_path / "run/quarantine.jsonl").read_text()
    assert "while there are 1" in quarantine


@pytest.mark.usefixtures("undrawn")
def test_masks_that_are_missing_stop_a_run_unless_allowed(shapes, tmp_path):
    uids = write_avsbench(tmp_path / "data", shapes)
    (tmp_path / f"data/v1s/{uids[4]}/labels_semantic/1.png").unlink()
    assert "more than --max-unreadable" in run(tmp_path / "a", data=tmp_path / "data")
    assert run(tmp_path / "b", data=tmp_path / "data", max_unreadable=0.5) == 0
    results = json.loads((tmp_path / "b/results.json").read_text())
    assert results["coverage"] == dict(judged=14, expected=15)
    assert "labels_semantic/1.png" in (tmp_path / "b/quarantine.jsonl").read_text()


@pytest.mark.parametrize("kind", [Segmentation, Localization])
def test_images_need_not_be_square(shapes, tmp_path, kind):
    """Wide ones are trained on, judged as the protocol says, and keep their shape in the pictures."""
    torch.manual_seed(0)
    wide = create_encoder("tiny", inputs=replace(INPUTS, image_size=(32, 64)))
    wide.save_pretrained(tmp_path / "encoder")
    config = dict(checkpoint=str(tmp_path / "encoder"), data=shapes, run=tmp_path / "run", workers=0)
    config |= dict(epochs=1, warmup_epochs=0, batch_size=2)
    assert program((SegmentConfig if kind is Segmentation else LocalizeConfig)(**config), kind) == 0
    results = json.loads((tmp_path / "run/results.json").read_text())
    assert all(0 <= value <= 1 for value in results["metrics"].values())
    axis, frame = Figure().subplots(), torch.zeros(32, 64, 3).numpy()
    show_map(axis, torch.zeros(224, 224), frame)
    axis.figure.draw_without_rendering()
    box = axis.get_window_extent()
    assert box.width == pytest.approx(2 * box.height)


def test_mistakes_are_explained(tmp_path):
    assert "neither Sounding Shapes nor AVSBench" in run(tmp_path / "run", data=tmp_path)
    with pytest.raises(ValueError, match="--protocol deepavfusion does not define --target semantic"):
        SegmentConfig(target="semantic", protocol="deepavfusion")
    with pytest.raises(ValueError, match="dim"):
        SegmentConfig(dim=0)
    with pytest.raises(ValueError, match="--missing keep: each annotated picture needs its sound"):
        SegmentConfig(missing="keep")


def test_no_two_classes_have_colours_alike():
    """Not the 70 of AVSBench either; and those of Sounding Shapes are apart for who cannot see green, too
    (matrix: Machado et al., 2009).
    """
    colours = torch.tensor([colour(label) for label in range(1, 71)], dtype=torch.float64)
    assert torch.pdist(colours).min() > 0.01
    blind = [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.01182, 0.04294, 0.968881]]
    shapes = colours[: len(SHAPE_CLASSES) - 1]
    for seen in shapes, shapes @ torch.tensor(blind, dtype=torch.float64).T:
        assert torch.pdist(seen).min() > 0.2
