"""Pictures of a run: masked reconstructions, and where the fusion tokens look and listen."""

import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.text import Text
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from torch.nn.functional import interpolate

from ..encoder import AVEncoder
from ..inputs import InputSettings
from ..mae import AVMAE, patchify, unpatchify

BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#777777"  # told apart by colour-blind readers (Okabe-Ito)
STAGES = ("what the model sees", "reconstruction")
FRAMES = 8  # of a clip, in a row


@torch.no_grad()
def draw_reconstructions(mae: AVMAE, inputs: dict[str, Tensor], path: Path, clips: int = 4) -> None:
    """Original, masked input and reconstruction of frames and spectrograms, one row a clip; where it has
    several frames, a row each. `inputs` are what the model is called with.
    """
    mae.eval()
    clips = min(clips, len(inputs["image"]))
    output = mae(**{name: value[:clips] for name, value in inputs.items()})
    sound_title = title_of_sound(mae.encoder.inputs)
    images, sounds = (restored(mae, name, inputs[name][:clips], output) for name in ("image", "audio"))
    if mae.encoder.frames == 1:
        figure, grid = figure_grid(clips, ("frame", *STAGES), (sound_title, *STAGES))
    else:
        title, in_row = f"frames, {STAGES[0]}, {STAGES[1]}", min(FRAMES, mae.encoder.frames)
        figure, grid = figure_grid(3 * clips, (title,), (sound_title,), in_row)
    for row in range(clips):
        low, high = sounds[0][row].min().item(), sounds[0][row].max().item()
        for stage in range(3):
            frame, sound = grid[row, stage::3] if mae.encoder.frames == 1 else grid[3 * row + stage]
            frame.imshow(rgb(images[stage][row], mae.encoder.inputs).numpy())
            show_sound(sound, sounds[stage][row, 0], vmin=low, vmax=high)
    save(figure, path)


def restored(mae: AVMAE, name: str, pixels: Tensor, output) -> tuple[Tensor, Tensor, Tensor]:
    """Original, masked and rebuilt pixels (B, C, height, width), or (B, T, C, height, width). A normalised
    target tells a patch up to its mean and deviation: the rebuilt picture takes these two numbers per patch
    from the original.
    """
    embed = getattr(mae.encoder, name).patch_embed
    size, grid, lead = embed.patch_size, embed.grid_size, pixels.shape[:-3]
    removed = getattr(output, f"{name}_removed").flatten(0, -2)[..., None]
    patches = patchify(pixels.flatten(0, -4), size)
    pred = getattr(output, f"{name}_pred").float().flatten(0, -3)
    if mae.norm_target:
        pred = pred * patches.var(-1, keepdim=True).sqrt() + patches.mean(-1, keepdim=True)
    background = patches.amin((1, 2), keepdim=True) if name == "audio" else torch.zeros(())
    stages = (patches, torch.where(removed, background, patches), torch.where(removed, pred, patches))
    return tuple(unpatchify(stage, size, grid).unflatten(0, lead).cpu() for stage in stages)


@torch.no_grad()
def draw_attention(
    encoder: AVEncoder, inputs: dict[str, Tensor], path: Path, *, clips: int = 4, layer: int | None = None
) -> None:
    """Weights of the fusion block of a layer, the last fused one by default, averaged over heads and fusion
    tokens, over frames and spectrograms; of clips of several frames also how they are spread over time.
    """
    encoder.eval()
    layer = encoder.fusion_layers[-1] if layer is None else layer
    names = "image", "audio", "image_present", "audio_present"
    first = {name: inputs[name][:clips] for name in names if name in inputs}
    image, audio = first["image"], first["audio"]
    weights = encoder.fusion_attention(**first, layer=layer)
    looked, heard = (weight.mean((1, 2)) for weight in weights)
    maps = heat_maps(encoder.image, looked, image), heat_maps(encoder.audio, heard, audio)
    sound_title = title_of_sound(encoder.inputs)
    if encoder.frames == 1:
        titles = ("frame", f"looked at in layer {layer}"), (sound_title, "listened to")
        figure, grid = figure_grid(len(image), *titles)
    else:
        titles = (
            (f"frames, where fusion tokens look in layer {layer}, and when",),
            (f"{sound_title}, where they listen, and when",),
        )
        figure, grid = figure_grid(3 * len(image), *titles, min(FRAMES, encoder.frames))
    for row in range(len(image)):
        frame, seen, sound, listened = (
            grid[row] if encoder.frames == 1 else grid[3 * row : 3 * row + 2].T.flat
        )
        picture = rgb(image[row].cpu(), encoder.inputs)
        looked_at = maps[0][row] if encoder.frames == 1 else in_a_row(maps[0][row])
        frame.imshow(picture.numpy())
        seen.imshow(picture.mean(-1).numpy(), cmap="gray", vmin=0, vmax=1)
        seen.imshow(looked_at.numpy(), cmap="inferno", alpha=0.6)
        show_sound(sound, audio[row, 0])
        show_sound(listened, audio[row, 0], cmap="gray")
        show_sound(listened, maps[1][row], cmap="inferno", alpha=0.6)
        if encoder.frames > 1:
            columns = heard[row].view(encoder.audio.patch_embed.grid_size).sum(0)
            draw_moments(grid[3 * row + 2, 0], encoder, looked[row].view(image.shape[1], -1).sum(1))
            draw_moments(grid[3 * row + 2, 1], encoder, columns)
    save(figure, path)


def draw_moments(axis, encoder: AVEncoder, weights: Tensor) -> None:
    """How much of the attention falls on each of equal parts of the window, in multiples of an even share."""
    draw_steps(axis, weights * len(weights), encoder.inputs.audio_seconds)
    axis.axhline(1, color=GREY, lw=0.8)


def draw_steps(axis, values: Tensor, seconds: float, *, highest: float | None = None) -> None:
    """A value, 0 or above, for each of equal parts of a window."""
    axis.axis("on")
    edges = np.linspace(0, seconds, len(values) + 1)
    axis.stairs(values.cpu().numpy(), edges, color=BLUE, fill=True)
    axis.set(xlim=(0, seconds), ylim=(0, highest))
    axis.tick_params(labelsize=7)
    axis.spines[["top", "right"]].set_visible(False)


def heat_maps(vit: VisionTransformer, weights: Tensor, pixels: Tensor) -> Tensor:
    """Weights over patches (B, N), of several frames (B, T * N), as pictures of the size of the pixels."""
    weights = weights.float().view(-1, 1, *vit.patch_embed.grid_size)
    maps = interpolate(weights, size=tuple(pixels.shape[-2:]), mode="bilinear")[:, 0].cpu()
    return maps.unflatten(0, pixels.shape[:-3])


def figure_grid(
    rows: int, frames: Sequence[str], sounds: Sequence[str], times: int = 1
) -> tuple[Figure, np.ndarray]:
    """A figure with rows below these titles: frames, so many `times` as wide, then spectrograms."""
    widths = [times] * len(frames) + [1.7 * min(times, 2)] * len(sounds)
    figure = Figure(figsize=(1.55 * sum(widths) + 0.5, 1.75 * rows + 0.4), layout="constrained")
    grid = figure.subplots(rows, len(widths), squeeze=False, width_ratios=widths)
    for axis in grid.flat:
        axis.axis("off")
    for axis, title in zip(grid[0], (*frames, *sounds), strict=True):
        axis.set_title(title, fontsize=10)
    return figure, grid


def in_a_row(pictures: Tensor) -> Tensor:
    """(T, height, width, ...) -> (height, all widths, ...), of many frames `FRAMES` of them, evenly."""
    shown = torch.linspace(0, len(pictures) - 1, min(FRAMES, len(pictures))).round().long()
    return torch.cat(list(pictures[shown]), dim=1)


def rgb(image: Tensor, inputs: InputSettings) -> Tensor:
    """A normalised image (3, height, width) -> (height, width, 3) in [0, 1]; several in a row."""
    mean, std = torch.tensor(inputs.image_mean), torch.tensor(inputs.image_std)
    picture = (image.movedim(-3, -1) * std + mean).clamp(0, 1)
    return picture if image.ndim == 3 else in_a_row(picture)


def middle_frame(image: Tensor) -> Tensor:
    """(3, height, width), of several frames (T, 3, height, width) -> (3, height, width)"""
    return image if image.ndim == 3 else image[len(image) // 2]


def show_sound(axis, spectrogram: Tensor, **options) -> None:
    """A (mel, time) picture, low frequencies at the bottom."""
    axis.imshow(spectrogram.cpu().numpy(), **dict(cmap="magma", origin="lower", aspect="auto") | options)


def title_of_sound(inputs: InputSettings) -> str:
    """How long and how high its pictures are."""
    return f"spectrogram ({inputs.audio_seconds:g} s, to {inputs.max_frequency / 1000:g} kHz)"


def save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    for text in figure.findobj(Text):  # names are no formulas, whatever dollars they have
        text.set_parse_math(False)
    with warnings.catch_warnings():  # letters that the font lacks are boxes, and whoever looks sees them
        warnings.filterwarnings("ignore", "Glyph")
        # Half the time of level 6, for 3 % more bytes.
        figure.savefig(path, dpi=120, pil_kwargs=dict(compress_level=4))
