"""The model of a task: an encoder and a head, saved and loaded as one."""

from torch import nn

from ..encoder import AVEncoder


class TaskModel(nn.Module):
    """An `encoder`, and what a task puts on it. A subclass is `avfuse.pretrained.Pretrained`, too, and keeps
    in `settings` the arguments that it was made with besides the encoder, ready for JSON.
    """

    encoder: AVEncoder
    settings: dict

    def to_config(self) -> dict:
        """What config.json holds."""
        return dict(encoder=self.encoder.to_config(), **self.settings)

    @classmethod
    def from_config(cls, config: dict) -> "TaskModel":
        config = dict(config)
        return cls(AVEncoder.from_config(config.pop("encoder")), **config)
