"""What a model takes in: the sizes and normalisation of one image and one log-mel spectrogram.

A model carries its `InputSettings` (they are saved in its config.json), and every reader of clips is built
from them, so that a model can never be fed with the wrong transform.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .checks import check_choice, check_count, check_positive, check_size, is_number

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
FRONT_ENDS = ("log-mel", "kaldi")
KALDI_LOWEST = 20.0  # Hz, where Kaldi's filters begin


@dataclass(frozen=True)
class InputSettings:
    """Input transforms of an audio-visual model; the defaults are the paper's (Sec. 4.1 and its released
    code).

    The image is `(3, *image_shape)`, normalised by `image_mean` and `image_std`; of several `image_frames`,
    evenly over the window of sound, `(image_frames, 3, *image_shape)`. The spectrogram is
    `(1, mel_bins, frames)`: log10(mel power + 1e-7) of `audio_seconds` of mono sound, with a centred,
    reflect-padded window of `window` samples every `hop` samples and HTK mel filters between 0 and
    `max_frequency`; the last of the `frames + 1` centred frames is dropped. With `front_end="kaldi"` it is
    the natural logarithm of Kaldi's filter banks, from 20 Hz, of windows that lie wholly in the sound; zeros
    fill `frames`. Either is normalised by `audio_mean` and `audio_std`.

    Raises:
        ValueError: naming the field: a size that is no positive integer, a deviation that is not positive,
            frequencies above half the sample rate, a clip that is shorter than half a window (for Kaldi, a
            window) or not a whole number of hops.
    """

    image_size: int | tuple[int, int] = 224  # pixels: of a square image, or (height, width)
    image_mean: tuple[float, float, float] = IMAGENET_MEAN
    image_std: tuple[float, float, float] = IMAGENET_STD
    sample_rate: int = 16_000  # Hz
    audio_seconds: float = 3.0
    window: int = 800  # samples: 50 ms
    hop: int = 250  # samples: 1/64 s
    mel_bins: int = 128
    max_frequency: float = 8_000.0  # Hz
    front_end: str = "log-mel"  # or "kaldi"
    audio_mean: float = 0.0  # of the spectrogram
    audio_std: float = 1.0
    padded_frames: int | None = None  # Kaldi's, with zeros; default: one for each hop
    image_frames: int = 1  # T: one frame stands in the middle of each of T equal parts of the window

    @classmethod
    def audiomae(cls, **others) -> "InputSettings":
        """What AudioMAE's weights were trained on: Kaldi filter banks of 10 s, 998 frames and 26 of zeros.

        AST's are the same. `others` are further fields, and may replace these.
        """
        kaldi = dict(front_end="kaldi", window=400, hop=160, audio_seconds=10.0, padded_frames=1024)
        return cls(**kaldi | dict(audio_mean=-4.2677393, audio_std=2 * 4.5689974) | others)

    def __post_init__(self):
        if isinstance(self.image_size, (tuple, list)):
            check_size("image_size", self.image_size)
            height, width = self.image_size
            object.__setattr__(self, "image_size", height if height == width else (height, width))
        else:
            check_count("image_size", self.image_size)
        for name in ("sample_rate", "window", "hop", "mel_bins", "image_frames"):
            check_count(name, getattr(self, name))
        check_choice("front_end", self.front_end, FRONT_ENDS)
        if not is_number(self.audio_mean):
            raise ValueError(f"audio_mean must be a number, got {self.audio_mean!r}")
        for name in ("audio_seconds", "max_frequency", "audio_std"):
            check_positive(name, getattr(self, name))
        for name in ("image_mean", "image_std"):
            rgb = getattr(self, name)
            if not isinstance(rgb, (tuple, list)) or len(rgb) != 3 or not all(map(is_number, rgb)):
                raise ValueError(f"{name} needs three numbers (red, green, blue), got {rgb!r}")
            object.__setattr__(self, name, tuple(rgb))  # JSON brings lists
        if min(self.image_std) <= 0:
            raise ValueError(f"image_std must be positive, got {self.image_std}")
        if self.max_frequency > self.sample_rate / 2:
            raise ValueError(
                f"max_frequency={self.max_frequency} is above half the sample_rate of {self.sample_rate}"
            )
        if self.samples <= self.window // 2:  # what the reflecting padding needs
            raise ValueError(f"audio_seconds={self.audio_seconds} is less than half a window")
        if self.front_end == "kaldi" and self.samples < self.window:
            raise ValueError(f"audio_seconds={self.audio_seconds} is less than a window")
        if self.front_end == "kaldi" and self.max_frequency <= KALDI_LOWEST:
            raise ValueError(f"max_frequency={self.max_frequency} is not above {KALDI_LOWEST} Hz")
        if self.samples % self.hop:
            raise ValueError(
                f"audio_seconds={self.audio_seconds} is not a whole number of hops of {self.hop} samples"
            )

        if self.padded_frames is not None:
            check_count("padded_frames", self.padded_frames)
            if self.front_end != "kaldi" or self.padded_frames < self.samples // self.hop:
                raise ValueError(
                    f"padded_frames={self.padded_frames} pads Kaldi filter banks to more frames than "
                    f"the {self.samples // self.hop} hops of audio_seconds={self.audio_seconds}"
                )

    @property
    def image_shape(self) -> tuple[int, int]:
        """Height and width of the image in pixels."""
        return self.image_size if isinstance(self.image_size, tuple) else (self.image_size, self.image_size)

    @property
    def frame_times(self) -> tuple[float, ...]:
        """When each of the `image_frames` is shown, in seconds from the start of the window."""
        return tuple((t + 0.5) * self.audio_seconds / self.image_frames for t in range(self.image_frames))

    @property
    def samples(self) -> int:
        """Samples of sound a spectrogram is made from."""
        return round(self.audio_seconds * self.sample_rate)

    @property
    def frames(self) -> int:
        """Time steps of the spectrogram (192 at the defaults; the paper says 196)."""
        return self.padded_frames or self.samples // self.hop


def middles(parts: int, seconds: float, **options) -> Tensor:
    """The middles of equal parts of a time, (parts,)."""
    return (torch.arange(parts, **options) + 0.5) * (seconds / parts)
