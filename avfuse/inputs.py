"""What a model takes in: the sizes and normalisation of one image and one log-mel spectrogram.

A model carries its `InputSettings` (they are saved in its config.json), and every reader of clips is built
from them, so that a model can never be fed with the wrong transform.
"""

from dataclasses import dataclass

from .checks import check_count, check_positive, is_number

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class InputSettings:
    """Input transforms of an audio-visual model; the defaults are the paper's (Sec. 4.1 and its released
    code).

    The image is `(3, *image_shape)`, normalised by `image_mean` and `image_std`. The spectrogram is
    `(1, mel_bins, frames)`: log10(mel power + 1e-7) of `audio_seconds` of mono sound, with a centred,
    reflect-padded window of `window` samples every `hop` samples and HTK mel filters between 0 and
    `max_frequency`; the last of the `frames + 1` centred frames is dropped.

    Raises:
        ValueError: naming the field: a size that is no positive integer, a deviation that is not positive,
            frequencies above half the sample rate, a clip that is shorter than half a window or not a whole
            number of hops.
    """

    image_size: int | tuple[int, int] = 224  # pixels: (height, width), or one number for both
    image_mean: tuple[float, float, float] = IMAGENET_MEAN
    image_std: tuple[float, float, float] = IMAGENET_STD
    sample_rate: int = 16_000  # Hz
    audio_seconds: float = 3.0
    window: int = 800  # samples: 50 ms
    hop: int = 250  # samples: 1/64 s
    mel_bins: int = 128
    max_frequency: float = 8_000.0  # Hz

    def __post_init__(self):
        is_pair = isinstance(self.image_size, (tuple, list)) and len(self.image_size) == 2
        for size in self.image_size if is_pair else (self.image_size,):
            check_count("image_size", size)
        if is_pair:
            object.__setattr__(self, "image_size", tuple(self.image_size))  # JSON brings lists
        for name in ("sample_rate", "window", "hop", "mel_bins"):
            check_count(name, getattr(self, name))
        for name in ("audio_seconds", "max_frequency"):
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
        if self.samples % self.hop:
            raise ValueError(
                f"audio_seconds={self.audio_seconds} is not a whole number of hops of {self.hop} samples"
            )

    @property
    def image_shape(self) -> tuple[int, int]:
        """Height and width of the image in pixels."""
        return self.image_size if isinstance(self.image_size, tuple) else (self.image_size,) * 2

    @property
    def samples(self) -> int:
        """Samples of sound a spectrogram is made from."""
        return round(self.audio_seconds * self.sample_rate)

    @property
    def frames(self) -> int:
        """Time steps of the spectrogram (192 at the defaults; the paper says 196)."""
        return self.samples // self.hop
