"""The semantics of the paper's released code, quirk by quirk, so that its weights give its outputs.

Names and shapes of parameters are those of the released state dicts; the quirks are listed in each class.
Where the released dense module forms all pairs, this one uses the exact identity of
`avfuse.ops.pair_attention`.
"""

import math
import os
import re
from functools import wraps

import torch
import torch.nn.functional as F
from timm.layers import Mlp
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from .checks import check_count, check_flag, check_positive, check_size
from .encoder import AVEncoder
from .files import read_pth, read_safetensors
from .fusion import (
    NORM_EPS,
    aggregate_mask,
    any_pair_left,
    check_streams,
    initialize_linear,
    split_state,
    union_mask,
)
from .inputs import InputSettings
from .mae import AVMAE
from .ops.pair_attention import masked_attention, pair_attention
from .pretrained import load_strictly
from .vit import ratio_of

INTERACTIONS = {"dense_mmi": "dense", "factorized_mmi": "factorized", "token": "token", "none": "none"}
COUNTS = (
    *("embed_dim", "num_heads", "depth", "patch_size"),
    *("fusion_tokens", "image_aggregation_tokens", "audio_aggregation_tokens"),
    *("decoder_dim", "decoder_depth", "decoder_heads"),
)
RATIOS = ("attn_ratio", "mlp_ratio", "image_mask_ratio", "audio_mask_ratio")
SIZES = ("image_size", "audio_size")
CONFIG_KEYS = (*COUNTS, *RATIOS, *SIZES, "interactions", "fusion_layers", "norm_loss")
DECODER_NAME = re.compile(r"^(image|audio)_decoder_")


class ReleasedFusion(nn.Module):
    """What the released fusion blocks share: the residual adds to the *normalised* tokens, which replace the
    input; the softmax scale comes from the full width, (D / H) ** -0.5, whatever the query width."""

    def __init__(self, dim, num_heads, *, mlp_ratio=1.0):
        super().__init__()
        self.dim, self.num_heads, self.scale = dim, num_heads, (dim // num_heads) ** -0.5
        self.norm1_mm = nn.LayerNorm(dim, eps=NORM_EPS)
        self.norm1_img = nn.LayerNorm(dim, eps=NORM_EPS)
        self.norm1_aud = nn.LayerNorm(dim, eps=NORM_EPS)
        self.norm2 = nn.LayerNorm(dim, eps=NORM_EPS)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))

    def forward(
        self,
        fusion: Tensor,
        image: Tensor,
        audio: Tensor,
        *,
        image_mask: Tensor | None = None,
        audio_mask: Tensor | None = None,
        image_positions: Tensor | None = None,
        audio_positions: Tensor | None = None,
    ) -> Tensor:
        check_streams(self, fusion, image, audio, image_mask, audio_mask)
        fusion, image, audio = self.norm1_mm(fusion), self.norm1_img(image), self.norm1_aud(audio)
        fusion = fusion + self.attend(fusion, image, audio, image_mask, audio_mask)
        return fusion + self.mlp(self.norm2(fusion))

    def split_heads(self, tokens):
        return tokens.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    def pairs(
        self, query, image_key, image_value, audio_key, audio_value, value_bias, image_mask, audio_mask
    ):
        """Pair attention over (B, N, width) projections -> (B, F, value width)"""
        projections = (query, image_key, image_value, audio_key, audio_value)
        attended = pair_attention(
            *map(self.split_heads, projections),
            image_mask=image_mask,
            audio_mask=audio_mask,
            scale=self.scale,
        )
        return attended.transpose(1, 2).flatten(2) + value_bias * any_pair_left(image_mask, audio_mask)


class ReleasedDense(ReleasedFusion):
    """Released "dense_mmi": one Linear over concatenated pairs, whose first D columns act on audio, the last
    on image.
    """

    def __init__(self, dim, num_heads, *, attn_ratio=0.25, mlp_ratio=1.0):
        super().__init__(dim, num_heads, mlp_ratio=mlp_ratio)
        width = int(dim * attn_ratio)
        self.attn = nn.ModuleDict(
            dict(q=nn.Linear(dim, width), kv=nn.Linear(2 * dim, 2 * width), proj=nn.Linear(width, dim))
        )
        initialize_linear(self)

    def attend(self, fusion, image, audio, image_mask, audio_mask):
        audio_weight, image_weight = self.attn["kv"].weight.chunk(2, dim=1)
        image_key, image_value = F.linear(image, image_weight).chunk(2, dim=-1)
        audio_key, audio_value = F.linear(audio, audio_weight).chunk(2, dim=-1)
        value_bias = self.attn["kv"].bias.chunk(2)[1]  # the key bias cancels in the softmax
        query = self.attn["q"](fusion)
        return self.attn["proj"](
            self.pairs(
                query, image_key, image_value, audio_key, audio_value, value_bias, image_mask, audio_mask
            )
        )


class ReleasedFactorized(ReleasedFusion):
    """Released "factorized_mmi": pairs of the raw outputs of the aggregation attentions (no residual, no MLP
    before); one shared residual and MLP over all fusion and aggregation tokens; full-width values."""

    def __init__(self, dim, num_heads, *, split_sizes=(16, 8, 8), attn_ratio=0.25, mlp_ratio=1.0):
        super().__init__(dim, num_heads, mlp_ratio=mlp_ratio)
        self.split_sizes, width = list(split_sizes), int(dim * attn_ratio)
        self.attn = nn.ModuleDict(
            dict(
                attn_v=self.cross_attention(dim),
                attn_a=self.cross_attention(dim),
                q=nn.Linear(dim, width),
                k=nn.Linear(2 * dim, width),
                v=nn.Linear(2 * dim, dim),
                proj=nn.Linear(dim, dim),
            )
        )
        self.attn["k"].bias.requires_grad_(False)  # it cancels in the softmax: never used, never trained
        initialize_linear(self)

    @staticmethod
    def cross_attention(dim):
        return nn.ModuleDict(
            dict(q=nn.Linear(dim, dim), kv=nn.Linear(dim, 2 * dim), proj=nn.Linear(dim, dim))
        )

    def attend(self, fusion, image, audio, image_mask, audio_mask):
        fusion, image_aggregate, audio_aggregate = split_state(fusion, self.split_sizes)
        image_aggregate = self.aggregate(self.attn["attn_v"], image_aggregate, image, image_mask)
        audio_aggregate = self.aggregate(self.attn["attn_a"], audio_aggregate, audio, audio_mask)

        image_key_weight, audio_key_weight = self.attn["k"].weight.chunk(2, dim=1)
        image_value_weight, audio_value_weight = self.attn["v"].weight.chunk(2, dim=1)
        attended = self.pairs(
            self.attn["q"](fusion),
            F.linear(image_aggregate, image_key_weight),
            F.linear(image_aggregate, image_value_weight),
            F.linear(audio_aggregate, audio_key_weight),
            F.linear(audio_aggregate, audio_value_weight),
            self.attn["v"].bias,
            aggregate_mask(image_mask, image_aggregate),
            aggregate_mask(audio_mask, audio_aggregate),
        )
        return torch.cat([self.attn["proj"](attended), image_aggregate, audio_aggregate], dim=1)

    def aggregate(self, attn, aggregate, tokens, mask):
        key, value = attn["kv"](tokens).chunk(2, dim=-1)
        attended = masked_attention(
            *map(self.split_heads, (attn["q"](aggregate), key, value)), mask, self.scale
        )
        return attn["proj"](attended.transpose(1, 2).flatten(2))


class ReleasedToken(ReleasedFusion):
    """Released "token": one softmax over image and audio tokens, without the fusion tokens; its scale is that
    of its own query width."""

    def __init__(self, dim, num_heads, *, attn_ratio=0.25, mlp_ratio=1.0):
        super().__init__(dim, num_heads, mlp_ratio=mlp_ratio)
        width = int(dim * attn_ratio)
        self.scale = (width // num_heads) ** -0.5
        self.attn = nn.ModuleDict(
            dict(q=nn.Linear(dim, width), kv=nn.Linear(dim, 2 * width), proj=nn.Linear(width, dim))
        )
        initialize_linear(self)

    def attend(self, fusion, image, audio, image_mask, audio_mask):
        key, value = self.attn["kv"](torch.cat([image, audio], dim=1)).chunk(2, dim=-1)
        mask = union_mask((image, image_mask), (audio, audio_mask))
        attended = masked_attention(
            *map(self.split_heads, (self.attn["q"](fusion), key, value)), mask, self.scale
        )
        return self.attn["proj"](attended.transpose(1, 2).flatten(2))


class ReleasedEncoder(AVEncoder):
    """The released encoder: its blocks, and *all* fusion and aggregation tokens feed the uni-modal blocks and
    the decoders. (Its "token" variant calls the block with image and audio exchanged, which
    `from_deepavfusion` undoes.)
    """

    mark = "released"

    @wraps(AVEncoder.__init__)  # its signature too, which the hub mixin reads
    def __init__(self, image, audio, **options):
        super().__init__(image, audio, **options)
        for branch in self.image, self.audio:
            branch.pos_embed.requires_grad_(False)  # released: fixed sine-cosine

    def make_block(self):
        settings = self.settings
        options = dict(attn_ratio=settings["attn_ratio"], mlp_ratio=settings["mlp_ratio"])
        if settings["interactions"] == "factorized":
            counts = ("fusion_tokens", "image_aggregation_tokens", "audio_aggregation_tokens")
            options["split_sizes"] = [settings[name] for name in counts]
        block = {"dense": ReleasedDense, "factorized": ReleasedFactorized, "token": ReleasedToken}
        return block[settings["interactions"]](self.embed_dim, settings["num_heads"], **options)

    def visible_fusion(self, state):
        return state

    def config(self):
        return super().config() | {self.mark: True}


class ReleasedAutoencoder(AVMAE):
    """The released autoencoder: its decoders train their positions."""

    mark = ReleasedEncoder.mark  # of its encoder's config

    @wraps(AVMAE.__init__)
    def __init__(self, encoder, **options):
        super().__init__(encoder, **options)
        for decoder in self.image_decoder, self.audio_decoder:
            decoder.pos_embed.requires_grad_(True)


def from_deepavfusion(state_dict_or_path, *, config: dict | None = None) -> nn.Module:
    """The module that released DeepAVFusion weights belong to, with those weights, in eval mode.

    Args:
        state_dict_or_path: a checkpoint file (read with `weights_only=True`, or safetensors), a dictionary
            {"state_dict": ...}, or a state dict, of the autoencoder (-> `AVMAE`), a bare encoder (->
            `AVEncoder`) or a single fusion block.
        config: what names and shapes cannot tell, by the released names: image_size and audio_size (height,
            width), num_heads, the token counts, fusion_layers ("all", "none" or "0-1"), decoder_heads, the
            mask ratios, norm_loss. Defaults: heads D/64, tokens 16/8/8, square images, audio of 8 patch rows,
            16 decoder heads, norm_loss True.

    Raises:
        ValueError: weights of none of these models, an unknown config key, or weights that do not fit
        strictly.

    The weights began as MAE's and AudioMAE's, whose licence `AVEncoder.origins` names.
    """
    weights = read_weights(state_dict_or_path)
    settings = infer_settings(weights) | check_config(config)
    dim, heads = settings["embed_dim"], settings["num_heads"]
    if heads < 1 or dim % heads:
        raise ValueError(f"config: num_heads must divide the width of {dim}, got {heads}")
    if "norm1_mm.weight" in weights:
        if settings["interactions"] == "none":
            raise ValueError("config: interactions is 'none', but the weights are those of a fusion block")
        return load_strictly(make_released_block(settings), weights)
    if not any(name.startswith("encoder.") for name in weights):
        encoder = make_released_encoder(settings)
        return load_strictly(encoder, exchange_token_norms(weights, settings))
    encoder = make_released_encoder(settings)
    mae = ReleasedAutoencoder(
        encoder,
        decoder_dim=settings["decoder_dim"],
        decoder_depth=settings["decoder_depth"],
        decoder_heads=settings["decoder_heads"],
        image_mask_ratio=settings["image_mask_ratio"],
        audio_mask_ratio=settings["audio_mask_ratio"],
        norm_target=settings["norm_loss"],
    )
    weights = {DECODER_NAME.sub(r"\1_decoder.", name): weight for name, weight in weights.items()}
    return load_strictly(mae, exchange_token_norms(weights, settings))


def read_weights(source) -> dict[str, Tensor]:
    """The state dict in a file or dictionary, without the prefix that distributed training adds."""
    if isinstance(source, (str, os.PathLike)):
        source = read_safetensors(source) if os.fspath(source).endswith(".safetensors") else read_pth(source)
    if not isinstance(source, dict):
        raise ValueError(f"state_dict_or_path must be a path or a dictionary, got {type(source).__name__}")
    weights = source.get("state_dict", source)
    if not isinstance(weights, dict) or not all(
        isinstance(name, str) and isinstance(weight, Tensor) for name, weight in weights.items()
    ):
        raise ValueError("state_dict_or_path must hold tensors by name, by itself or under 'state_dict'")
    return {name.removeprefix("module."): weight for name, weight in weights.items()}


def encoder_weights(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Those below "encoder.", as an encoder by itself names them."""
    below = [name for name in weights if name.startswith("encoder.")]
    return {name.removeprefix("encoder."): weights[name] for name in below}


def infer_settings(weights: dict[str, Tensor]) -> dict:
    """What names and shapes tell, and defaults for the rest."""
    encoder = {name.removeprefix("encoder."): weight for name, weight in weights.items()}
    prefix = "" if "norm1_mm.weight" in weights else r"fusion_blocks\.\d+\."
    block = {re.sub(f"^{prefix}", "", name): w for name, w in encoder.items() if re.match(prefix, name)}
    if not prefix:
        dim = size_of(block, "norm1_mm.weight", 0)
    elif "fusion_tokens" in encoder and "image.pos_embed" in encoder and "audio.pos_embed" in encoder:
        dim = size_of(encoder, "fusion_tokens", 2)
    else:
        raise ValueError(
            "state_dict_or_path holds no DeepAVFusion autoencoder, encoder or fusion block; "
            f"its names begin with {sorted(weights)[:3]}"
        )
    settings = dict(
        embed_dim=dim,
        num_heads=max(1, dim // 64),
        attn_ratio=0.25,
        mlp_ratio=1.0,
        interactions="none",
        fusion_tokens=16,
        image_aggregation_tokens=8,
        audio_aggregation_tokens=8,
        decoder_heads=16,
        image_mask_ratio=0.75,
        audio_mask_ratio=0.8,
        norm_loss=True,
    )
    if block:
        is_factorized = any(name.startswith("attn.attn_a.") for name in block)
        is_dense = not is_factorized and size_of(block, "attn.kv.weight", 1) == 2 * dim
        settings |= dict(
            attn_ratio=ratio_of(size_of(block, "attn.q.weight", 0), dim),
            mlp_ratio=ratio_of(size_of(block, "mlp.fc1.weight", 0), dim),
            interactions="factorized_mmi" if is_factorized else "dense_mmi" if is_dense else "token",
        )
    if prefix:
        settings |= infer_encoder(encoder, settings["interactions"])
    if any(name.startswith("encoder.") for name in weights):  # an autoencoder
        settings |= dict(
            decoder_dim=size_of(weights, "image_decoder_embed.weight", 0),
            decoder_depth=count_blocks(weights, "image_decoder_blocks"),
        )
    return settings


def infer_encoder(encoder: dict[str, Tensor], interactions: str) -> dict:
    patch_size = size_of(encoder, "image.patch_embed.proj.weight", 3)
    image_patches, audio_patches = (size_of(encoder, f"{name}.pos_embed", 1) for name in ("image", "audio"))
    side = math.isqrt(image_patches)
    layers = sorted(
        {int(match[1]) for name in encoder if (match := re.match(r"fusion_blocks\.(\d+)\.", name))}
    )
    inferred = dict(
        patch_size=patch_size,
        depth=count_blocks(encoder, "image.blocks"),
        image_size=(side * patch_size, side * patch_size),
        audio_size=(8 * patch_size, audio_patches // 8 * patch_size),
        fusion_layers="-".join(map(str, layers)) or "none",
    )
    if interactions != "factorized_mmi":  # there are no aggregation tokens to tell apart
        inferred["fusion_tokens"] = size_of(encoder, "fusion_tokens", 1)
    return inferred


def size_of(weights: dict[str, Tensor], name: str, dim: int) -> int:
    """The size of a weight along `dim`, from which settings are inferred."""
    if name not in weights or weights[name].ndim <= dim:
        raise ValueError(f"state_dict_or_path holds no {name}, or one without dimension {dim}")
    return weights[name].shape[dim]


def count_blocks(weights: dict[str, Tensor], blocks: str) -> int:
    pattern = re.escape(blocks) + r"\.(\d+)\."
    found = {int(match[1]) for name in weights if (match := re.match(pattern, name))}
    if not found:
        raise ValueError(f"state_dict_or_path holds no {blocks}")
    return 1 + max(found)


def check_config(config: dict | None) -> dict:
    if not (config is None or isinstance(config, dict)):
        raise ValueError(f"config must be a dictionary, got {type(config).__name__}")
    config = dict(config or {})
    unknown = sorted(set(config) - set(CONFIG_KEYS))
    if unknown:
        raise ValueError(f"config has unknown keys {', '.join(unknown)}; known are {', '.join(CONFIG_KEYS)}")
    for name in config:
        if name in COUNTS:
            check_count(f"config: {name}", config[name])
        elif name in RATIOS:
            check_positive(f"config: {name}", config[name])
        elif name in SIZES:
            check_size(f"config: {name}", config[name])
    if config.get("interactions", "none") not in INTERACTIONS:
        names = ", ".join(INTERACTIONS)
        raise ValueError(f"config: interactions must be one of {names}, got {config['interactions']!r}")
    if not re.fullmatch(r"all|none|\d+(-\d+)*", str(config.get("fusion_layers", "all"))):
        raise ValueError(
            f"config: fusion_layers must be 'all', 'none' or like '0-1', got {config['fusion_layers']!r}"
        )
    check_flag("config: norm_loss", config.get("norm_loss", True))
    return config


def make_released_block(settings: dict) -> ReleasedFusion:
    options = dict(attn_ratio=settings["attn_ratio"], mlp_ratio=settings["mlp_ratio"])
    if settings["interactions"] == "factorized_mmi":
        counts = ("fusion_tokens", "image_aggregation_tokens", "audio_aggregation_tokens")
        options["split_sizes"] = [settings[name] for name in counts]
    block = {"dense_mmi": ReleasedDense, "factorized_mmi": ReleasedFactorized, "token": ReleasedToken}
    return block[settings["interactions"]](settings["embed_dim"], settings["num_heads"], **options)


def make_released_encoder(settings: dict) -> ReleasedEncoder:
    def vit(channels, size):
        return VisionTransformer(
            img_size=tuple(size),
            patch_size=settings["patch_size"],
            in_chans=channels,
            embed_dim=settings["embed_dim"],
            depth=settings["depth"],
            num_heads=settings["num_heads"],
            class_token=False,
            global_pool="",
            num_classes=0,
        )

    image, audio = vit(3, settings["image_size"]), vit(1, settings["audio_size"])
    for branch in image, audio:
        branch.origin = dict(weights="DeepAVFusion", family="DeepAVFusion", licence="CC-BY-NC-4.0")
    layers = settings["fusion_layers"]
    if layers not in ("all", "none"):
        layers = [int(layer) for layer in str(layers).split("-")]
    return ReleasedEncoder(
        image,
        audio,
        interactions=INTERACTIONS[settings["interactions"]],
        fusion_layers=layers,
        fusion_tokens=settings["fusion_tokens"],
        image_aggregation_tokens=settings["image_aggregation_tokens"],
        audio_aggregation_tokens=settings["audio_aggregation_tokens"],
        num_heads=settings["num_heads"],
        attn_ratio=settings["attn_ratio"],
        mlp_ratio=settings["mlp_ratio"],
        inputs=released_inputs(settings),
    )


def released_inputs(settings: dict) -> InputSettings | None:
    """The paper's transforms where the sizes are its own; else what the encoder derives from its sizes."""
    paper = InputSettings()
    sizes = tuple(settings["image_size"]), tuple(settings["audio_size"])
    return paper if sizes == ((224, 224), (128, 192)) else None


def exchange_token_norms(weights: dict, settings: dict) -> dict:
    """In a released token encoder, norm1_aud normalises image tokens and norm1_img audio tokens."""
    if settings["interactions"] != "token":
        return weights
    exchanged = {"norm1_aud": "norm1_img", "norm1_img": "norm1_aud"}
    return {re.sub("norm1_(aud|img)", lambda m: exchanged[m[0]], name): w for name, w in weights.items()}
