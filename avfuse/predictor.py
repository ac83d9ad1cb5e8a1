"""What every model has: `predict`, its answer for one window of a file."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .data.clips import read_clip


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode while this lasts; then each part trains again, or does not, as before."""
    before = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, training in before:
            part.training = training


class Predictor:
    """A module that is an encoder, or has one as `encoder`. A subclass gives `predicted`."""

    @torch.no_grad()
    def predict(self, path: str | Path, *, start: float | None = None) -> dict[str, Any]:
        """What the model says of one window of a file, in evaluation mode.

        Args:
            path: a video or sound file.
            start: of the window, in seconds; None = the window in the middle.

        Returns:
            What `predicted` of the class says.

        Raises:
            ValueError: the file cannot be read, lacks what the model needs, or `start` is not within it.
        """
        encoder = getattr(self, "encoder", self)
        clip = read_clip(path, encoder.inputs, start=start)
        image, audio = (None if x is None else x.to(encoder.fusion_tokens) for x in clip)
        try:
            with evaluating(self):
                return self.predicted(image, audio)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    def predicted(self, image: Tensor | None, audio: Tensor | None) -> dict[str, Any]:
        """The answer for one clip, a batch of one; None is a modality that it lacks. It holds tensors,
        numbers and dictionaries of probabilities, by name.
        """
        raise NotImplementedError
