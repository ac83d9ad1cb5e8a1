"""Models by name: plain functions of a few numbers."""

from dataclasses import replace

from .checks import check_choice, check_count, check_rate
from .encoder import AVEncoder
from .inputs import InputSettings
from .vit import plain_vit

PATCH = 16
PAPER = InputSettings()
# 96 x 96 pixels and 64 mels x 128 frames of 3 s: 36 + 32 tokens, small enough to train on a CPU in minutes.
SMALL_INPUTS = InputSettings(image_size=96, mel_bins=64, hop=375)

# 48 x 48 pixels, 9 tokens a frame: many frames in minutes.
MICRO_INPUTS = InputSettings(image_size=48, mel_bins=64, hop=375)

SIZES = {  # width, depth, heads, inputs
    "micro": (48, 2, 2, MICRO_INPUTS),
    "tiny": (192, 4, 3, SMALL_INPUTS),
    "small": (384, 12, 6, PAPER),
    "base": (768, 12, 12, PAPER),
    "large": (1024, 24, 16, PAPER),
}


def create_encoder(
    size: str = "base",
    interactions: str = "dense",
    *,
    frames: int | None = None,
    inputs: InputSettings | None = None,
    **options,
) -> AVEncoder:
    """An `AVEncoder` with fresh weights.

    Args:
        size: "tiny" (192 wide, 4 layers; 96 x 96 images and 64 x 128 spectrograms, for CPUs), "micro" (48
            wide, 2 layers, 48 x 48 images, for scenes of synchrony), or the ViT sizes "small", "base" (the
            paper's) and "large" at 224 x 224 and 128 x 192.
        interactions: see `AVEncoder`.
        frames: of a clip; default that of `inputs`, or 1.
        inputs: other input transforms; both sizes must be multiples of the 16-pixel patches.
        options: any other keyword of `AVEncoder`, and `drop_path` for all three branches.

    Raises:
        ValueError: naming the argument that is wrong.
    """
    check_choice("size", size, tuple(SIZES))
    check_rate("drop_path", options.get("drop_path", 0.0))
    if frames is not None:
        check_count("frames", frames)
    dim, depth, heads, standard_inputs = SIZES[size]
    if inputs is None:
        inputs = standard_inputs if frames is None else replace(standard_inputs, image_frames=frames)
    if not isinstance(inputs, InputSettings):
        raise ValueError(f"inputs must be InputSettings, got {type(inputs).__name__}")
    sizes = dict(image_size=inputs.image_shape, mel_bins=(inputs.mel_bins,), frames=(inputs.frames,))
    for name, size in sizes.items():
        if any(pixels % PATCH for pixels in size):
            raise ValueError(
                f"inputs: {name}={getattr(inputs, name)} must be a multiple of the {PATCH}-pixel patches"
            )

    options_of_vits = dict(
        patch_size=PATCH,
        embed_dim=dim,
        depth=depth,
        num_heads=heads,
        drop_path_rate=options.get("drop_path", 0.0),
    )
    image = plain_vit(3, inputs.image_shape, **options_of_vits)
    audio = plain_vit(1, (inputs.mel_bins, inputs.frames), **options_of_vits)
    return AVEncoder(image, audio, interactions=interactions, frames=frames, inputs=inputs, **options)
