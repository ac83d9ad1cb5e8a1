"""Blocks made for inference: the same outputs from fewer bytes and fewer launches.

In every layer, of the tokens x of a branch and the fusion tokens f that they attend to:

    z = standardized [f; x]                             one pass, with the residual sum of the layer before
    q, k, v, pair keys, pair values = product of z      one product for both blocks of the layer
    x = x + proj(attention(q, k, v));  x = x + mlp(standardized x)

The weight w and the bias b of a norm are taken up by the product behind it, W (w z + b) + c = (W w) z + (W b
+ c). Norms of the same tokens are then one norm, and products of that norm are one product.
"""

import copy

import torch
import torch.nn.functional as F
from timm.layers import Mlp
from timm.models.vision_transformer import Block, LayerScale
from torch import Tensor, nn

from .checks import has_hooks, is_plain
from .fusion import DenseFusion, Stream
from .ops.residual_norm import is_layer_norm, residual_norm
from .vit import DROPPING, Heads, check_blocks, split_heads

# Parts of a block that a folded one does not call, and what they have to be.
PARTS = (
    (is_layer_norm, ("norm1", "norm2")),
    (is_plain, ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")),
    (lambda part: type(part) in (nn.Identity, LayerScale), ("ls1", "ls2")),
    (
        lambda part: type(part) in DROPPING,
        ("drop_path1", "drop_path2", "attn.proj_drop", "mlp.drop1", "mlp.drop2"),
    ),
)


class FoldedBlock(nn.Module):
    """A transformer's block, of which the parts are called and not the whole. Its first product also gives
    what `dense`, if there is one, pairs of its tokens.

    Args:
        block: one of timm.
        dense: the fusion block of the layer, and the name of its side, "image" or "audio".
    """

    def __init__(self, block: Block, dense: DenseFusion | None, side: str):
        super().__init__()
        attn, mlp = block.attn, block.mlp
        self.num_heads, self.attn_dim = attn.num_heads, attn.attn_dim
        self.eps, self.mlp_eps = block.norm1.eps, block.norm2.eps
        products = [folded(block.norm1, attn.qkv)]
        if dense is not None:
            products.append(folded(getattr(dense, f"norm_{side}"), getattr(dense, f"{side}_key_value")))
        self.input = stacked(products)
        self.q_norm, self.k_norm, self.norm = attn.q_norm, attn.k_norm, attn.norm
        self.proj = scaled(attn.proj, block.ls1)
        self.fc1, self.act = folded(block.norm2, mlp.fc1), mlp.act
        self.mlp_norm, self.fc2 = mlp.norm, scaled(mlp.fc2, block.ls2)

    def refuse_hooks(self, *args, **options):
        raise ValueError(
            "blocks of a fused encoder run no hooks: give them to the blocks of the encoder itself"
        )

    register_forward_hook = register_forward_pre_hook = refuse_hooks
    register_full_backward_hook = register_full_backward_pre_hook = register_backward_hook = refuse_hooks

    def project(self, tokens: Tensor, update: Tensor | None, context: Tensor | None) -> tuple[Tensor, Tensor]:
        """Tokens (B, N, D) with their update; queries, keys and values, and what is paired, of context and
        tokens: (B, F + N, 3 D + pair widths).
        """
        tokens, norm = residual_norm(tokens, update, context, eps=self.eps)
        return tokens, self.input(norm)

    def heads(self, projected: Tensor, count: int) -> Heads:
        """Queries of the last `count` tokens, as the context is not updated here; keys and values of all."""
        query, key, value = split_heads(projected[..., : 3 * self.attn_dim], 3, self.num_heads)
        return Heads(self.q_norm(query[:, :, -count:]), self.k_norm(key), value)

    def update(self, tokens: Tensor, heads: Heads, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Tokens after attention, and what the MLP adds to them."""
        attended = F.scaled_dot_product_attention(*heads, attn_mask=mask)
        attended = self.proj(self.norm(attended.transpose(1, 2).flatten(2)))
        tokens, norm = residual_norm(tokens, attended, eps=self.mlp_eps)
        return tokens, self.fc2(self.mlp_norm(self.act(self.fc1(norm))))


class FoldedDense(nn.Module):
    """A `DenseFusion` whose keys and values come with the products of the branches' blocks."""

    def __init__(self, block: DenseFusion):
        super().__init__()
        self.block = block = copy.deepcopy(block)  # its parts may be those of other layers, too
        self.eps, self.mlp_eps = block.norm_fusion.eps, block.norm_mlp.eps
        block.query = folded(block.norm_fusion, block.query)
        block.mlp.fc1 = folded(block.norm_mlp, block.mlp.fc1)
        block.norm_fusion = block.norm_mlp = nn.Identity()
        for side in "image", "audio":  # they are in the blocks of the branches now
            delattr(block, f"norm_{side}")
            delattr(block, f"{side}_key_value")

    def forward(
        self, fusion: Tensor, norm: Tensor, paired: tuple[Tensor, Tensor], image: Stream, audio: Stream
    ) -> tuple[Tensor, Tensor]:
        """Fusion tokens after attention, and what the MLP adds to them."""
        block = self.block
        query = block.split_heads(block.query(norm))
        attended = block.attend_projected(query, paired, image, audio)
        fusion, norm = residual_norm(fusion, block.proj(attended), eps=self.mlp_eps)
        return fusion, block.mlp(norm)

    def paired(
        self, projected: tuple[Tensor | None, Tensor | None], streams: tuple[Stream, Stream]
    ) -> list[Tensor]:
        """Keys and values side by side of the tokens of both modalities, from what `FoldedBlock.project`
        gave, of frames (B * T, F + n, ...); for a missing one, of a token that is masked.
        """
        width, there = 2 * self.block.width, next(x for x in projected if x is not None)
        paired = []
        for x, (tokens, *_) in zip(projected, streams, strict=True):
            B, N, _ = tokens.shape
            count = N if x is None or B == 0 else B * N // x.shape[0]  # of a frame
            own = there.new_zeros(B, N, width) if x is None else x[:, -count:, -width:]
            paired.append(own.reshape(B, N, width))
        return paired


# --- weights ------------------------------------------------------------------------------------------------


@torch.no_grad()
def folded(norm: nn.LayerNorm, linear: nn.Linear) -> nn.Linear:
    """`linear` behind `norm`, as a product of what is standardized only."""
    weight, bias = wide(linear.weight), wide(linear.bias)
    if norm.bias is not None:
        bias = weight @ wide(norm.bias) + (0.0 if bias is None else bias)
    if norm.weight is not None:
        weight = weight * wide(norm.weight)
    return made_linear(weight, bias, like=linear.weight)


@torch.no_grad()
def scaled(linear: nn.Linear, layer_scale: nn.Module) -> nn.Linear:
    """`linear` in front of a LayerScale, or of nothing."""
    gamma = getattr(layer_scale, "gamma", None)
    if gamma is None:
        return linear
    bias = None if linear.bias is None else wide(gamma) * wide(linear.bias)
    return made_linear(wide(gamma)[:, None] * wide(linear.weight), bias, like=linear.weight)


@torch.no_grad()
def stacked(linears: list[nn.Linear]) -> nn.Linear:
    """One product for several of the same input."""
    weight = torch.cat([linear.weight for linear in linears])
    biases = (x.weight.new_zeros(x.out_features) if x.bias is None else x.bias for x in linears)
    return made_linear(weight, torch.cat(list(biases)), like=weight)


def wide(tensor: Tensor | None) -> Tensor | None:
    """In float32 or better: folded weights are rounded once."""
    return None if tensor is None else tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def made_linear(weight: Tensor, bias: Tensor | None, like: Tensor) -> nn.Linear:
    linear = nn.Linear(*weight.shape[::-1], bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight.to(like.dtype), requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias.to(like.dtype), requires_grad=False)
    return linear


# --- what can be folded -------------------------------------------------------------------------------------


def check_foldable(encoder: nn.Module) -> None:
    """Folding would lose what hooks, adapters and quantized weights do, and knows one kind of norm."""
    refuse_hooks(encoder, "a fused encoder")
    for vit in "image", "audio":
        check_blocks(vit, getattr(encoder, vit))
        for index, block in enumerate(getattr(encoder, vit).blocks):
            for is_foldable, names in PARTS:
                for name in names:
                    part = block.get_submodule(name)
                    if not is_foldable(part):
                        raise ValueError(
                            f"{vit}.blocks[{index}].{name} is a {type(part).__name__} that cannot be folded:"
                            " only plain LayerNorm and Linear can, and what timm has around them"
                        )


def refuse_hooks(encoder: nn.Module, whose: str) -> None:
    """Raises ValueError where a part has hooks, which `whose` parts would not run."""
    for name, module in encoder.named_modules():
        if has_hooks(module):
            raise ValueError(f"{name or 'the encoder'} has hooks, which {whose} would not run")


def shares_norms(dense: nn.Module | None, image: Block, audio: Block) -> bool:
    """Whether a fusion block can be folded, and standardizes its tokens as the blocks of its layer do."""
    if type(dense) is not DenseFusion:
        return False
    norms = dense.norm_image, dense.norm_audio, dense.norm_fusion, dense.norm_mlp
    if type(dense.mlp) is not Mlp or not {type(dense.drop), type(dense.drop_path)} <= {*DROPPING}:
        return False
    linears = dense.image_key_value, dense.audio_key_value, dense.query, dense.mlp.fc1
    return (
        all(map(is_layer_norm, norms))
        and all(map(is_plain, linears))
        and (dense.norm_image.eps, dense.norm_audio.eps) == (image.norm1.eps, audio.norm1.eps)
    )
