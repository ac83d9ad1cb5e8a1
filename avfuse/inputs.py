"""What a model takes in: the sizes and normalisation of one image and one log-mel spectrogram.

A model carries its `InputSettings` (they are saved in its config.json), and every reader of clips is built
from them, so that a model can never be fed with the wrong transform.
"""

from dataclasses import dataclass

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class InputSettings:
    """Input transforms of an audio-visual model; the defaults are the paper's (Sec. 4.1 and its released
    code).

    The image is `(3, image_size, image_size)`, normalised by `image_mean` and `image_std`. The spectrogram is
    `(1, mel_bins, frames)`: log10(mel power + 1e-7) of `audio_seconds` of mono sound, with a centred,
    reflect-padded window of `window` samples every `hop` samples and HTK mel filters between 0 and
    `max_frequency`; the last of the `frames + 1` centred frames is dropped.

    Raises:
        ValueError: a size that is not positive, or a clip length that is not a whole number of hops.
    """

    image_size: int = 224  # pixels
    image_mean: tuple[float, float, float] = IMAGENET_MEAN
    image_std: tuple[float, float, float] = IMAGENET_STD
    sample_rate: int = 16_000  # Hz
    audio_seconds: float = 3.0
    window: int = 800  # samples: 50 ms
    hop: int = 250  # samples: 1/64 s
    mel_bins: int = 128
    max_frequency: float = 8_000.0  # Hz

    def __post_init__(self):
        for name in (
            "image_size",
            "sample_rate",
            "audio_seconds",
            "window",
            "hop",
            "mel_bins",
            "max_frequency",
        ):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        for name in ("image_mean", "image_std"):  # JSON brings lists
            object.__setattr__(self, name, tuple(getattr(self, name)))
            if len(getattr(self, name)) != 3:
                raise ValueError(f"{name} needs three numbers (red, green, blue), got {getattr(self, name)}")
        if self.samples % self.hop:
            raise ValueError(
                f"audio_seconds={self.audio_seconds} is not a whole number of hops of {self.hop} samples"
            )

    @property
    def samples(self) -> int:
        """Samples of sound a spectrogram is made from."""
        return round(self.audio_seconds * self.sample_rate)

    @property
    def frames(self) -> int:
        """Time steps of the spectrogram (192 at the defaults; the paper says 196)."""
        return self.samples // self.hop
