"""What is like what: the nearest clips by frozen features, and how often they have a label in common."""

import math

import torch
from torch import Tensor
from torch.nn.functional import normalize

from .features import FEATURES

AT_ONCE = 1024  # queries: of a large set, the cosines of all pairs would not fit into memory


def neighbours(features: dict[str, Tensor], k: int, queries: Tensor | None = None) -> dict[str, Tensor]:
    """The k clips nearest to each of the queries, (Q, k), nearest first: by the cosines of image, audio and
    fusion features (N, D), and by "sum", the three added (protocol of the paper's Fig. 3). A clip
    never finds itself, and finds those that lack the feature (`rows_there`) last. Queries (Q,) are indices of
    clips; None: all clips.
    """
    queries = torch.arange(len(features["image"])) if queries is None else queries
    unit = {name: normalize(features[name].double(), dim=1) for name in FEATURES}
    absent = {name: ~there.flatten() for name, there in rows_there(features).items()}
    nearest = {name: [] for name in (*FEATURES, "sum")}
    for part in queries.split(AT_ONCE):
        cosines = {name: u[part] @ u.T for name, u in unit.items()}
        cosines["sum"] = sum(cosines.values())
        for name, cosine in cosines.items():
            cosine[:, absent[name]] = -torch.inf
            cosine[range(len(part)), part] = -torch.inf
            nearest[name].append(cosine.topk(k, dim=1).indices)
    return {name: torch.cat(parts) for name, parts in nearest.items()}


def related(labels: Tensor) -> Tensor:
    """Which clips have the same label (N,), or one of their several classes (N, classes) in common: (N, N)
    bool.
    """
    if labels.ndim == 1:
        return labels[:, None] == labels
    return torch.cat([part @ labels.T > 0 for part in labels.split(AT_ONCE)])


def of_both(related: Tensor, there: Tensor) -> Tensor:
    """The same (N, N), of clips that both have a feature, (N, 1)."""
    return related & there & there.T


def recall_at(nearest: Tensor, related: Tensor, k: int) -> float:
    """Share of the clips that are related (N, N) to one of the first k of their neighbours (N, k or more),
    among which they may be themselves, last, where fewer others have the feature.
    """
    nearest = nearest[:, :k]
    others = nearest != torch.arange(len(nearest))[:, None]
    return (related.gather(1, nearest) & others).any(1).double().mean().item()


def rows_there(features: dict[str, Tensor]) -> dict[str, Tensor]:
    """Which clips have a feature, (N, 1): zeros stand for that of a modality which a clip lacks. Its nearest
    would be any clip, such as another that lacks it.
    """
    there = {name: features[name].any(1, keepdim=True) for name in FEATURES}
    return there | dict(sum=torch.stack([*there.values()]).any(0))


def chance_at(related: Tensor, k: int) -> float:
    """The expectation of `recall_at` for neighbours drawn at random."""
    others = len(related) - 1
    relatives = related.sum(1) - related.diagonal().long()
    draws = math.comb(others, k)
    hits = [draws - math.comb(others - n, k) for n in range(int(relatives.max()) + 1)]
    return sum(hits[n] for n in relatives.tolist()) / (draws * len(related))


def wilson(share: float, clips: int, z: float = 1.96) -> tuple[float, float]:
    """The 95 % interval (Wilson 1927) of a share of so many clips, which is honest where these are few: that
    of 7 of 7 is 0.65 to 1, whose standard error is 0.
    """
    middle, square = share + z**2 / (2 * clips), share * (1 - share) / clips + (z / (2 * clips)) ** 2
    low, high = ((middle + sign * z * square**0.5) / (1 + z**2 / clips) for sign in (-1, 1))
    return max(0.0, low), min(1.0, high)


def interval(low: float, high: float) -> str:
    """The same for people."""
    return f"{low:.2f} to {high:.2f}"


def nearest_neighbour_probes(features: dict[str, Tensor]) -> dict[str, dict[str, dict[str, float]]]:
    """Label -> feature -> accuracy of guessing a clip's label from its nearest neighbour, which is the recall
    at 1, with its standard error, its 95 % interval and the accuracy of a random neighbour. Of several labels
    also all at once, under their names joined by "and": what takes image and sound, if each tells one.

    Labels of which a clip may have several are passed over, and so is a single clip, which has no neighbour.

    Args:
        features: image, audio, fusion (N, D), and label_<name> (N,) or (N, classes).
    """
    clips, probes = len(features["image"]), {}
    if clips < 2:
        return probes
    nearest, there = neighbours(features, 1), rows_there(features)
    same = {
        name.removeprefix("label_"): related(labels)
        for name, labels in features.items()
        if name.startswith("label_") and labels.ndim == 1
    }
    if len(same) > 1 and (all_of_them := torch.stack([*same.values()]).all(0)).sum() > clips:
        same[" and ".join(same)] = all_of_them  # unless no clip has another that is like it in all
    for name, related_clips in same.items():
        recalls = {
            feature: recall_at(found, of_both(related_clips, there[feature]), 1)
            for feature, found in nearest.items()
        }
        probes[name] = {
            feature: dict(
                accuracy=recall,
                standard_error=(recall * (1 - recall) / clips) ** 0.5,
                interval=wilson(recall, clips),
                chance=chance_at(related_clips, 1),
            )
            for feature, recall in recalls.items()
        }
    return probes
