"""What a pretrained model is worth before any fine-tuning: held-out loss and a nearest-neighbour probe."""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize
from tqdm import tqdm

from ..encoder import AVEncoder
from ..mae import AVMAE
from .features import encode, pool

INPUTS = ("image", "audio", "image_removed", "audio_removed", "image_present", "audio_present")


class HeldOutLoss(NamedTuple):
    """Mean losses over the clips that could be read, and what predicting zero everywhere would cost."""

    clips: int
    image: float
    audio: float
    image_zero: float
    audio_zero: float


class Probe(NamedTuple):
    """Nearest-neighbour accuracy, its standard error, and the accuracy of a random neighbour."""

    accuracy: float
    standard_error: float
    chance: float


@torch.no_grad()
def held_out_loss(mae: AVMAE, batches: Iterable[dict], device: torch.device) -> HeldOutLoss:
    """Losses under the masks that the batches bring, each clip counted once whatever the batch size.

    Raises:
        ValueError: no clip could be read.
    """
    mae.eval()
    clips = 0
    sums, counts = torch.zeros(4, dtype=torch.float64), torch.zeros(4, dtype=torch.float64)
    for batch in tqdm(batches, desc="held-out loss", leave=False):
        if not len(batch["index"]):
            continue
        inputs = {name: batch[name].to(device) for name in INPUTS}
        output = mae(**inputs)
        present = [int(inputs[f"{name}_present"].sum()) for name in ("image", "audio")]
        zeros = [
            mae.loss(
                name,
                inputs[name],
                torch.zeros_like(getattr(output, f"{name}_pred")),
                inputs[f"{name}_removed"],
                inputs[f"{name}_present"],
            )
            for name in ("image", "audio")
        ]
        weights = torch.tensor(present + present, dtype=torch.float64)
        losses = torch.stack([output.image_loss, output.audio_loss, *zeros]).double().cpu()
        sums, counts = sums + losses * weights, counts + weights
        clips += len(inputs["image"])
    if not clips:
        raise ValueError("the held-out set has no readable clip")
    return HeldOutLoss(clips, *(sums / counts.clamp(min=1)).tolist())


@torch.no_grad()
def pooled_features(encoder: AVEncoder, loader: Iterable[dict], device: torch.device) -> dict[str, Tensor]:
    """Mean-pooled `image`, `audio` and `fusion` tokens (N, D) of whole clips, with every `label_*` of the
    loader.
    """
    encoder.eval()
    batches = []
    for batch in tqdm(loader, desc="features", leave=False):
        if not len(batch["index"]):
            continue
        inputs = {n: batch[n].to(device) for n in ("image", "audio", "image_present", "audio_present")}
        pooled = {name: mean.float().cpu() for name, mean in pool(encode(encoder, **inputs)).items()}
        batches.append(pooled | {name: batch[name] for name in batch if name.startswith("label_")})
    return {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]} if batches else {}


def nearest_neighbour_probes(features: dict[str, Tensor]) -> dict[str, dict[str, Probe]]:
    """Label -> feature -> probe: a clip's label guessed from its nearest neighbour among all other clips.

    Features are compared by cosine; "sum" adds the three similarities (protocol of the paper's Fig. 3).
    Labels of which a clip may have several are passed over.
    """
    names = [name for name in ("image", "audio", "fusion") if name in features]
    similarities = {
        name: normalize(features[name], dim=1) @ normalize(features[name], dim=1).T for name in names
    }
    similarities["sum"] = sum(similarities.values())
    return {
        label.removeprefix("label_"): {
            name: nearest_neighbour_probe(similarity, features[label])
            for name, similarity in similarities.items()
        }
        for label in features
        if label.startswith("label_") and features[label].ndim == 1
    }


def nearest_neighbour_probe(similarity: Tensor, labels: Tensor) -> Probe:
    """1-NN accuracy from similarities (N, N) and labels (N,), leaving each clip itself out.

    Raises:
        ValueError: fewer than two clips.
    """
    n = len(labels)
    if n < 2:
        raise ValueError(f"labels: a nearest neighbour needs at least two clips, got {n}")
    nearest = similarity.clone().fill_diagonal_(-torch.inf).argmax(1)
    accuracy = (labels[nearest] == labels).double().mean().item()
    counts = labels.unique(return_counts=True)[1].double()
    chance = (counts * (counts - 1)).sum().item() / (n * (n - 1))
    return Probe(accuracy, (accuracy * (1 - accuracy) / n) ** 0.5, chance)


# --- all of it at once --------------------------------------------------------------------------------------


def measures(mae: AVMAE, batches: list[dict], device: torch.device) -> dict:
    """The held-out losses, those of predicting zero, and the probes, ready for JSON."""
    loss = held_out_loss(mae, batches, device)
    features = pooled_features(mae.encoder, batches, device)
    probes = nearest_neighbour_probes(features) if loss.clips > 1 else {}
    return dict(
        held_out_clips=loss.clips,
        held_out_image_loss=loss.image,
        held_out_audio_loss=loss.audio,
        held_out_image_zero=loss.image_zero,
        held_out_audio_zero=loss.audio_zero,
        probes={label: {f: probe._asdict() for f, probe in by.items()} for label, by in probes.items()},
    )


def flat(row: dict) -> dict[str, float]:
    """The same for trackers, which take numbers by name."""
    numbers = {name: value for name, value in row.items() if name != "probes"}
    for label, by_feature in row["probes"].items():
        numbers |= {f"probe_{label}_{feature}": p["accuracy"] for feature, p in by_feature.items()}
    return numbers


def describe_measures(row: dict, when: str, clips: str) -> str:
    """The same for people."""
    image, audio = row["held_out_image_loss"], row["held_out_audio_loss"]
    zero = row["held_out_image_zero"] + row["held_out_audio_zero"]
    lines = [
        f"{when} training, {row['held_out_clips']} {clips}: loss {image + audio:.3f} (image {image:.3f}, "
        f"audio {audio:.3f}), {(image + audio) / zero:.2f} of predicting zero ({zero:.3f})"
    ]
    for label, probes in row["probes"].items():
        cells = [f"{f} {p['accuracy']:.3f} ± {p['standard_error']:.3f}" for f, p in probes.items()]
        chance = probes["image"]["chance"]
        lines.append(f"  nearest neighbour, {label}: {', '.join(cells)} (chance {chance:.3f})")
    return "\n".join(lines)
