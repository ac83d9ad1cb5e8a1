"""The model of a task: an encoder and a head, saved and loaded as one."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..data.clips import read_clip
from ..encoder import AVEncoder


class TaskModel(nn.Module):
    """An `encoder`, and what a task puts on it. A subclass is `avfuse.pretrained.Pretrained`, too, and keeps
    in `settings` the arguments that it was made with besides the encoder, ready for JSON.
    """

    encoder: AVEncoder
    settings: dict

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
        training, device = self.training, self.encoder.fusion_tokens.device
        image, audio = read_clip(path, self.encoder.inputs, start=start)
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

    @staticmethod
    def check_both(image: Tensor | None, audio: Tensor | None) -> None:
        """Raises ValueError for a clip that lacks a modality."""
        if image is None or audio is None:
            raise ValueError(f"it has no {'pictures' if image is None else 'sound'}, and both are needed")

    def to_config(self) -> dict:
        """What config.json holds."""
        return dict(encoder=self.encoder.to_config(), **self.settings)

    @classmethod
    def from_config(cls, config: dict) -> "TaskModel":
        config = dict(config)
        return cls(AVEncoder.from_config(config.pop("encoder")), **config)


def named(class_names: Sequence[str] | None, classes: int) -> tuple[str, ...] | None:
    """The names of all classes, or None; ValueError if there are more or fewer."""
    if class_names is not None and len(class_names) != classes:
        raise ValueError(f"class_names must name all {classes} classes, got {len(class_names)} names")
    return None if class_names is None else tuple(class_names)
