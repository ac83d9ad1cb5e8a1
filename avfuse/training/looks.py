"""Do fusion tokens look at what sounds? Told of Sounding Shapes, which say where that is."""

import math
from collections.abc import Sequence
from contextlib import suppress

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

from ..data.clips import Clip, ClipDataset
from ..data.container import ClipError
from ..data.decode import EPSILON
from ..data.scenes import View, consensus
from ..data.sounding_shapes.read import Entry, is_built, read_manifest
from ..data.sounding_shapes.truths import read_frame_masks
from ..data.transforms import evaluation_size
from ..encoder import AVEncoder
from ..files import inside
from ..inputs import InputSettings

CLEARLY = 1.5  # times an even share of the picture: less is not called looking at it


class Sources:
    """Where what sounds is seen in test clips of Sounding Shapes; of other clips nothing is known."""

    def __init__(self, clips: Sequence[Clip], encoder: AVEncoder):
        self.clips, self.inputs, self.patch = clips, encoder.inputs, encoder.image.patch_embed.patch_size
        self.root, self.entries = clips[0].path.parent.parent if clips else None, {}
        with suppress(OSError, ValueError):  # files of other data that are called the same
            entries = read_manifest(self.root, "test") if clips and is_built(self.root) else []
            found = {inside(self.root, entry.file): entry for entry in entries}
            self.entries = found if all(clip.path in found for clip in clips) else {}

    def __bool__(self) -> bool:
        return bool(self.entries)

    def boxes(self, indices: Tensor) -> Tensor:
        """How much of each patch of clips lies in the box of what sounds, (B, T * N), in the pictures that
        evaluation shows; NaN where the file that knows is damaged.
        """
        dataset, rows = ClipDataset(self.clips, self.inputs, train=False), []
        for index in indices.tolist():
            clip = self.clips[index]
            start = max(0.0, clip.streams.seconds - self.inputs.audio_seconds) / 2
            times = dataset.times_of(start, clip.streams)
            try:
                frames = [self.box(self.entries[clip.path], time) for time in times]
            except ClipError:
                frames = [np.full(self.inputs.image_shape, np.nan, np.float32)] * len(times)
            rows.append(avg_pool2d(torch.from_numpy(np.stack(frames))[:, None], self.patch).flatten())
        return torch.stack(rows)

    def box(self, entry: Entry, time: float) -> np.ndarray:
        """1 in the box of what sounds at a time, else 0: (height, width) float32."""
        frame = min(math.floor((time + EPSILON) * entry.fps), round(entry.seconds * entry.fps) - 1)
        masks, boxes = read_frame_masks(inside(self.root, entry.masks), frame, len(entry.sounding))
        size, shape = masks.shape[1:], self.inputs.image_shape
        return consensus(boxes, size, central_view(*size, self.inputs), shape, annotators=1)


def looks(encoder: AVEncoder, inputs: dict[str, Tensor], boxes: Tensor) -> dict[str, Tensor]:
    """How much of what fusion tokens look at, the mean over heads and tokens, lies in boxes (B, T * N):
    `look_N` (B,) of each fused layer N, and `even` (B,) if every place were looked at alike; NaN without a
    picture.
    """
    shares = dict(even=boxes.mean(1))
    for layer in encoder.fusion_layers:
        weights = encoder.fusion_attention(**inputs, layer=layer)[0].mean((1, 2)).float().cpu()
        weights /= weights.sum(1, keepdim=True)  # of "token", sounds have a part
        shares[f"look_{layer}"] = (weights * boxes).sum(1)
    return shares


def most_looking(even: Tensor, **layers: Tensor) -> int:
    """The fused layer that looks at what sounds most; the first, where nothing is known."""
    means = {name: shares.nanmean() for name, shares in layers.items()}
    return int(max(means, key=means.get).removeprefix("look_"))


def do_look(even: float, **layers: float) -> bool:
    """Whether the fused layer that looks at what sounds most does so more than by chance."""
    return max(layers.values()) > CLEARLY * even


def said_of(even: float, **layers: float) -> str:
    """The same for people."""
    most, verb = max(layers, key=layers.get), "look" if do_look(even, **layers) else "do not look"
    share = f"{layers[most]:.0%} of their attention to the picture lies in its box, which is {even:.0%} of it"
    return f"Fusion tokens {verb} at what sounds: in layer {most.removeprefix('look_')}, {share}."


def central_view(height: int, width: int, settings: InputSettings) -> View:
    """The part of a picture of this size that evaluation shows, see `evaluation_image`."""
    rows, columns = settings.image_shape
    resized = evaluation_size(height, width, settings)
    before, after = min(zip((height, width), resized, strict=True), key=lambda side: side[0] / side[1])
    shown = rows * before / after, columns * before / after
    return View(height, width, ((height - shown[0]) / 2, (width - shown[1]) / 2, *shown))
