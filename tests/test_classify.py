"""Classification against the released classifier's outputs, torchmetrics and hand counts."""

import json
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from models import make_encoder, make_inputs, relative_error
from safetensors import SafetensorError, safe_open
from trees import vggsound
from videos import write_video

from avfuse import InputSettings, create_encoder, load_encoder, read_clip
from avfuse.data import container, decode
from avfuse.data.class_folders import labelled, with_classes
from avfuse.data.clips import Clip, ClipDataset, collate
from avfuse.data.container import Part
from avfuse.data.find import Found
from avfuse.data.table import ClipTable
from avfuse.features import FEATURES
from avfuse.files import read_rows
from avfuse.loading import load_model
from avfuse.tasks.classifier import Classifier, load_classifier
from avfuse.tasks.classify import (
    Classification,
    ClassifyConfig,
    MultiWindowDataset,
    accuracy,
    average,
    check_label,
    confusion,
    linear_probe,
    mix,
    parse,
    ranking_metrics,
)
from avfuse.tasks.localize import Localizer
from avfuse.tasks.segment import Segmenter
from avfuse.tasks.separator import Separator
from avfuse.training.judge import judge_all, weights_hash
from avfuse.training.loop import program, set_up, train
from avfuse.training.report import write_report
from avfuse.training.run_folder import former_settings
from avfuse.training.settings import checked, learning_rate, schedule_of
from avfuse.training.starts import first_encoder, with_drop_path
from avfuse.training.task import Run
from avfuse.weight_files import write_safetensors

GOLDEN = Path(__file__).parent / "golden" / "classifier.safetensors"


def find_labelled(folder, class_list=None) -> Found:
    config = ClassifyConfig(checkpoint="none", data=folder, class_list=class_list, workers=0)
    return Classification.find(config, lambda _: None)


def make_classifier(classes=5, **options) -> Classifier:
    classifier = Classifier(make_encoder(), classes, **options).double()
    for name in classifier.features:  # fresh heads are all but 0
        torch.nn.init.normal_(getattr(classifier, f"{name}_head").weight)
    return classifier


# --- model --------------------------------------------------------------------------------------------------


@pytest.fixture
def golden():
    """Weights, settings, number of classes and tensors of the released classifier."""
    with safe_open(GOLDEN, "pt") as file:
        config = json.loads(file.metadata()["config"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    weights = {n.removeprefix("weights/"): t for n, t in tensors.items() if n.startswith("weights/")}
    classes = config.pop("num_classes")
    assert config.pop("input_norm")
    return weights, config, classes, tensors


def test_gives_the_released_logits(golden):
    weights, config, classes, tensors = golden
    classifier = load_classifier(weights, config=config)
    output = classifier(tensors["inputs/image"], tensors["inputs/audio"])
    released = {name: tensors[f"outputs/{name}_logits"] for name in FEATURES}
    for name in FEATURES:
        assert output.heads[name].shape == (2, classes)
        assert relative_error(output.heads[name], released[name]) < 1e-5, name
    assert relative_error(output.logits, sum(released.values()) / 3) < 1e-5


@pytest.mark.parametrize(
    "change, problem",
    [
        ({1: torch.zeros(2)}, "must hold tensors by name"),
        ({"image_head.weight": torch.tensor(1.0)}, "image_head.weight"),
        ({"other": torch.zeros(2)}, "other"),
    ],
)
def test_what_is_no_released_classifier_is_refused(golden, change, problem):
    weights, config, *_ = golden
    with pytest.raises(ValueError, match=problem):
        load_classifier(weights | change, config=config)


@pytest.mark.parametrize("features", [("image",), ("fusion", "audio"), FEATURES])
@pytest.mark.parametrize("batch_norm", [False, True])
def test_logits_do_not_depend_on_the_batch(features, batch_norm):
    classifier = make_classifier(features=features, batch_norm=batch_norm)
    image, audio = make_inputs(4)
    classifier.train()(image, audio)  # statistics that are not 0 and 1
    classifier.eval()
    whole = classifier(image, audio).logits
    single = torch.cat([classifier(image[n : n + 1], audio[n : n + 1]).logits for n in range(4)])
    heads = classifier(image, audio).heads
    assert set(heads) == set(features)
    assert relative_error(whole, sum(heads.values()) / len(features)) < 1e-12
    assert relative_error(single, whole) < 1e-12
    there = torch.ones(4, dtype=torch.bool)
    deaf = classifier(image, None, image_present=there, audio_present=there)  # of what is not given
    assert torch.equal(deaf.logits, classifier(image, None).logits)


@pytest.mark.parametrize("batch_norm", [False, True])
def test_an_absent_modality_is_as_if_it_had_not_been_given(batch_norm):
    classifier = make_classifier(batch_norm=batch_norm).eval()
    image, audio = make_inputs(3)
    there = torch.tensor([True, False, True])
    mixed = classifier(image, audio, audio_present=there)
    whole, alone = classifier(image, audio), classifier(image, None)
    assert relative_error(mixed.logits[[0, 2]], whole.logits[[0, 2]]) < 1e-12
    assert relative_error(mixed.logits[1], alone.logits[1]) < 1e-12
    assert relative_error(alone.logits, (alone.heads["image"] + alone.heads["fusion"]) / 2) < 1e-12
    nothing = classifier(image, audio, ~there & False, ~there & False)
    assert not nothing.logits.any() and not nothing.read["fusion"].any()


def test_statistics_are_those_of_the_clips_that_have_the_modality():
    there = torch.tensor([True, False, True, True])
    image, audio = make_inputs(4)
    running = []
    for noise in 0.0, 100.0:
        torch.manual_seed(1)
        classifier = make_classifier(batch_norm=True, frozen=True).train()
        classifier(image, audio + noise * ~there.view(-1, 1, 1, 1), audio_present=there)
        running.append(classifier.audio_norm.running_mean.clone())
    assert running[0].any() and torch.equal(*running)


def test_a_frozen_encoder_stays_as_it_is():
    classifier = Classifier(with_drop_path(make_encoder().float(), 0.5), 3, batch_norm=True, frozen=True)
    before = {name: w.clone() for name, w in classifier.encoder.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in classifier.parameters() if p.requires_grad], lr=1.0)
    image, audio = make_inputs(4, torch.float32)
    classifier.train()
    assert not any(module.training for module in classifier.encoder.modules())
    classifier(image, audio).logits.square().sum().backward()
    optimizer.step()
    assert all(torch.equal(w, before[n]) for n, w in classifier.encoder.state_dict().items())
    assert classifier.image_norm.running_mean.any()  # of the heads, they are learned
    mean = classifier.image_norm.running_mean.clone()
    classifier.eval()(image, audio)
    assert torch.equal(mean, classifier.image_norm.running_mean)


def test_blocks_are_dropped_at_the_rate_of_the_run_not_of_its_checkpoint(tmp_path):
    with_drop_path(create_encoder("tiny"), 0.4).save_pretrained(tmp_path)
    config = ClassifyConfig(checkpoint=str(tmp_path))
    x = torch.randn(2, 3, 96, 96), torch.randn(2, 1, 64, 128)
    for rate, varies in (0.0, False), (0.2, True):
        encoder = first_encoder(config, rate).train()
        assert encoder.to_config()["drop_path"] == rate
        once, again = encoder(*x), encoder(*x)
        assert all(torch.equal(a, b) != varies for a, b in zip(once[:3], again[:3], strict=True))


def test_one_clip_alone_can_be_trained_on():
    classifier = make_classifier(batch_norm=True).train()
    assert classifier(*make_inputs(1)).logits.isfinite().all()


@pytest.mark.parametrize("features", ["image", (), ("image", "image"), ("text",)])
def test_wrong_features_are_refused(features):
    with pytest.raises(ValueError, match="features"):
        Classifier(make_encoder(), 3, features=features)


# --- loss ---------------------------------------------------------------------------------------------------


def test_mixup_mixes_both_modalities_alike():
    image, audio = torch.eye(4).view(4, 1, 2, 2), torch.eye(4).view(4, 1, 4, 1)
    target = torch.arange(4)
    torch.manual_seed(3)
    inputs, soft = mix(dict(image=image, audio=audio), target, 4, alpha=0.8, smoothing=0.0)
    torch.manual_seed(3)
    again, _ = mix(dict(image=image, audio=audio), target, 4, alpha=0.8, smoothing=0.0)
    weights = soft.diagonal()
    for n in range(4):  # the pictures are one-hot too, and so must be mixed like the targets
        assert torch.allclose(inputs["image"][n].flatten(), soft[n])
        assert torch.allclose(inputs["audio"][n].flatten(), soft[n])
        assert soft[n, 3 - n] == pytest.approx(1 - weights[n].item(), abs=1e-6)
    assert len(weights.unique()) == 4 and torch.equal(again["image"], inputs["image"])


def test_clips_with_different_modalities_are_not_mixed():
    inputs = dict(image=torch.randn(4, 3, 2, 2), audio=torch.randn(4, 1, 2, 2))
    inputs["audio_present"] = torch.tensor([True, True, True, False])
    mixed, soft = mix(inputs, torch.arange(4), 4, alpha=1.0, smoothing=0.0)
    assert torch.equal(mixed["image"][[0, 3]], inputs["image"][[0, 3]]) and soft[0, 0] == soft[3, 3] == 1
    assert not torch.equal(mixed["image"][1], inputs["image"][1])


def test_targets_are_smoothed():
    _, soft = mix({}, torch.tensor([1]), 4, alpha=0.0, smoothing=0.2)
    assert soft.tolist()[0] == pytest.approx([0.05, 0.85, 0.05, 0.05])
    _, soft = mix({}, torch.tensor([[1.0, 0.0]]), 2, alpha=0.0, smoothing=0.2)
    assert soft.tolist()[0] == pytest.approx([0.9, 0.1])


# --- metrics ------------------------------------------------------------------------------------------------


def test_accuracy_by_hand():
    scores = torch.tensor([[1.0, 2.0], [3.0, 1.0], [-torch.inf, -torch.inf], [0.0, 1.0]])
    assert accuracy(scores, torch.tensor([1, 1, 0, 1])) == 0.5  # what could not be read is wrong
    assert accuracy(torch.zeros(3, 1), torch.zeros(3, dtype=torch.long)) == 1.0  # one class


def mean_of_ranks(metric, scores, target, classes):
    """The mean over classes of a metric of torchmetrics. Of logits it takes the sigmoid, which makes large
    ones ties: it is given ranks.
    """
    from torchmetrics.functional import classification  # a second to import

    metric = getattr(classification, metric)
    ranks = [scores[:, c].unique(return_inverse=True)[1].double() / len(scores) for c in classes]
    return np.mean([metric(r, target[:, c]).item() for r, c in zip(ranks, classes, strict=True)])


def test_ranking_metrics_against_torchmetrics():
    scores, target = torch.randn(60, 7), (torch.rand(60, 7) < 0.3).long()
    target[:, 2], target[:, 5] = 0, 1  # no positive clip; no negative one
    metrics = ranking_metrics(scores, target)
    kept = [0, 1, 3, 4, 5, 6]
    precision = mean_of_ranks("binary_average_precision", scores, target, kept)
    area = mean_of_ranks("binary_auroc", scores, target, [c for c in kept if c != 5])
    assert metrics["mAP"] == pytest.approx(precision, abs=1e-6)
    assert metrics["AUC"] == pytest.approx(area, abs=1e-6)
    assert metrics["classes_without_positives"] == metrics["classes_without_negatives"] == 1
    assert torch.special.ndtr(torch.tensor(metrics["d_prime"] / 2**0.5)).item() == pytest.approx(area, 1e-5)


@pytest.mark.parametrize("shift, scale", [(60, 10), (-800, 10), (1, 1e-6), (0, 0)])
def test_ranking_metrics_look_at_the_order_alone(shift, scale):
    """Of logits whose sigmoids are the same, too; all the same (scale 0) is no better than chance."""
    logits, target = torch.randn(50, 3, dtype=torch.float64), (torch.rand(50, 3) < 0.3).long()
    metrics, scores = ranking_metrics(shift + scale * logits, target), (scale > 0) * logits
    precision = mean_of_ranks("binary_average_precision", scores, target, range(3))
    area = mean_of_ranks("binary_auroc", scores, target, range(3))
    assert (metrics["mAP"], metrics["AUC"]) == (pytest.approx(precision), pytest.approx(area))


def test_infinite_logits_rank_first_and_last():
    inf, target = torch.inf, torch.tensor([[1, 1], [0, 1], [0, 1]])
    found = ranking_metrics(torch.tensor([[inf, 0.0], [3e38, inf], [-inf, -inf]]), target)
    assert (found["mAP"], found["AUC"]) == (1.0, 1.0)
    alone = ranking_metrics(torch.zeros(1, 2).bfloat16(), torch.tensor([[1, 0]]))
    assert (alone["mAP"], alone["AUC"]) == (1.0, None)


def test_logits_that_are_no_numbers_rank_last():
    target = torch.tensor([[1], [0], [0], [1]])
    ranked = [ranking_metrics(torch.tensor([[2.0], [1.0], [0.0], [x]]), target) for x in (-9.0, torch.nan)]
    assert ranked[0] == ranked[1] and ranked[0]["mAP"] == pytest.approx((1 + 2 / 4) / 2)


def test_ranking_metrics_of_too_little():
    perfect = ranking_metrics(torch.tensor([[9.0], [-9.0]]), torch.tensor([[1], [0]]))
    assert (perfect["mAP"], perfect["AUC"], perfect["d_prime"]) == (1.0, 1.0, None)
    nothing = ranking_metrics(torch.randn(3, 2), torch.zeros(3, 2))
    assert (nothing["mAP"], nothing["AUC"], nothing["classes_without_positives"]) == (None, None, 2)


# --- data ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two classes, in train/ and test/."""
    root = tmp_path_factory.mktemp("clips")
    for split, count in ("train", 4), ("test", 3):
        for number in range(count):
            write_video(root / split / ("bird", "cat")[number % 2] / f"{number}.mp4", 4.0)
    return root


def test_sub_folders_are_classes(folder, tmp_path):
    found = find_labelled(folder)
    for clips in found.train, found.test:  # a list of them takes more than ten times the memory
        assert isinstance(clips, ClipTable) and clips.classes == found.classes and clips.root == folder
    listed = with_classes(found._replace(test=[*found.test], classes={}), folder).test
    assert [clip.root for clip in listed] == 3 * [folder], "which no clip may lead out of"
    assert found.classes == {"class": ("bird", "cat")}
    assert [(c.path.parent.name, c.labels["class"]) for c in found.test] == [("bird", 0)] * 2 + [("cat", 1)]
    names = tmp_path / "classes.txt"
    names.write_text("ant\ncat\nbird\n")
    assert find_labelled(folder, names).train[0].labels["class"] == 2
    names.write_text("ant\ncat\n")
    with pytest.raises(ValueError, match="'bird', which is none of ant, cat"):
        find_labelled(folder, names)


@pytest.mark.parametrize(
    "content, problem",
    [
        (b"", "names none"),
        (b"\n \n", "names none"),
        (b"cat\nbird\ncat\n", "more than once: cat"),
        (b"caf\xe9\n", "cannot be read"),
        (None, "cannot be read"),
    ],
)
def test_class_lists_that_are_none_are_refused(folder, tmp_path, content, problem):
    names = tmp_path / "classes.txt"
    if content is not None:
        names.write_bytes(content)
    with pytest.raises(ValueError, match=f"--class-list .*{problem}"):
        find_labelled(folder, names)


def test_a_class_list_may_begin_with_a_byte_order_mark(folder, tmp_path):
    names = tmp_path / "classes.txt"
    names.write_text("bird\r\ncat\r\n", encoding="utf-8-sig")
    assert find_labelled(folder, names).classes["class"] == ("bird", "cat")


def test_a_class_list_of_data_with_labels_is_that_of_one_of_them():
    found = Found([], [], "", [], 0, {"kind": ("cat", "bird")})
    assert with_classes(found, None) is with_classes(found, None, ("cat", "bird")) is found
    with pytest.raises(ValueError, match="--class-list is that of no label of this data set"):
        with_classes(found, None, ("bird", "cat"))


def test_an_address_without_labels_has_no_classes():
    found = Found([Clip(Path("https://host/data/a.mp4"))], [], "", [], 1, {})
    with pytest.raises(ValueError, match="is no folder here, whose sub-folders"):
        with_classes(found, Path("https://host/data"))


def test_clips_of_one_class_teach_nothing(folder):
    found = find_labelled(folder)
    birds = found._replace(train=[clip for clip in found.train if clip.labels["class"] == 0])
    with pytest.raises(ValueError, match="--data has clips to train on of no class but 'bird'"):
        Classification(ClassifyConfig(checkpoint="none"), birds)


def test_shards_of_a_plain_folder_have_no_classes(folder):
    clip = Clip(folder / "train-000000.tar" / "0.mp4", part=Part(folder / "train-000000.tar", 0, 9))
    with pytest.raises(ValueError, match="is in a shard of a plain folder"):
        labelled(clip, folder, {"bird": 0})


def test_labels_that_do_not_fit_are_refused():
    clip = Clip(Path("a.mp4"), {"kind": 3})
    found = Found([clip], [clip], "", [], 1, {"kind": ("a", "b")})
    with pytest.raises(ValueError, match="a.mp4 has 3, of 2 classes"):
        check_label(found, "")
    with pytest.raises(ValueError, match="--label must be one of kind, got 'hue'"):
        check_label(found, "hue")
    alone = Found([clip], [clip], "", [], 1, {"kind": ("train",)})
    with pytest.raises(ValueError, match="no two classes to tell apart: the label 'kind' is always 'train'"):
        check_label(alone, "")


def test_windows_are_evenly_spaced(folder):
    settings = InputSettings(image_size=32, mel_bins=16, hop=375)
    clip = Clip(folder / "test" / "bird" / "0.mp4", {"class": 0})
    (one,), three = MultiWindowDataset([clip], settings), MultiWindowDataset([clip], settings, windows=3)[0]
    middle = ClipDataset([clip], settings, train=False)[0]
    assert torch.equal(one["image"][0], middle["image"]) and torch.equal(one["audio"][0], middle["audio"])
    assert three["image"].shape == (3, 3, 32, 32) and three["audio"].shape == (3, 1, 16, 128)
    assert torch.equal(three["audio"][1], middle["audio"])
    levels = three["image"].mean((1, 2, 3))  # frames grow lighter with time
    assert levels[0] < levels[1] < levels[2]
    assert (levels[2] - levels[1]).item() == pytest.approx((levels[1] - levels[0]).item(), rel=0.1)


@pytest.mark.parametrize("frames", [1, 3])
def test_windows_are_those_of_single_calls_out_of_one_open_file(tmp_path, monkeypatch, frames):
    path, opened, decoded = write_video(tmp_path / "a.mp4", 5.3), [], []
    settings = InputSettings(image_size=32, mel_bins=16, hop=375, image_frames=frames)
    starts = [n * 2.3 / 9 for n in range(10)]
    single = [read_clip(path, settings, start=start) for start in starts]
    really_open, really_decode = container.open_file, decode.ClipReader._decode_run
    monkeypatch.setattr(container, "open_file", lambda *args: opened.append(args) or really_open(*args))
    monkeypatch.setattr(
        decode.ClipReader, "_decode_run", lambda *args: decoded.append(args) or really_decode(*args)
    )
    item = MultiWindowDataset([Clip(path, {"class": 0})], settings, windows=10)[0]
    assert len(opened) == len(decoded) == 1  # one pass over the pictures of all windows
    assert torch.equal(item["image"], torch.cat([clip.image for clip in single]))
    assert torch.equal(item["audio"], torch.cat([clip.audio for clip in single]))


@pytest.mark.parametrize("several", [False, True])
def test_averages_of_probabilities_against_their_definition(several):
    logits = 4 * torch.randn(10, 3, 5, dtype=torch.float64)
    odds = (lambda x: x.sigmoid()) if several else (lambda x: x.softmax(-1))
    assert torch.equal(average(logits, "logits", several=several), logits.mean(0))
    mean = average(logits, "probabilities", several=several)
    torch.testing.assert_close(odds(mean), odds(logits).mean(0))
    torch.testing.assert_close(odds(average(logits[:1], "probabilities", several=several)), odds(logits[0]))
    large = torch.tensor([[[400.0, 200.0]], [[300.0, 200.0]]])  # whose probabilities are 1 and 0 in float32
    first, second = average(large, "probabilities", several=several)[0].tolist()
    assert -torch.inf < second < first < torch.inf


# --- program ------------------------------------------------------------------------------------------------


def test_batch_norm_of_one_clip_in_each_process_is_refused(folder, tmp_path, monkeypatch):
    """Which has no statistics: the heads would be trained, and judged, without any standardisation."""

    def four_processes(config, clips, *_):
        return schedule_of(config, clips, processes=4)

    monkeypatch.setattr("avfuse.training.loop.schedule_of", four_processes)
    config = linear_probe()
    config.checkpoint, config.data, config.run = "none", folder, tmp_path / "run"
    config.batch_size, config.workers = 4, 0
    with pytest.raises(ValueError, match="--batch-norm needs more than one clip at once, and each process"):
        set_up(config, Classification)
    assert not config.run.exists()


def test_running_statistics_are_averaged_as_weights_are(folder, tmp_path):
    config = linear_probe()
    config.checkpoint, config.data, config.run = "none", folder, tmp_path / "run"
    config.batch_size, config.workers, config.ema = 4, 0, 0.75
    run = set_up(config, Classification)
    run.lock.close()
    for mean in 1.0, 5.0:
        run.task.model.image_norm.running_mean.fill_(mean)
        run.average.update_parameters(run.task.model)
    assert (run.average.module.image_norm.running_mean == 0.75 * 1 + 0.25 * 5).all()


@pytest.mark.parametrize("probe", [False, True])
def test_a_run_leaves_a_classifier_and_its_results(folder, tmp_path, probe):
    config = linear_probe() if probe else ClassifyConfig()
    config.checkpoint, config.data, config.run = "none", folder, tmp_path / "run"
    config.epochs, config.warmup_epochs, config.workers, config.batch_size = 1, 0, 0, 4
    config.test_windows, config.seed = 2, 1
    run = set_up(config, Classification)
    task = run.task
    before = {n: w.clone() for n, w in task.model.encoder.state_dict().items()}
    assert train(run) == 0
    changed = [n for n, w in task.model.encoder.state_dict().items() if not torch.equal(w, before[n])]
    assert bool(changed) != probe
    results = json.loads((config.run / "results.json").read_text())
    assert results["coverage"] == dict(judged=3, expected=3) and "2 windows" in results["protocol"]
    assert "given image and audio" in results["protocol"]
    assert ("linear probe with BatchNorm" if probe else "fine-tuning, ") in results["protocol"]
    names = [f"accuracy_{n}_head" for n in FEATURES] + ["accuracy_image_input", "accuracy_audio_input"]
    assert set(results["metrics"]) == {
        "accuracy",
        *names,
        "standard_error",
        "interval_low",
        "interval_high",
        "chance",
        "clips",
        *(f"confusion_{name}" for name in ("image", "audio", "each")),
    }
    tested = results["conditions"]
    assert set(tested) == {"silence", "noise", "other_sound", "grey_picture"}
    assert all(set(of) == {"accuracy", "judged"} and of["judged"] == 3 for of in tested.values())
    assert results["metrics"]["chance"] == pytest.approx(2 / 3)
    assert (config.run / "pictures" / "predictions-000001.png").exists()
    card = (config.run / "model/README.md").read_text()
    assert "| the sound of another clip |" in card and "| wrong by both, right by image alone |" in card
    assert "Hearing and seeing, tested" in (config.run / "index.html").read_text()
    assert sum("conditions" in row for row in read_rows(config.run / "metrics.jsonl")) == 1  # at the end
    assert "In the order of the outputs: bird; cat." in card and "| most frequent class | 0.6667 |" in card
    assert "| measured on | 3 " in card and str(tmp_path) not in card
    of = {result.metric_name: result for result in ModelCard(card).data.eval_results}
    assert of["accuracy"].metric_value == results["metrics"]["accuracy"]
    assert of["accuracy"].dataset_split == results["split"] and "clips" not in of
    assert of["accuracy"].dataset_args == dict(coverage="3 of 3", protocol=results["protocol"])
    config.checkpoint = str(config.run)
    assert task.facts(1, 3, results["metrics"], [])["recipe"]["checkpoint"] == "run"
    loaded = load_classifier(config.run)
    assert loaded.class_names == ("bird", "cat")
    item = task.dataset(run.found.test, train=False)[0]
    task.model.eval()
    assert (
        relative_error(
            loaded(item["image"], item["audio"]).logits, task.model(item["image"], item["audio"]).logits
        )
        < 1e-6
    )


VGG_SECONDS = 5.3


@pytest.fixture(scope="module")
def vgg(tmp_path_factory):
    """VGGSound, of clips in which windows differ."""
    root = tmp_path_factory.mktemp("vggsound")
    sources = [write_video(root / f"sources/{n}.mp4", VGG_SECONDS, fps=8 + n) for n in range(5)]
    return vggsound(root / "data", sources)


def judged(data, run_folder, **options) -> tuple[dict, list[dict], Run]:
    """Fine-tuning of a step: its results.json, the rows of the test clips, and the run."""
    config = ClassifyConfig(checkpoint="none", data=data, run=run_folder, workers=0, batch_size=3, **options)
    config.epochs, config.warmup_epochs = 1, 0
    run = set_up(config, Classification)
    assert train(run) == 0
    rows = [row for row, _ in judge_all(run, run.task.model)[0].values()]
    return json.loads((run_folder / "results.json").read_text()), rows, run


@pytest.mark.parametrize("what", ["logits", "probabilities"])
@pytest.mark.usefixtures("undrawn")
def test_ten_windows_are_the_average_of_ten_calls(vgg, tmp_path, what):
    results, rows, run = judged(vgg, tmp_path / "run", test_windows=10, average=what)
    model, hits, clips = load_classifier(tmp_path / "run"), 0, run.found.test
    assert len(rows) == len(clips) == 2
    for row, clip in zip(rows, clips, strict=True):
        total = {"": 0, "image_input": 0, "audio_input": 0}
        for n in range(10):
            read = read_clip(clip.path, model.encoder.inputs, start=n * (VGG_SECONDS - 3) / 9)
            for name, inputs in (
                ("", read),
                ("image_input", (read.image, None)),
                ("audio_input", (None, read.audio)),
            ):
                with torch.no_grad():
                    logits = model(*inputs).logits[0]
                total[name] += (logits if what == "logits" else logits.softmax(0)) / 10
        for name, by_hand in total.items():
            ours = torch.from_numpy(row[name])
            torch.testing.assert_close(
                ours if what == "logits" else ours.softmax(0), by_hand, atol=1e-5, rtol=1e-4
            )
        hits += total[""].argmax().item() == clip.labels["class"]
    assert results["metrics"]["accuracy"] == hits / 2
    protocol = f"10 windows of 3.0 s, {what} averaged, middle frame"
    card, page = (tmp_path / "run/model/README.md").read_text(), write_report(tmp_path / "run").read_text()
    assert results["protocol"].endswith(protocol) and protocol in card and protocol in page


@pytest.mark.usefixtures("undrawn")
def test_results_differ_by_the_windows_alone(vgg, tmp_path):
    kinds = {"1": {}, "10": dict(test_windows=10)}
    found = {name: judged(vgg, tmp_path / name, **options)[0] for name, options in kinds.items()}
    for results in found.values():
        results.pop("date")
    assert found["1"]["protocol"].endswith("; 1 window of 3.0 s, middle frame")
    others = [found[name] | dict(protocol="", metrics={}, conditions={}) for name in ("1", "10")]
    assert others[0] == others[1] and found["1"]["protocol"] != found["10"]["protocol"]
    assert found["1"]["metrics"].keys() == found["10"]["metrics"].keys()


def save_as_before(folder, model, options):
    """The model of a task as it was saved once: its encoder, and a file with the head and its options."""
    model.encoder.save_pretrained(folder)
    head = {name: t for name, t in model.state_dict().items() if not name.startswith("encoder.")}
    write_safetensors(folder / "head.safetensors", head, dict(options=json.dumps(options)))


def test_models_of_before_are_read(tmp_path):
    model = Localizer(create_encoder("tiny"))
    save_as_before(tmp_path / "model", model, dict(dim=128))
    loaded = load_model(Localizer, tmp_path)
    assert weights_hash(loaded) == weights_hash(model)
    assert weights_hash(load_encoder(tmp_path)) == weights_hash(model.encoder)
    with pytest.raises(ValueError, match="head.safetensors is not that of a Classifier"):
        load_classifier(tmp_path)
    save_as_before(tmp_path / "model", model, dict(dim=64))
    with pytest.raises(ValueError, match="do not fit Localizer"):
        load_model(Localizer, tmp_path)
    model.encoder.save_pretrained(tmp_path / "encoder" / "model")
    with pytest.raises(ValueError, match="head.safetensors cannot be read"):
        load_classifier(tmp_path / "encoder")


def test_models_of_tasks_are_saved_and_loaded_whole(tmp_path):
    model = Classifier(
        create_encoder("tiny"), 3, features=("audio", "fusion"), class_names="abc", frozen=True
    )
    model.facts = dict(recipe=dict(epochs=3))
    model.save_pretrained(tmp_path / "model")
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == [
        *("README.md", "config.json", "model.safetensors"),
    ]
    for loaded in load_model(Classifier, tmp_path), Classifier.from_pretrained(tmp_path / "model"):
        assert weights_hash(loaded) == weights_hash(model) and not loaded.training
        assert loaded.features == ("audio", "fusion") and loaded.class_names == ("a", "b", "c")
        assert loaded.facts == model.facts
    assert weights_hash(load_encoder(tmp_path)) == weights_hash(model.encoder)
    with pytest.raises(ValueError, match="holds a model of class Classifier, not Localizer"):
        load_model(Localizer, tmp_path)
    with pytest.raises(ValueError, match="is no file, no folder and no name on the hub"):
        load_model(Localizer, tmp_path / "nowhere" / "else")
    card = (tmp_path / "model" / "README.md").read_text()
    assert "# Audio-visual classifier" in card and "| epochs | 3 |" in card
    assert 'avfuse.tasks.classifier.Classifier.from_pretrained("FOLDER_OR_NAME")' in card
    for kind in Classifier, Localizer, Segmenter, Separator:  # what the cards say to import
        assert getattr(import_module(kind.home), kind.__name__) is kind


def test_names_of_classes_are_as_many_as_classes():
    with pytest.raises(ValueError, match="class_names must name all 3 classes, got 2"):
        Classifier(create_encoder("tiny"), 3, class_names=("bird", "cat"))


def test_confusion_by_hand():
    """Five clips of class 0: right by both, by all but both, by the image, by the sound, and by nothing."""
    right = {
        "": [1, 0, 0, 0, 0],
        "image_input": [1, 1, 1, 0, 0],
        "audio_input": [0, 1, 0, 1, 0],
    }
    scores = {name: torch.tensor([[float(hit), 0.5] for hit in hits]) for name, hits in right.items()}
    scores["audio_input"][4] = -torch.inf  # it has no sound
    target = torch.zeros(5).long()
    found = confusion(scores, target)
    assert found == {
        f"confusion_{name}": pytest.approx(n / 5) for name, n in dict(image=2, audio=2, each=1).items()
    }
    rows = [
        dict(target=t, **{n: s[i].numpy() for n, s in scores.items()}) for i, t in enumerate(target.numpy())
    ]
    task = Classification.__new__(Classification)
    task.is_multi_label = False
    assert task.summarize(rows).items() >= found.items()
    alone = [{name: row[name] for name in ("target", "")} for row in rows]  # a model of one modality
    assert not any(name.startswith("confusion") for name in task.summarize(alone))


@pytest.fixture
def short(folder, tmp_path):
    """Settings of a run of one step."""
    config = ClassifyConfig(checkpoint="none", data=folder, run=tmp_path / "run")
    config.epochs, config.warmup_epochs, config.workers, config.batch_size = 1, 0, 0, 4
    return config


@pytest.mark.usefixtures("undrawn")
def test_a_model_is_saved_though_no_test_clip_can_be_read(short, monkeypatch):
    monkeypatch.setattr("avfuse.training.judge.judge_all", lambda run, model: ({}, []))
    assert program(short, Classification) == 0
    assert load_classifier(short.run).classes == 2 and not (short.run / "results.json").exists()


@pytest.mark.parametrize("error", [OSError("No space left"), SafetensorError("No space left")])
@pytest.mark.usefixtures("undrawn")
def test_a_model_that_cannot_be_saved_is_an_error(short, monkeypatch, error):
    def full_disk(*_):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr("avfuse.pretrained.write_safetensors", full_disk)
        assert "No space left" in program(short, Classification)
    assert program(short, Classification) == 0  # the same command goes on
    assert (short.run / "results.json").exists()


@pytest.mark.parametrize("modalities", ["both", "image", "audio"])
def test_the_model_knows_what_has_taught_it(folder, modalities):
    config = ClassifyConfig(data=folder, checkpoint="none", modalities=modalities)
    task = Classification(config, Classification.find(config, lambda _: None))
    assert task.model.settings["modalities"] == modalities


def test_clips_with_several_classes_and_batches_without_any(folder):
    classes = {"class": ("a", "b", "c")}
    clips = ClipTable([Clip(folder / "a.mp4", {"class": (0, 2)})], classes=classes)
    found = Found(clips, clips, "", [], 1, classes)
    task = Classification(ClassifyConfig(checkpoint="none"), found)
    blank = task.inputs(collate([], task.dataset(clips, train=True).blank))
    assert task.counts(blank) == dict(class_loss=0)
    loss = task.losses(task.model.train(), blank)["class_loss"]
    loss.backward()
    assert loss == 0
    rows = [
        {"target": np.array(t, np.float32), "": np.array(s), "image_input": np.array(s)}
        for t, s in (([1, 0, 1], [2.0, 1.0, -1.0]), ([0, 0, 1], [1.0, 3.0, 1.0]))
    ]
    metrics = task.summarize(rows)
    assert metrics["mAP"] == metrics["mAP_image_input"] == 1.0 and metrics["classes_without_positives"] == 1


def test_windows_have_two_spellings_and_runs_of_before_keep_theirs():
    assert parse(["--windows", "3"]).test_windows == parse(["--test-windows", "3"]).test_windows == 3
    with pytest.raises(ValueError, match="windows must be positive, got 0"):
        ClassifyConfig(test_windows=0)
    before = dict(settings=dict(test_windows=10))
    assert former_settings(ClassifyConfig(), before)["average"] == "logits"
    assert "test_windows" not in former_settings(ClassifyConfig(), before)


def test_presets_are_the_published_settings():
    tuned, probe = (checked(parse)(["--preset", f"vggsound-{name}"]) for name in ("finetune", "probe"))
    assert (learning_rate(tuned, 512), learning_rate(probe, 128)) == (6e-4, 1e-4)
    assert (tuned.epochs, tuned.test_windows, tuned.average, tuned.probe) == (100, 10, "logits", False)
    assert (probe.epochs, probe.test_windows, probe.probe, probe.batch_norm) == (50, 1, True, True)
    paper = checked(parse)(
        ["--preset=vggsound-finetune", "--epochs=50", "--batch-size=128", "--base-lr=2e-4"]
    )
    assert (learning_rate(paper, 128), paper.epochs, paper.layer_decay) == (1e-4, 50, 0.75)


def test_the_command_line_has_defaults_for_both_protocols():
    assert parse(["--probe"]) == linear_probe() and parse(["--mixup", "0"]).mixup == 0
    with pytest.raises(ValueError, match="--batch-norm needs more than one clip"):
        ClassifyConfig(batch_norm=True, micro_batch=1)
    with pytest.raises(ValueError, match="--drop-path 0.2 has no effect"):
        ClassifyConfig(probe=True, drop_path=0.2)
    with pytest.raises(ValueError, match="--average probabilities has no effect on one window"):
        ClassifyConfig(average="probabilities")
    for wrong in dict(probe=False), dict(probe=True, scene="synchrony"):
        with pytest.raises(ValueError, match="--preset vggsound-probe decides about --probe, .* no --scene"):
            ClassifyConfig(preset="vggsound-probe", **wrong)
    with pytest.raises(ValueError, match="cannot be read from --modalities image"):
        ClassifyConfig(features=("audio",), modalities="image")
