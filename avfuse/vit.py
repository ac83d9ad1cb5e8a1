"""A timm VisionTransformer as one branch of an encoder: embed, attend with extra keys, describe, rebuild."""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from timm.layers import (
    GELU,
    Attention,
    DropPath,
    GELUTanh,
    LayerNorm,
    Mlp,
    PatchEmbed,
    QuickGELU,
    RmsNorm,
)
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from .checks import check_count, check_flag, check_positive, check_rate, has_hooks, is_plain
from .inputs import InputSettings, middles
from .ops.residual_norm import normed, sum_and_norm

NORMS = {"LayerNorm": (LayerNorm, nn.LayerNorm), "RmsNorm": (RmsNorm,)}
ACTIVATIONS = {
    "GELU": (nn.GELU, GELU),
    "GELUTanh": (GELUTanh,),
    "QuickGELU": (QuickGELU,),
    "SiLU": (nn.SiLU,),
    "ReLU": (nn.ReLU,),
}
DROPPING = nn.Identity, nn.Dropout, DropPath  # in training alone
LAYERS = 10_000  # of a transformer at most: timm lists a rate for each before it makes the first
FLAGS = tuple(  # of a description
    "qkv_bias qk_norm scale_attn_norm scale_mlp_norm proj_bias class_token no_embed_class pre_norm"
    " final_norm".split()
)


def plain_vit(channels: int, size: tuple[int, int], **options) -> VisionTransformer:
    """A transformer of patch tokens alone, without class token and head, for inputs (channels, *size)."""
    options = dict(class_token=False, global_pool="", num_classes=0) | options
    check_depth(options.get("depth", 1))
    return VisionTransformer(img_size=tuple(size), in_chans=channels, **options)


def check_depth(depth: int) -> None:
    check_count("depth", depth)
    if depth > LAYERS:
        raise ValueError(f"depth must be at most {LAYERS}, got {depth}")


def patch_tokens(vit: VisionTransformer, pixels: Tensor, keep: Tensor | None) -> Tensor:
    """Embedded tokens with positions, (B, prefix + N, D); of the patches only those in `keep` (B, n)."""
    # Patch embedding leaves tokens strided, and residual sums keep their strides: without `contiguous`, every
    # norm of all layers would copy them.
    tokens = vit.norm_pre(vit._pos_embed(vit.patch_embed(pixels))).contiguous()
    if keep is None:
        return tokens
    prefix, patches = split_prefix(vit, tokens)
    kept = patches.gather(1, keep[..., None].expand(-1, -1, patches.shape[-1]))
    return torch.cat([prefix, kept], dim=1)


def per_frame(x: Tensor, frames: int | None) -> Tensor:
    """What belongs to a clip, (B, ...), once for each of its frames, (B * T, ...)."""
    return x if frames is None else x[:, None].expand(-1, frames, *x.shape[1:]).flatten(0, 1)


def per_clip(x: Tensor, frames: int | None) -> Tensor:
    """Tokens of frames, (B * T, n, ...), as those of clips, (B, T * n, ...), one frame after the other."""
    return x if frames is None else x.unflatten(0, (-1, frames)).flatten(1, 2)


def split_prefix(vit: VisionTransformer, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """(..., prefix + n, D) -> the class and register tokens, the patch tokens"""
    prefix = vit.num_prefix_tokens
    return tokens[..., :prefix, :], tokens[..., prefix:, :]


class Heads(NamedTuple):
    """What attention runs on."""

    query: Tensor  # (B, H, N, K)
    key: Tensor  # (B, H, M, K)
    value: Tensor


def split_heads(projected: Tensor, parts: int, num_heads: int) -> tuple[Tensor, ...]:
    """(B, N, parts * H * K) -> so many (B, H, N, K)"""
    heads = projected.unflatten(-1, (parts, num_heads, -1)).unbind(2)
    return tuple(head.transpose(1, 2) for head in heads)


class ContextAttention(Attention):
    """timm's attention with extra keys and values. `context` are tokens (B, F, D) that are attended to and do
    not attend; an int F says that `tokens` begin with them. Where `projected` is given, `tokens` are not
    read.
    """

    def forward(
        self,
        tokens: Tensor,
        attn_mask=None,
        *,
        context: Tensor | int | None = None,
        projected: Heads | None = None,
        **options,
    ) -> Tensor:
        if context is None and projected is None:
            return super().forward(tokens, attn_mask, **options)
        attended = F.scaled_dot_product_attention(
            *(self.project(tokens, context) if projected is None else projected),
            attn_mask=attn_mask,
            dropout_p=self.attn_drop.p if self.training else 0.0,
            **options,
        )
        return self.proj_drop(self.proj(self.norm(attended.transpose(1, 2).flatten(2))))

    def project(self, tokens: Tensor, context: Tensor | int) -> Heads:
        """Queries (B, H, N, K) of the tokens, keys and values (B, H, F + N, K) of context and tokens."""
        query, key, value = self.query_key_value(tokens, context)
        return Heads(self.q_norm(query), self.k_norm(key), value)

    def query_key_value(self, tokens: Tensor, context: Tensor | int) -> tuple[Tensor, Tensor, Tensor]:
        """Those of `project`, before their norms."""
        if type(context) is int or not is_plain(self.qkv):
            # Adapters, hooks and quantized weights take effect where the module is called.
            union = tokens if type(context) is int else torch.cat([context, tokens], dim=1)
            count = context if type(context) is int else context.shape[1]
            query, key, value = split_heads(self.qkv(union), 3, self.num_heads)
            return query[:, :, count:], key, value
        # Its rows give each only what is used: no queries of the context.
        weights, biases = self.qkv.weight, self.qkv.bias
        rows = slice(0, self.attn_dim), slice(self.attn_dim, None)
        query, key_value = (
            F.linear(inputs, weights[part], None if biases is None else biases[part])
            for inputs, part in zip((tokens, torch.cat([context, tokens], dim=1)), rows, strict=True)
        )
        return *split_heads(query, 1, self.num_heads), *split_heads(key_value, 2, self.num_heads)


class ContextBlock(Block):
    """A timm block in which `context` tokens (B, F, D) serve as extra keys and values only (paper Eq. 2-3).

    Running a block on the concatenation and dropping its first F outputs gives the same; this skips their
    queries and their MLP. A part with hooks or an adapter is called as a module, so that they take effect; of
    a plain one only the weights may be used.
    """

    def forward(
        self,
        tokens: Tensor,
        attn_mask=None,
        *,
        context: Tensor | None = None,
        projected: Heads | None = None,
        **options,
    ) -> Tensor:
        """Tokens (B, N, D) -> (B, N, D). `attn_mask` (B, 1, 1, F + N) bool, True = attend. In `projected`
        are their own queries, and the keys and values that these attend to.
        """
        if context is None and projected is None:
            return super().forward(tokens, attn_mask, **options)
        if projected is not None:
            union = tokens
        elif torch.is_grad_enabled() or has_hooks(self.norm1) or not is_standard(self.attn):
            # One norm and one product: few kept tokens, and half of the launches. And what hooks and adapters
            # see is the same in training and after.
            tokens, union = sum_and_norm(self.norm1, tokens, context=context)
            context = context.shape[1]
        else:  # no queries of the context
            union, context = self.norm1(tokens), self.norm1(context)
        attended = self.attn(union, attn_mask, context=context, projected=projected, **options)
        tokens, norm = sum_and_norm(self.norm2, tokens, self.drop_path1(self.ls1(attended)))
        return tokens + self.drop_path2(self.ls2(self.mlp(norm)))

    def project(self, tokens: Tensor) -> Heads:
        """Own queries, keys and values.

        Raises:
            ValueError: a hook or an adapter wants to see the tokens before, which are read here already.
        """
        if type(self.attn) is not ContextAttention:
            raise ValueError(f"joint attention cannot run a {type(self.attn).__name__} in the place of attn")
        for part in self, self.attn:
            # Where all modules have hooks, those of norm1 run.
            if part._forward_pre_hooks and not self.norm1._forward_pre_hooks:
                raise ValueError(
                    f"joint attention cannot run the pre-hooks of a {type(part).__name__}, only those of its"
                    " parts, such as norm1 or attn.qkv"
                )
        return self.attn.project(normed(self.norm1, tokens), 0)


def is_standard(attn: nn.Module) -> bool:
    """Whether attention is that of timm, and nothing around it."""
    return type(attn) is ContextAttention and not has_hooks(attn)


def run_jointly(
    blocks: tuple[ContextBlock, ContextBlock],
    tokens: tuple[Tensor, Tensor],
    masks: tuple[Tensor | None, Tensor | None],
    prefixes: tuple[int, int],
    frames: int | None,
) -> tuple[Tensor, Tensor]:
    """Image and audio tokens through a block of each transformer, in joint attention: see `joint_heads`."""
    projected = (block.project(x) for block, x in zip(blocks, tokens, strict=True))
    return tuple(
        block(x, mask, projected=heads)
        for block, x, mask, heads in zip(
            blocks, tokens, masks, joint_heads(*projected, prefixes, frames), strict=True
        )
    )


def joint_heads(
    image: Heads, audio: Heads, prefixes: tuple[int, int], frames: int | None
) -> tuple[Heads, Heads]:
    """Own queries; keys and values of own tokens and of the other's patch tokens.

    Both are slices of [image prefix, image patches, audio patches, audio prefix], which is written once; not
    of several frames, of which each attends to itself and the sound, and the sound to all.
    """
    image_prefix, audio_prefix = prefixes
    if frames is not None:
        image_keys, audio_keys = [], []
        for ours, theirs in zip(image[1:], audio[1:], strict=True):
            seen = ours[:, :, image_prefix:].unflatten(0, (-1, frames)).transpose(1, 2).flatten(2, 3)
            heard = per_frame(theirs[:, :, audio_prefix:], frames)
            image_keys.append(torch.cat([ours, heard], dim=2))
            audio_keys.append(
                torch.cat([seen, theirs[:, :, audio_prefix:], theirs[:, :, :audio_prefix]], dim=2)
            )
        return Heads(image.query, *image_keys), Heads(audio.query, *audio_keys)
    key, value = (
        torch.cat([ours, theirs[:, :, audio_prefix:], theirs[:, :, :audio_prefix]], dim=2)
        for ours, theirs in zip(image[1:], audio[1:], strict=True)
    )
    end = key.shape[2] - audio_prefix
    return (
        Heads(image.query, key[:, :, :end], value[:, :, :end]),
        Heads(audio.query, key[:, :, image_prefix:], value[:, :, image_prefix:]),
    )


def input_shape(vit: VisionTransformer) -> tuple[int, int, int]:
    """What one input must be: (channels, height, width)"""
    return (vit.patch_embed.proj.weight.shape[1], *vit.patch_embed.img_size)


def audio_times(inputs: InputSettings, patches: PatchEmbed, **options) -> Tensor:
    """The middle of each audio patch, (A,), in seconds from the start of the window."""
    rows, columns = patches.grid_size
    steps = columns * patches.patch_size[1]
    return middles(columns, steps * inputs.hop / inputs.sample_rate, **options).repeat(rows)


def default_inputs(
    image: VisionTransformer, audio: VisionTransformer, image_frames: int = 1
) -> InputSettings | None:
    """The paper's transforms at the sizes of the two transformers; None if it had no such spectrograms."""
    mel_bins, frames = audio.patch_embed.img_size
    if frames != InputSettings().frames:
        return None
    trained = getattr(image, "pretrained_cfg", None) or {}  # of timm: how its weights saw their images
    normalisation = {f"image_{name}": tuple(trained[name]) for name in ("mean", "std") if name in trained}
    return InputSettings(
        image_size=image.patch_embed.img_size, mel_bins=mel_bins, image_frames=image_frames, **normalisation
    )


def ask_for_inputs(image: VisionTransformer, audio: VisionTransformer) -> str:
    """What to write where the inputs cannot be told."""
    (mel_bins, frames), paper = audio.patch_embed.img_size, InputSettings()
    height, width = image.patch_embed.img_size
    return (
        f"this encoder was made without inputs, which say how files become images and spectrograms: its"
        f" {frames} time steps may be any seconds of sound. At the paper's hop of {paper.hop} samples, write"
        f" AVEncoder(..., inputs=avfuse.InputSettings(image_size={(height, width)}, mel_bins={mel_bins},"
        f" hop={paper.hop}, audio_seconds={frames * paper.hop / paper.sample_rate}))"
    )


def check_inputs(
    inputs: InputSettings | None, image: VisionTransformer, audio: VisionTransformer, frames: int
) -> None:
    if inputs is None:
        return
    if not isinstance(inputs, InputSettings):
        raise ValueError(f"inputs must be InputSettings, got {type(inputs).__name__}")
    if inputs.image_frames != frames:
        raise ValueError(f"frames={frames}, while inputs has image_frames={inputs.image_frames}")
    for name, vit, described in (
        ("image", image, (3, *inputs.image_shape)),
        ("audio", audio, (1, inputs.mel_bins, inputs.frames)),
    ):
        taken = input_shape(vit)
        if taken != described:
            raise ValueError(f"{name} takes inputs of shape {taken}, while inputs describes {described}")


def check_vit(name: str, vit: VisionTransformer, channels: int) -> None:
    """Raises ValueError unless `vit` is a timm VisionTransformer of standard pre-norm blocks."""
    if type(vit) is not VisionTransformer:  # a subclass may compute something else
        raise ValueError(
            f"{name} must be a timm VisionTransformer, got {type(vit).__name__}; tokens of other models can "
            "be fused by a layer, avfuse.DenseFusion(dim, num_heads, image_dim=..., audio_dim=...)"
        )
    check_blocks(name, vit)
    if type(vit.patch_embed) is not PatchEmbed or vit.dynamic_img_size:
        raise ValueError(f"{name} must embed patches by timm's PatchEmbed with a fixed img_size")
    if input_shape(vit)[0] != channels:
        raise ValueError(f"{name} takes inputs of shape {input_shape(vit)}: it must have {channels} channels")
    if not isinstance(vit.patch_drop, nn.Identity):
        raise ValueError(
            f"{name} must not drop patches by itself (patch_drop_rate): pass image_keep or audio_keep"
        )


def check_blocks(name: str, vit: VisionTransformer) -> None:
    """ValueError where a part of a block is another than timm's, or wrapped."""
    for index, block in enumerate(vit.blocks):
        attn, mlp = getattr(block, "attn", None), getattr(block, "mlp", None)
        for part, *standard in (block, Block, ContextBlock), (attn, Attention, ContextAttention), (mlp, Mlp):
            if type(part) not in standard:
                raise ValueError(
                    f"{name} must have standard timm blocks; blocks[{index}] holds a {type(part).__name__} "
                    f"where a {standard[0].__name__} belongs"
                )
        if getattr(block.attn, "gate", None) is not None:  # older versions of timm have none
            raise ValueError(f"{name} must have standard attention; that of blocks[{index}] is gated")


def take_over(vit: VisionTransformer) -> None:
    """Lets the blocks take context tokens; they stay the modules they are, with their weights and hooks.
    Removes pooling and classifier, which the encoder never calls (unused parameters break distributed
    training). Average-pooling models keep their last norm behind the pool: it becomes that of the tokens.
    """
    for block in vit.blocks:
        block.__class__, block.attn.__class__ = ContextBlock, ContextAttention
    if isinstance(vit.norm, nn.Identity):
        vit.norm = vit.fc_norm
    vit.head, vit.fc_norm, vit.attn_pool = nn.Identity(), nn.Identity(), None
    vit.num_classes, vit.global_pool = 0, ""


def describe_vit(vit: VisionTransformer) -> dict:
    """The JSON-ready arguments from which `build_vit` makes the same architecture again.

    Raises:
        ValueError: the model has a part that they cannot express.
    """
    check_blocks("what config.json describes", vit)
    block = vit.blocks[0]
    return dict(
        img_size=list(vit.patch_embed.img_size),
        patch_size=list(vit.patch_embed.patch_size),
        in_chans=vit.patch_embed.proj.in_channels,
        embed_dim=vit.embed_dim,
        depth=len(vit.blocks),
        num_heads=block.attn.num_heads,
        mlp_ratio=ratio_of(block.mlp.fc1.out_features, vit.embed_dim),
        qkv_bias=block.attn.qkv.bias is not None,
        qk_norm=not isinstance(block.attn.q_norm, nn.Identity),
        scale_attn_norm=not isinstance(block.attn.norm, nn.Identity),
        scale_mlp_norm=not isinstance(block.mlp.norm, nn.Identity),
        proj_bias=block.attn.proj.bias is not None,
        init_values=1e-5 if hasattr(block.ls1, "gamma") else None,
        class_token=vit.has_class_token,
        reg_tokens=vit.num_reg_tokens,
        pos_embed="none" if vit.pos_embed is None else "learn",
        no_embed_class=vit.no_embed_class,
        pre_norm=not isinstance(vit.norm_pre, nn.Identity),
        final_norm=not isinstance(vit.norm, nn.Identity),
        pos_drop_rate=vit.pos_drop.p,
        proj_drop_rate=block.attn.proj_drop.p,
        attn_drop_rate=block.attn.attn_drop.p,
        drop_path_rate=float(getattr(vit.blocks[-1].drop_path1, "drop_prob", 0.0)),
        norm_layer=_name_of(block.norm1, NORMS, "norm_layer"),
        norm_eps=block.norm1.eps,
        act_layer=_name_of(block.mlp.act, ACTIVATIONS, "act_layer"),
    )


def build_vit(description: dict, device: str | None = None) -> VisionTransformer:
    """A VisionTransformer from the arguments of `describe_vit`."""
    arguments = dict(description)
    check_depth(arguments["depth"])
    check_count("num_heads", arguments["num_heads"])
    check_positive("norm_eps", arguments["norm_eps"])
    for name, value in arguments.items():
        if name.endswith("_rate"):
            check_rate(name, value)
        elif name in FLAGS:
            check_flag(name, value)
    norm, eps = NORMS[arguments.pop("norm_layer")][0], arguments.pop("norm_eps")
    arguments |= dict(
        norm_layer=lambda dim, **kind: norm(dim, eps=eps, **kind),
        act_layer=ACTIVATIONS[arguments.pop("act_layer")][0],
        img_size=tuple(arguments["img_size"]),
        patch_size=tuple(arguments["patch_size"]),
    )
    on_meta = torch.device(device or torch.get_default_device()).type == "meta"
    init = "skip" if on_meta else ""  # to draw no numbers takes Python longer than to draw them
    return VisionTransformer(**arguments, num_classes=0, global_pool="", weight_init=init, device=device)


def check_rebuilt(rebuilt: nn.Module, model: nn.Module) -> None:
    """ValueError unless the parts of a model are those of what was rebuilt from its description: names and
    shapes of weights do not tell one activation from another, or a subclass that computes something else. Nor
    may a parameter have two names: loaded again, each would learn by itself. What has no weights, and no
    place in what was rebuilt, is not looked at: nothing calls it.
    """
    parts = dict(rebuilt.named_modules())
    for name, part in model.named_modules():
        if name and name in parts and kind_of(parts[name]) != kind_of(part):
            raise ValueError(f"{name}, a {type(part).__name__}, is none that config.json can describe")
    first = {}
    for name, weight in model.named_parameters(remove_duplicate=False):
        if (other := first.setdefault(id(weight), name)) != name:
            raise ValueError(f"{name} is {other}, too, and config.json cannot describe what is shared")
    places = {name: place.shape for name, place in rebuilt.state_dict().items()}
    for name, weight in model.state_dict().items():
        # A copy for another number of frames has other positions of frames.
        if name != "frame_embed" and places.get(name) != weight.shape:
            raise ValueError(f"{name} is none of the weights that config.json can describe")


def kind_of(part: nn.Module) -> tuple:
    """What a part computes, as far as it is not in its weights. Several classes are one kind."""
    blocks = (Block, ContextBlock), (Attention, ContextAttention), (nn.BatchNorm1d, nn.SyncBatchNorm)
    kinds = *NORMS.values(), *ACTIVATIONS.values(), DROPPING, *blocks
    kind = next((kind for kind in kinds if type(part) in kind), type(part))
    options = dict(eps=None, approximate="none", num_heads=None)
    has_bias = getattr(part, "bias", None) is not None
    return kind, has_bias, *(getattr(part, name, default) for name, default in options.items())


def ratio_of(width: int, dim: int) -> float:
    """The r for which int(dim * r) is `width`, which width / dim misses by rounding at some sizes."""
    ratio = width / dim
    return ratio if int(dim * ratio) == width else math.nextafter(ratio, math.inf)


def _name_of(module, known, argument):
    for name, classes in known.items():
        if type(module) in classes and getattr(module, "approximate", "none") == "none":
            return name
    raise ValueError(f"{argument}: a {type(module).__name__} cannot be described in config.json")
