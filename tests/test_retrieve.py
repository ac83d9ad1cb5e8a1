"""Retrieval against brute force, hand counts and the nearest-neighbour probe."""

import itertools
import json

import pytest
import torch
from torch.nn.functional import cosine_similarity
from videos import write_video

from avfuse import create_encoder
from avfuse.data.clips import Clip
from avfuse.tasks.retrieve import (
    RetrieveConfig,
    chance_at,
    draw_neighbours,
    main,
    neighbours,
    recall_at,
    recalls,
    related,
)
from avfuse.training.evaluate import nearest_neighbour_probes


def make_features(clips=12):
    features = {name: torch.randn(clips, 5) for name in ("image", "audio", "fusion")}
    return features | dict(label_kind=torch.arange(clips) % 3)


def test_recall_against_brute_force(monkeypatch):
    monkeypatch.setattr("avfuse.tasks.retrieve.AT_ONCE", 5)  # of 12
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
        assert metrics[f"kind_recall@1_{name}"] == pytest.approx(probe.accuracy)
        assert metrics["kind_recall@1_chance"] == pytest.approx(probe.chance)


def test_chance_by_counting_every_draw():
    labels, k = torch.tensor([0, 0, 0, 1, 1, 2]), 2
    hits = draws = 0
    for query in range(6):
        for drawn in itertools.combinations([n for n in range(6) if n != query], k):
            hits, draws = hits + any(labels[n] == labels[query] for n in drawn), draws + 1
    assert chance_at(related(labels), k) == pytest.approx(hits / draws)


def test_clips_of_several_classes_are_related_by_one_in_common(monkeypatch):
    monkeypatch.setattr("avfuse.tasks.retrieve.AT_ONCE", 5)
    labels = (torch.rand(12, 4) < 0.2).float()
    labels[3] = 0  # of no class at all
    classes = [set(row.nonzero().flatten().tolist()) for row in labels]
    assert related(labels).tolist() == [[bool(a & b) for b in classes] for a in classes]
    hits = draws = 0
    for query, other in itertools.permutations(range(12), 2):
        hits, draws = hits + bool(classes[query] & classes[other]), draws + 1
    metrics = recalls(make_features() | dict(label_kind=labels), [1])
    assert metrics["kind_recall@1_chance"] == pytest.approx(hits / draws)
    nearest = neighbours(make_features(), 3)["sum"]
    found = [any(classes[n] & classes[query] for n in row) for query, row in enumerate(nearest.tolist())]
    assert recall_at(nearest, related(labels), 3) == pytest.approx(sum(found) / 12)


def test_clips_of_several_classes_are_drawn(tmp_path):
    paths = [write_video(tmp_path / f"{n}.mp4", 3.0) for n in range(3)]
    clips = [Clip(path, {"kind": classes}) for path, classes in zip(paths, [(0, 1), (), (1,)], strict=True)]
    features = make_features(3) | dict(label_kind=torch.tensor([[1.0, 1, 0], [0, 0, 0], [0, 1, 0]]))
    draw_neighbours(tmp_path / "a.png", create_encoder("tiny"), clips, features, {"kind": ("a", "b", "c")})
    assert (tmp_path / "a.png").exists()


@pytest.mark.parametrize("ks", [(3,), (0,), (1, -1), ()])
def test_numbers_of_neighbours_that_cannot_be_are_refused(ks):
    with pytest.raises(ValueError, match="--k must be in 1..2 with 3 test clips, got"):
        recalls(make_features(3), ks)


def test_a_run_leaves_results_and_a_picture(tmp_path):
    for number in range(4):
        write_video(tmp_path / "data" / ("bird", "cat")[number % 2] / f"{number}.mp4", 3.0)
    (tmp_path / "data" / "cat" / "broken.mp4").write_bytes(b"no video")
    config = dict(checkpoint="none", data=tmp_path / "data", run=tmp_path / "run", k=(1, 2), workers=0)
    hashes = []
    for seed in 5, 5, 6:
        metrics = main(RetrieveConfig(**config, seed=seed))
        results = json.loads((tmp_path / "run" / "results.json").read_text())
        assert results["metrics"] == metrics and results["coverage"] == dict(judged=4, expected=5)
        assert results["seed"] == seed
        hashes.append(results["weights_sha256"])
    assert hashes[0] == hashes[1] != hashes[2]
    assert (tmp_path / "run" / "pictures" / "neighbours-000000.png").exists()
    one_by_one = main(RetrieveConfig(**config | dict(run=tmp_path / "again"), batch_size=1, seed=6))
    assert one_by_one == pytest.approx(metrics) and results["date"]
    assert "class_recall@2_fusion" in (tmp_path / "run" / "index.html").read_text()


def test_several_processes_are_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="one process"):
        main(RetrieveConfig(checkpoint="none", data=tmp_path, run=tmp_path / "run"))
    assert not (tmp_path / "run").exists()
