"""The three-branch encoder: image and audio transformers, and fusion tokens that tie them at any depth."""

from collections.abc import Collection, Sequence
from dataclasses import asdict
from itertools import pairwise
from typing import NamedTuple

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .checks import (
    check_choice,
    check_count,
    check_dtype,
    check_flag,
    check_indices,
    check_mask,
    check_tensor,
    has_hooks,
)
from .fusion import NORM_EPS, STATE, VARIANTS, Fusion, Stream, Variant
from .inputs import InputSettings, ask_for_inputs, check_inputs, default_inputs
from .pretrained import Pretrained, parameter_groups
from .vit import (
    build_vit,
    check_vit,
    describe_vit,
    input_shape,
    patch_tokens,
    split_prefix,
    take_context,
    without_head,
)


class EncoderOutput(NamedTuple):
    """Normalised tokens of the last layer; `layers`, on request, those of every layer before the norm."""

    image: Tensor | None  # (B, prefix + n_image, D)
    audio: Tensor | None  # (B, prefix + n_audio, D)
    fusion: Tensor  # (B, F, D)
    layers: "list[EncoderOutput] | None" = None


class AVEncoder(nn.Module, Pretrained):
    """Early-fusion audio-visual encoder (paper Sec. 3.1): two timm ViTs joined by fusion tokens.

    In a fused layer, all three branches update from the layer before (Eq. 1-3): the fusion block reads the
    image and audio patch tokens, and both uni-modal blocks attend to the fusion tokens as extra keys and
    values. Layers without fusion run the uni-modal blocks alone.

    Args:
        image, audio: timm VisionTransformers with standard blocks; they become part of the encoder, and lose
            their classifier head. Audio is a one-channel image (mel, time). The fusion tokens have the width
            of `image`; where `audio` has another, it reads them through a linear map.
        interactions: "dense" (exact, all pairs; the default), "bilinear", "factorized", "token" or "none".
        fusion_layers: "all", "none", or the 0-based layers that fuse.
        fusion_tokens: F; default 16. image_aggregation_tokens, audio_aggregation_tokens: of "factorized";
            default 8.
        num_heads: of the fusion blocks; default the image transformer's.
        attn_ratio, mlp_ratio, drop, drop_path: of the fusion blocks, see `avfuse.fusion.FusionBlock`.
        pair_bias: a learned bias per head and pair of positions in every fusion block ("dense" and
            "bilinear").
        block_layers: for transformers of unequal depth, the 0-based layers of the deeper one in which the
            blocks of the other run, one after the other. In the layers between, its tokens wait.
        inputs: the input transforms, kept in config.json and needed only where files are read. Default: the
            paper's at the sizes of the transformers, with the mean and deviation that timm states for
            `image`; None where spectrograms are not of the paper's 192 steps, whose seconds nobody knows.

    A transformer whose parts config.json cannot describe (such as an unknown activation) works, but
    `save_pretrained` refuses it.

    Raises:
        ValueError: naming the argument that is wrong.
    """

    variants: dict[str, Variant] = VARIANTS

    def __init__(
        self,
        image: VisionTransformer,
        audio: VisionTransformer,
        *,
        interactions="dense",
        fusion_layers="all",
        fusion_tokens=16,
        image_aggregation_tokens=8,
        audio_aggregation_tokens=8,
        num_heads=None,
        attn_ratio=0.25,
        mlp_ratio=1.0,
        pair_bias=False,
        drop=0.0,
        drop_path=0.0,
        block_layers: Sequence[int] | None = None,
        inputs: InputSettings | None = None,
    ):
        super().__init__()
        check_vit("image", image, channels=3)
        check_vit("audio", audio, channels=1)
        check_choice("interactions", interactions, tuple(self.variants))
        same_width = image.embed_dim == audio.embed_dim
        if not (same_width or interactions == "none" or "audio_dim" in self.variants[interactions].options):
            raise ValueError(
                f"interactions={interactions!r} needs transformers of one width, got {image.embed_dim} for"
                f" image and {audio.embed_dim} for audio"
            )
        check_flag("pair_bias", pair_bias)
        if pair_bias and "pair_bias" not in self.variants[interactions].options:
            able = [name for name, variant in self.variants.items() if "pair_bias" in variant.options]
            raise ValueError(
                f"pair_bias needs interactions {' or '.join(map(repr, able))}, got {interactions!r}"
            )
        num_heads = image.blocks[0].attn.num_heads if num_heads is None else num_heads
        check_count("num_heads", num_heads)
        counts = fusion_tokens, image_aggregation_tokens, audio_aggregation_tokens
        for name, count in zip(STATE, counts, strict=True):
            check_count(name, count)
        self.image, self.audio = without_head(image), without_head(audio)
        take_context(image)
        take_context(audio)
        self.block_layers = layers_of_blocks(len(image.blocks), len(audio.blocks), block_layers)
        self.embed_dim, self.depth = image.embed_dim, max(len(image.blocks), len(audio.blocks))
        self.num_fusion_tokens = fusion_tokens
        self.given_inputs = default_inputs(image, audio) if inputs is None else inputs
        check_inputs(self.given_inputs, image, audio)
        self.grad_checkpointing = False
        fusion_layers = layers_of(fusion_layers, self.depth)
        self.fusion_layers = () if interactions == "none" else fusion_layers
        # Everything that rebuilds the fusion branch, as it goes into config.json.
        self.settings = dict(
            interactions=interactions,
            fusion_layers=list(self.fusion_layers) or "none",
            fusion_tokens=fusion_tokens,
            image_aggregation_tokens=image_aggregation_tokens,
            audio_aggregation_tokens=audio_aggregation_tokens,
            num_heads=num_heads,
            attn_ratio=attn_ratio,
            mlp_ratio=mlp_ratio,
            pair_bias=pair_bias,
            drop=drop,
            drop_path=drop_path,
            block_layers=None if block_layers is None else list(block_layers),
        )
        self.fusion_blocks = nn.ModuleDict({str(layer): self.make_block() for layer in self.fusion_layers})
        self.fusion_tokens = nn.Parameter(
            torch.empty(1, self.num_state_tokens, self.embed_dim).normal_(std=0.02)
        )
        self.fusion_norm = nn.LayerNorm(self.embed_dim, eps=NORM_EPS)
        self.context_to_audio = None
        if self.fusion_layers and not same_width:
            self.context_to_audio = nn.Linear(self.embed_dim, audio.embed_dim)

    @property
    def inputs(self) -> InputSettings:
        """The input transforms.

        Raises:
            ValueError: they were not given and cannot be told from the transformers.
        """
        if self.given_inputs is None:
            raise ValueError(ask_for_inputs(self.image, self.audio))
        return self.given_inputs

    @property
    def num_state_tokens(self) -> int:
        """Tokens of the fusion branch: the fusion tokens, with "factorized" also the aggregation tokens."""
        return sum(self.settings[name] for name in self.variant.state)

    @property
    def dims(self) -> dict[str, int]:
        """Widths of the "image", "audio" and "fusion" tokens."""
        return dict(image=self.image.embed_dim, audio=self.audio.embed_dim, fusion=self.embed_dim)

    @property
    def variant(self) -> Variant:
        """The way to fuse."""
        return self.variants[self.settings["interactions"]]

    def make_block(self) -> Fusion:
        """One fusion block, as the settings say."""
        patches = self.image.patch_embed.num_patches, self.audio.patch_embed.num_patches
        dims = dict(image_dim=self.dims["image"], audio_dim=self.dims["audio"])
        return self.variant.make(self.embed_dim, self.settings | dims, patches)

    def forward(
        self,
        image: Tensor | None,
        audio: Tensor | None,
        *,
        image_keep: Tensor | None = None,
        audio_keep: Tensor | None = None,
        image_mask: Tensor | None = None,
        audio_mask: Tensor | None = None,
        image_present: Tensor | None = None,
        audio_present: Tensor | None = None,
        return_layers: bool = False,
    ) -> EncoderOutput:
        """Encode images (B, 3, height, width) with spectrograms (B, 1, mel, time).

        Args:
            image, audio: either may be None (a missing modality, at inference); its output is then None.
            image_keep, audio_keep: (B, n) long, indices of the patch tokens that are kept (one named twice
                counts twice); prefix tokens always are.
            image_mask, audio_mask: (B, N) bool over all patch tokens, True = attend: tokens nobody attends
                to.
            image_present, audio_present: (B,) bool, the clips that have it; in the others it is masked
                everywhere, and what stands in its place is not looked at.
            return_layers: also return the tokens after every layer.

        Raises:
            ValueError: naming the argument that is wrong.
        """
        image_selection = Selection(image_keep, image_mask, image_present)
        audio_selection = Selection(audio_keep, audio_mask, audio_present)
        image, audio, fusion = self.embed(image, audio, image_selection, audio_selection)
        layers = []
        for layer in range(self.depth):
            image, audio, fusion = self.run_layer(layer, image, audio, fusion)
            if return_layers:
                layers.append(EncoderOutput(tokens_of(image), tokens_of(audio), self.visible_fusion(fusion)))
        return EncoderOutput(
            None if image is None else self.image.norm(image.tokens),
            None if audio is None else self.audio.norm(audio.tokens),
            self.fusion_norm(self.visible_fusion(fusion)),
            layers if return_layers else None,
        )

    def embed(self, image, audio, image_selection: "Selection", audio_selection: "Selection"):
        """Both branches (None where a modality is) and the fusion tokens (B, F, D) before the first layer."""
        if image is None and audio is None:
            raise ValueError("image and audio cannot both be None")
        check_branch("image", self.image, image, image_selection)
        check_branch("audio", self.audio, audio, audio_selection)
        if image is not None and audio is not None:
            if image.shape[0] != audio.shape[0]:
                raise ValueError(
                    f"audio must have the batch size of image, {image.shape[0]}, got {audio.shape[0]}"
                )
            if image.device != audio.device:
                raise ValueError(f"audio must be on the device of image, {image.device}, got {audio.device}")
        fusion = self.fusion_tokens.repeat((audio if image is None else image).shape[0], 1, 1)
        if image is not None:
            image = Branch.embed(self.image, image, image_selection, self.block_layers["image"])
        if audio is not None:
            audio = Branch.embed(self.audio, audio, audio_selection, self.block_layers["audio"])
        return image, audio, fusion

    def run_layer(self, layer, image, audio, fusion):
        """One layer: all branches read the layer before (paper Eq. 1-3)."""
        if str(layer) not in self.fusion_blocks:
            return self.run_unimodal(layer, image), self.run_unimodal(layer, audio), fusion
        context = self.visible_fusion(fusion)
        heard = context if self.context_to_audio is None else self.context_to_audio(context)
        return (
            self.run_unimodal(layer, image, context),
            self.run_unimodal(layer, audio, heard),
            self.run_fusion(layer, fusion, image, audio),
        )

    def run_unimodal(self, layer, branch, context=None):
        if branch is None or layer not in branch.layers:
            return branch
        key_mask = branch.key_mask(0 if context is None else context.shape[1])
        block = self.checkpointed(branch.vit.blocks[branch.layers.index(layer)])
        return branch._replace(tokens=block(branch.tokens, context=context, attn_mask=key_mask))

    def run_fusion(self, layer, fusion, image, audio):
        image, audio = self.streams(image, audio)
        return self.checkpointed(self.fusion_blocks[str(layer)])(
            fusion,
            image.tokens,
            audio.tokens,
            image_mask=image.mask,
            audio_mask=audio.mask,
            image_positions=image.positions,
            audio_positions=audio.positions,
        )

    def streams(self, image: "Branch | None", audio: "Branch | None") -> tuple[Stream, Stream]:
        """What fusion reads of both."""
        if image is None:
            return absent(audio.tokens, self.dims["image"]), audio.stream
        return image.stream, absent(image.tokens, self.dims["audio"]) if audio is None else audio.stream

    def visible_fusion(self, state: Tensor) -> Tensor:
        """The F fusion tokens of the fusion branch's state, which the other branches and the user see."""
        return state[:, : self.num_fusion_tokens]

    @torch.no_grad()
    def fusion_attention(
        self,
        image: Tensor | None,
        audio: Tensor | None,
        layer: int | None = None,
        *,
        image_mask: Tensor | None = None,
        audio_mask: Tensor | None = None,
        image_present: Tensor | None = None,
        audio_present: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Where the fusion tokens of a fused layer (default: the last) look and listen.

        Returns:
            Image weights (B, H, F, I) and audio weights (B, H, F, A) over the patch tokens; those of a masked
            token are 0, and so is the single weight of a modality that is None.

        Raises:
            ValueError: no such fused layer, released blocks (which have no weights to show), or an input that
                `forward` refuses.
        """
        layer = self.fusion_layers[-1] if layer is None and self.fusion_layers else layer
        if type(layer) is not int or layer not in self.fusion_layers:
            raise ValueError(f"layer must be one of the fused layers {list(self.fusion_layers)}, got {layer}")
        block = self.fusion_blocks[str(layer)]
        if not hasattr(block, "weights"):
            raise ValueError(f"layer {layer} is a {type(block).__name__}, which has no weights to show")
        image_selection = Selection(None, image_mask, image_present)
        audio_selection = Selection(None, audio_mask, audio_present)
        image, audio, fusion = self.embed(image, audio, image_selection, audio_selection)
        for before in range(layer):
            image, audio, fusion = self.run_layer(before, image, audio, fusion)
        return block.weights(fusion, *self.streams(image, audio))

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute every block in the backward instead of storing its activations."""
        self.grad_checkpointing = enable

    def checkpointed(self, function):
        if not (self.grad_checkpointing and self.training and torch.is_grad_enabled()):
            return function
        return lambda *args, **kwargs: checkpoint(function, *args, use_reentrant=False, **kwargs)

    @property
    def origins(self) -> dict[str, dict[str, str]]:
        """By branch, the pretrained weights it began with: {"weights", "family", "licence"}."""
        branches = ("image", self.image), ("audio", self.audio)
        return {name: vit.origin for name, vit in branches if getattr(vit, "origin", None)}

    def parameter_groups(self, weight_decay: float = 0.05) -> list[dict]:
        """Optimizer groups by decay and layer, see `avfuse.pretrained.parameter_groups`."""
        return parameter_groups(self, self, weight_decay)

    def to_config(self) -> dict:
        """What config.json holds."""
        return dict(
            image=describe_vit(self.image),
            audio=describe_vit(self.audio),
            inputs=None if self.given_inputs is None else asdict(self.given_inputs),
            origins=self.origins,
            **self.settings,
        )

    @classmethod
    def from_config(cls, config: dict) -> "AVEncoder":
        config, cls = dict(config), cls.kind_of(config)
        config.pop(cls.mark, None)
        image, audio = build_vit(config.pop("image")), build_vit(config.pop("audio"))
        origins, inputs = config.pop("origins", {}), config.pop("inputs")
        image.origin, audio.origin = origins.get("image"), origins.get("audio")
        return cls(image, audio, inputs=None if inputs is None else InputSettings(**inputs), **config)


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


def tokens_of(branch: Branch | None) -> Tensor | None:
    return None if branch is None else branch.tokens


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


def layers_of(fusion_layers, depth: int) -> tuple[int, ...]:
    """ "all", "none" or 0-based layers -> sorted layers"""
    if fusion_layers == "all":
        return tuple(range(depth))
    if fusion_layers == "none":
        return ()
    if type(fusion_layers) is int:
        fusion_layers = (fusion_layers,)
    is_list = isinstance(fusion_layers, Collection) and not isinstance(fusion_layers, str)
    if not is_list or not all(type(layer) is int and 0 <= layer < depth for layer in fusion_layers):
        raise ValueError(
            f"fusion_layers must be 'all', 'none' or integers in 0..{depth - 1}, got {fusion_layers!r}"
        )
    return tuple(sorted(set(fusion_layers)))


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
