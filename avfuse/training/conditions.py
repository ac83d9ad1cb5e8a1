"""Inputs that ask whether a model hears and sees: sounds and pictures that are not those of the clip.

What is true of a clip stays, and so does the mixture that masks of a separator are laid over: only what
the model itself hears or sees changes. One that listens gets worse when the sound changes; one that goes by
pictures alone does not. The sounds are those of AVSBench-Robust (Li et al., arXiv 2502.00358) and of Juanola
et al. (arXiv 2410.01020): silence, noise, and the sound of what is not in the picture.
"""

import random
from collections.abc import Callable, Hashable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..data.clips import ClipDataset, Failure, generator_of
from ..data.transforms import FLOOR, KALDI_FLOOR, PREEMPHASIS, Spectrogram, kaldi_filters
from ..inputs import InputSettings

Inputs = dict[str, Tensor]
EXCHANGES = 200  # clips with which one may exchange the sound that it was given, at most


def silence(inputs: Inputs, batch: dict, settings: InputSettings) -> Inputs:
    """What a reader gives of a track in which nothing sounds. To the model it is a sound like any other: that
    there is none is what `no_sound` tells it.
    """
    return hearing(inputs, batch, Spectrogram(settings)(torch.zeros(settings.samples)))


def noise(inputs: Inputs, batch: dict, settings: InputSettings) -> Inputs:
    """White noise, drawn from the number of the clip, as loud as the clip's own sound."""
    spectrogram, audio = Spectrogram(settings), batch["audio"]
    size = (*audio.shape[1:-3], settings.samples)  # each window of a clip has its own
    white = [torch.randn(size, generator=generator_of(0, 0, 1 + index)) for index in batch["index"].tolist()]
    white = torch.stack(white)
    gain = (power(audio, settings) / power(spectrogram(white), settings)).sqrt().float()
    return hearing(inputs, batch, spectrogram(gain[..., None] * white))


def other_sound(inputs: Inputs, batch: dict, settings: InputSettings) -> Inputs:
    """The sound of another clip, see `derangement`."""
    return hearing(inputs, batch, batch["other_audio"])


def no_sound(inputs: Inputs, batch: dict, settings: InputSettings) -> Inputs:
    """The model is told that no clip has a sound: none of its tokens attends to one."""
    audio = inputs["audio"]
    return inputs | dict(audio_present=torch.zeros(len(audio), dtype=torch.bool, device=audio.device))


def grey_picture(inputs: Inputs, batch: dict, settings: InputSettings) -> Inputs:
    """All frames in the mean colour of pictures, which normalisation makes 0. To the model they are pictures
    like any others.
    """
    return inputs | dict(image=torch.zeros_like(inputs["image"]))


class Condition(NamedTuple):
    title: str  # for people
    modality: str  # that is changed
    change: Callable[[Inputs, dict, InputSettings], Inputs]  # inputs on the device, the batch as read


CONDITIONS = {
    "silence": Condition("silence", "audio", silence),
    "noise": Condition("noise as loud as its sound", "audio", noise),
    "other_sound": Condition("the sound of another clip", "audio", other_sound),
    "no_sound": Condition("told that there is no sound", "audio", no_sound),
    "grey_picture": Condition("a grey picture", "image", grey_picture),
}
ALWAYS = ("silence", "noise", "other_sound", "grey_picture")  # for any model that takes pictures and sounds


def condition_table(metrics: dict, tested: dict[str, dict]) -> list[tuple]:
    """A table whose first row names the metrics; these follow as they are, and under each condition."""
    names = list(dict.fromkeys(name for of in tested.values() for name in of))
    titles = {name: condition.title for name, condition in CONDITIONS.items()}
    lines = {"its own": metrics} | {titles.get(name, name): of for name, of in tested.items()}
    return [
        ("heard and seen", *names),
        *((title, *(of.get(name) for name in names)) for title, of in lines.items()),
    ]


def hearing(inputs: Inputs, batch: dict, audio: Tensor) -> Inputs:
    """The inputs with this sound in the place of the clips' own; a clip without sound stays without."""
    own = batch["audio"]
    there = has_sound(batch).view(-1, *[1] * (own.ndim - 1))
    return inputs | dict(audio=torch.where(there, audio, own).to(inputs["audio"].device))


def has_sound(batch: dict) -> Tensor:
    """(B,) bool; a mixture has sound if one of its clips has."""
    return batch["audio_present"].view(len(batch["audio"]), -1).any(1)


def power(spectrogram: Tensor, settings: InputSettings) -> Tensor:
    """(..., 1, mel, frames) -> (...,) float64, that of the sound but for a factor: mel filters sum to 1."""
    level = spectrogram.double() * settings.audio_std + settings.audio_mean
    if settings.front_end == "kaldi":
        whole = 1 + (settings.samples - settings.window) // settings.hop  # zeros follow, which are no power
        power = (level[..., :whole].exp() - KALDI_FLOOR) / preemphasis_of(kaldi_filters(settings))[:, None]
    else:
        power = 10**level - FLOOR
    return power.clamp(min=0).sum((-3, -2, -1))


def preemphasis_of(filters: Tensor) -> Tensor:
    """(bins of the spectrum, mel_bins) -> (mel_bins,): by how much Kaldi's pre-emphasis raises the power of
    each band, which is far below 1 for low ones; inf for a band so narrow that no bin lies in it.
    """
    turns = torch.linspace(0, torch.pi, len(filters), dtype=torch.float64)
    gain = 1 + PREEMPHASIS**2 - 2 * PREEMPHASIS * turns.cos()
    raised = gain @ filters.double() / filters.double().sum(0)
    return raised.nan_to_num(torch.inf)


def derangement(kinds: dict[int, Hashable]) -> dict[int, int]:
    """Gives each clip another one, each once and of another kind, unless most clips are of one kind: numbers
    of clips by numbers of clips, none where there is one clip alone.

    Clips of a kind stand together on a circle, and each takes the one half a turn on, which is of another
    kind if none has more than half of the places. The order of kinds is shuffled: neighbours in a list may
    sound alike. A tuple of classes may have one in common with another tuple: such a clip exchanges what it
    got with the next one on the circle where both then get what they have nothing in common with.
    """
    if len(kinds) < 2:
        return {}
    places = list(dict.fromkeys(kinds.values()))
    random.Random(0).shuffle(places)
    place = {kind: n for n, kind in enumerate(places)}
    circle = sorted(kinds, key=lambda clip: place[kinds[clip]])
    half = len(circle) // 2
    others = circle[half:] + circle[:half]

    def fits(clip: int, other: int) -> bool:
        one, two = kinds[clip], kinds[other]
        several = isinstance(one, tuple) and isinstance(two, tuple)
        return clip != other and ({*one}.isdisjoint(two) if several else one != two)

    for n, clip in enumerate(circle):
        if not fits(clip, others[n]):
            for m in (step % len(circle) for step in range(n + 1, n + min(len(circle), EXCHANGES))):
                if fits(clip, others[m]) and fits(circle[m], others[n]):
                    others[n], others[m] = others[m], others[n]
                    break
    return dict(zip(circle, others, strict=True))


class BesideOthers(Dataset):
    """Clips of a data set, each with the sound of another as `other_audio`, its own where it has no other.

    Args:
        dataset: for evaluation.
        others: numbers of clips by numbers of clips.
    """

    def __init__(self, dataset: ClipDataset, others: dict[int, int]):
        self.dataset, self.others, self.clips = dataset, others, dataset.clips

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Tensor] | Failure:
        epoch, index = key
        item = other = self.dataset[key]
        if index in self.others and not isinstance(item, Failure):
            other = self.dataset[epoch, self.others[index]]
        return other if isinstance(other, Failure) else item | dict(other_audio=other["audio"])

    def blank(self) -> dict[str, Tensor]:
        blank = self.dataset.blank()
        return blank | dict(other_audio=blank["audio"])
