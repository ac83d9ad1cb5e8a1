"""The measures of a pretrained model against brute force and hand-computed cases."""

import pytest
import torch
from torch.nn.functional import cosine_similarity

from avfuse import AVMAE, create_encoder
from avfuse.mae import patchify
from avfuse.training.evaluate import (
    held_out_loss,
    nearest_neighbour_probe,
    nearest_neighbour_probes,
    pooled_features,
)


@pytest.fixture(scope="module")
def mae():
    torch.manual_seed(0)
    return AVMAE(create_encoder("tiny"), decoder_dim=32, decoder_depth=1, decoder_heads=2)


def batch_of(mae, clips, seed=0):
    generator = torch.Generator().manual_seed(seed)
    masks = [mae.mask_sampler()(generator) for _ in range(clips)]
    return {
        "image": torch.randn(clips, 3, 96, 96, generator=generator),
        "audio": torch.randn(clips, 1, 64, 128, generator=generator),
        "image_present": torch.ones(clips, dtype=torch.bool),
        "audio_present": torch.ones(clips, dtype=torch.bool),
        "label_kind": torch.arange(clips) % 2,
        "failures": [],
        **{name: torch.stack([mask[name] for mask in masks]) for name in masks[0]},
    }


def split(batch, *sizes):
    """The same clips in batches of other sizes."""
    parts = {name: value.split(sizes) for name, value in batch.items() if name != "failures"}
    return [{name: part[n] for name, part in parts.items()} | {"failures": []} for n in range(len(sizes))]


def test_held_out_loss_counts_each_clip_once(mae):
    batch = batch_of(mae, 5)
    batch["audio_present"][1] = False
    whole = held_out_loss(mae, [batch], torch.device("cpu"))
    parts = held_out_loss(mae, [*split(batch, 1, 4), {"failures": ["unreadable"]}], torch.device("cpu"))
    assert whole.clips == parts.clips == 5
    assert parts == pytest.approx(whole, rel=1e-5)


def test_loss_of_predicting_zero(mae):
    batch = batch_of(mae, 3)
    loss = held_out_loss(mae, [batch], torch.device("cpu"))
    patches = patchify(batch["image"], (16, 16)).double()
    normal = (patches - patches.mean(-1, keepdim=True)) / (patches.var(-1, keepdim=True) + 1e-6).sqrt()
    expected = normal.square().mean(-1)[batch["image_removed"]].mean().item()
    assert loss.image_zero == pytest.approx(expected, rel=1e-5)


def test_held_out_loss_needs_a_clip(mae):
    with pytest.raises(ValueError, match="no readable clip"):
        held_out_loss(mae, [{"failures": ["a"]}], torch.device("cpu"))


def test_pooled_features_do_not_depend_on_the_batches(mae):
    batch = batch_of(mae, 4)
    batch["image_present"][2] = False
    whole = pooled_features(mae.encoder, [batch], torch.device("cpu"))
    parts = pooled_features(mae.encoder, split(batch, 3, 1), torch.device("cpu"))
    assert whole["fusion"].shape == (4, 192) and whole["label_kind"].tolist() == [0, 1, 0, 1]
    for name in whole:
        torch.testing.assert_close(parts[name], whole[name])


def test_absent_image_does_not_reach_the_fusion_feature(mae):
    batch = batch_of(mae, 2)
    batch["image_present"][:] = False
    first = pooled_features(mae.encoder, [batch], torch.device("cpu"))
    batch["image"] = torch.randn_like(batch["image"])
    second = pooled_features(mae.encoder, [batch], torch.device("cpu"))
    torch.testing.assert_close(first["fusion"], second["fusion"])


def test_nearest_neighbour_probe_by_brute_force():
    features = {name: torch.randn(40, 7) for name in ("image", "audio", "fusion")}
    labels = torch.randint(0, 4, (40,))
    probes = nearest_neighbour_probes(features | {"label_kind": labels})["kind"]
    similarity = {
        name: [[cosine_similarity(a, b, dim=0).item() for b in f] for a in f] for name, f in features.items()
    }
    similarity["sum"] = [
        [sum(similarity[name][a][b] for name in features) for b in range(40)] for a in range(40)
    ]
    for name, probe in probes.items():
        hits = 0
        for a in range(40):
            nearest = max((b for b in range(40) if b != a), key=lambda b: similarity[name][a][b])
            hits += int(labels[nearest] == labels[a])
        assert probe.accuracy == pytest.approx(hits / 40)
        assert probe.standard_error == pytest.approx((hits / 40 * (1 - hits / 40) / 40) ** 0.5)


def test_chance_is_the_accuracy_of_a_random_neighbour():
    # Labels 0 0 0 1: each 0 meets another 0 in 2 of 3 others, the 1 never: (3 * 2/3 + 0) / 4.
    probe = nearest_neighbour_probe(torch.rand(4, 4), torch.tensor([0, 0, 0, 1]))
    assert probe.chance == pytest.approx(0.5)
    with pytest.raises(ValueError, match="at least two clips"):
        nearest_neighbour_probe(torch.ones(1, 1), torch.tensor([0]))
