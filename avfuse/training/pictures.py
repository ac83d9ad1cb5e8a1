"""Pictures of a run: masked reconstructions, and where the fusion tokens look and listen."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.text import Text
from torch import Tensor
from torch.nn.functional import interpolate

from ..encoder import AVEncoder
from ..inputs import InputSettings
from ..mae import AVMAE, patchify, unpatchify

BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#777777"  # told apart by colour-blind readers (Okabe-Ito)
STAGES = ("what the model sees", "reconstruction")


@torch.no_grad()
def draw_reconstructions(mae: AVMAE, inputs: dict[str, Tensor], path: Path, clips: int = 4) -> None:
    """Original, masked input and reconstruction of frames and spectrograms, one row a clip. `inputs` are what
    the model is called with.
    """
    mae.eval()
    clips = min(clips, len(inputs["image"]))
    output = mae(**{name: value[:clips] for name, value in inputs.items()})
    figure, grid = figure_grid(clips, ("frame", *STAGES), ("spectrogram", *STAGES))
    images, sounds = (restored(mae, name, inputs[name][:clips], output) for name in ("image", "audio"))
    for row, axes in enumerate(grid):
        low, high = sounds[0][row].min().item(), sounds[0][row].max().item()
        for stage in range(3):
            axes[stage].imshow(rgb(images[stage][row], mae.encoder.inputs).numpy())
            show_sound(axes[3 + stage], sounds[stage][row, 0], vmin=low, vmax=high)
    save(figure, path)


def restored(mae: AVMAE, name: str, pixels: Tensor, output) -> tuple[Tensor, Tensor, Tensor]:
    """Original, masked and rebuilt pixels (B, C, height, width). A normalised target tells a patch up to its
    mean and deviation: the rebuilt picture takes these two numbers per patch from the original."""
    embed = getattr(mae.encoder, name).patch_embed
    size, grid = embed.patch_size, embed.grid_size
    removed = getattr(output, f"{name}_removed")[..., None]
    patches, pred = patchify(pixels, size), getattr(output, f"{name}_pred").float()
    if mae.norm_target:
        pred = pred * patches.var(-1, keepdim=True).sqrt() + patches.mean(-1, keepdim=True)
    background = patches.amin((1, 2), keepdim=True) if name == "audio" else torch.zeros(())
    stages = (patches, torch.where(removed, background, patches), torch.where(removed, pred, patches))
    return tuple(unpatchify(stage, size, grid).cpu() for stage in stages)


@torch.no_grad()
def draw_attention(encoder: AVEncoder, inputs: dict[str, Tensor], path: Path, clips: int = 4) -> None:
    """Weights of the last fusion block, averaged over heads and fusion tokens, over frames and
    spectrograms.
    """
    encoder.eval()
    first = {name: value[:clips] for name, value in inputs.items()}
    image, audio = first["image"], first["audio"]
    weights = encoder.fusion_attention(
        image,
        audio,
        image_present=first.get("image_present"),
        audio_present=first.get("audio_present"),
    )
    figure, grid = figure_grid(len(image), ("frame", "looked at"), ("spectrogram", "listened to"))
    maps = [
        heat_map(weight.mean((1, 2)), getattr(encoder, name).patch_embed.grid_size, pixels.shape[-2:])
        for name, weight, pixels in zip(("image", "audio"), weights, (image, audio), strict=True)
    ]
    for row, axes in enumerate(grid):
        frame, sound = rgb(image[row].cpu(), encoder.inputs), audio[row, 0].cpu()
        axes[0].imshow(frame.numpy())
        axes[1].imshow(frame.mean(-1).numpy(), cmap="gray", vmin=0, vmax=1)
        axes[1].imshow(maps[0][row].numpy(), cmap="inferno", alpha=0.6)
        show_sound(axes[2], sound)
        show_sound(axes[3], sound, cmap="gray")
        show_sound(axes[3], maps[1][row], cmap="inferno", alpha=0.6)
    save(figure, path)


def figure_grid(rows: int, frames: Sequence[str], sounds: Sequence[str]) -> tuple[Figure, np.ndarray]:
    """A figure with a row for each clip: frames, then spectrograms, which are wider, below these titles."""
    widths = [1] * len(frames) + [1.7] * len(sounds)
    figure = Figure(figsize=(1.55 * sum(widths) + 0.5, 1.75 * rows + 0.4), layout="constrained")
    grid = figure.subplots(rows, len(widths), squeeze=False, width_ratios=widths)
    for axis in grid.flat:
        axis.axis("off")
    for axis, title in zip(grid[0], (*frames, *sounds), strict=True):
        axis.set_title(title, fontsize=10)
    return figure, grid


def heat_map(weights: Tensor, grid: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """Weights over patches (B, N) -> (B, height, width)"""
    weights = weights.float().view(-1, 1, *grid)
    return interpolate(weights, size=tuple(size), mode="bilinear")[:, 0].cpu()


def rgb(image: Tensor, inputs: InputSettings) -> Tensor:
    """A normalised image (3, height, width), or of several (T, 3, height, width) the one in the middle ->
    (height, width, 3) in [0, 1]
    """
    image = image[len(image) // 2] if image.ndim == 4 else image
    mean, std = torch.tensor(inputs.image_mean), torch.tensor(inputs.image_std)
    return (image.permute(1, 2, 0) * std + mean).clamp(0, 1)


def show_sound(axis, spectrogram: Tensor, **options) -> None:
    """A (mel, time) picture, low frequencies at the bottom."""
    axis.imshow(spectrogram.cpu().numpy(), **dict(cmap="magma", origin="lower", aspect="auto") | options)


def save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    for text in figure.findobj(Text):  # names are no formulas, whatever dollars they have
        text.set_parse_math(False)
    figure.savefig(path, dpi=120)
