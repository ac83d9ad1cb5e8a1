"""Pictures of a run: masked reconstructions, and where the fusion tokens look and listen."""

from pathlib import Path

import torch
from matplotlib.figure import Figure
from matplotlib.text import Text
from torch import Tensor
from torch.nn.functional import interpolate

from ..encoder import AVEncoder
from ..inputs import InputSettings
from ..mae import AVMAE, patchify, unpatchify

BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#777777"  # told apart by colour-blind readers (Okabe-Ito)


@torch.no_grad()
def draw_reconstructions(mae: AVMAE, inputs: dict[str, Tensor], path: Path, clips: int = 4) -> None:
    """Original, masked input and reconstruction of frames and spectrograms, one row a clip. `inputs` are what
    the model is called with.
    """
    mae.eval()
    clips = min(clips, len(inputs["image"]))
    output = mae(**{name: value[:clips] for name, value in inputs.items()})
    figure = Figure(figsize=(11.5, 1.75 * clips + 0.3), layout="constrained")
    grid = figure.subplots(clips, 6, squeeze=False, width_ratios=(1, 1, 1, 1.7, 1.7, 1.7))
    titles = ("frame", "what the model sees", "reconstruction")
    for column, name in enumerate(("image", "audio")):
        stages = restored(mae, name, inputs[name][:clips], output)
        for row in range(clips):
            low, high = stages[0][row].min().item(), stages[0][row].max().item()
            for stage, (title, pixels) in enumerate(zip(titles, stages, strict=True)):
                axis = grid[row][3 * column + stage]
                if name == "image":
                    axis.imshow(rgb(pixels[row], mae.encoder.inputs).numpy())
                else:
                    show_sound(axis, pixels[row, 0], cmap="magma", vmin=low, vmax=high)
                axis.axis("off")
                if row == 0:
                    axis.set_title("spectrogram" if stage == 0 and name == "audio" else title, fontsize=10)
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
    image, audio, clips = first["image"], first["audio"], len(first["image"])
    weights = encoder.fusion_attention(
        image,
        audio,
        image_present=first.get("image_present"),
        audio_present=first.get("audio_present"),
    )
    figure = Figure(figsize=(9.5, 1.75 * clips + 0.3), layout="constrained")
    grid = figure.subplots(clips, 4, squeeze=False, width_ratios=(1, 1, 1.7, 1.7))
    maps = [
        heat_map(weight.mean((1, 2)), getattr(encoder, name).patch_embed.grid_size, pixels.shape[-2:])
        for name, weight, pixels in zip(("image", "audio"), weights, (image, audio), strict=True)
    ]
    for row in range(clips):
        frame, sound = rgb(image[row].cpu(), encoder.inputs), audio[row, 0].cpu()
        for axis in grid[row]:
            axis.axis("off")
        grid[row][0].imshow(frame.numpy())
        grid[row][1].imshow(frame.mean(-1).numpy(), cmap="gray", vmin=0, vmax=1)
        grid[row][1].imshow(maps[0][row].numpy(), cmap="inferno", alpha=0.6)
        show_sound(grid[row][2], sound, cmap="magma")
        show_sound(grid[row][3], sound, cmap="gray")
        show_sound(grid[row][3], maps[1][row], cmap="inferno", alpha=0.6)
    for axis, title in zip(grid[0], ("frame", "looked at", "spectrogram", "listened to"), strict=True):
        axis.set_title(title, fontsize=10)
    save(figure, path)


def heat_map(weights: Tensor, grid: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """Weights over patches (B, N) -> (B, height, width)"""
    weights = weights.float().view(-1, 1, *grid)
    return interpolate(weights, size=tuple(size), mode="bilinear")[:, 0].cpu()


def rgb(image: Tensor, inputs: InputSettings) -> Tensor:
    """A normalised image (3, height, width) -> (height, width, 3) in [0, 1]"""
    mean, std = torch.tensor(inputs.image_mean), torch.tensor(inputs.image_std)
    return (image.permute(1, 2, 0) * std + mean).clamp(0, 1)


def show_sound(axis, spectrogram: Tensor, **options) -> None:
    """A (mel, time) picture, low frequencies at the bottom."""
    axis.imshow(spectrogram.numpy(), origin="lower", aspect="auto", **options)


def save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    for text in figure.findobj(Text):  # names are no formulas, whatever dollars they have
        text.set_parse_math(False)
    figure.savefig(path, dpi=120)
