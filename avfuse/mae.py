"""The audio-visual masked autoencoder: hide most of image and sound, rebuild both (paper Sec. 3.2)."""

import math
from dataclasses import dataclass
from typing import NamedTuple, get_args

import torch
import torch.distributed as dist
from timm.layers import build_sincos2d_pos_embed
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, layer_norm, normalize, pad

from .checks import (
    check_choice,
    check_count,
    check_flag,
    check_mask,
    check_tensor,
    is_number,
    is_recording,
    without_autocast,
)
from .choices import DecodeFrom
from .encoder import AVEncoder, EncoderOutput
from .folding import wide
from .fusion import initialize_linear
from .predictor import Predictor
from .pretrained import Pretrained
from .vit import input_shape, per_frame, split_prefix

TARGET_EPS = 1e-6
TEMPERATURE = 0.05  # of the contrastive term, as in CAV-MAE (Gong et al. 2023)


class MAEOutput(NamedTuple):
    """Losses (scalars), predictions (B, N, values) of all patches, and which were hidden (B, N) bool; of
    several frames, (B, T, N, values) and (B, T, N). `loss` is the sum of the others, `contrastive_loss` with
    its weight in it; None without.
    """

    loss: Tensor
    image_loss: Tensor
    audio_loss: Tensor
    image_pred: Tensor
    audio_pred: Tensor
    image_removed: Tensor
    audio_removed: Tensor
    contrastive_loss: Tensor | None = None


class AVMAE(nn.Module, Predictor, Pretrained):
    """Audio-visual masked autoencoder (paper Eq. 14-16).

    Args:
        encoder: the `AVEncoder` to pretrain.
        decoder_dim, decoder_depth, decoder_heads: of both decoders; default 512, 8, 16 (the paper's).
        image_mask_ratio, audio_mask_ratio: shares of the patches that are hidden; default 0.75 and 0.8. Of
            several frames the same number in each.
        tubes: of several frames, hide the same places in all of them; default False.
        norm_target: rebuild each patch normalised by its own mean and deviation; default True.
        decode_from: what decoders see, "patches" (fusion tokens and the kept patches of their modality; the
            default, and the paper's) or "fusion", the fusion tokens alone: what the hidden patches of both
            modalities show then has to pass through them. No image and audio block from the last fused layer
            on gets gradients then, nor do their last norms.
        contrastive: weight of CAV-MAE's contrastive term (0.01 there): of the clips of a batch, which image
            goes with which sound, by tokens that do not know of one another yet, see `unfused`; default 0.

    Raises:
        ValueError: naming the argument that is wrong, such as a ratio that hides nothing or everything.
    """

    def __init__(
        self,
        encoder: AVEncoder,
        *,
        decoder_dim=512,
        decoder_depth=8,
        decoder_heads=16,
        image_mask_ratio=0.75,
        audio_mask_ratio=0.8,
        norm_target=True,
        decode_from="patches",
        tubes=False,
        contrastive: float = 0.0,
    ):
        super().__init__()
        if not isinstance(encoder, AVEncoder):
            raise ValueError(f"encoder must be an AVEncoder, got {type(encoder).__name__}")
        check_count("decoder_dim", decoder_dim)
        check_count("decoder_depth", decoder_depth)
        check_count("decoder_heads", decoder_heads)
        if decoder_dim % decoder_heads or decoder_dim % 4:
            raise ValueError(
                f"decoder_dim={decoder_dim} must be a multiple of 4 and of decoder_heads={decoder_heads}"
            )
        check_flag("norm_target", norm_target)
        check_flag("tubes", tubes)
        if tubes and encoder.frames == 1:
            raise ValueError("tubes hide the same places in several frames: encoder has one")
        check_choice("decode_from", decode_from, get_args(DecodeFrom))
        if decode_from == "fusion" and (encoder.frames > 1 or not encoder.fusion_blocks):
            found = (
                f"{encoder.frames} frames" if encoder.frames > 1 else "no fusion tokens that read anything"
            )
            raise ValueError(
                "decode_from='fusion' needs fusion blocks, and one frame, as decoders are not told which they"
                f" rebuild: encoder has {found}"
            )
        check_contrastive(contrastive, encoder)
        self.encoder = encoder
        self.settings = dict(
            decoder_dim=decoder_dim,
            decoder_depth=decoder_depth,
            decoder_heads=decoder_heads,
            image_mask_ratio=image_mask_ratio,
            audio_mask_ratio=audio_mask_ratio,
            norm_target=norm_target,
            decode_from=decode_from,
            tubes=tubes,
            contrastive=contrastive,
        )
        self.norm_target, self.tubes, self.contrastive = norm_target, tubes, contrastive
        self.image_mask_ratio, self.audio_mask_ratio = image_mask_ratio, audio_mask_ratio
        for name, vit, ratio in (
            ("image_mask_ratio", encoder.image, image_mask_ratio),
            ("audio_mask_ratio", encoder.audio, audio_mask_ratio),
        ):
            count_removed(name, vit.patch_embed.num_patches, ratio)
            size, patch = input_shape(vit)[1:], vit.patch_embed.patch_size
            if size[0] % patch[0] or size[1] % patch[1]:
                raise ValueError(f"encoder takes inputs of size {size}: not whole patches of {patch}")
        options = encoder.embed_dim, decoder_dim, decoder_depth, decoder_heads, decode_from == "patches"
        self.image_decoder = Decoder(encoder.image.patch_embed, *options)
        self.audio_decoder = Decoder(encoder.audio.patch_embed, *options)

    def forward(
        self,
        image: Tensor,
        audio: Tensor,
        *,
        image_removed: Tensor | None = None,
        audio_removed: Tensor | None = None,
        image_present: Tensor | None = None,
        audio_present: Tensor | None = None,
    ) -> MAEOutput:
        """Hide, encode, decode, compare.

        Args:
            image: (B, 3, height, width), or (B, T, 3, height, width). audio: (B, 1, mel, time).
            image_removed, audio_removed: (B, N) bool, or (B, T, N), True = hidden from the encoder, the same
                number in every row; drawn at the mask ratios when not given. Under torch.compile and in a
                CUDA graph their number must be that of the mask ratios: neither can wait for another, and
                where it is not, a compiled model raises RuntimeError, and a graph ends the program.
            image_present, audio_present: (B,) bool, None = all: an absent modality is masked everywhere and
                leaves its loss (which is 0 if no clip has it).

        Raises:
            ValueError: naming the argument that is wrong.
        """
        image_removed, image_keep = self.mask("image", image, image_removed)
        audio_removed, audio_keep = self.mask("audio", audio, audio_removed)
        latent = self.encoder(
            image,
            audio,
            image_keep=image_keep,
            audio_keep=audio_keep,
            image_present=image_present,
            audio_present=audio_present,
            return_layers=self.contrastive > 0,
        )
        image_pred, audio_pred = self.decode(latent, image_keep, audio_keep)
        image_loss = self.loss("image", image, image_pred, image_removed, image_present)
        audio_loss = self.loss("audio", audio, audio_pred, audio_removed, audio_present)
        loss, contrastive_loss = image_loss + audio_loss, None
        if self.contrastive:
            contrastive_loss = self.contrastive * self.contrast(latent, image_present, audio_present)
            loss = loss + contrastive_loss
        return MAEOutput(
            loss,
            image_loss,
            audio_loss,
            image_pred,
            audio_pred,
            image_removed,
            audio_removed,
            contrastive_loss,
        )

    def predicted(self, image: Tensor | None, audio: Tensor | None) -> dict[str, Tensor]:
        """What its encoder says, see `AVEncoder.predicted`."""
        return self.encoder.predicted(image, audio)

    def mask(self, name, pixels, removed):
        """Hidden patches (B, N) bool, given or drawn at the ratio, and the indices (B, n) of the others."""
        if pixels is None:
            raise ValueError(
                "image and audio must both be given; say what is absent by image_present, audio_present"
            )
        check_tensor(name, pixels, "floating point")  # the encoder checks the rest
        if not pixels.ndim or pixels.shape[0] == 0:  # not len(), which an export with any batch size refuses
            raise ValueError(f"{name} must hold at least one clip, got an empty batch")
        patches = getattr(self.encoder, name).patch_embed.num_patches
        ratio = getattr(self, f"{name}_mask_ratio")
        hidden = count_removed(f"{name}_mask_ratio", patches, ratio)
        rows = pixels.shape[:-3]
        if removed is None:
            drawn = (*rows[:1], 1) if name == "image" and self.tubes else rows
            order = torch.rand(*drawn, patches, device=pixels.device).argsort(-1)  # a random permutation
            removed = (order < hidden).expand(*rows, patches)
        else:
            check_mask(f"{name}_removed", removed, (*rows, patches), pixels.device)
            if is_recording(removed.device) or torch.compiler.is_compiling():
                wanted = f"must hide as many patches as {name}_mask_ratio does: {hidden} in each row"
                torch._assert_async((removed.sum(-1) == hidden).all(), f"{name}_removed {wanted}")
            else:
                hidden = same_in_every_row(f"{name}_removed", removed)
        return removed, kept_indices(removed, patches - hidden)

    def decode(self, latent, image_keep, audio_keep):
        """Predictions (B, N, values) of all patches, from fusion tokens and kept patches of one modality."""
        image_tokens = split_prefix(self.encoder.image, latent.image)[1]
        audio_tokens = split_prefix(self.encoder.audio, latent.audio)[1]
        return (
            self.image_decoder(latent.fusion, image_tokens, image_keep),
            self.audio_decoder(latent.fusion, audio_tokens, audio_keep),
        )

    def loss(self, name, pixels, pred, removed, present):
        """Mean squared error over the hidden patches of the clips that have this modality (Eq. 14)."""
        if present is not None:
            present = present.view(-1, *[1] * (removed.ndim - 1))
            pixels = pixels.masked_fill(~present[..., None, None], 0.0)  # what stands there may be NaN
        target = self.target(name, pixels)
        error = (wide(pred) - target).square().mean(-1)  # (B, N)
        counted = removed if present is None else removed & present
        return (error * counted).sum() / counted.sum().clamp(min=1)

    def contrast(self, latent, image_present, audio_present):
        """InfoNCE between the images and the sounds of the clips that have both.

        In a training step the negatives come from all processes, which all have to call; without gradients,
        where one process may be alone, from its own clips. The processes' losses, averaged with their numbers
        of such clips as weights, are the loss of one process with all clips.
        """
        image, audio = unfused(self.encoder, latent)
        paired = image.new_ones(len(image), dtype=torch.bool)
        for present in image_present, audio_present:
            paired = paired if present is None else paired & present
        with without_autocast(image.device):
            return info_nce(
                wide(image), wide(audio), paired, across=self.training and torch.is_grad_enabled()
            )

    def target(self, name: str, pixels: Tensor) -> Tensor:
        """Targets of the "image" or "audio" decoder, (B, N, values): pixels, normalised within a patch."""
        frames = wide(pixels).flatten(0, -4)
        target = patchify(frames, getattr(self.encoder, name).patch_embed.patch_size)
        target = target.view(*pixels.shape[:-3], *target.shape[1:])
        if not self.norm_target:
            return target
        return (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + TARGET_EPS).sqrt()

    def mask_sampler(self) -> "MaskSampler":
        """Draws masks of this model's sizes and ratios clip by clip, where a data loader prepares them."""
        encoder = self.encoder
        patches = encoder.image.patch_embed.num_patches, encoder.audio.patch_embed.num_patches
        frames = encoder.frames if encoder.frames > 1 else None
        return MaskSampler(*patches, self.image_mask_ratio, self.audio_mask_ratio, frames, self.tubes)

    def to_config(self) -> dict:
        """What config.json holds."""
        return dict(encoder=self.encoder.to_config(), **self.settings)

    @classmethod
    def from_config(cls, config: dict) -> "AVMAE":
        """An autoencoder with fresh weights, as config.json describes it."""
        config, cls = dict(config), cls.kind_of(config["encoder"])
        return cls(AVEncoder.from_config(config.pop("encoder")), **config)


class Decoder(nn.Module):
    """A narrow transformer that rebuilds one modality from fusion tokens and, if it `sees_patches`, from the
    patches that were kept.

    Its input: fusion tokens (no position), then visible and mask tokens in their places, with sine-cosine
    positions. Of several frames, each is rebuilt from its own patches.
    """

    def __init__(self, patch_embed, fusion_dim, dim, depth, heads, sees_patches):
        super().__init__()
        patch_dim, channels = patch_embed.proj.out_channels, patch_embed.proj.in_channels
        self.sees_patches = sees_patches
        self.embed = nn.Linear(patch_dim if sees_patches else fusion_dim, dim)
        shared = not sees_patches or fusion_dim == patch_dim
        self.embed_fusion = None if shared else nn.Linear(fusion_dim, dim)
        self.mask_token = nn.Parameter(torch.empty(1, 1, dim).normal_(std=0.02))
        positions = build_sincos2d_pos_embed(patch_embed.grid_size, dim, interleave_sin_cos=False)
        self.pos_embed = nn.Parameter(positions[None].to(self.mask_token), requires_grad=False)
        blocks = (Block(dim, heads, qkv_bias=True, norm_layer=nn.LayerNorm) for _ in range(depth))  # eps 1e-5
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.LayerNorm(dim)
        self.pred = nn.Linear(dim, math.prod(patch_embed.patch_size) * channels)
        initialize_linear(self)

    def forward(self, fusion: Tensor, visible: Tensor, keep: Tensor) -> Tensor:
        """Fusion tokens (B, F, D), visible patches (B, n, D), their places (B, n) -> (B, N, values); of
        several frames, (B, T, n, D), (B, T, n) -> (B, T, N, values)
        """
        lead, frames = visible.shape[:-2], visible.shape[1] if visible.ndim == 4 else None
        fusion, visible, keep = per_frame(fusion, frames), visible.flatten(0, -3), keep.flatten(0, -2)
        fusion = (self.embed_fusion or self.embed)(fusion)
        tokens = self.mask_token.to(fusion.dtype).expand(visible.shape[0], self.pos_embed.shape[1], -1)
        if self.sees_patches:
            visible = self.embed(visible)
            tokens = tokens.scatter(1, keep[..., None].expand_as(visible), visible)
        tokens = torch.cat([fusion, tokens + self.pos_embed], dim=1)
        for block in self.blocks:
            tokens = block(tokens)
        return self.pred(self.norm(tokens[:, fusion.shape[1] :])).unflatten(0, lead)


# --- contrastive term ---------------------------------------------------------------------------------------


def unfused(encoder: AVEncoder, latent: EncoderOutput) -> tuple[Tensor, Tensor]:
    """Means (B, D) of the image and of the audio tokens, each normalised, before the first fused layer (after
    the last one, where none is fused). `latent` has `layers`.
    """
    before = latent.layers[encoder.fusion_layers[0] - 1 if encoder.fusion_layers else -1]
    return tuple(layer_norm(x, x.shape[-1:]).flatten(1, -2).mean(1) for x in (before.image, before.audio))


def info_nce(image: Tensor, audio: Tensor, paired: Tensor, *, across: bool = False) -> Tensor:
    """The mean over the pairs of the two cross-entropies of finding one half by the other, among the halves
    of all pairs (van den Oord et al. 2018), by cosines over TEMPERATURE; 0 without pairs.

    Args:
        image, audio: (B, D). paired: (B,) bool, which clips are pairs; the others take no part.
        across: find them among the pairs of all processes, if there are several. All must call.
    """
    image, audio, first = normalize(image, dim=1), normalize(audio, dim=1), 0
    images, audios, pairs = image, audio, paired
    if across and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        images, audios, pairs = (gathered(x) for x in (image, audio, paired.to(image)))
        first, pairs = dist.get_rank() * (len(images) // dist.get_world_size()), pairs.bool()
    own = first + torch.arange(len(image), device=image.device)
    losses = 0
    for queries, keys in (image, audios), (audio, images):
        logits = (queries @ keys.T / TEMPERATURE).masked_fill(~pairs, torch.finfo(image.dtype).min)
        losses = losses + cross_entropy(logits, own, reduction="none") / 2
    return losses.where(paired, 0).sum() / paired.sum().clamp(min=1)


def gathered(rows: Tensor) -> Tensor:
    """The rows (B, ...) of all processes, with gradients; each process's are filled up with zeros to the
    largest B.
    """
    from torch.distributed.nn.functional import all_gather  # not in every build of torch

    most = torch.tensor(len(rows), device=rows.device)
    dist.all_reduce(most, dist.ReduceOp.MAX)
    filled = pad(rows, (0, 0) * (rows.ndim - 1) + (0, int(most) - len(rows)))
    return torch.cat(all_gather(filled))


def check_contrastive(weight: float, encoder: AVEncoder) -> None:
    """Raises ValueError unless this is the weight of a term that the encoder can have."""
    if not is_number(weight) or weight < 0:
        raise ValueError(f"contrastive must be a weight of 0 or more, got {weight!r}")
    if weight and encoder.fusion_layers[:1] == (0,):
        raise ValueError(
            f"contrastive={weight} compares image and audio tokens before the first fused layer, and layer 0 "
            "is fused: fused tokens give away which belong together. Let fusion_layers begin later"
        )
    if weight and encoder.dims["image"] != encoder.dims["audio"]:
        raise ValueError(
            f"contrastive={weight} needs transformers of one width, got {encoder.dims['image']} for image and"
            f" {encoder.dims['audio']} for audio"
        )


# --- patches ------------------------------------------------------------------------------------------------


def patchify(pixels: Tensor, patch_size: tuple[int, int]) -> Tensor:
    """(B, C, rows * p, columns * q) -> (B, rows * columns, p * q * C)"""
    B, C, height, width = pixels.shape
    p, q = patch_size
    patches = pixels.reshape(B, C, height // p, p, width // q, q)
    return patches.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)


def unpatchify(patches: Tensor, patch_size: tuple[int, int], grid: tuple[int, int]) -> Tensor:
    """(B, rows * columns, p * q * C) -> (B, C, rows * p, columns * q)"""
    (p, q), (rows, columns) = patch_size, grid
    pixels = patches.reshape(patches.shape[0], rows, columns, p, q, -1)
    return pixels.permute(0, 5, 1, 3, 2, 4).reshape(patches.shape[0], -1, rows * p, columns * q)


def count_removed(name: str, patches: int, ratio: float) -> int:
    """How many patches a mask ratio hides; those kept are rounded down (196 at 0.75: 49, 96 at 0.8: 19)."""
    kept = math.floor(patches * (1 - ratio) + 1e-6) if is_number(ratio) and 0 < ratio < 1 else 0
    if not 0 < kept < patches:
        raise ValueError(f"{name}={ratio!r} must hide some and keep some of {patches} patches")
    return patches - kept


def random_removed(patches: int, ratio: float, generator: torch.Generator | None = None) -> Tensor:
    """A random (patches,) bool mask, True = hidden, that hides the share `ratio`."""
    hidden = torch.randperm(patches, generator=generator)[: count_removed("ratio", patches, ratio)]
    return torch.zeros(patches, dtype=torch.bool).index_fill(0, hidden, True)


@dataclass(frozen=True)
class MaskSampler:
    """Draws the masks of one clip, "image_removed" and "audio_removed" (N,), from the clip's generator; of
    several frames, "image_removed" (T, N), with `tubes` of equal rows.
    """

    image_patches: int
    audio_patches: int
    image_ratio: float
    audio_ratio: float
    frames: int | None = None  # T
    tubes: bool = False

    def __call__(self, generator: torch.Generator) -> dict[str, Tensor]:
        frames = self.frames or 1
        drawn = [
            random_removed(self.image_patches, self.image_ratio, generator)
            for _ in range(1 if self.tubes else frames)
        ]
        image_removed = (
            drawn[0] if self.frames is None else torch.stack(drawn).expand(frames, -1).contiguous()
        )
        return {
            "image_removed": image_removed,
            "audio_removed": random_removed(self.audio_patches, self.audio_ratio, generator),
        }


def kept_indices(removed: Tensor, kept: int) -> Tensor:
    """(..., N) bool with `kept` False in every row -> their indices in order, (..., kept) long"""
    return removed.to(torch.uint8).argsort(dim=-1, stable=True)[..., :kept]


def same_in_every_row(name: str, removed: Tensor) -> int:
    """How many patches each row hides."""
    counts = removed.sum(-1).flatten().tolist()
    if len(set(counts)) > 1:
        raise ValueError(f"{name} must hide the same number in every row, got {counts}")
    if not 0 < counts[0] < removed.shape[-1]:
        raise ValueError(
            f"{name} must hide some and keep some of {removed.shape[-1]} patches, hides {counts[0]}"
        )
    return counts[0]
