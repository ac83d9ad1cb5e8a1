"""Retrieval against brute force, hand counts and the nearest-neighbour probe."""

import itertools
import json

import pytest
import torch
from torch.nn.functional import cosine_similarity
from videos import write_video

from avfuse.evaluate import nearest_neighbour_probes
from avfuse.tasks.retrieve import RetrieveConfig, chance_at, main, recall_at, recalls, similarities


def make_features(clips=12):
    features = {name: torch.randn(clips, 5) for name in ("image", "audio", "fusion")}
    return features | dict(label_kind=torch.arange(clips) % 3)


def test_recall_against_brute_force():
    features = make_features()
    labels = features["label_kind"].tolist()
    for name, similarity in similarities(features).items():
        names = ["image", "audio", "fusion"] if name == "sum" else [name]
        for k in 1, 4:
            hits = 0
            for query in range(12):
                cosines = sum(cosine_similarity(features[f][query], features[f], dim=1) for f in names)
                ranked = [n for n in cosines.argsort(descending=True).tolist() if n != query]
                hits += any(labels[n] == labels[query] for n in ranked[:k])
            assert recall_at(similarity, features["label_kind"], k) == pytest.approx(hits / 12)


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
    assert chance_at(labels, k) == pytest.approx(hits / draws)


def test_more_neighbours_than_clips_are_refused():
    with pytest.raises(ValueError, match="k must be in 1..2 with 3 clips, got 3"):
        recall_at(torch.eye(3), torch.arange(3), 3)


def test_a_run_leaves_results_and_a_picture(tmp_path):
    for number in range(4):
        write_video(tmp_path / "data" / ("bird", "cat")[number % 2] / f"{number}.mp4", 3.0)
    config = dict(checkpoint="none", data=tmp_path / "data", run=tmp_path / "run", k=(1, 2), workers=0)
    metrics = main(RetrieveConfig(**config))
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["metrics"] == metrics and results["coverage"] == dict(judged=4, expected=4)
    assert (tmp_path / "run" / "pictures" / "neighbours-000000.png").exists()
    assert results["seed"] == 0 and results["date"]
    again = main(RetrieveConfig(**config | dict(run=tmp_path / "again", batch_size=1)))
    assert again == pytest.approx(metrics) and len(results["weights_sha256"]) == 64
    assert f'"{results["weights_sha256"]}"' in (tmp_path / "again/results.json").read_text()
    assert "class_recall@2_fusion" in (tmp_path / "run" / "index.html").read_text()
