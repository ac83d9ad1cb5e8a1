"""Retrieval against brute force, and its run from end to end, with one process and with two."""

import json
import math
import shutil
from contextlib import nullcontext

import pytest
import torch
from forked import run_together
from torch.nn.functional import cosine_similarity, layer_norm
from videos import write_video

from avfuse import create_encoder, read_clip
from avfuse.data.find import Found
from avfuse.tasks import retrieve
from avfuse.tasks.classify import Task
from avfuse.tasks.retrieve import Retrieval, RetrieveConfig, apart, cross_recalls, named_neighbours, recalls
from avfuse.training.judge import judge_all
from avfuse.training.loop import program, set_up
from avfuse.training.neighbours import nearest_neighbour_probes, neighbours, rows_there

PAIRS = "image_to_audio_recall", "audio_to_image_recall", "pair_chance"


def make_features(clips=12):
    features = {name: torch.randn(clips, 5) for name in ("image", "audio", "fusion")}
    return features | dict(label_kind=torch.arange(clips) % 3)


def test_recall_against_brute_force():
    features = make_features()
    labels, metrics = features["label_kind"].tolist(), recalls(features, [1, 4])
    for name in "image", "audio", "fusion", "sum":
        names = ["image", "audio", "fusion"] if name == "sum" else [name]
        for k in 1, 4:
            hits = 0
            for query in range(12):
                cosines = sum(cosine_similarity(features[f][query], features[f], dim=1) for f in names)
                ranked = [n for n in cosines.argsort(descending=True).tolist() if n != query]
                hits += any(labels[n] == labels[query] for n in ranked[:k])
            assert metrics[f"kind_recall@{k}_{name}"] == pytest.approx(hits / 12)


def test_recall_at_1_is_the_probe():
    features = make_features(30)
    probes, metrics = nearest_neighbour_probes(features)["kind"], recalls(features, [1])
    for name, probe in probes.items():
        assert metrics[f"kind_recall@1_{name}"] == probe["accuracy"]
        assert metrics["kind_recall@1_chance"] == probe["chance"]


def test_recall_across_modalities_by_hand_count():
    """Cosines of three images (rows) with three sounds: the own one is nearest to 1 image of 3, and among the
    two nearest to 2; to 2 sounds of 3, and to all."""
    image, audio = torch.eye(3), torch.tensor([[0.9, 0.3, 0.1], [0.5, 0.4, 0.2], [0.95, 0.5, 0.15]])
    metrics = cross_recalls(image, audio, [1, 2, 3, 4])
    cosines = [[cosine_similarity(i, a, dim=0).item() for a in audio] for i in image]
    for way, table in ("image_to_audio", cosines), ("audio_to_image", [*zip(*cosines, strict=True)]):
        for k in 1, 2, 3:
            hits = sum(sorted(row, reverse=True).index(row[n]) < k for n, row in enumerate(table))
            assert metrics[f"{way}_recall@{k}"] == hits / 3
    assert [metrics[f"pair_chance@{k}"] for k in (1, 2, 3)] == [1 / 3, 2 / 3, 1] and len(metrics) == 9


def test_features_that_are_all_alike_find_nothing():
    same = torch.ones(8, 4)
    assert cross_recalls(same, same, [1])["image_to_audio_recall@1"] == 0
    broken = cross_recalls(torch.full((4, 3), math.nan), torch.randn(4, 3), [1])
    assert broken["image_to_audio_recall@1"] == broken["audio_to_image_recall@1"] == 0


def test_recall_across_modalities_of_random_features_is_chance(monkeypatch):
    monkeypatch.setattr("avfuse.tasks.retrieve.AT_ONCE", 300)
    metrics = cross_recalls(torch.randn(1000, 16), torch.randn(1000, 16), [100])
    for way in "image_to_audio", "audio_to_image":  # 0.1 +- 4 standard errors
        assert metrics[f"{way}_recall@100"] == pytest.approx(metrics["pair_chance@100"], abs=0.038)


@pytest.mark.parametrize("layers", ["all", (1,), "none"])
def test_features_apart_know_of_one_modality_alone(layers):
    encoder = create_encoder("micro", fusion_layers=layers).eval()
    image, audio = (torch.randn(3, 2, *shape) for shape in encoder.input_shapes.values())
    present = dict.fromkeys(("image_present", "audio_present"), torch.ones(3, dtype=torch.bool))
    with torch.no_grad():
        own = apart(encoder, image, audio, **present)
        deaf = apart(encoder, image, torch.randn_like(audio), **present)
        blind = apart(encoder, torch.randn_like(image), audio, **present)
    assert torch.equal(own["image_alone"], deaf["image_alone"])
    assert torch.equal(own["audio_alone"], blind["audio_alone"])
    assert not torch.equal(own["audio_alone"], deaf["audio_alone"])
    for name, vit, pixels in ("image", encoder.image, image), ("audio", encoder.audio, audio):
        windows = []
        for x in pixels.unbind(1):
            with torch.no_grad():
                if layers == "all":  # no layer is left out of fusion: the encoder without the other modality
                    tokens = getattr(encoder(**dict(image=None, audio=None) | {name: x}), name)
                else:
                    blocks = vit.blocks[: 1 if layers == (1,) else None]
                    tokens = blocks(vit.norm_pre(vit._pos_embed(vit.patch_embed(x))))
                    tokens = layer_norm(tokens, tokens.shape[-1:])
            windows.append(tokens.mean(1))
        torch.testing.assert_close(own[f"{name}_alone"], torch.stack(windows).mean(0))


@pytest.mark.parametrize("ks", [(3,), (0,), (1, -1), ()])
def test_numbers_of_neighbours_that_cannot_be_are_refused(ks):
    with pytest.raises(ValueError, match="--k must be in 1..2 with 3 test clips, got"):
        recalls(make_features(3), ks)
    with pytest.raises(
        ValueError, match="--k must be in 1..2 with 3 test clips, got"
    ):  # before any clip is read
        Retrieval(RetrieveConfig(k=ks), Found([], list("abc"), "", [], 0, {}))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Four clips of two classes, and one that cannot be read."""
    root = tmp_path_factory.mktemp("clips")
    for number in range(4):
        write_video(root / ("bird", "cat")[number % 2] / f"{number}.mp4", 3.0)
    (root / "cat" / "broken.mp4").write_bytes(b"no video")
    return root


def results(config: RetrieveConfig) -> dict:
    assert program(config, Retrieval) == 0
    return json.loads((config.run / "results.json").read_text())


def test_a_run_leaves_results_and_a_picture(folder, tmp_path):
    options = dict(checkpoint="none", data=folder, k=(1, 2), workers=0)
    found = []
    for seed in 5, 5, 6:  # what a folder holds is replaced
        found.append(results(RetrieveConfig(**options, run=tmp_path / "run", seed=seed)))
        assert found[-1]["coverage"] == dict(judged=4, expected=5) and found[-1]["seed"] == seed
    hashes = [one["weights_sha256"] for one in found]
    assert hashes[0] == hashes[1] != hashes[2]
    (row,) = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    assert row["metrics"] == found[-1]["metrics"] and (row["step"], row["when"]) == (0, "after")
    assert (tmp_path / "run" / "pictures" / "neighbours-000000.png").exists()
    assert not (tmp_path / "run" / "model").exists()  # nothing was trained
    assert "class_recall@2_fusion" in (tmp_path / "run" / "index.html").read_text()
    one_by_one = results(RetrieveConfig(**options, run=tmp_path / "again", batch_size=1, seed=6))
    assert one_by_one["metrics"] == pytest.approx(found[-1]["metrics"]) and one_by_one["date"]


def test_two_processes_find_the_same(folder, tmp_path):
    options = dict(checkpoint="none", data=folder, k=(1, 2), workers=0)
    alone = results(RetrieveConfig(**options, run=tmp_path / "1"))
    run_together(RetrieveConfig(**options, run=tmp_path / "2"), Retrieval, 2)
    together = json.loads((tmp_path / "2" / "results.json").read_text())
    assert together["metrics"] == alone["metrics"]
    assert together["weights_sha256"] == alone["weights_sha256"]


def test_clips_of_several_classes_are_drawn(folder, tmp_path, monkeypatch):
    def find(config, say):
        found = find_data(config, say)
        clips = [*found.test]
        for clip, classes in zip(clips, [(0, 1), (), (1,), (2,)], strict=True):
            clip.labels["class"] = classes
        table = type(found.test)(clips, classes={"class": "abc"})
        return found._replace(train=table, test=table, classes={"class": ("a\x1b", "b", "c")})

    find_data = Task.find
    monkeypatch.setattr(Task, "find", staticmethod(find))
    draw, titles = retrieve.draw_neighbours, []
    monkeypatch.setattr(
        retrieve, "draw_neighbours", lambda *args: titles.extend(args[1].values()) or draw(*args)
    )
    found = results(RetrieveConfig(checkpoint="none", data=folder, k=(1,), run=tmp_path / "run", workers=0))
    assert found["metrics"]["class_recall@1_chance"] == pytest.approx(1 / 6)  # two of four share b
    assert r"class: a\x1b, b" in titles
    assert (tmp_path / "run" / "pictures" / "neighbours-000000.png").exists()


def test_windows_are_averaged_before_clips_are_compared(tmp_path):
    """Against the encoder on each window of each file."""
    data, options = tmp_path / "clips", dict(checkpoint="none", k=(1,), workers=0)
    for number in range(4):
        write_video(data / ("bird", "cat")[number % 2] / f"{number}.mp4", 5.3, fps=8 + number)
    one = results(RetrieveConfig(data=data, run=tmp_path / "1", **options))
    config = RetrieveConfig(data=data, run=tmp_path / "3", windows=3, **options)
    three = results(config)
    assert one["protocol"].endswith("nearest; 1 window of 3.0 s, middle frame")
    assert three["protocol"].endswith("nearest; 3 windows of 3.0 s, pooled tokens averaged, middle frame")
    assert (tmp_path / "3" / "pictures" / "neighbours-000000.png").exists()

    run = set_up(config, Retrieval)
    with run.lock or nullcontext():
        rows = [row for row, _ in judge_all(run, run.task.model)[0].values()]
    for row, clip in zip(rows, run.found.test, strict=True):
        with torch.no_grad():
            clips = [read_clip(clip.path, run.task.model.inputs, start=start) for start in (0.0, 1.15, 2.3)]
            tokens = [run.task.model(*clip) for clip in clips]
        for name in "image", "audio", "fusion":
            mean = torch.stack([getattr(one, name)[0].mean(0) for one in tokens]).mean(0)
            torch.testing.assert_close(torch.from_numpy(row[name]), mean, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["checkpoints", "model"])
def test_the_folder_of_a_training_run_is_left_alone(tmp_path, name):
    (tmp_path / name).mkdir()
    with pytest.raises(ValueError, match="is that of a training run"):
        RetrieveConfig(checkpoint="none", run=tmp_path)


def test_a_folder_without_labels_shows_neighbours(folder, tmp_path, capsys):
    for path in folder.rglob("?.mp4"):
        (tmp_path / "clips" / path.name).parent.mkdir(exist_ok=True)
        shutil.copy(path, tmp_path / "clips" / f"$x$-{path.name}")  # no formula
    options = dict(checkpoint="none", data=tmp_path / "clips", k=(1, 2), workers=0)
    found = results(RetrieveConfig(**options, run=tmp_path / "run"))
    pairs = {f"{way}@{k}" for way in PAIRS for k in (1, 2)}
    assert found["metrics"].keys() == {"clips"} | pairs and found["metrics"]["clips"] == 4
    said = capsys.readouterr().out
    assert "neighbours without recall, as there are no classes: --data" in said
    assert "\n4 clips:\n" in said and "after training" not in said  # there was none
    rows = [json.loads(line) for line in (tmp_path / "run" / "neighbours.jsonl").read_text().splitlines()]
    clips = [row["clip"] for row in rows]
    assert clips == sorted(str(path) for path in (tmp_path / "clips").iterdir())
    for row in rows:
        for feature in "image", "audio", "fusion", "sum":
            assert len(set(row[feature])) == 2 and {*row[feature]} < {*clips} - {row["clip"]}
    assert (tmp_path / "run" / "pictures" / "neighbours-000000.png").exists()


def test_a_clip_that_lacks_a_feature_is_named_beside_no_other():
    features = make_features(4)
    features["audio"][1:3] = 0.0  # which two clips lack
    found = named_neighbours("abcd", neighbours(features, 3), rows_there(features))
    assert [row["clip"] for row in found] == list("abcd")
    assert [row["audio"] for row in found] == [["d"], [], [], ["a"]]
    for feature in "image", "fusion", "sum":
        assert all(sorted(row[feature] + [row["clip"]]) == list("abcd") for row in found)


def test_clips_that_are_lost_on_the_way_leave_fewer_neighbours():
    features = make_features()
    rows = [{name: value[n].numpy() for name, value in features.items()} for n in range(4)]
    config = RetrieveConfig(k=None, checkpoint="none", model="micro")
    task = Retrieval(config, Found([], list("abcdef"), "", [], 0, {}))
    assert task.ks == [1, 5]
    metrics = task.summarize([row | dict(index=n) for n, row in enumerate(rows)])
    assert metrics["clips"] == 4 and any("@1" in name for name in metrics)
    assert not any("@5_" in name for name in metrics)
    assert task.summarize(rows[:1])["clips"] == 1
