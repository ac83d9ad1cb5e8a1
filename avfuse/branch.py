"""One modality on its way through an encoder: what of it takes part, its tokens, its checks."""

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from .checks import check_dtype, check_indices, check_mask, check_tensor, has_hooks
from .fusion import Stream, union_mask
from .vit import input_shape, patch_tokens, split_prefix


class Selection(NamedTuple):
    """Which patch tokens of one modality take part."""

    keep: Tensor | None  # (B, n) long: the others are dropped
    mask: Tensor | None  # (B, N) bool: nobody attends to the others
    present: Tensor | None  # (B,) bool: the other clips lack the modality


class Branch(NamedTuple):
    """One uni-modal stream on its way through the layers."""

    vit: VisionTransformer
    tokens: Tensor  # (B, prefix + n, D)
    mask: Tensor | None  # (B, n) over the patch tokens, True = attend
    positions: Tensor | None  # (B, n) which patches they are; None = all, in order
    layers: Sequence[int]  # in which its blocks run
    update: Tensor | None = None  # of the tokens, yet to be added: see `FusedEncoder`

    @classmethod
    def embed(
        cls, vit: VisionTransformer, pixels: Tensor, selection: Selection, layers: Sequence[int]
    ) -> "Branch":
        keep, mask, present = selection
        if present is not None:
            pixels = pixels.masked_fill(~present[:, None, None, None], 0.0)  # whatever stands there, even NaN
            present = present[:, None].expand(-1, vit.patch_embed.num_patches)
            mask = present if mask is None else mask & present
        if mask is not None and keep is not None:
            mask = mask.gather(1, keep)
        return cls(vit, patch_tokens(vit, pixels, keep), mask, keep, layers)

    @property
    def stream(self) -> Stream:
        """What fusion reads: prefix tokens are never paired."""
        return Stream(split_prefix(self.vit, self.tokens)[1], self.mask, self.positions)

    def key_mask(self, num_context: int) -> Tensor | None:
        """Mask (B, 1, 1, context + prefix + n) for self-attention; all, where it would leave none."""
        if self.mask is None:
            return None
        always = self.mask.new_ones(self.mask.shape[0], num_context + self.vit.num_prefix_tokens)
        mask = torch.cat([always, self.mask], dim=1)
        return (mask | ~mask.any(1, keepdim=True))[:, None, None]


def joint_masks(image: Branch, audio: Branch) -> tuple[Tensor | None, Tensor | None]:
    """Masks (B, 1, 1, keys) of `avfuse.vit.joint_heads`; all own tokens, where it would leave none."""
    image_prefix, audio_prefix = (Stream(split_prefix(x.vit, x.tokens)[0]) for x in (image, audio))
    image_mask = union_mask(image_prefix, image.stream, audio.stream)
    audio_mask = union_mask(image.stream, audio.stream, audio_prefix)
    if image_mask is None:
        return None, None
    image_mask[:, : image.tokens.shape[1]] |= ~image_mask.any(1, keepdim=True)
    audio_mask[:, -audio.tokens.shape[1] :] |= ~audio_mask.any(1, keepdim=True)
    return image_mask[:, None, None], audio_mask[:, None, None]


def absent(like: Tensor, dim: int) -> Stream:
    """A modality that is not there: one token of this width that nobody attends to."""
    nothing = torch.zeros(like.shape[0], 1, dtype=torch.bool, device=like.device)
    return Stream(like.new_zeros(like.shape[0], 1, dim), nothing, nothing.long())


def check_branch(name: str, vit: VisionTransformer, pixels: Tensor | None, selection: Selection) -> None:
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
    expected, shape = input_shape(vit), tuple(pixels.shape)
    if len(shape) != 4 or shape[1:] != expected:
        raise ValueError(f"{name} must be (B, {', '.join(map(str, expected))}), got shape {shape}")
    check_dtype(name, pixels, vit.patch_embed.proj.weight)
    batch, patches = shape[0], vit.patch_embed.num_patches
    check_mask(f"{name}_mask", selection.mask, (batch, patches), pixels.device)
    check_mask(f"{name}_present", selection.present, (batch,), pixels.device)
    if selection.keep is not None:
        check_indices(f"{name}_keep", selection.keep, batch, patches, pixels.device)


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
