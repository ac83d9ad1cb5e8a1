"""A model that hears a mixture, sees one of its sources, and masks all else: encoder, audio U-Net, STFT."""

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import relu

from ..checks import check_count
from ..data.clips import check_one_frame, open_window
from ..data.decode import extend
from ..data.transforms import Spectrogram
from ..encoder import AVEncoder
from ..inputs import InputSettings
from ..pretrained import Pretrained
from ..vit import split_prefix
from .model import TaskModel, check_encoder

QUERY = 128  # numbers in which the decoder is told what to look for
PLACED = 16  # numbers in it from each image patch: its place counts
NARROWEST = 8  # channels of the U-Net
LARGEST = 2**24  # samples of a window times mel bins


class Separator(TaskModel, Pretrained):
    """Masks for the sources that images show, out of a mixture (paper Sec. 4 and App. A.3).

    Image and mixture meet in the encoder; an audio U-Net takes its tokens back to the resolution of the
    spectrogram. Masks lie on the grid of the encoder's own input, mel bins and frames, so that a patch of
    tokens is a patch of mask; `MelSTFT` lays them over the STFT below that grid, which can be inverted.

    Args:
        encoder: the `AVEncoder` to fine-tune.
        decoder_dim: channels of the U-Net where it is coarsest, halved at each finer stage; default 256.

    Raises:
        ValueError: `decoder_dim` is no positive integer, or the audio patches of the encoder are not squares
            with a power of 2 as their side, or its inputs are Kaldi filter banks, which cannot be inverted.
    """

    home = "avfuse.tasks.separator"

    def __init__(self, encoder: AVEncoder, *, decoder_dim: int = 256):
        super().__init__()
        check_encoder(encoder)
        check_one_frame(encoder.frames, "separation")
        self.encoder, self.settings = encoder, dict(decoder_dim=decoder_dim)
        self.decoder = AudioUNet(encoder, decoder_dim)
        self.mel_stft = MelSTFT(encoder.inputs)

    def forward(self, image: Tensor, audio: Tensor) -> Tensor:
        """Images (B, S, 3, height, width) of S sources and the log-mel spectrogram (B, 1, mel, time) of their
        mixture -> mask logits (B, S, mel, time). Each source is masked on its own: the others may be unseen.

        Raises:
            ValueError: shapes that do not fit.
        """
        if image.ndim != 5 or audio.ndim != 4 or len(image) != len(audio):
            raise ValueError(
                "image must be (B, S, 3, height, width) and audio (B, 1, mel, time), "
                f"got shapes {tuple(image.shape)} and {tuple(audio.shape)}"
            )
        sources = image.shape[1]
        audio = audio.repeat_interleave(sources, dim=0)
        tokens = self.encoder(image.flatten(0, 1), audio, return_layers=True)
        patches = split_prefix(self.encoder.image, tokens.image)[1]
        layers = [split_prefix(self.encoder.audio, layer.audio)[1] for layer in (*tokens.layers, tokens)]
        return self.decoder(patches, layers, tokens.fusion, audio).unflatten(0, (-1, sources))

    def predict(self, path: str | Path, *, start: float | None = None) -> dict[str, Tensor | int]:
        """{"sound": (samples,), "sample_rate"}: what the picture of a window sounds like, out of all that is
        heard in it. Arguments and errors as for `TaskModel.predict`.
        """
        masks, inputs = super().predict(path, start=start)["masks"], self.encoder.inputs
        mixture, heard = read_mixture(path, inputs, start)
        sound = self.mel_stft.apply_masks(masks, mixture[None].to(masks.device))[0, 0]
        return dict(sound=sound[:heard].cpu(), sample_rate=inputs.sample_rate)

    def predicted(self, image: Tensor | None, audio: Tensor | None) -> dict[str, Tensor]:
        """{"masks": (1, 1, mel, time)}"""
        self.check_both(image, audio)
        return dict(masks=self.masks(image[None], audio))

    def masks(self, image: Tensor, audio: Tensor) -> Tensor:
        """The probability of each bin to be the source's, (B, S, mel, time); arguments as for `forward`."""
        return self(image, audio).float().sigmoid()

    @torch.no_grad()
    def separate(self, image: Tensor, audio: Tensor, mixture: Tensor) -> tuple[Tensor, Tensor]:
        """The sounds (B, S, samples) of the sources that images show, out of a mixture (B, samples), and the
        masks (B, S, mel, time) that let them through: each bin's probability of being the source's.
        """
        masks = self.masks(image, audio)
        return self.mel_stft.apply_masks(masks, mixture), masks


class AudioUNet(nn.Module):
    """From audio tokens to a map as fine as the spectrogram, in doublings (paper App. A.3).

    It starts from the last audio tokens. Each stage doubles the resolution by a transposed convolution, adds
    the audio tokens of an earlier layer, taken there in one step (the last stage: the spectrogram itself),
    and convolves. A query made from image and fusion tokens tells what to look for: it scales and shifts the
    channels of every stage and at the end weighs them (as in Zhao et al. 2018, The Sound of Pixels).

    There is no normalisation between stages: over the batch, it would tie the clips of a batch together.
    """

    def __init__(self, encoder: AVEncoder, dim: int):
        super().__init__()
        check_count("decoder_dim", dim)
        embed, depth, tokens = encoder.audio.patch_embed, encoder.depth, encoder.dims["audio"]
        stages = doublings(embed.patch_size)
        widths = [max(dim >> stage, NARROWEST) for stage in range(stages)]
        self.grid = embed.grid_size
        # Layers of the skips: evenly spaced, the deepest at the coarsest stage.
        self.layers = [max(depth * (stages - stage) // stages, 1) - 1 for stage in range(1, stages)]

        self.place = nn.Linear(encoder.dims["image"], PLACED)
        seen = PLACED * encoder.image.patch_embed.num_patches + encoder.dims["fusion"]
        self.query = nn.Sequential(
            nn.Linear(seen, 2 * QUERY), nn.GELU(), nn.Linear(2 * QUERY, QUERY), nn.GELU()
        )
        self.start = nn.Linear(tokens, widths[0])
        self.norms = nn.ModuleList(nn.LayerNorm(tokens) for _ in self.layers)
        self.skips = nn.ModuleList(
            nn.ConvTranspose2d(tokens, widths[stage - 1], 2**stage, 2**stage) for stage in range(1, stages)
        )
        self.skips.append(nn.Conv2d(1, widths[-1], 5, padding=2))
        self.stages = nn.ModuleList(map(Stage, [widths[0], *widths[:-1]], widths))
        self.weigh = nn.Linear(QUERY, widths[-1])
        self.bias = nn.Parameter(torch.zeros(()))

    def forward(self, image: Tensor, layers: list[Tensor], fusion: Tensor, spectrogram: Tensor) -> Tensor:
        """Image patches (B, I, D), audio patches (B, A, D) after every layer and the last norm, fusion tokens
        (B, F, D) and the spectrogram (B, 1, mel, time) -> (B, mel, time)
        """
        query = self.query(torch.cat([self.place(image).flatten(1), fusion.mean(1)], dim=1))
        skips = [self.on_grid(norm(layers[l])) for norm, l in zip(self.norms, self.layers, strict=True)]
        x = self.on_grid(self.start(layers[-1]))
        for stage, skip, finer in zip(self.stages, self.skips, [*skips, spectrogram], strict=True):
            x = stage(x, skip(finer), query)
        return torch.einsum("bchw,bc->bhw", x, self.weigh(query)) + self.bias

    def on_grid(self, tokens: Tensor) -> Tensor:
        """(B, A, C) -> (B, C, rows, columns)"""
        return tokens.transpose(1, 2).unflatten(2, self.grid)


class Stage(nn.Module):
    """Twice as fine: (B, before, h, w), a skip (B, after, 2h, 2w), a query (B, Q) -> (B, after, 2h, 2w)"""

    def __init__(self, before: int, after: int):
        super().__init__()
        self.up = nn.ConvTranspose2d(before, after, 2, 2)
        self.film = nn.Linear(QUERY, 2 * after)
        self.conv = nn.Conv2d(after, after, 3, padding=1)

    def forward(self, x: Tensor, skip: Tensor, query: Tensor) -> Tensor:
        scale, shift = self.film(query)[..., None, None].chunk(2, dim=1)
        x = relu((self.up(x) + skip) * (1 + scale) + shift)
        return relu(self.conv(x))


def read_mixture(path: str | Path, inputs: InputSettings, start: float | None) -> tuple[Tensor, int]:
    """The sound (samples,) of a window of a file, and how many of these it has: mirrored copies follow, as in
    the spectrogram. Errors as for `read_clip`.
    """
    with open_window(path, inputs, start) as (reader, start):
        sound = reader.audio(start, inputs.audio_seconds, inputs.sample_rate, extended=False)
    return torch.from_numpy(extend(sound, inputs.samples)), len(sound)


def doublings(patch_size: tuple[int, int]) -> int:
    """How often a grid of patches is doubled until it has the size of what was cut into patches."""
    side, other = patch_size
    if side != other or side < 2 or side & (side - 1):
        raise ValueError(
            f"encoder must have square audio patches with a power of 2 as side, got {patch_size}"
        )
    return side.bit_length() - 1


class MelSTFT(nn.Module):
    """The STFT under a model's mel spectrogram: what masks on the mel grid are made from and laid over.

    A mel spectrogram cannot be inverted, its STFT can. Both ways between them go through the mel filters:
    power is summed with them, and a mask is interpolated with them, as neighbouring triangles sum to 1.
    Where masks are soft or coarse, the mixture's phase is kept.
    """

    def __init__(self, settings: InputSettings):
        super().__init__()
        self.settings = settings
        if settings.front_end != "log-mel":
            raise ValueError(f"separation needs the STFT of log-mel spectrograms, not {settings.front_end!r}")
        if settings.window * settings.mel_bins > LARGEST:
            raise ValueError(
                f"inputs: a window of {settings.window} with {settings.mel_bins} mel bins is too much"
            )
        with torch.device("cpu"):  # the filters are made by their numbers, also of a model on the meta device
            spectrogram = Spectrogram(settings)
            filters = spectrogram.filters.T  # (mel, bins)
            nearest = torch.zeros_like(filters)  # for the bins outside all filters, at both ends
            centres = filters.argmax(1)
            bins = torch.arange(filters.shape[1])
            nearest[(bins - centres[:, None]).abs().argmin(0), bins] = 1
            spread = torch.where(filters.sum(0) > 0, filters, nearest)
        self.register_buffer("window", spectrogram.window, persistent=False)
        self.register_buffer("to_mel", filters, persistent=False)
        self.register_buffer("to_bins", (spread / spread.sum(0)).T.contiguous(), persistent=False)

    def stft(self, waveform: Tensor) -> Tensor:
        """(..., samples) -> complex (..., bins, frames + 1)"""
        options = dict(
            n_fft=self.settings.window, hop_length=self.settings.hop, window=self.window.to(waveform.dtype)
        )
        flat = waveform.reshape(-1, waveform.shape[-1])
        return torch.stft(flat, **options, return_complex=True).unflatten(0, waveform.shape[:-1] or (1,))

    def istft(self, spectrum: Tensor) -> Tensor:
        """complex (..., bins, frames + 1) -> (..., samples), as many as the settings say"""
        options = dict(
            n_fft=self.settings.window,
            hop_length=self.settings.hop,
            window=self.window.to(spectrum.real.dtype),
        )
        flat = torch.istft(spectrum.flatten(0, -3), **options, length=self.settings.samples)
        return flat.unflatten(0, spectrum.shape[:-2])

    def magnitude(self, waveform: Tensor) -> Tensor:
        """(..., samples) -> (..., mel, frames), the square root of mel power; the last frame is dropped"""
        return (self.to_mel @ self.stft(waveform).abs().square())[..., :-1].sqrt()

    def apply_masks(self, masks: Tensor, mixture: Tensor) -> Tensor:
        """Masks (B, S, mel, frames) over mixtures (B, samples) -> sounds (B, S, samples)"""
        masks = torch.cat([masks, masks[..., -1:]], dim=-1).to(mixture.dtype)  # the last is what was dropped
        return self.istft(self.to_bins.to(mixture.dtype) @ masks * self.stft(mixture)[:, None])
