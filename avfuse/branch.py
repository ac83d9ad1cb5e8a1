"""One modality on its way through an encoder: what of it takes part, its tokens, its checks."""

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from .checks import check_dtype, check_indices, check_mask, check_tensor, has_hooks
from .fusion import Stream
from .vit import input_shape, patch_tokens, per_clip, per_frame, split_prefix


class Selection(NamedTuple):
    """Which patch tokens of one modality take part. Of several frames, "B" is (B, T)."""

    keep: Tensor | None  # (B, n) long: the others are dropped
    mask: Tensor | None  # (B, N) bool: nobody attends to the others
    present: Tensor | None  # (B,) bool, of clips: the others lack the modality


class Branch(NamedTuple):
    """One uni-modal stream on its way through the layers. Each of several frames runs alone, as if it were a
    clip: then "B" is B * T.
    """

    vit: VisionTransformer
    tokens: Tensor  # (B, prefix + n, D)
    mask: Tensor | None  # (B, n) over the patch tokens, True = attend
    positions: Tensor | None  # (B, n) which patches they are; None = all, in order
    layers: Sequence[int]  # in which its blocks run
    frames: int | None = None  # T of a clip of several, which fusion reads one after the other
    times: Tensor | None = None  # seconds, for a time bias, see `avfuse.fusion.Stream`
    update: Tensor | None = None  # of the tokens, yet to be added: see `FusedEncoder`

    @classmethod
    def embed(
        cls,
        vit: VisionTransformer,
        pixels: Tensor,
        selection: Selection,
        layers: Sequence[int],
        frame_embed: Tensor | None = None,
    ) -> "Branch":
        """Tokens of pixels (B, C, H, W); with `frame_embed` (1, T', D), which is added to the tokens of each
        frame, of pixels (B, T, C, H, W).
        """
        keep, mask, present = selection
        frames = None if frame_embed is None else pixels.shape[1]
        if frames is not None:
            pixels, keep, mask = (None if x is None else x.flatten(0, 1) for x in (pixels, keep, mask))
        if present is not None:
            present = per_frame(present[:, None], frames)
            pixels = pixels.masked_fill(~present[..., None, None], 0.0)  # whatever stands there, even NaN
            present = present.expand(-1, vit.patch_embed.num_patches)
            mask = present if mask is None else mask & present
        if mask is not None and keep is not None:
            mask = mask.gather(1, keep)
        tokens = patch_tokens(vit, pixels, keep)
        if frames is not None:
            frame_embed = resampled_frames(frame_embed, frames)[:, :, None]
            tokens = (tokens.unflatten(0, (-1, frames)) + frame_embed).flatten(0, 1)
        return cls(vit, tokens, mask, keep, layers, frames)

    @property
    def stream(self) -> Stream:
        """What fusion reads, of clips: prefix tokens are never paired."""
        patches = split_prefix(self.vit, self.tokens)[1], self.mask, self.positions
        return Stream(*(x if x is None else per_clip(x, self.frames) for x in patches), self.times)

    @property
    def output(self) -> Tensor:
        """(B, prefix + n, D), of several frames (B, T, prefix + n, D)"""
        return self.tokens if self.frames is None else self.tokens.unflatten(0, (-1, self.frames))

    def key_mask(self, num_context: int) -> Tensor | None:
        """Mask (B, 1, 1, context + prefix + n) for self-attention; all, where it would leave none."""
        if self.mask is None:
            return None
        always = self.mask.new_ones(self.mask.shape[0], num_context + self.vit.num_prefix_tokens)
        mask = torch.cat([always, self.mask], dim=1)
        return (mask | ~mask.any(1, keepdim=True))[:, None, None]


def resampled_frames(frame_embed: Tensor, frames: int) -> Tensor:
    """Positions (1, T', D) of frames evenly over a window, at as many other times in it, (1, T, D)."""
    if frame_embed.shape[1] == frames:
        return frame_embed
    return F.interpolate(frame_embed.mT, frames, mode="linear").mT


def joint_masks(image: Branch, audio: Branch) -> tuple[Tensor | None, Tensor | None]:
    """Masks (B, 1, 1, keys) of `avfuse.vit.joint_heads`; all own tokens, where it would leave none."""
    if image.mask is None and audio.mask is None:
        return None, None
    masks, prefixes = [], []
    for branch in image, audio:
        every = branch.tokens.new_ones(branch.tokens.shape[:2], dtype=torch.bool)
        prefix, patches = every.tensor_split([branch.vit.num_prefix_tokens], dim=1)
        prefixes.append(prefix)
        masks.append(patches if branch.mask is None else branch.mask)
    seen, heard = masks
    image_mask = torch.cat([prefixes[0], seen, per_frame(heard, image.frames)], dim=1)
    audio_mask = torch.cat([per_clip(seen, image.frames), heard, prefixes[1]], dim=1)
    image_mask[:, : image.tokens.shape[1]] |= ~image_mask.any(1, keepdim=True)
    audio_mask[:, -audio.tokens.shape[1] :] |= ~audio_mask.any(1, keepdim=True)
    return image_mask[:, None, None], audio_mask[:, None, None]


def absent(like: Tensor, dim: int) -> Stream:
    """A modality that is not there: one token of this width that nobody attends to."""
    nothing = torch.zeros(like.shape[0], 1, dtype=torch.bool, device=like.device)
    return Stream(like.new_zeros(like.shape[0], 1, dim), nothing, nothing.long(), like.new_zeros(1))


def check_branch(
    name: str, vit: VisionTransformer, pixels: Tensor | None, selection: Selection, several: bool = False
) -> None:
    """Raises ValueError unless these are pixels, of `several` frames or not, and a selection of patches."""
    if pixels is None:
        for what, given in zip(("keep", "mask", "present"), selection, strict=True):
            if given is not None:
                raise ValueError(f"{name}_{what} needs {name}, which is None")
        return
    for part, module in (name, vit), (f"{name}.blocks", vit.blocks):
        if has_hooks(module) and not has_hooks(vit.blocks[0]):  # where all modules have some, those run
            raise ValueError(
                f"{name} cannot run the hooks of {part}, only those of its parts, such as its blocks"
            )
    check_tensor(name, pixels, "floating point")
    expected, shape, lead = input_shape(vit), tuple(pixels.shape), ("B", "frames") if several else ("B",)
    if len(shape) != len(lead) + 3 or shape[-3:] != expected or 0 in shape[1:]:
        raise ValueError(f"{name} must be ({', '.join(map(str, lead + expected))}), got shape {shape}")
    check_dtype(name, pixels, vit.patch_embed.proj.weight)
    lead, patches = shape[:-3], vit.patch_embed.num_patches
    check_mask(f"{name}_mask", selection.mask, (*lead, patches), pixels.device)
    check_mask(f"{name}_present", selection.present, shape[:1], pixels.device)
    if selection.keep is not None:
        check_indices(f"{name}_keep", selection.keep, (*lead, None), patches, pixels.device)


def check_joint(
    image: VisionTransformer,
    audio: VisionTransformer,
    fusion_layers: Sequence[int],
    block_layers: dict[str, Sequence[int]],
) -> None:
    """Raises ValueError unless queries of either fit the keys of the other, in every fused layer."""
    heads = [(vit.blocks[0].attn.num_heads, vit.blocks[0].attn.head_dim) for vit in (image, audio)]
    if heads[0] != heads[1]:
        said = " and ".join(f"{count} of width {width}" for count, width in heads)
        raise ValueError(f"interactions='joint' needs equal heads of image and audio, got {said}")
    shared = sorted(set(block_layers["image"]) & set(block_layers["audio"]))
    if not set(fusion_layers) <= set(shared):
        raise ValueError(
            f"interactions='joint' needs a block of both transformers in every fused layer: fusion_layers may"
            f" hold {shared}, got {list(fusion_layers)}"
        )


def layers_of_blocks(
    image_depth: int, audio_depth: int, given: Sequence[int] | None
) -> dict[str, Sequence[int]]:
    """In which layers the blocks of "image" and of "audio" run."""
    shallow, deep = sorted((image_depth, audio_depth))
    if shallow == deep:
        if given is not None:
            raise ValueError(f"block_layers is for transformers of unequal depth, both have {deep} blocks")
        return dict(image=range(deep), audio=range(deep))
    if given is None:
        evenly = tuple((block + 1) * deep // shallow - 1 for block in range(shallow))
        raise ValueError(
            f"image has {image_depth} blocks and audio {audio_depth}: say in which layers of the deeper one"
            f" the {shallow} blocks of the other run, such as block_layers={evenly}"
        )
    is_list = isinstance(given, Sequence) and len(given) == shallow and all(type(at) is int for at in given)
    if not is_list or not all(a < b for a, b in pairwise((-1, *given, deep))):
        raise ValueError(f"block_layers must be {shallow} rising integers in 0..{deep - 1}, got {given!r}")
    layers = tuple(given), range(deep)
    return dict(zip(("image", "audio"), layers if image_depth == shallow else layers[::-1], strict=True))
