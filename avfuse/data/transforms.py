"""Input transforms: sound to log-mel spectrograms, frames to normalised images, and their augmentation.

Everything random is drawn from the generator that is passed in, never from the global state.
"""

import math

import torch
import torchaudio
from torch import Tensor, nn
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as tv

from ..inputs import InputSettings

AREA = (0.5, 1.0)  # share of the frame that a training crop keeps
RATIO = (3 / 4, 4 / 3)  # width / height of a training crop, over that of the image it is squeezed into
GAIN = 6.0  # dB, up and down
FLOOR = 1e-7  # added to the power, so that silence has a logarithm
EVALUATION_RESIZE = 256 / 224  # of a frame before the central crop, in crops
WASTE = 16  # times the pixels of the crop that a resized frame may have, of which the crop is then taken
RESIZE = {"interpolation": InterpolationMode.BICUBIC, "antialias": True}


class Spectrogram(nn.Module):
    """Log-mel spectrogram, log10(mel power + 1e-7), as `InputSettings` describes it."""

    def __init__(self, settings: InputSettings):
        super().__init__()
        self.settings = settings
        self.mel = torchaudio.transforms.MelSpectrogram(
            sample_rate=settings.sample_rate,
            n_fft=settings.window,
            hop_length=settings.hop,
            n_mels=settings.mel_bins,
            f_max=settings.max_frequency,
        )  # the rest is torchaudio's default: Hann window, centred, reflecting, power 2, HTK mels, no norm

    def forward(self, waveform: Tensor) -> Tensor:
        """(..., samples) in -1..1 -> (..., 1, mel_bins, samples // hop); low frequencies first.

        Raises:
            ValueError: there are fewer samples than the reflected half windows need.
        """
        samples, hop, window = waveform.shape[-1], self.settings.hop, self.settings.window
        if samples < hop or samples <= window // 2:
            raise ValueError(f"waveform must be longer than half a window of {window} samples, got {samples}")
        power = self.mel(waveform)[..., : samples // hop]  # the last centred frame is dropped
        return torch.log10(power + FLOOR).unsqueeze(-3)


def random_gain(waveform: Tensor, generator: torch.Generator) -> Tensor:
    """(..., samples) made louder or softer by uniform -6..+6 dB, one gain for all, then clamped to -1..1."""
    decibel = _uniform(-GAIN, GAIN, generator)
    return (waveform * 10 ** (decibel / 20)).clamp(-1, 1)


def training_image(frame: Tensor, settings: InputSettings, generator: torch.Generator) -> Tensor:
    """A random crop, squeezed and perhaps mirrored: (3, H, W) uint8 -> (3, *image_shape) float32.

    It has half the area or more; shape, mean and deviation are those of `settings`.
    """
    crop, mirrored = random_view(*frame.shape[-2:], settings, generator)
    return cropped_image(frame, settings, crop, mirrored=mirrored)


def random_view(
    height: int, width: int, settings: InputSettings, generator: torch.Generator
) -> tuple[tuple[int, int, int, int], bool]:
    """A `random_crop` of a frame of this size, and whether it is mirrored, which every other is."""
    rows, columns = settings.image_shape
    crop = random_crop(height, width, generator, aspect=columns / rows)
    return crop, _uniform(0, 1, generator) < 0.5


def cropped_image(
    frame: Tensor, settings: InputSettings, crop: tuple[int, int, int, int], *, mirrored: bool = False
) -> Tensor:
    """A crop (top, left, height, width), squeezed: (3, H, W) uint8 -> (3, *image_shape) float32."""
    image = tv.resized_crop(frame, *crop, list(settings.image_shape), **RESIZE)
    return _normalise(tv.horizontal_flip(image) if mirrored else image, settings)


def evaluation_image(frame: Tensor, settings: InputSettings) -> Tensor:
    """The central crop of the resized frame: (3, H, W) uint8 -> (3, *image_shape) float32.

    Shape, mean and deviation are those of `settings`.
    """
    (height, width), shape = evaluation_size(*frame.shape[-2:], settings), settings.image_shape
    if height * width <= WASTE * math.prod(shape):
        image = tv.center_crop(tv.resize(frame, [height, width], **RESIZE), list(shape))
    else:
        rows, vertical = _centre(frame.shape[-2], height, shape[0])
        columns, horizontal = _centre(frame.shape[-1], width, shape[1])
        image = _product(frame[:, rows, columns], horizontal)
        image = _product(image.mT, vertical).mT
    return _normalise(image, settings)


def _centre(length: int, resized: int, count: int) -> tuple[slice, Tensor]:
    """The part of `length` pixels that the `count` central ones of `resized` depend on, and (part, count) by
    how much: the weights of `RESIZE`, Keys' cubic kernel, wider where the image shrinks.
    """
    scale = length / resized
    reach, first = max(scale, 1.0), round((resized - count) / 2)
    centres = (torch.arange(first, first + count, dtype=torch.float64) + 0.5) * scale
    part = slice(max(0, math.floor(centres[0] - 2 * reach)), min(length, math.ceil(centres[-1] + 2 * reach)))
    x = ((torch.arange(part.start, part.stop) + 0.5)[:, None] - centres).abs() / reach
    weights = torch.where(x < 1, (1.5 * x - 2.5) * x**2 + 1, ((-0.5 * x + 2.5) * x - 4) * x + 2) * (x < 2)
    return part, (weights / weights.sum(0)).float()


def _product(image: Tensor, weights: Tensor) -> Tensor:
    return (image.float() @ weights).round().clamp(0, 255).to(torch.uint8)


def evaluation_size(height: int, width: int, settings: InputSettings) -> tuple[int, int]:
    """Height and width to which a frame is resized before the central crop: the side that is shorter in
    proportion has 256 pixels for a crop of 224, and in proportion for others.
    """
    rows, columns = settings.image_shape
    if height * columns <= width * rows:
        resized = round(rows * EVALUATION_RESIZE)
        return resized, int(resized * width / height)
    resized = round(columns * EVALUATION_RESIZE)
    return int(resized * height / width), resized


def random_crop(
    height: int, width: int, generator: torch.Generator, *, aspect: float = 1.0
) -> tuple[int, int, int, int]:
    """Top, left, height, width of a crop with uniform area and log-uniform ratio around `aspect`, the width
    over the height.

    After ten draws that do not fit, the largest central crop of an allowed ratio.
    """
    for _ in range(10):
        area = height * width * _uniform(*AREA, generator)
        ratio = aspect * math.exp(_uniform(*map(math.log, RATIO), generator))
        crop_width, crop_height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < crop_width <= width and 0 < crop_height <= height:
            top = int(torch.randint(height - crop_height + 1, (), generator=generator))
            left = int(torch.randint(width - crop_width + 1, (), generator=generator))
            return top, left, crop_height, crop_width
    crop_width = min(width, max(1, round(height * aspect * RATIO[1])))
    crop_height = min(height, max(1, round(width / aspect / RATIO[0])))
    return (height - crop_height) // 2, (width - crop_width) // 2, crop_height, crop_width


def _uniform(low: float, high: float, generator: torch.Generator) -> float:
    return low + (high - low) * float(torch.rand((), generator=generator))


def _normalise(image: Tensor, settings: InputSettings) -> Tensor:
    image = tv.to_dtype(image, torch.float32, scale=True)
    return tv.normalize(image, settings.image_mean, settings.image_std)
