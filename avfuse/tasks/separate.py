"""Separate what an image shows from a mixture of sounds: `python -m avfuse.tasks.separate`.

Mix and separate (Zhao et al. 2018; paper Sec. 4 and App. A.3): the sounds of two clips are added up, and the
model finds each of them again, given the mixture and one frame of the clip that it belongs to.
"""

from ..command import begin, read
from ..training.settings import checked
from .options import SeparateConfig

if __name__ == "__main__":
    begin("avfuse.tasks.separate", checked(read(SeparateConfig)), explained=())

import wave
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from ..data.clips import Clip, ClipDataset, Failure, check_one_frame
from ..data.find import Found
from ..data.listing import Listing
from ..data.sets import music
from ..data.transforms import evaluation_image, random_gain
from ..files import printable, some
from ..inputs import InputSettings
from ..training.conditions import ALWAYS
from ..training.judge import JudgedTask, first_clips
from ..training.loop import program
from ..training.pictures import figure_grid, rgb, save, show_sound
from ..training.starts import first_encoder
from ..training.task import Task
from .separation_metrics import BSSEval, bss_eval, is_silent, nmf_masks, rpca_masks
from .separator import Separator

DRAWN = 4  # pairs in a picture
SAME = 30.0  # dB: a mixture as close as that to both of its sources has one sound in it, twice
LIGHTEST, HEAVIEST = 1e-3, 10.0  # weights of a bin in the loss (Zhao et al. 2018, released code)


@dataclass(frozen=True)
class Mixture(Clip):
    """A clip, and the one that a list mixes it with."""

    other: Clip | None = None


class MixtureDataset(ClipDataset):
    """Mixtures of two clips, by `(epoch, index)`: clip `index`, and one drawn from seed, epoch and index.

    The partner is never the clip itself and shares no label with it, or without labels no folder, if there is
    such a clip. In evaluation it depends on seed and index alone, or is the one that a `Mixture` names. The
    frame is the one in the middle of the sound. In training window, gain of each clip and mirroring are
    random; images are not cropped, as a crop may hide the source.

    An item is a dictionary; S = 2 sources, the clip and its partner:
        image: (S, 3, height, width) float32. audio: (1, mel_bins, frames) float32, the mixture.
        sounds: (S, samples) float32; their sum is the mixture.
        image_present, audio_present: (S,) bool. index, partner: () long.
    If one of the clips cannot be read, the item is a `Failure` that names it.

    Args:
        clips, settings, train, seed: as for `ClipDataset`.

    Raises:
        ValueError: fewer than two clips, or what `ClipDataset` refuses.
    """

    def __init__(self, clips: Sequence[Clip], settings: InputSettings, *, train: bool, seed: int = 0):
        if len(clips) < 2:
            raise ValueError(f"clips: a mixture needs at least two clips, got {len(clips)}")
        super().__init__(clips, settings, train=train, seed=seed, extras=draw_partner)
        check_one_frame(settings.image_frames, "mixtures")
        owners, classes, numbers = [], [], {}  # a row for each class of each clip; numbers of the classes
        for index, clip in enumerate(clips):
            folder = {} if clip.part else dict(folder=str(clip.path.parent))  # which may name a class
            for name, label in (clip.labels or folder).items():
                for kind in label if isinstance(label, tuple) else (label,):
                    owners.append(index)
                    classes.append(numbers.setdefault((name, kind), len(numbers)))
        self.owners, self.labels = np.array(owners, np.int32), np.array(classes, np.int32)
        others = [clip.other for clip in clips if isinstance(clip, Mixture)]
        self.listed = len(others)
        if others:
            self.clips += others

    def __getitem__(self, key: int | tuple[int, int]) -> dict[str, Tensor] | Failure:
        epoch, index = key if isinstance(key, tuple) else (0, key)
        epoch = epoch if self.train else 0
        first = super().__getitem__((epoch, index))
        if isinstance(first, Failure):
            return first
        partner = self.partner(int(first["index"]), float(first["partner"]))
        second = super().__getitem__((epoch, partner))
        if isinstance(second, Failure):
            return second
        return self.mixed(first, second) | dict(index=first["index"], partner=torch.tensor(partner))

    def blank(self):
        silence = super().blank()
        return self.mixed(silence, silence) | dict(partner=torch.tensor(0))

    def mixed(self, first: dict[str, Tensor], second: dict[str, Tensor]) -> dict[str, Tensor]:
        both = {name: torch.stack([first[name], second[name]]) for name in PAIRED}
        return both | dict(audio=self.spectrogram(both["sounds"].sum(0)))

    def partner(self, index: int, draw: float) -> int:
        """The clip that a uniform draw from [0, 1) chooses for clip `index`, where no list does."""
        if self.listed:
            return self.listed + index
        free = np.ones(len(self), bool)
        free[self.owners[np.isin(self.labels, self.labels[self.owners == index])]] = False
        free[index] = False
        others = np.flatnonzero(free)
        if not len(others):  # all share a label
            others = np.delete(np.arange(len(self)), index)
        return int(others[int(draw * len(others))])

    def item(self, clip, reader, generator):
        settings, streams = self.settings, clip.streams or reader.streams
        place, mirror = torch.rand(2, generator=generator).tolist() if self.train else (0.5, 1.0)
        start = place * max(0.0, streams.seconds - settings.audio_seconds)
        image = torch.zeros(3, *settings.image_shape)
        if streams.video:
            frame = reader.frame(start + 0.5 * min(settings.audio_seconds, streams.seconds))
            image = evaluation_image(torch.from_numpy(frame).permute(2, 0, 1), settings)
            image = image.flip(-1) if mirror < 0.5 else image
        sounds = torch.zeros(settings.samples)
        if streams.audio:
            sounds = torch.from_numpy(reader.audio(start, settings.audio_seconds, settings.sample_rate))
            sounds = random_gain(sounds, generator) if self.train else sounds
        present = dict(image_present=torch.tensor(streams.video), audio_present=torch.tensor(streams.audio))
        return dict(image=image, sounds=sounds, **present)


PAIRED = ("image", "sounds", "image_present", "audio_present")


def draw_partner(generator: torch.Generator) -> dict[str, Tensor]:
    return {"partner": torch.rand((), generator=generator)}


class Separation(JudgedTask):
    """Mixtures of two clips, and a mask for each of them."""

    name = "separation"
    conditions, headline = ALWAYS, ("sdr", "sir", "sar")

    def __init__(self, config: SeparateConfig, found: Found):
        super().__init__(config, found)
        self.model = Separator(first_encoder(config), decoder_dim=config.decoder_dim)
        seconds = self.model.encoder.inputs.audio_seconds
        self.protocol = (
            "BSS-eval v3 (512 taps, no permutation) of both sources of mixtures of two clips, the middle "
            f"{seconds:g} s of each, mean over sources; skipped: pairs that lack a picture or a sound, have "
            "a stem or sum of an energy below 1e-5, or the same sound twice; NMF and RPCA in their better "
            "order; oracle = the mask trained towards"
        )
        self.references: dict[int, dict] = {}  # what does not change as the model learns, by clip

    @staticmethod
    def find(config, say):
        """The data set, of which so many `pairs` are judged: of its test clips, or of mixtures it lists."""
        found = Task.find(config, say)
        if config.data is not None and (config.data / music.MIXTURES).exists():
            found = listed_mixtures(found, config.data, say)
        found = first_clips(found, config.pairs)
        for split, clips in (("train", found.train), ("test", found.test)):
            if len(clips) < 2:
                raise ValueError(f"--data: a mixture needs two clips or more, {split} has {len(clips)}")
        return found

    def dataset(self, clips, *, train):
        seed = self.config.seed if train else 0  # runs of other seeds are judged on the same mixtures
        return MixtureDataset(clips, self.model.encoder.inputs, train=train, seed=seed)

    def inputs(self, batch):
        """Images, mixtures, sounds, and which mixtures are `whole`: with two pictures and two sounds."""
        whole = (batch["image_present"] & batch["audio_present"]).all(1)
        return dict(image=batch["image"], audio=batch["audio"], sounds=batch["sounds"], whole=whole)

    def counts(self, inputs):
        return dict(mask_loss=int(inputs["whole"].sum()))

    def losses(self, model, inputs):
        """Binary cross-entropy (App. A.3), in which the loudness of the mixture weighs the bins of a mask."""
        logits = model(inputs["image"], inputs["audio"]).float()
        target, weight = self.targets(inputs["sounds"])
        loss = binary_cross_entropy_with_logits(logits, target, weight, reduction="none").mean((1, 2, 3))
        whole = inputs["whole"]
        return dict(mask_loss=torch.where(whole, loss, 0).sum() / whole.sum().clamp(min=1))

    def targets(self, sounds: Tensor) -> tuple[Tensor, Tensor]:
        """Sounds (B, 2, samples) -> ideal masks and weights of the bins, of mean 1, (B, 2, mel, frames)"""
        mel_stft = self.model.mel_stft
        sources, mixture = mel_stft.magnitude(sounds), mel_stft.magnitude(sounds.sum(1, keepdim=True))
        weight = torch.log1p(mixture).clamp(LIGHTEST, HEAVIEST).expand_as(sources)
        return ideal_masks(sources, self.config.mask), weight / weight.mean((1, 2, 3), keepdim=True)

    def judge(self, model, inputs, batch):
        separated, _ = model.separate(inputs["image"], inputs["audio"], inputs["sounds"].sum(1))
        items = zip(batch["index"].tolist(), inputs["sounds"], separated, inputs["whole"], strict=True)
        return [self.judge_pair(*item) for item in items]

    def judge_pair(self, index: int, sources: Tensor, separated: Tensor, whole: Tensor) -> dict:
        """Ratios in dB, means over both sources; or that the pair was `skipped`: a picture or sound is
        absent, a source or their sum is silent, or both sources are the same, for which SIR is undefined.
        """
        if not whole or is_silent(sources).any() or is_silent(sources.sum(0)):
            return dict(skipped=1)
        if index not in self.references:
            self.references[index] = self.judge_references(sources)
        references = self.references[index]
        if references["mixture_sdr"] > SAME:
            return dict(skipped=1)
        return dict(skipped=0) | ratios(sources, separated[None])[0] | references

    def judge_references(self, sources: Tensor) -> dict:
        """The same of what needs no training: the mixture as it is, blind separation, and the ideal mask,
        which is what the model's are trained towards.
        """
        mixture, mel_stft = sources.sum(0), self.model.mel_stft
        magnitude = mel_stft.magnitude(mixture[None])[0].cpu().numpy().astype(np.float64)
        blind = (torch.from_numpy(masks(magnitude)).to(sources) for masks in (nmf_masks, rpca_masks))
        nmf, rpca = (self.masked(masks, mixture) for masks in blind)
        ideal = ideal_masks(mel_stft.magnitude(sources[None]), self.config.mask)[0]
        orders = nmf, nmf.flip(0), rpca, rpca.flip(0)  # nobody tells these two which source is which
        estimates = mixture.expand_as(sources), *orders, self.masked(ideal, mixture)
        mixed, *orders, oracle = ratios(sources, torch.stack(estimates))
        nmf, rpca = (max(both, key=lambda row: row["sdr"]) for both in (orders[:2], orders[2:]))
        named = dict(mixture=mixed, nmf=nmf, rpca=rpca, oracle=oracle)
        return {f"{name}_{ratio}": value for name, row in named.items() for ratio, value in row.items()}

    def masked(self, masks: Tensor, mixture: Tensor) -> Tensor:
        """Masks (S, mel, frames) over a mixture (samples,) -> (S, samples)"""
        return self.model.mel_stft.apply_masks(masks[None], mixture[None])[0]

    def count(self, rows, metrics):
        return metrics["pairs"]

    def summarize(self, rows):
        judged = [row for row in rows if not row["skipped"]]
        metrics = dict(pairs=len(judged), skipped=len(rows) - len(judged))
        for name in judged[0] if judged else ():
            if name != "skipped":
                values = [row[name] for row in judged if np.isfinite(row[name])]  # silent estimates have none
                metrics[name] = float(np.mean(values)) if values else None
                if len(values) < len(judged):
                    metrics[f"{name}_pairs"] = len(values)
        return metrics

    def tables(self, metrics):
        ratios = ("sdr", "sir", "sar")
        names = {"": "model", "mixture_": "mixture as it is", "nmf_": "NMF", "rpca_": "RPCA"}
        names["oracle_"] = "ideal mask"
        rows = [(name, *(metrics.get(f"{kind}{ratio}") for ratio in ratios)) for kind, name in names.items()]
        judged = f"dB, {metrics['pairs']} pairs, {metrics['skipped']} skipped"
        return [[(judged, *(ratio.upper() for ratio in ratios)), *rows]]

    def doubt(self, metrics):
        sdr, mixture = metrics.get("sdr"), metrics.get("mixture_sdr")
        if mixture is None or sdr is not None and sdr > mixture:
            return ""
        said = "no sound at all" if sdr is None else f"SDR {sdr:.1f} dB"
        return f"{said} is no better than the mixture as it is, {mixture:.1f} dB"

    def draw(self, folder, model, inputs, batch, step):
        """Mixtures, masks and what they let through; and the sounds of the same pairs, to listen to."""
        mixture = inputs["sounds"].sum(1)
        separated, masks = model.separate(inputs["image"], inputs["audio"], mixture)
        draw_pairs(model, inputs, separated, masks, folder / f"separation-{step:06d}.png")
        for row, index in enumerate(batch["index"][:DRAWN].tolist()):
            sounds = dict(mixture=mixture[row], separated=separated[row, 0], truth=inputs["sounds"][row, 0])
            # Two sounds of full loudness add up to more than a file can hold: one gain for all three.
            peak = max(1.0, *(sound.abs().max().item() for sound in sounds.values()))
            for name, sound in sounds.items():
                path = folder.parent / "sounds" / f"{index:06d}-{name}.wav"
                write_wav(path, sound / peak, model.encoder.inputs.sample_rate)


def listed_mixtures(found: Found, root: Path, say: Callable[[str], object]) -> Found:
    """The same data, to be judged by the mixtures that MUSIC lists; those that lack a clip are named."""
    listing = Listing(f"mixtures of {music.MIXTURES.name}", root)
    test = [Mixture(**vars(clip), other=other) for clip, other in music.read_mixtures(listing, found.test)]
    for line in listing.summary():
        say(printable(line))
    if missing := listing.missing.get("test"):
        say(printable(f"{len(missing)} mixtures lack a clip, such as {some(missing)}"))
    coverage = found.coverage | dict(test=(len(test), listing.expected["test"]))
    return found._replace(test=test, test_name=listing.name, coverage=coverage)


def ideal_masks(sources: Tensor, kind: str) -> Tensor:
    """Magnitudes (B, S, mel, frames) of sources -> their masks: 1 for the loudest, or shares of the sum."""
    if kind == "binary":
        return (sources == sources.amax(1, keepdim=True)).to(sources.dtype)
    return sources / sources.sum(1, keepdim=True).clamp(min=1e-8)


def ratios(sources: Tensor, estimates: Tensor) -> list[dict[str, float]]:
    """SDR, SIR and SAR of estimates (E, S, samples) of the sources (S, samples), means over the sources."""
    found = torch.stack(bss_eval(sources.cpu(), estimates.cpu())).mean(-1)
    return [dict(zip(BSSEval._fields, row, strict=True)) for row in found.T.tolist()]


# --- pictures and sounds ------------------------------------------------------------------------------------


def draw_pairs(model: Separator, inputs: dict[str, Tensor], separated, masks, path: Path) -> None:
    """A row for each pair: the frame, and on the mel grid the mixture, the predicted mask, what it lets
    through, and what it should.
    """
    pairs = min(DRAWN, len(masks))
    sounds = ("mixture", "mask", "separated", "truth")
    figure, grid = figure_grid(pairs, ("wanted: the sound of",), sounds)
    for row, (frame, *axes) in enumerate(grid):
        frame.imshow(rgb(inputs["image"][row, 0].cpu(), model.encoder.inputs).numpy())
        sounds = torch.stack([inputs["sounds"][row].sum(0), separated[row, 0], inputs["sounds"][row, 0]])
        loud = 20 * model.mel_stft.magnitude(sounds).clamp(min=1e-4).log10()
        highest = loud[0].max().item()
        for axis, decibels in zip((axes[0], axes[2], axes[3]), loud, strict=True):
            show_sound(axis, decibels, vmin=highest - 70, vmax=highest)
        show_sound(axes[1], masks[row, 0], cmap="gray", vmin=0, vmax=1)
    save(figure, path)


def write_wav(path: Path, sound: Tensor, rate: int) -> None:
    """(samples,) in -1..1 as 16 bits, mono."""
    path.parent.mkdir(exist_ok=True)
    with wave.open(str(path), "wb") as file:
        file.setparams((1, 2, rate, 0, "NONE", ""))
        file.writeframes((32767 * sound.cpu().clamp(-1, 1)).round().short().numpy().tobytes())


main = partial(program, kind=Separation)
