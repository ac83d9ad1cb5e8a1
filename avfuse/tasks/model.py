"""The model of a task: an encoder and a head, saved and loaded as one."""

from collections.abc import Sequence

from torch import Tensor, nn

from ..encoder import AVEncoder
from ..predictor import Predictor


class TaskModel(nn.Module, Predictor):
    """An `encoder`, and what a task puts on it. A subclass is `avfuse.pretrained.Pretrained`, too, and keeps
    in `settings` the arguments that it was made with besides the encoder, ready for JSON.
    """

    encoder: AVEncoder
    settings: dict

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


def check_encoder(encoder: AVEncoder) -> None:
    """Raises ValueError unless it is one."""
    if not isinstance(encoder, AVEncoder):
        raise ValueError(f"encoder must be an AVEncoder, got {type(encoder).__name__}")


def named(class_names: Sequence[str] | None, classes: int) -> tuple[str, ...] | None:
    """The names of all classes, or None; ValueError if they are not as many different names."""
    if class_names is None:
        return None
    if not isinstance(class_names, Sequence) or not all(isinstance(name, str) for name in class_names):
        raise ValueError(f"class_names must be a sequence of names, got {class_names!r}")
    if not len(set(class_names)) == len(class_names) == classes:
        raise ValueError(
            f"class_names must name all {classes} classes, got {len(set(class_names))} different names"
        )
    return tuple(class_names)
