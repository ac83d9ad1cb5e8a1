"""Nearest neighbours and their labels against brute force and hand counts."""

import itertools
import math

import pytest
import torch
from torch.nn.functional import cosine_similarity

from avfuse.tasks.retrieve import recalls
from avfuse.training.neighbours import (
    chance_at,
    nearest_neighbour_probes,
    neighbours,
    recall_at,
    related,
    wilson,
)


def make_features(clips=12):
    features = {name: torch.randn(clips, 5) for name in ("image", "audio", "fusion")}
    return features | dict(label_kind=torch.arange(clips) % 3)


def test_neighbours_by_brute_force(monkeypatch):
    monkeypatch.setattr("avfuse.training.neighbours.AT_ONCE", 5)  # of 12
    features = make_features()
    nearest, some = neighbours(features, 4), neighbours(features, 2, torch.tensor([7, 3]))
    for name in "image", "audio", "fusion", "sum":
        names = ["image", "audio", "fusion"] if name == "sum" else [name]
        for query in range(12):
            cosines = sum(cosine_similarity(features[f][query], features[f], dim=1) for f in names)
            ranked = [n for n in cosines.argsort(descending=True).tolist() if n != query]
            assert nearest[name][query].tolist() == ranked[:4]
        assert torch.equal(some[name], nearest[name][[7, 3], :2])


def test_a_clip_without_a_feature_is_nobodys_neighbour_by_it():
    """The cosine of zeros is above that of what points away, and would make the third clip a hit."""
    image = torch.tensor([[1.0, 0.0], [-1.0, 0.1], [0.0, 0.0]])
    features = dict(image=image, audio=image, fusion=torch.ones(3, 2), label_kind=torch.tensor([0, 1, 0]))
    nearest = neighbours(features, 2)
    assert nearest["image"][:2, 0].tolist() == [1, 0]
    (probe,) = nearest_neighbour_probes(features).values()
    assert probe["image"]["accuracy"] == 0.0
    metrics = recalls(features, [1, 2])
    assert metrics["kind_recall@1_image"] == metrics["kind_recall@2_image"] == 0.0


def test_nearest_neighbour_probe_by_brute_force():
    features = {name: torch.randn(40, 7) for name in ("image", "audio", "fusion")}
    labels = torch.randint(0, 4, (40,))
    several = (torch.rand(40, 3) < 0.5).float()  # of which a clip may have several: passed over
    (probes,) = nearest_neighbour_probes(features | dict(label_kind=labels, label_tags=several)).values()
    similarity = {
        name: [[cosine_similarity(a, b, dim=0).item() for b in f] for a in f] for name, f in features.items()
    }
    similarity["sum"] = [
        [sum(similarity[name][a][b] for name in features) for b in range(40)] for a in range(40)
    ]
    assert list(probes) == ["image", "audio", "fusion", "sum"]
    for name, probe in probes.items():
        hits = 0
        for a in range(40):
            nearest = max((b for b in range(40) if b != a), key=lambda b: similarity[name][a][b])
            hits += int(labels[nearest] == labels[a])
        assert probe["accuracy"] == pytest.approx(hits / 40)
        assert probe["standard_error"] == pytest.approx((hits / 40 * (1 - hits / 40) / 40) ** 0.5)
        assert probe["interval"][0] < hits / 40 < probe["interval"][1]


@pytest.mark.parametrize("clips", [1, 3, 7, 20, 256])
@pytest.mark.parametrize("truth", [0.3, 0.5, 0.7, 0.9])
def test_intervals_hold_the_truth_however_few_the_clips(truth, clips):
    covered = 0.0
    for hits in range(clips + 1):
        low, high = wilson(hits / clips, clips)
        assert 0 <= low < high <= 1
        covered += (low < truth < high) * math.comb(clips, hits) * truth**hits * (1 - truth) ** (clips - hits)
    assert covered > 0.83  # 0.17 where the share is one in seven and its standard error 0


def test_intervals_are_those_of_the_books():
    assert wilson(7 / 7, 7) == pytest.approx((0.6457, 1.0), abs=1e-4)  # Brown, Cai, DasGupta (2001), eq. 4
    assert wilson(81 / 263, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)  # Newcombe (1998), table I


def test_chance_of_the_probe_is_the_accuracy_of_a_random_neighbour():
    # Labels 0 0 0 1: each 0 meets another 0 in 2 of 3 others, the 1 never: (3 * 2/3 + 0) / 4.
    features = make_features(4) | dict(label_kind=torch.tensor([0, 0, 0, 1]))
    probes = nearest_neighbour_probes(features)["kind"]
    assert [probe["chance"] for probe in probes.values()] == [0.5] * 4


def test_a_single_clip_has_no_neighbour():
    assert nearest_neighbour_probes(make_features(1)) == {}


def test_several_labels_are_asked_for_at_once_too():
    """Six clips in pairs of neighbours: shapes pair up, and colours but for those of the last pair."""
    angles = torch.tensor([0.0, 0.1, 1.0, 1.1, 2.0, 2.1])
    tokens = torch.stack([angles.cos(), angles.sin()], 1)
    features = dict.fromkeys(("image", "audio", "fusion"), tokens)
    features |= dict(
        label_shape=torch.tensor([0, 0, 1, 1, 2, 2]), label_colour=torch.tensor([0, 0, 0, 0, 1, 0])
    )
    probes = nearest_neighbour_probes(features)
    assert [*probes] == ["shape", "colour", "shape and colour"]
    assert probes["shape"]["fusion"]["accuracy"] == 1.0
    both = probes["shape and colour"]["fusion"]
    assert both["accuracy"] == pytest.approx(4 / 6) and both["chance"] == pytest.approx(4 / 30)
    assert [*nearest_neighbour_probes(features | dict(label_colour=torch.arange(6)))] == ["shape", "colour"]


def test_chance_by_counting_every_draw():
    labels, k = torch.tensor([0, 0, 0, 1, 1, 2]), 2
    hits = draws = 0
    for query in range(6):
        for drawn in itertools.combinations([n for n in range(6) if n != query], k):
            hits, draws = hits + any(labels[n] == labels[query] for n in drawn), draws + 1
    assert chance_at(related(labels), k) == pytest.approx(hits / draws)


def test_clips_of_several_classes_are_related_by_one_in_common(monkeypatch):
    monkeypatch.setattr("avfuse.training.neighbours.AT_ONCE", 5)
    labels = (torch.rand(12, 4) < 0.2).float()
    labels[3] = 0  # of no class at all
    classes = [set(row.nonzero().flatten().tolist()) for row in labels]
    assert related(labels).tolist() == [[bool(a & b) for b in classes] for a in classes]
    hits = draws = 0
    for query, other in itertools.permutations(range(12), 2):
        hits, draws = hits + bool(classes[query] & classes[other]), draws + 1
    assert chance_at(related(labels), 1) == pytest.approx(hits / draws)
    nearest = neighbours(make_features(), 3)["sum"]
    found = [any(classes[n] & classes[query] for n in row) for query, row in enumerate(nearest.tolist())]
    assert recall_at(nearest, related(labels), 3) == pytest.approx(sum(found) / 12)
