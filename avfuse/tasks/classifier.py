"""The classifier of clips: a linear head over each kind of token, also as it was saved or released."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import batch_norm

from ..checks import check_choice, check_count, check_flag
from ..encoder import AVEncoder
from ..loading import load_model
from ..pretrained import Pretrained, load_strictly
from ..released import encoder_weights, from_deepavfusion, read_weights, size_of
from ..training.features import FEATURES, pool
from .model import TaskModel, check_encoder, named

NORM_EPS = 1e-6


class Classified(NamedTuple):
    """Logits (B, classes): their mean over the heads that had something to read, which is 0 where none had;
    those of each head; and which clips each head could read, (B,) bool.
    """

    logits: Tensor
    heads: dict[str, Tensor]
    read: dict[str, Tensor]


class Classifier(TaskModel, Pretrained):
    """A linear head over each of the pooled image, audio and fusion tokens, their logits averaged.

    A clip that lacks a modality is classified by the other heads.

    Args:
        encoder: whose tokens are pooled.
        classes: number of classes.
        features: which of "image", "audio" and "fusion" have a head.
        batch_norm: standardise each pooled feature by a BatchNorm without parameters (eps 1e-6), as the
            released linear probe does. In training, its statistics are those of the clips given at once.
        frozen: the encoder is not trained, and stays in eval mode: a linear probe.
        class_names: what the classes are called, kept as a tuple with a saved classifier; None = not told.
        several: a clip may have several classes, each with a probability of its own (a sigmoid).
        modalities: "both", "image" or "audio", what it is taught by: `predict` answers by nothing else.

    Raises:
        ValueError: naming the argument that is wrong.
    """

    home = "avfuse.tasks.classifier"

    def __init__(
        self,
        encoder: AVEncoder,
        classes: int,
        *,
        features: Sequence[str] = FEATURES,
        batch_norm: bool = False,
        frozen: bool = False,
        class_names: Sequence[str] | None = None,
        several: bool = False,
        modalities: str = "both",
    ):
        super().__init__()
        check_count("classes", classes)
        check_choice("modalities", modalities, ("both", "image", "audio"))
        check_encoder(encoder)
        for name, flag in dict(batch_norm=batch_norm, frozen=frozen, several=several).items():
            check_flag(name, flag)
        if isinstance(features, str) or not features or len(set(features)) < len(features):
            raise ValueError(f"features must be some of {', '.join(FEATURES)}, each once, got {features!r}")
        for name in features:
            check_choice("features", name, FEATURES)
        self.class_names = named(class_names, classes)
        self.encoder, self.classes, self.frozen, self.several = encoder, classes, frozen, several
        self.features = tuple(name for name in FEATURES if name in features)
        self.settings = dict(
            classes=classes,
            features=self.features,
            batch_norm=batch_norm,
            class_names=self.class_names,
            several=several,
            modalities=modalities,
        )
        for name in self.features:
            norm = nn.BatchNorm1d(encoder.dims[name], eps=NORM_EPS, affine=False) if batch_norm else None
            head = nn.Linear(encoder.dims[name], classes)
            nn.init.trunc_normal_(head.weight, std=0.01)
            nn.init.zeros_(head.bias)
            setattr(self, f"{name}_norm", norm)
            setattr(self, f"{name}_head", head)
        if frozen:
            encoder.requires_grad_(False)
        self.train(self.training)

    def fitted(self, weights):
        """The heads of a probe take in its BatchNorm, for which a classifier without one has no place: they
        say the same of the same features.
        """
        for name in self.features:
            mean, var = (weights.get(f"{name}_norm.running_{of}") for of in ("mean", "var"))
            weight, bias = (weights.get(f"{name}_head.{of}") for of in ("weight", "bias"))
            if getattr(self, f"{name}_norm") or any(x is None for x in (mean, var, weight, bias)):
                continue
            weight = weight / (var + NORM_EPS).sqrt()
            weights = {key: x for key, x in weights.items() if not key.startswith(f"{name}_norm.")}
            weights |= {f"{name}_head.weight": weight, f"{name}_head.bias": bias - weight @ mean}
        return weights

    def train(self, mode: bool = True) -> "Classifier":
        super().train(mode)
        if self.frozen:
            self.encoder.eval()
        return self

    def forward(
        self,
        image: Tensor | None,
        audio: Tensor | None,
        image_present: Tensor | None = None,
        audio_present: Tensor | None = None,
    ) -> Classified:
        """Classify images (B, 3, height, width) with spectrograms (B, 1, mel, time).

        Args:
            image, audio: one of them may be None, for all clips.
            image_present, audio_present: (B,) bool, which clips have it; None = all.
        """
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            present = dict(
                image_present=None if image is None else image_present,
                audio_present=None if audio is None else audio_present,
            )
            pooled = pool(self.encoder(image, audio, **present))
        there = presence(image, audio, image_present, audio_present)
        heads = {
            name: getattr(self, f"{name}_head")(self.normalised(name, pooled[name], there[name]))
            for name in self.features
            if name in pooled
        }
        read = {name: there[name] for name in heads}
        if not heads:
            raise ValueError(f"features {self.features} cannot be read from what is given")
        weights = torch.stack(list(read.values())).to(next(iter(heads.values())).dtype)  # (heads, B)
        logits = torch.stack(list(heads.values())) * weights[..., None]
        return Classified(logits.sum(0) / weights.sum(0).clamp(min=1)[:, None], heads, read)

    def predicted(self, image: Tensor | None, audio: Tensor | None) -> dict[str, dict[str, float]]:
        """{"image", "audio", "both"} -> {class: probability}, likeliest first: by what the clip has of them.

        The probabilities of a clip's classes sum to 1, unless it may have `several`.

        Raises:
            ValueError: the clip lacks all that it could be classified by.
        """
        names = self.class_names or range(self.classes)
        answers, ways = {}, self.ways(image, audio)
        if not ways:
            lacks = "pictures" if image is None else "sound"
            raise ValueError(f"it has no {lacks}, by which alone this classifier answers")
        for what, inputs in ways.items():
            logits = self(*inputs).logits[0].float()
            odds = (logits.sigmoid() if self.several else logits.softmax(0)).cpu()
            answers[what] = {names[n]: odds[n].item() for n in odds.argsort(descending=True).tolist()}
        return answers

    def ways(
        self, image: Tensor | None, audio: Tensor | None
    ) -> dict[str, tuple[Tensor | None, Tensor | None]]:
        """What of a clip "image", "audio" and "both" are judged by, as far as it is there, has a head, and
        taught the classifier.
        """
        ways, taught = {}, self.settings["modalities"]
        if image is not None and {"image", "fusion"} & set(self.features):
            ways["image"] = image, None
        if audio is not None and {"audio", "fusion"} & set(self.features):
            ways["audio"] = None, audio
        if image is not None and audio is not None:
            ways["both"] = image, audio
        return ways if taught == "both" else {what: ways[what] for what in ways.keys() & {taught}}

    def normalised(self, name: str, pooled: Tensor, there: Tensor) -> Tensor:
        """Pooled tokens (B, D) standardised; those of clips without the modality are no part of the
        statistics.
        """
        norm = getattr(self, f"{name}_norm")
        if norm is None or not norm.training or there.all():
            return pooled if norm is None else self.standardised(norm, pooled)
        standardised = self.standardised(norm, pooled[there]).to(pooled.dtype)
        return pooled.masked_scatter(there[:, None], standardised)

    @staticmethod
    def standardised(norm: nn.BatchNorm1d, pooled: Tensor) -> Tensor:
        if norm.training and len(pooled) < 2:  # which have no statistics of their own
            return batch_norm(pooled, norm.running_mean, norm.running_var, eps=norm.eps)
        return norm(pooled)


def presence(image, audio, image_present, audio_present) -> dict[str, Tensor]:
    """Which clips have something that the image, the audio and the fusion tokens stem from: (B,) bool."""
    like = audio if image is None else image
    everyone = torch.ones(like.shape[0], dtype=torch.bool, device=like.device)
    there = {
        name: ~everyone if pixels is None else everyone if present is None else present
        for name, pixels, present in (("image", image, image_present), ("audio", audio, audio_present))
    }
    return there | dict(fusion=there["image"] | there["audio"])


def load_classifier(source: str | Path | dict, *, config: dict | None = None) -> Classifier:
    """A trained classifier, in eval mode; `class_names` tells what its classes are, unless it is a released
    one.

    Args:
        source: the run folder of `avfuse classify`, or a file or state dict of a released classifier.
        config: of released weights what their names and shapes cannot tell, see `from_deepavfusion`.

    Raises:
        ValueError: it is neither, or damaged.
    """
    if isinstance(source, (str, Path)) and Path(source).is_dir():
        return load_model(Classifier, source)
    weights = read_weights(source)
    encoder = from_deepavfusion(encoder_weights(weights), config=config)
    weights = {name: weight for name, weight in weights.items() if not name.startswith("encoder.")}
    features = [name for name in FEATURES if f"{name}_head.weight" in weights]
    if not features:
        raise ValueError(f"source holds no classifier: of a head there are only {sorted(weights)[:3]}")
    classifier = Classifier(
        encoder,
        size_of(weights, f"{features[0]}_head.weight", 0),
        features=features,
        batch_norm=f"{features[0]}_norm.running_mean" in weights,
    )
    weights |= {f"encoder.{name}": weight for name, weight in encoder.state_dict().items()}
    return load_strictly(classifier, weights)
