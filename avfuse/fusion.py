"""Fusion blocks: fusion tokens read image and audio tokens, in three ways that share one call.

    block(fusion, image, audio) -> fusion            (B, F, D), (B, I, D), (B, A, D) -> (B, F, D)

`DenseFusion` attends to every pair of an image and an audio token (paper Eq. 4-8), `FactorizedFusion` to the
pairs of a few aggregation tokens (Eq. 9-13), `TokenFusion` to the tokens themselves (Sec. 3.1). All are
pre-norm residual blocks: z = x + proj(attention(norm x, norm image, norm audio)), out = z + mlp(norm z).
"""

import torch
from timm.layers import DropPath, Mlp
from torch import Tensor, nn

from .checks import (
    check_choice,
    check_count,
    check_dtype,
    check_indices,
    check_mask,
    check_positive,
    check_rate,
    check_tokens,
)
from .ops.pair_attention import (
    INTERACTIONS,
    masked_attention,
    masked_attention_weights,
    pair_attention,
    pair_attention_weights,
)

NORM_EPS = 1e-5


class FusionBlock(nn.Module):
    """What all fusion blocks share: queries from the fusion tokens, and the residual update from what they
    attended.

    Args:
        dim: model width D.
        num_heads: attention heads.
        attn_ratio: query, key and value widths are int(dim * attn_ratio) over all heads; default 0.25 (the
            paper's).
        mlp_ratio: hidden width of the MLP over dim; default 1.0 (the paper's VGGSound model; 4.0 for
            AudioSet).
        drop: dropout after the projection and in the MLP.
        drop_path: stochastic depth rate of both residual branches.

    Raises:
        ValueError: naming the argument, when the widths do not divide or a rate is not in [0, 1).
    """

    def __init__(self, dim, num_heads, *, attn_ratio=0.25, mlp_ratio=1.0, drop=0.0, drop_path=0.0):
        super().__init__()
        check_count("dim", dim)
        check_count("num_heads", num_heads)
        check_positive("attn_ratio", attn_ratio)
        check_positive("mlp_ratio", mlp_ratio)
        self.dim, self.num_heads, self.width = dim, num_heads, int(dim * attn_ratio)
        if self.width < 1 or self.width % num_heads:
            raise ValueError(
                f"attn_ratio={attn_ratio} gives int(dim * attn_ratio) = {self.width} channels, "
                f"which num_heads={num_heads} does not divide"
            )
        if int(dim * mlp_ratio) < 1:
            raise ValueError(f"mlp_ratio={mlp_ratio} leaves the MLP without hidden channels")
        check_rate("drop", drop)
        check_rate("drop_path", drop_path)
        self.norm_fusion = nn.LayerNorm(dim, eps=NORM_EPS)
        self.query = nn.Linear(dim, self.width)
        self.proj = nn.Linear(self.width, dim)
        self.drop = nn.Dropout(drop)
        self.norm_mlp = nn.LayerNorm(dim, eps=NORM_EPS)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop=drop)
        self.drop_path = DropPath(drop_path)

    def queries(self, fusion: Tensor) -> Tensor:
        """(B, F, D) -> (B, H, F, K)"""
        return self.split_heads(self.query(self.norm_fusion(fusion)))

    def keys_and_values(self, projected: Tensor) -> tuple[Tensor, Tensor]:
        """(B, N, 2 * width) -> keys (B, H, N, K), values (B, H, N, V)"""
        return projected.unflatten(-1, (2, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind()

    def update(self, fusion: Tensor, attended: Tensor) -> Tensor:
        """Residual update of (B, F, D) from attended values (B, F, width)."""
        fusion = fusion + self.drop_path(self.drop(self.proj(attended)))
        return fusion + self.drop_path(self.mlp(self.norm_mlp(fusion)))

    def split_heads(self, tokens: Tensor) -> Tensor:
        return tokens.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    def merge_heads(self, tokens: Tensor) -> Tensor:
        return tokens.transpose(1, 2).flatten(2)


class DenseFusion(FusionBlock):
    """Fusion by exact dense interactions: attention over all I x A pairs at the cost of I + A (paper Eq.
    4-8).

    Keys and values of a pair are sums of a linear map of its image token and one of its audio token (Eq. 4
    folded into the key and value projections); a key bias would cancel in the softmax, and the value bias of
    a pair is added once, after the sum. With `interaction="bilinear"` they are products, and each side keeps
    its bias, so that bilinear pairs can fall back to additive ones.

    Args:
        dim, num_heads, attn_ratio, mlp_ratio, drop, drop_path: see `FusionBlock`.
        interaction: "additive" (the paper) or "bilinear".
        pair_bias: None, or the numbers of image and audio tokens: a learned table (num_heads, I, A) over
            positions, zero at first, is then added to the logits of the pairs. Where tokens were dropped, its
            part for the tokens that are left is gathered: (B, num_heads, I, A) numbers.

    Call: `block(fusion, image, audio, *, image_mask=None, audio_mask=None, image_positions=None,
    audio_positions=None)`, (B, F, D), (B, I, D), (B, A, D) -> (B, F, D). Masks (B, N) bool, True = attend.
    Positions (B, N) long tell the learned pair bias which tokens are left after masking; None = all, in
    order.

    Raises:
        ValueError: naming the argument that is wrong.
    """

    def __init__(
        self,
        dim,
        num_heads,
        *,
        attn_ratio=0.25,
        mlp_ratio=1.0,
        interaction="additive",
        pair_bias=None,
        drop=0.0,
        drop_path=0.0,
    ):
        super().__init__(
            dim, num_heads, attn_ratio=attn_ratio, mlp_ratio=mlp_ratio, drop=drop, drop_path=drop_path
        )
        check_choice("interaction", interaction, INTERACTIONS)
        if pair_bias is not None:
            is_pair = isinstance(pair_bias, (tuple, list)) and len(pair_bias) == 2
            if not is_pair or not all(type(count) is int and count > 0 for count in pair_bias):
                raise ValueError(
                    f"pair_bias must be None or the counts of image and audio tokens, got {pair_bias!r}"
                )
        self.interaction = interaction
        bilinear = interaction == "bilinear"
        self.norm_image = nn.LayerNorm(dim, eps=NORM_EPS)
        self.norm_audio = nn.LayerNorm(dim, eps=NORM_EPS)
        self.image_key_value = nn.Linear(dim, 2 * self.width, bias=bilinear)
        self.audio_key_value = nn.Linear(dim, 2 * self.width, bias=bilinear)
        self.value_bias = None if bilinear else nn.Parameter(torch.zeros(self.width))
        self.pair_bias = None if pair_bias is None else nn.Parameter(torch.zeros(num_heads, *pair_bias))
        initialize_linear(self)

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
        image_key, image_value = self.keys_and_values(self.image_key_value(self.norm_image(image)))
        audio_key, audio_value = self.keys_and_values(self.audio_key_value(self.norm_audio(audio)))
        attended = pair_attention(
            self.queries(fusion),
            image_key,
            image_value,
            audio_key,
            audio_value,
            image_mask=image_mask,
            audio_mask=audio_mask,
            pair_bias=self.positioned_bias(image, audio, image_positions, audio_positions),
            interaction=self.interaction,
        )
        attended = self.merge_heads(attended)
        if self.value_bias is not None:
            attended = attended + self.value_bias * any_pair_left(image_mask, audio_mask)
        return self.update(fusion, attended)

    @torch.no_grad()
    def attention_weights(
        self,
        fusion,
        image,
        audio,
        *,
        image_mask=None,
        audio_mask=None,
        image_positions=None,
        audio_positions=None,
    ):
        """What the fusion tokens attend to: image weights (B, H, F, I) and audio weights (B, H, F, A)."""
        check_streams(self, fusion, image, audio, image_mask, audio_mask)
        image_key, _ = self.keys_and_values(self.image_key_value(self.norm_image(image)))
        audio_key, _ = self.keys_and_values(self.audio_key_value(self.norm_audio(audio)))
        pair_bias = self.positioned_bias(image, audio, image_positions, audio_positions)
        return pair_attention_weights(
            self.queries(fusion),
            image_key,
            audio_key,
            image_mask=image_mask,
            audio_mask=audio_mask,
            pair_bias=pair_bias,
            interaction=self.interaction,
        )

    def positioned_bias(self, image, audio, image_positions, audio_positions):
        """The learned table at the positions of the tokens: (1, H, I, A), or (B, H, I, A) where some were
        dropped.
        """
        if self.pair_bias is None:
            return None
        image_positions = self._positions("image_positions", image_positions, image, self.pair_bias.shape[1])
        audio_positions = self._positions("audio_positions", audio_positions, audio, self.pair_bias.shape[2])
        if image_positions is None and audio_positions is None:
            return self.pair_bias[None]
        rows = torch.arange(image.shape[1])[None] if image_positions is None else image_positions
        columns = torch.arange(audio.shape[1])[None] if audio_positions is None else audio_positions
        rows, columns = rows.to(image.device), columns.to(audio.device)
        return self.pair_bias[:, rows[:, :, None], columns[:, None]].transpose(
            0, 1
        )  # (H, B, I, A) -> (B, H, I, A)

    @staticmethod
    def _positions(name, positions, tokens, size):
        if positions is None:
            if tokens.shape[1] != size:
                raise ValueError(
                    f"{name} is needed: the pair bias has {size} tokens, there are {tokens.shape[1]}"
                )
            return None
        check_indices(name, positions, tokens.shape[0], size, tokens.device)
        if positions.shape[1] != tokens.shape[1]:
            raise ValueError(f"{name} must name {tokens.shape[1]} tokens, got shape {tuple(positions.shape)}")
        return positions


class FactorizedFusion(nn.Module):
    """Fusion by factorized interactions: pairs of a few aggregation tokens instead of all pairs (paper Eq.
    9-13).

    The image aggregation tokens read the image and the audio aggregation tokens the sound, each by a
    cross-attention block with its own norms and MLP; a `DenseFusion` then forms the pairs from their
    normalised outputs.

    Args:
        dim, num_heads, attn_ratio, mlp_ratio, drop, drop_path: see `FusionBlock`.
        fusion_tokens, image_aggregation_tokens, audio_aggregation_tokens: how the state is divided (default
            16, 8, 8).

    Call: as `DenseFusion`, but takes and returns (B, fusion + image aggregation + audio aggregation tokens,
    D), in that order. Positions are accepted and not needed.

    Raises:
        ValueError: naming the argument that is wrong.
    """

    def __init__(
        self,
        dim,
        num_heads,
        *,
        fusion_tokens=16,
        image_aggregation_tokens=8,
        audio_aggregation_tokens=8,
        **block_options,
    ):
        super().__init__()
        self.dim = dim
        self.split_sizes = [fusion_tokens, image_aggregation_tokens, audio_aggregation_tokens]
        check_count("fusion_tokens", fusion_tokens)
        check_count("image_aggregation_tokens", image_aggregation_tokens)
        check_count("audio_aggregation_tokens", audio_aggregation_tokens)
        self.image_aggregation = Aggregation(dim, num_heads, **block_options)
        self.audio_aggregation = Aggregation(dim, num_heads, **block_options)
        self.fusion = DenseFusion(dim, num_heads, **block_options)

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
        fusion, image_aggregate, audio_aggregate = split_state(fusion, self.split_sizes)
        image_aggregate = self.image_aggregation(image_aggregate, image, image_mask)
        audio_aggregate = self.audio_aggregation(audio_aggregate, audio, audio_mask)
        fusion = self.fusion(
            fusion,
            image_aggregate,
            audio_aggregate,
            image_mask=aggregate_mask(image_mask, image_aggregate),
            audio_mask=aggregate_mask(audio_mask, audio_aggregate),
        )
        return torch.cat([fusion, image_aggregate, audio_aggregate], dim=1)

    @torch.no_grad()
    def attention_weights(self, fusion, image, audio, *, image_mask=None, audio_mask=None, **_positions):
        """Weights of the fusion tokens over image and audio tokens, (B, H, F, I) and (B, H, F, A): each goes
        through the aggregation tokens, so it is the product of two attention maps.
        """
        check_streams(self, fusion, image, audio, image_mask, audio_mask)
        fusion, image_aggregate, audio_aggregate = split_state(fusion, self.split_sizes)
        image_map = self.image_aggregation.attention_weights(image_aggregate, image, image_mask)
        audio_map = self.audio_aggregation.attention_weights(audio_aggregate, audio, audio_mask)
        image_weights, audio_weights = self.fusion.attention_weights(
            fusion,
            self.image_aggregation(image_aggregate, image, image_mask),
            self.audio_aggregation(audio_aggregate, audio, audio_mask),
            image_mask=aggregate_mask(image_mask, image_aggregate),
            audio_mask=aggregate_mask(audio_mask, audio_aggregate),
        )
        return image_weights @ image_map, audio_weights @ audio_map


class Aggregation(FusionBlock):
    """Cross-attention block: a few aggregation tokens summarize the tokens of one modality (paper Eq.
    9-10).
    """

    def __init__(self, dim, num_heads, **block_options):
        super().__init__(dim, num_heads, **block_options)
        self.norm_tokens = nn.LayerNorm(dim, eps=NORM_EPS)
        self.key_value = nn.Linear(dim, 2 * self.width)
        initialize_linear(self)

    def forward(self, aggregate: Tensor, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        key, value = self.keys_and_values(self.key_value(self.norm_tokens(tokens)))
        attended = self.merge_heads(masked_attention(self.queries(aggregate), key, value, mask))
        return self.update(aggregate, attended)

    @torch.no_grad()
    def attention_weights(self, aggregate: Tensor, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        key, _ = self.keys_and_values(self.key_value(self.norm_tokens(tokens)))
        return masked_attention_weights(self.queries(aggregate), key, mask)


class TokenFusion(FusionBlock):
    """Fusion by tokens, the ablation without pairs (paper Sec. 3.1, like MBT): one softmax over the union of
    fusion, image and audio tokens, so that the modalities compete for attention.

    Args:
        dim, num_heads, attn_ratio, mlp_ratio, drop, drop_path: see `FusionBlock`.

    Call: as `DenseFusion`. Positions are accepted and not needed.

    Raises:
        ValueError: naming the argument that is wrong.
    """

    def __init__(self, dim, num_heads, **block_options):
        super().__init__(dim, num_heads, **block_options)
        self.norm_image = nn.LayerNorm(dim, eps=NORM_EPS)
        self.norm_audio = nn.LayerNorm(dim, eps=NORM_EPS)
        self.key_value = nn.Linear(dim, 2 * self.width)
        initialize_linear(self)

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
        query, key, value = self._query_key_value(fusion, image, audio)
        mask = union_mask((fusion, None), (image, image_mask), (audio, audio_mask))
        return self.update(fusion, self.merge_heads(masked_attention(query, key, value, mask)))

    def _query_key_value(self, fusion, image, audio):
        normed = self.norm_fusion(fusion)
        union = torch.cat(
            [normed, self.norm_image(image), self.norm_audio(audio)], dim=1
        )  # (B, F + I + A, D)
        return self.split_heads(self.query(normed)), *self.keys_and_values(self.key_value(union))

    @torch.no_grad()
    def attention_weights(self, fusion, image, audio, *, image_mask=None, audio_mask=None, **_positions):
        """The two parts, (B, H, F, I) and (B, H, F, A), of the one softmax: they do not sum to 1."""
        check_streams(self, fusion, image, audio, image_mask, audio_mask)
        query, key, _ = self._query_key_value(fusion, image, audio)
        mask = union_mask((fusion, None), (image, image_mask), (audio, audio_mask))
        weights = masked_attention_weights(query, key, mask)
        return weights.split([fusion.shape[1], image.shape[1], audio.shape[1]], dim=-1)[1:]


# --- what the blocks share ----------------------------------------------------------------------------------


def any_pair_left(image_mask, audio_mask):
    """1 where a clip has any token to pair, else 0, (B, 1, 1); simply 1 where a modality has no mask."""
    if image_mask is None or audio_mask is None:
        return 1.0
    return (image_mask.any(1) | audio_mask.any(1))[:, None, None]


def split_state(state: Tensor, sizes: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """(B, F + Ia + Aa, D) -> fusion, image aggregation and audio aggregation tokens"""
    if state.shape[1] != sum(sizes):
        raise ValueError(f"fusion must hold {' + '.join(map(str, sizes))} tokens, got {state.shape[1]}")
    return state.split(sizes, dim=1)


def aggregate_mask(mask, aggregate):
    """Aggregation tokens that summarize nothing form no pairs: (B, N) -> (B, aggregation tokens)."""
    return None if mask is None else mask.any(1, keepdim=True).expand(-1, aggregate.shape[1])


def union_mask(*streams: tuple[Tensor, Tensor | None]) -> Tensor | None:
    """The mask over (tokens, mask) streams in a row, (B, sum of N); None where nothing is masked."""
    if all(mask is None for _, mask in streams):
        return None
    masks = [
        tokens.new_ones(tokens.shape[:2], dtype=torch.bool) if mask is None else mask
        for tokens, mask in streams
    ]
    return torch.cat(masks, dim=1)


def initialize_linear(module: nn.Module) -> None:
    """Xavier-uniform weights and zero biases, as in the masked autoencoders this follows."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            nn.init.xavier_uniform_(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


def check_streams(block, fusion, image, audio, image_mask, audio_mask):
    """Whether these are tokens and masks that a fusion block can take."""
    check_tokens("fusion", fusion, block.dim)
    for name, tokens, mask in ("image", image, image_mask), ("audio", audio, audio_mask):
        check_tokens(name, tokens, block.dim, like=fusion)
        check_mask(f"{name}_mask", mask, tokens.shape[:2], tokens.device)
    weight = next(block.parameters())
    check_dtype("fusion", fusion, weight)
    check_dtype("image", image, weight)
    check_dtype("audio", audio, weight)
