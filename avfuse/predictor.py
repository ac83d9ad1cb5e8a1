"""What every model has: `predict`, its answer for one window of a file."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .data.clips import read_clip


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
        training, encoder = self.training, getattr(self, "encoder", self)
        device = encoder.fusion_tokens.device
        image, audio = read_clip(path, encoder.inputs, start=start)
        try:
            return self.eval().predicted(
                None if image is None else image.to(device), None if audio is None else audio.to(device)
            )
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        finally:
            self.train(training)

    def predicted(self, image: Tensor | None, audio: Tensor | None) -> dict[str, Any]:
        """The answer for one clip, a batch of one; None is a modality that it lacks."""
        raise NotImplementedError
