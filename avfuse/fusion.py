"""Fusion blocks: fusion tokens read image and audio tokens, in three ways that share one call.

    block(fusion, image, audio) -> fusion            (B, F, D), (B, I, D), (B, A, D) -> (B, F, D)

`DenseFusion` attends to every pair of an image and an audio token (paper Eq. 4-8), `FactorizedFusion` to the
pairs of a few aggregation tokens (Eq. 9-13), `TokenFusion` to the tokens themselves (Sec. 3.1). All are
pre-norm residual blocks: z = x + proj(attention(norm x, norm image, norm audio)), out = z + mlp(norm z).
`CrossFusion` needs no fusion tokens. `VARIANTS`, at the end, names the ways to fuse that an encoder offers.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

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
    check_tensor,
    check_tokens,
    is_number,
)
from .ops.pair_attention import (
    PAIRS,
    Side,
    attend_pairs,
    masked_attention,
    masked_attention_weights,
    pair_weights,
)
from .ops.residual_norm import normed, sum_and_norm
from .vit import split_heads

NORM_EPS = 1e-5
STATE = ("fusion_tokens", "image_aggregation_tokens", "audio_aggregation_tokens")  # of FactorizedFusion


class Stream(NamedTuple):
    """The tokens of one modality, as a fusion block reads them."""

    tokens: Tensor  # (B, N, D)
    mask: Tensor | None = None  # (B, N) bool, True = attend
    positions: Tensor | None = None  # (B, N) long, which tokens they are; None = all, in order
    times: Tensor | None = None  # seconds, (S,) or (B, S), of S equal parts of the tokens in a row


class Fusion(nn.Module):
    """The call that all fusion blocks share: check, attend, update.

    A block defines `attend` and `update`, or `fuse` as a whole, and `weights` if it can show them.
    """

    dim: int  # width of the fusion tokens
    image_dim: int  # and of those it reads
    audio_dim: int
    num_heads: int
    norm_weight: Tensor  # stands for all parameters in `check`, which every layer pays for

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
        image_times: Tensor | None = None,
        audio_times: Tensor | None = None,
    ) -> Tensor:
        """Fusion tokens (B, F, D) that have read image (B, I, D) and audio tokens (B, A, D).

        Masks (B, N) bool, True = attend; what they hide must be finite, too. Positions (B, N) long say which
        tokens are left after masking; None = all, in order. Times in seconds, (S,) or (B, S) of image and
        (T,) or (B, T) of audio tokens, are those of S and T equal parts of the tokens, one after the other,
        such as frames. Positions only matter to a pair bias, times to a time bias.
        """
        image = Stream(image, image_mask, image_positions, image_times)
        audio = Stream(audio, audio_mask, audio_positions, audio_times)
        self.check(fusion, image, audio)
        return self.fuse(fusion, image, audio)

    def fuse(self, fusion: Tensor, *streams: Stream) -> Tensor:
        """The call on what has been checked."""
        return self.update(fusion, self.attend(fusion, *streams))

    @torch.no_grad()
    def attention_weights(
        self,
        fusion: Tensor,
        image: Tensor,
        audio: Tensor,
        *,
        image_mask: Tensor | None = None,
        audio_mask: Tensor | None = None,
        image_positions: Tensor | None = None,
        audio_positions: Tensor | None = None,
        image_times: Tensor | None = None,
        audio_times: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """What the fusion tokens attend to: image weights (B, H, F, I) and audio weights (B, H, F, A)."""
        image = Stream(image, image_mask, image_positions, image_times)
        audio = Stream(audio, audio_mask, audio_positions, audio_times)
        self.check(fusion, image, audio)
        return self.weights(fusion, image, audio)

    def check(self, fusion: Tensor, image: Stream, audio: Stream) -> None:
        """ValueError for what does not fit this block or one another."""
        check_tokens("fusion", fusion, self.dim)
        check_dtype("fusion", fusion, self.norm_weight)
        for name, dim, (tokens, mask, *_) in (
            ("image", self.image_dim, image),
            ("audio", self.audio_dim, audio),
        ):
            check_tokens(name, tokens, dim, like=fusion)
            check_mask(f"{name}_mask", mask, tokens.shape[:2], tokens.device)
            check_dtype(name, tokens, self.norm_weight)

    def split_heads(self, tokens: Tensor) -> Tensor:
        """(B, N, H * K) -> (B, H, N, K)"""
        return tokens.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    def merge_heads(self, tokens: Tensor) -> Tensor:
        """(B, H, N, V) -> (B, N, H * V)"""
        return tokens.transpose(1, 2).flatten(2)


class FusionBlock(Fusion):
    """A fusion block of one attention: queries from the fusion tokens, and the residual update from what they
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
        norm_eps: of all norms of the block.

    Raises:
        ValueError: naming the argument, when the widths do not divide or a rate is not in [0, 1).
    """

    def __init__(
        self, dim, num_heads, *, attn_ratio=0.25, mlp_ratio=1.0, drop=0.0, drop_path=0.0, norm_eps=NORM_EPS
    ):
        super().__init__()
        self.dim, self.num_heads, self.width = dim, num_heads, attention_width(dim, num_heads, attn_ratio)
        self.image_dim = self.audio_dim = dim
        check_positive("mlp_ratio", mlp_ratio)
        if int(dim * mlp_ratio) < 1:
            raise ValueError(f"mlp_ratio={mlp_ratio} leaves the MLP without hidden channels")
        check_rate("drop", drop)
        check_rate("drop_path", drop_path)
        check_positive("norm_eps", norm_eps)
        self.norm_eps = norm_eps
        self.norm_fusion = nn.LayerNorm(dim, eps=norm_eps)
        self.query = nn.Linear(dim, self.width)
        self.proj = nn.Linear(self.width, dim)
        self.drop = nn.Dropout(drop)
        self.norm_mlp = nn.LayerNorm(dim, eps=norm_eps)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop=drop)
        self.drop_path = DropPath(drop_path)

    @property
    def norm_weight(self) -> Tensor:
        return self.norm_fusion.weight  # the linear layers may be quantized

    def queries(self, fusion: Tensor) -> Tensor:
        """(B, F, D) -> (B, H, F, K)"""
        return self.split_heads(self.query(normed(self.norm_fusion, fusion)))

    def keys_and_values(self, projected: Tensor) -> tuple[Tensor, Tensor]:
        """(B, N, 2 * width) -> keys (B, H, N, K), values (B, H, N, V)"""
        return split_heads(projected, 2, self.num_heads)

    def update(self, fusion: Tensor, attended: Tensor) -> Tensor:
        """Residual update of (B, F, D) from attended values (B, F, width)."""
        update = self.drop_path(self.drop(self.proj(attended)))
        fusion, norm = sum_and_norm(self.norm_mlp, fusion, update)
        return fusion + self.drop_path(self.mlp(norm))


class DenseFusion(FusionBlock):
    """Fusion by exact dense interactions: attention over all I x A pairs at the cost of I + A (paper Eq.
    4-8).

    Keys and values of a pair are sums of a linear map of its image token and one of its audio token (Eq. 4
    folded into the key and value projections); a key bias would cancel in the softmax, and the value bias of
    a pair is added once, after the sum. With `interaction="bilinear"` they are products, and each side keeps
    its bias, so that bilinear pairs can fall back to additive ones.

    Args:
        dim, num_heads, attn_ratio, mlp_ratio, drop, drop_path, norm_eps: see `FusionBlock`.
        image_dim, audio_dim: widths of the image and audio tokens; default `dim`.
        interaction: "additive" (the paper) or "bilinear".
        pair_bias: None, or the numbers of image and audio tokens: a learned table (num_heads, I, A) over
            positions, zero at first, is then added to the logits of the pairs. Where tokens were dropped, its
            part for the tokens that are left is gathered: (B, num_heads, I, A) numbers. Of several frames one
            after the other, each has the image positions of the table.
        time_bias: None, or the reach in seconds and the number of knots of a `TimeBias`, which is added to
            the logits instead: then the call needs the times of the tokens.

    Raises:
        ValueError: naming the argument that is wrong.
    """

    def __init__(
        self,
        dim,
        num_heads,
        *,
        image_dim=None,
        audio_dim=None,
        interaction="additive",
        pair_bias=None,
        time_bias=None,
        **block_options,
    ):
        super().__init__(dim, num_heads, **block_options)
        self.image_dim, self.audio_dim = token_dims(dim, image_dim, audio_dim)
        check_choice("interaction", interaction, tuple(PAIRS))
        if pair_bias is not None:
            is_pair = isinstance(pair_bias, (tuple, list)) and len(pair_bias) == 2
            if not is_pair or not all(type(count) is int and count > 0 for count in pair_bias):
                raise ValueError(
                    f"pair_bias must be None or the counts of image and audio tokens, got {pair_bias!r}"
                )
        if pair_bias is not None and time_bias is not None:
            raise ValueError("pair_bias and time_bias exclude one another")
        if time_bias is not None and not (isinstance(time_bias, (tuple, list)) and len(time_bias) == 2):
            raise ValueError(f"time_bias must be None or (reach in seconds, knots), got {time_bias!r}")
        self.interaction = interaction
        bilinear = interaction == "bilinear"
        self.norm_image = nn.LayerNorm(self.image_dim, eps=self.norm_eps)
        self.norm_audio = nn.LayerNorm(self.audio_dim, eps=self.norm_eps)
        self.image_key_value = nn.Linear(self.image_dim, 2 * self.width, bias=bilinear)
        self.audio_key_value = nn.Linear(self.audio_dim, 2 * self.width, bias=bilinear)
        self.value_bias = None if bilinear else nn.Parameter(torch.zeros(self.width))
        self.pair_bias = None if pair_bias is None else nn.Parameter(torch.zeros(num_heads, *pair_bias))
        self.time_bias = None if time_bias is None else TimeBias(num_heads, *time_bias)
        initialize_linear(self)

    def attend(self, fusion: Tensor, image: Stream, audio: Stream) -> Tensor:
        """What the fusion tokens read from all pairs, (B, F, width)."""
        return self.attend_projected(self.queries(fusion), self.projected(image, audio), image, audio)

    def attend_projected(
        self, query: Tensor, projected: tuple[Tensor, Tensor], image: Stream, audio: Stream
    ) -> Tensor:
        """What queries (B, H, F, K) attend to, (B, F, width)."""
        sides, bias = self.sides(projected, image, audio), self.bias(image, audio)
        attended = self.merge_heads(attend_pairs(query, *sides, bias, interaction=self.interaction))
        if self.value_bias is None:
            return attended
        return attended + value_bias_of_pairs(self.value_bias, image.mask, audio.mask)

    def weights(self, fusion: Tensor, image: Stream, audio: Stream) -> tuple[Tensor, Tensor]:
        """The marginals of the weights of pairs, (B, H, F, I) and (B, H, F, A)."""
        sides, bias = self.sides(self.projected(image, audio), image, audio), self.bias(image, audio)
        return pair_weights(self.queries(fusion), *sides, bias, interaction=self.interaction)

    def projected(self, image: Stream, audio: Stream) -> tuple[Tensor, Tensor]:
        """Keys and values side by side, (B, I, 2 * width) and (B, A, 2 * width)."""
        return (
            self.image_key_value(normed(self.norm_image, image.tokens)),
            self.audio_key_value(normed(self.norm_audio, audio.tokens)),
        )

    def sides(self, projected: tuple[Tensor, Tensor], image: Stream, audio: Stream) -> tuple[Side, Side]:
        """Keys and values of both modalities."""
        image_projected, audio_projected = projected
        return (
            Side(*self.keys_and_values(image_projected), image.mask),
            Side(*self.keys_and_values(audio_projected), audio.mask),
        )

    def bias(self, image: Stream, audio: Stream) -> Tensor | None:
        """What is added to the logits of the pairs: an entry for each pair, or for the pairs of two parts."""
        if self.time_bias is not None:
            return self.time_bias(image.times, audio.times)
        return None if self.pair_bias is None else self.positioned_bias(image, audio)

    def positioned_bias(self, image: Stream, audio: Stream) -> Tensor:
        """The table at the positions of the tokens: (1, H, I, A), or (B, H, I, A) where some were dropped."""
        if image.positions is None and audio.positions is None:
            frames = image.tokens.shape[1] // self.pair_bias.shape[1]
            return self.pair_bias[None].repeat(1, 1, frames, 1) if frames > 1 else self.pair_bias[None]
        rows, columns = (
            torch.arange(tokens.shape[1], device=tokens.device)[None] % size
            if positions is None
            else positions
            for (tokens, _, positions, _), size in zip((image, audio), self.pair_bias.shape[1:], strict=True)
        )
        table = self.pair_bias[:, rows[:, :, None], columns[:, None]]  # (H, B, I, A)
        return table.transpose(0, 1)

    def check(self, fusion: Tensor, image: Stream, audio: Stream) -> None:
        super().check(fusion, image, audio)
        if self.pair_bias is not None:
            frames = max(1, image.tokens.shape[1] // self.pair_bias.shape[1])
            check_positions("image_positions", image, self.pair_bias.shape[1], frames)
            check_positions("audio_positions", audio, self.pair_bias.shape[2])
        if self.time_bias is not None:
            check_times("image_times", image)
            check_times("audio_times", audio)


class TimeBias(nn.Module):
    """A learned function of the time of a frame minus the time of a sound, for each head: linear between its
    knots, constant beyond them, zero at first. Pairs of a dense block then find what happens together, and
    sooner after `favour_together`: from zero, the bias, what is bright and what is loud are of no use without
    one another, and training waits for all three.

    Args:
        num_heads: attention heads.
        reach: the knots lie evenly from -reach to +reach, in seconds.
        knots: how many; one lies at 0 if they are odd.

    Raises:
        ValueError: a reach that is not positive, or fewer than two knots.
    """

    def __init__(self, num_heads: int, reach: float, knots: int):
        super().__init__()
        check_positive("reach", reach)
        if type(knots) is not int or knots < 2:
            raise ValueError(f"knots must be an integer of 2 or more, got {knots!r}")
        self.reach = reach
        self.table = nn.Parameter(torch.zeros(num_heads, knots))

    def favour_together(self, height: float, width: float) -> None:
        """Adds a triangle to the table: `height` logits at no time difference, 0 at the knots from `width`
        seconds on; no narrower than the knots allow.

        Raises:
            ValueError: a height that is no number, or a width that is not positive.
        """
        if not is_number(height):
            raise ValueError(f"height must be a number of logits, got {height!r}")
        check_positive("width", width)
        knots = torch.linspace(-self.reach, self.reach, self.table.shape[1], device=self.table.device)
        width = max(width, 2 * self.reach / (len(knots) - 1))
        with torch.no_grad():
            self.table += height * (1 - knots.abs() / width).clamp(min=0)

    def forward(self, image_times: Tensor, audio_times: Tensor) -> Tensor:
        """Seconds (S,) or (B, S) and (T,) or (B, T) -> (1 or B, H, S, T)"""
        last = self.table.shape[1] - 1
        apart = image_times[..., :, None] - audio_times[..., None, :]
        place = ((apart / self.reach + 1) * (last / 2)).clamp(0, last)  # in knots
        left = place.long().clamp(0, last - 1)  # NaN would be a place outside
        bias = self.table[:, left].lerp(self.table[:, left + 1], (place - left).to(self.table.dtype))
        return bias[None] if bias.ndim == 3 else bias.transpose(0, 1)


class FactorizedFusion(Fusion):
    """Fusion by factorized interactions: pairs of a few aggregation tokens instead of all pairs (paper Eq.
    9-13).

    The image aggregation tokens read the image and the audio aggregation tokens the sound, each by a
    cross-attention block with its own norms and MLP; a `DenseFusion` then forms the pairs from their
    normalised outputs.

    Args:
        dim, num_heads, attn_ratio, mlp_ratio, drop, drop_path, norm_eps: see `FusionBlock`.
        image_dim, audio_dim: widths of the image and audio tokens; default `dim`.
        fusion_tokens, image_aggregation_tokens, audio_aggregation_tokens: how the state is divided (default
            16, 8, 8).

    Call: as `Fusion`, but takes and returns (B, fusion + image aggregation + audio aggregation tokens, D), in
    that order.

    Raises:
        ValueError: naming the argument that is wrong.
    """

    def __init__(
        self,
        dim,
        num_heads,
        *,
        image_dim=None,
        audio_dim=None,
        fusion_tokens=16,
        image_aggregation_tokens=8,
        audio_aggregation_tokens=8,
        **block_options,
    ):
        super().__init__()
        self.dim = dim
        self.image_dim, self.audio_dim = token_dims(dim, image_dim, audio_dim)
        self.split_sizes = [fusion_tokens, image_aggregation_tokens, audio_aggregation_tokens]
        for name, count in zip(STATE, self.split_sizes, strict=True):
            check_count(name, count)
        self.image_aggregation = Aggregation(dim, num_heads, self.image_dim, **block_options)
        self.audio_aggregation = Aggregation(dim, num_heads, self.audio_dim, **block_options)
        self.fusion = DenseFusion(dim, num_heads, **block_options)

    @property
    def norm_weight(self) -> Tensor:
        return self.fusion.norm_weight

    def fuse(self, state: Tensor, image: Stream, audio: Stream) -> Tensor:
        fusion, image, audio = self.summarize(state, image, audio)
        fusion = self.fusion(fusion, image.tokens, audio.tokens, image_mask=image.mask, audio_mask=audio.mask)
        return torch.cat([fusion, image.tokens, audio.tokens], dim=1)

    def weights(self, state: Tensor, image: Stream, audio: Stream) -> tuple[Tensor, Tensor]:
        """Each weight goes through the aggregation tokens, so it is the product of two attention maps."""
        _, image_aggregate, audio_aggregate = split_state(state, self.split_sizes)
        image_weights, audio_weights = self.fusion.weights(*self.summarize(state, image, audio))
        image_weights = image_weights @ self.image_aggregation.weights(image_aggregate, image)
        return image_weights, audio_weights @ self.audio_aggregation.weights(audio_aggregate, audio)

    def summarize(self, state: Tensor, image: Stream, audio: Stream) -> tuple[Tensor, Stream, Stream]:
        """The fusion tokens, and the updated aggregation tokens, of which pairs form."""
        fusion, image_aggregate, audio_aggregate = split_state(state, self.split_sizes)
        image_aggregate = self.image_aggregation(image_aggregate, image.tokens, image.mask)
        audio_aggregate = self.audio_aggregation(audio_aggregate, audio.tokens, audio.mask)
        return fusion, summary(image_aggregate, image), summary(audio_aggregate, audio)


class Aggregation(FusionBlock):
    """Cross-attention: a few aggregation tokens summarize the tokens of one modality (paper Eq. 9-10)."""

    def __init__(self, dim, num_heads, token_dim, **block_options):
        super().__init__(dim, num_heads, **block_options)
        self.norm_tokens = nn.LayerNorm(token_dim, eps=self.norm_eps)
        self.key_value = nn.Linear(token_dim, 2 * self.width)
        initialize_linear(self)

    def forward(self, aggregate: Tensor, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.fuse(aggregate, Stream(tokens, mask))

    def attend(self, aggregate: Tensor, stream: Stream) -> Tensor:
        key, value = self.keys_and_values(self.key_value(normed(self.norm_tokens, stream.tokens)))
        return self.merge_heads(masked_attention(self.queries(aggregate), key, value, stream.mask))

    def weights(self, aggregate: Tensor, stream: Stream) -> Tensor:
        key, _ = self.keys_and_values(self.key_value(normed(self.norm_tokens, stream.tokens)))
        return masked_attention_weights(self.queries(aggregate), key, stream.mask)


class TokenFusion(FusionBlock):
    """Fusion by tokens, the ablation without pairs (paper Sec. 3.1, like MBT): one softmax over the union of
    fusion, image and audio tokens, so that the modalities compete for attention.

    Args:
        dim, num_heads, attn_ratio, mlp_ratio, drop, drop_path, norm_eps: see `FusionBlock`.

    Raises:
        ValueError: naming the argument that is wrong.
    """

    def __init__(self, dim, num_heads, **block_options):
        super().__init__(dim, num_heads, **block_options)
        self.norm_image = nn.LayerNorm(dim, eps=self.norm_eps)
        self.norm_audio = nn.LayerNorm(dim, eps=self.norm_eps)
        self.key_value = nn.Linear(dim, 2 * self.width)
        initialize_linear(self)

    def attend(self, fusion: Tensor, image: Stream, audio: Stream) -> Tensor:
        """What the fusion tokens read from the tokens of all three, (B, F, width)."""
        query, key, value, mask = self.union(fusion, image, audio)
        return self.merge_heads(masked_attention(query, key, value, mask))

    def weights(self, fusion: Tensor, image: Stream, audio: Stream) -> tuple[Tensor, Tensor]:
        """The two parts of the one softmax: they do not sum to 1."""
        query, key, _, mask = self.union(fusion, image, audio)
        weights = masked_attention_weights(query, key, mask)
        return weights.split([stream.shape[1] for stream in (fusion, image.tokens, audio.tokens)], dim=-1)[1:]

    def union(self, fusion: Tensor, image: Stream, audio: Stream):
        """Queries of the fusion tokens; keys, values and mask of all tokens, (B, F + I + A, ...)."""
        norms = self.norm_fusion, self.norm_image, self.norm_audio
        norms = [normed(*each) for each in zip(norms, (fusion, image.tokens, audio.tokens), strict=True)]
        key, value = self.keys_and_values(self.key_value(torch.cat(norms, dim=1)))
        return self.split_heads(self.query(norms[0])), key, value, union_mask(Stream(fusion), image, audio)


class CrossFusion(nn.Module):
    """What is done without fusion tokens: image and audio tokens each attend to the other's patch tokens, as
    in the cross-modality layers of LXMERT (Tan and Bansal 2019), which attend across before they attend to
    themselves. The rest of such a layer is the transformers' own blocks, which follow.

    Args:
        dim: of the encoder's fusion tokens, which it does not read.
        num_heads, attn_ratio, drop, drop_path, norm_eps: see `CrossAttention`.
        image_dim, audio_dim: widths of the image and audio tokens; default `dim`.

    Raises:
        ValueError: naming the argument that is wrong.
    """

    def __init__(self, dim, num_heads, *, image_dim=None, audio_dim=None, **options):
        super().__init__()
        image_dim, audio_dim = token_dims(dim, image_dim, audio_dim)
        self.image = CrossAttention(image_dim, num_heads, audio_dim, **options)
        self.audio = CrossAttention(audio_dim, num_heads, image_dim, **options)

    def forward(
        self, image: Tensor, audio: Tensor, image_patches: Stream, audio_patches: Stream
    ) -> tuple[Tensor, Tensor]:
        """Tokens (B, N, D) of both, after each read the patches of the other."""
        return self.image(image, audio_patches), self.audio(audio, image_patches)


class CrossAttention(nn.Module):
    """x + proj(attention(norm x, norm context)); x, where all of the context is masked.

    Args:
        dim: width of the tokens.
        num_heads: attention heads.
        context_dim: width of the tokens that are read.
        attn_ratio: query, key and value widths are int(dim * attn_ratio) over all heads.
        drop, drop_path: dropout after the projection; stochastic depth rate.
        norm_eps: of both norms.
    """

    def __init__(
        self, dim, num_heads, context_dim, *, attn_ratio=0.25, drop=0.0, drop_path=0.0, norm_eps=NORM_EPS
    ):
        super().__init__()
        width = attention_width(dim, num_heads, attn_ratio)
        check_rate("drop", drop)
        check_rate("drop_path", drop_path)
        check_positive("norm_eps", norm_eps)
        self.num_heads = num_heads
        self.norm = nn.LayerNorm(dim, eps=norm_eps)
        self.norm_context = nn.LayerNorm(context_dim, eps=norm_eps)
        self.query = nn.Linear(dim, width)
        self.key_value = nn.Linear(context_dim, 2 * width)
        self.proj = nn.Linear(width, dim)
        self.drop = nn.Dropout(drop)
        self.drop_path = DropPath(drop_path)
        initialize_linear(self)

    def forward(self, tokens: Tensor, context: Stream) -> Tensor:
        query = self.query(normed(self.norm, tokens)).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        projected = self.key_value(normed(self.norm_context, context.tokens))
        attended = masked_attention(query, *split_heads(projected, 2, self.num_heads), context.mask)
        update = self.drop_path(self.drop(self.proj(attended.transpose(1, 2).flatten(2))))
        return tokens + (update if context.mask is None else update * context.mask.any(1)[:, None, None])


# --- what the blocks share ----------------------------------------------------------------------------------


def attention_width(dim: int, num_heads: int, attn_ratio: float) -> int:
    """Of queries, keys and values over all heads."""
    check_count("dim", dim)
    check_count("num_heads", num_heads)
    check_positive("attn_ratio", attn_ratio)
    width = int(dim * attn_ratio)
    if width < 1 or width % num_heads:
        raise ValueError(
            f"attn_ratio={attn_ratio} gives int(dim * attn_ratio) = {width} channels, "
            f"which num_heads={num_heads} does not divide"
        )
    return width


def token_dims(dim: int, *dims: int | None) -> tuple[int, int]:
    """Widths of image and audio tokens, `dim` where they are None."""
    for name, given in zip(("image_dim", "audio_dim"), dims, strict=True):
        if given is not None:
            check_count(name, given)
    return tuple(dim if given is None else given for given in dims)


def value_bias_of_pairs(value_bias: Tensor, image_mask: Tensor | None, audio_mask: Tensor | None) -> Tensor:
    """The value bias of each clip, (B, 1, width): 0 where both modalities are masked everywhere. Where one
    has no mask, no clip is without tokens, and it is (width,), as given.
    """
    if image_mask is None or audio_mask is None:
        return value_bias
    return value_bias * (image_mask.any(1) | audio_mask.any(1))[:, None, None]


def split_state(state: Tensor, sizes: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """(B, F + Ia + Aa, D) -> fusion, image aggregation and audio aggregation tokens"""
    if state.shape[1] != sum(sizes):
        raise ValueError(f"fusion must hold {' + '.join(map(str, sizes))} tokens, got {state.shape[1]}")
    return state.split(sizes, dim=1)


def summary(aggregate: Tensor, stream: Stream) -> Stream:
    """Aggregation tokens as a stream. Where they summarize nothing, all are masked: they form no pairs."""
    if stream.mask is None:
        return Stream(aggregate)
    return Stream(aggregate, stream.mask.any(1, keepdim=True).expand(-1, aggregate.shape[1]))


def union_mask(*streams: Stream) -> Tensor | None:
    """The mask over streams in a row, (B, sum of N); None where nothing is masked."""
    if all(stream.mask is None for stream in streams):
        return None
    masks = [
        tokens.new_ones(tokens.shape[:2], dtype=torch.bool) if mask is None else mask
        for tokens, mask, *_ in streams
    ]
    return torch.cat(masks, dim=1)


def initialize_linear(module: nn.Module) -> None:
    """Xavier-uniform weights and zero biases, as in the masked autoencoders this follows."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            nn.init.xavier_uniform_(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


def check_positions(name: str, stream: Stream, size: int, frames: int = 1) -> None:
    """Positions name a place in a table of `size` for each token; None where all are there, in each frame."""
    B, N, _ = stream.tokens.shape
    if stream.positions is None:
        if N != frames * size:
            raise ValueError(f"{name} is needed: the pair bias has {size} tokens, there are {N}")
        return
    check_indices(name, stream.positions, (B, N), size, stream.tokens.device)


def check_times(name: str, stream: Stream) -> None:
    """Times of equal parts of the tokens, the same for all clips or for each."""
    B, N, _ = stream.tokens.shape
    if stream.times is None:
        raise ValueError(f"{name} is needed: the time bias asks how far image and audio tokens are apart")
    check_tensor(name, stream.times, "floating point", device=stream.tokens.device)
    *lead, count = stream.times.shape or (0,)
    if (lead and lead != [B]) or not count or N % count:
        shape = tuple(stream.times.shape)
        raise ValueError(f"{name} must be (S,) or ({B}, S), where S divides the {N} tokens, got {shape}")


# --- the ways to fuse ---------------------------------------------------------------------------------------

SHARED = ("attn_ratio", "mlp_ratio", "drop", "drop_path", "norm_eps")
DIMS = ("image_dim", "audio_dim")
BIASES = ("pair_bias", "time_bias")


class Variant(NamedTuple):
    """A way to fuse: its block, and what that takes of the settings of an `AVEncoder`."""

    block: Callable[..., nn.Module] | None
    options: tuple[str, ...] = SHARED
    state: tuple[str, ...] = ("fusion_tokens",)  # the settings that count the tokens it takes and returns
    direct: bool = False  # image and audio tokens read one another, and fusion tokens stay what they are

    def make(self, dim: int, settings: dict) -> nn.Module:
        """A block for an encoder of this width."""
        return self.block(dim, settings["num_heads"], **{name: settings[name] for name in self.options})


VARIANTS = {
    "dense": Variant(DenseFusion, (*SHARED, *DIMS, *BIASES)),
    "bilinear": Variant(partial(DenseFusion, interaction="bilinear"), (*SHARED, *DIMS, *BIASES)),
    "factorized": Variant(FactorizedFusion, (*SHARED, *DIMS, *STATE), STATE),
    "token": Variant(TokenFusion),
    "joint": Variant(None, (), direct=True),
    "cross": Variant(CrossFusion, ("attn_ratio", "drop", "drop_path", "norm_eps", *DIMS), direct=True),
    "none": Variant(None),
}
