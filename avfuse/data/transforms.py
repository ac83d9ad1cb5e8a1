"""Input transforms: sound to log-mel spectrograms, frames to normalised images, and their augmentation.

Everything random is drawn from the generator that is passed in, never from the global state.
"""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as tv

from ..inputs import KALDI_LOWEST, InputSettings

AREA = (0.5, 1.0)  # share of the frame that a training crop keeps
RATIO = (3 / 4, 4 / 3)  # width / height of a training crop, over that of the image it is squeezed into
GAIN = 6.0  # dB, up and down
FLOOR = 1e-7  # added to the power, so that silence has a logarithm
KALDI_FLOOR = torch.finfo(torch.float32).eps  # of the power
PREEMPHASIS = 0.97  # of the sample before, which Kaldi subtracts
EVALUATION_RESIZE = 256 / 224  # of a frame before the central crop, in crops
WASTE = 16  # times the pixels of the crop that a resized frame may have, of which the crop is then taken
RESIZE = {"interpolation": InterpolationMode.BICUBIC, "antialias": True}


class Spectrogram(nn.Module):
    """Log-mel spectrogram or Kaldi filter banks, as `InputSettings` describes them.

    To the last bit torchaudio's `MelSpectrogram` and `compliance.kaldi.fbank`: the operations and their order
    are the same.
    """

    def __init__(self, settings: InputSettings):
        super().__init__()
        self.settings = settings
        kaldi = settings.front_end == "kaldi"
        filters = kaldi_filters(settings) if kaldi else htk_filters(settings)
        window = torch.hann_window(settings.window, periodic=not kaldi)
        self.register_buffer("window", window, persistent=False)
        self.register_buffer("filters", filters, persistent=False)

    def forward(self, waveform: Tensor) -> Tensor:
        """(..., samples) in -1..1 -> (..., 1, mel_bins, frames); low frequencies first.

        Raises:
            ValueError: there are fewer samples than a hop, or than a window needs, or its reflected half.
        """
        features = self.kaldi if self.settings.front_end == "kaldi" else self.log_mel
        normalised = (features(waveform) - self.settings.audio_mean) / self.settings.audio_std
        return normalised.transpose(-1, -2).unsqueeze(-3)

    def log_mel(self, waveform: Tensor) -> Tensor:
        """(..., samples) -> (..., samples // hop, mel_bins)"""
        samples, hop, window = waveform.shape[-1], self.settings.hop, self.settings.window
        if samples <= window // 2:
            raise ValueError(f"waveform must be longer than half a window of {window} samples, got {samples}")
        if samples < hop:
            raise ValueError(f"waveform must have a hop of {hop} samples or more, got {samples}")
        flat = waveform.reshape(-1, samples)
        spectra = torch.stft(flat, window, hop, window=self.window, return_complex=True).transpose(-1, -2)
        mel = spectra.abs().square() @ self.filters
        log_mel = torch.log10(mel[:, : samples // hop] + FLOOR)  # the last centred frame is dropped
        return log_mel.reshape(*waveform.shape[:-1], *log_mel.shape[1:])

    def kaldi(self, waveform: Tensor) -> Tensor:
        """(..., samples) -> (..., frames, mel_bins), zeros after the last whole window"""
        samples, hop, window = waveform.shape[-1], self.settings.hop, self.settings.window
        if samples < window:
            raise ValueError(f"waveform must have a window of {window} samples or more, got {samples}")
        frames = (waveform - waveform.mean(-1, keepdim=True)).unfold(-1, window, hop)
        frames = frames - frames.mean(-1, keepdim=True)
        before = torch.cat([frames[..., :1], frames[..., :-1]], dim=-1)
        spectra = torch.fft.rfft((frames - PREEMPHASIS * before) * self.window, fft_size(window))
        banks = (spectra.abs().square() @ self.filters).clamp(min=KALDI_FLOOR).log()
        return pad(banks, (0, 0, 0, self.settings.frames - banks.shape[-2]))


def htk_filters(settings: InputSettings) -> Tensor:
    """Triangles over frequencies: (bins of the spectrum, mel_bins)"""
    highest = 2595 * math.log10(1 + settings.max_frequency / 700)
    corners = 700 * (10 ** (torch.linspace(0, highest, settings.mel_bins + 2) / 2595) - 1)
    return triangles(torch.linspace(0, settings.sample_rate // 2, settings.window // 2 + 1), corners)


def kaldi_filters(settings: InputSettings) -> Tensor:
    """Triangles over mels: (bins of the spectrum, mel_bins); half the sample rate is in none."""
    lowest, highest = (1127 * math.log(1 + hertz / 700) for hertz in (KALDI_LOWEST, settings.max_frequency))
    step = (highest - lowest) / (settings.mel_bins + 1)
    size = fft_size(settings.window)
    mels = 1127 * (1 + settings.sample_rate / size * torch.arange(size / 2) / 700).log()
    return pad(triangles(mels, lowest + torch.arange(settings.mel_bins + 2) * step), (0, 0, 0, 1))


def triangles(points: Tensor, corners: Tensor) -> Tensor:
    """(P,) and (N + 2,) -> (P, N): triangle n rises from corner n to the next and falls to the one after."""
    rising = (points[:, None] - corners[:-2]) / corners.diff()[:-1]
    falling = (corners[2:] - points[:, None]) / corners.diff()[1:]
    return torch.minimum(rising, falling).clamp(min=0)


def fft_size(window: int) -> int:
    """Samples of Kaldi's transform: the next power of 2, filled with zeros."""
    return 1 << (window - 1).bit_length()


def random_gain(waveform: Tensor, generator: torch.Generator) -> Tensor:
    """(..., samples) made louder or softer by uniform -6..+6 dB, one gain for all, then clamped to -1..1."""
    decibel = _uniform(-GAIN, GAIN, generator)
    return (waveform * 10 ** (decibel / 20)).clamp(-1, 1)


def training_images(
    frames: Iterable[Tensor], settings: InputSettings, generator: torch.Generator
) -> list[Tensor]:
    """A random crop of the frames of a clip, one for all, squeezed and perhaps mirrored: (3, H, W) uint8 ->
    (3, *image_shape) float32.

    It has half the area or more, unless the frame is too long or too high for that, see `random_crop`. Shape,
    mean and deviation are those of `settings`. Frames of another size than the first are squeezed into that.
    """
    images, size = [], None
    for frame in frames:
        if size is None:
            size = frame.shape[-2:]
            crop, mirrored = random_view(*size, settings, generator)
        if frame.shape[-2:] != size:
            frame = tv.resize(frame, list(size), **RESIZE)
        images.append(cropped_image(frame, settings, crop, mirrored=mirrored))
    return images


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
