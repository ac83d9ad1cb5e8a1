"""Dense interactions as the paper writes them, with every pair in memory: what the exact rows are compared
with.

Good PyTorch throughout: broadcast sums instead of concatenated pairs, one projection for keys and values, and
`scaled_dot_product_attention` over the I x A pair tokens.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from avfuse import AVEncoder, DenseFusion
from avfuse.fusion import initialize_linear


class PairTokenFusion(DenseFusion):
    """Paper Eq. 4-7 as written: pair tokens x_ij = W_image x_i + W_audio x_j (B, I * A, D), attended to.

    `folded` turns its weights into those of a `DenseFusion` with the same outputs. No masks.
    """

    def __init__(self, dim, num_heads, **options):
        super().__init__(dim, num_heads, **options)
        del self.image_key_value, self.audio_key_value
        self.pair_image = nn.Linear(dim, dim, bias=False)  # W_image of Eq. 4
        self.pair_audio = nn.Linear(dim, dim, bias=False)
        self.pair_key_value = nn.Linear(dim, 2 * self.width, bias=False)
        initialize_linear(self)

    def attend(self, fusion, image, audio) -> Tensor:
        image_half = self.pair_image(self.norm_image(image.tokens))
        pairs = all_pairs(image_half, self.pair_audio(self.norm_audio(audio.tokens)))
        key, value = self.keys_and_values(self.pair_key_value(pairs))  # (B, H, I * A, K)
        return self.attend_stored(fusion, key, value, self.bias(image, audio))

    def attend_stored(self, fusion, key, value, bias):
        """What fusion tokens attended to over pairs, (B, F, width); bias None or (B or 1, H, I, A), of times
        (B or 1, H, S, A) with S dividing I.
        """
        if self.time_bias is not None:
            bias = bias.repeat_interleave(key.shape[2] // bias.shape[2] // bias.shape[3], 2)
        bias = None if bias is None else bias.flatten(2)[:, :, None]  # (B or 1, H, 1, I * A)
        if bias is not None and torch.is_autocast_enabled(key.device.type):
            bias = bias.to(key.dtype)
        attended = F.scaled_dot_product_attention(self.queries(fusion), key, value, attn_mask=bias)
        return self.merge_heads(attended) + self.value_bias


class PairKeyFusion(DenseFusion):
    """`DenseFusion` with keys k_i + k_j and values v_i + v_j of all pairs in memory.

    Half of the trick: it projects before it pairs, so its pairs are as narrow as keys, not as wide as tokens.
    """

    attend_stored = PairTokenFusion.attend_stored

    def attend(self, fusion, image, audio) -> Tensor:
        image_key_value = self.image_key_value(self.norm_image(image.tokens))
        key_value = all_pairs(image_key_value, self.audio_key_value(self.norm_audio(audio.tokens)))
        key, value = self.keys_and_values(key_value)
        return self.attend_stored(fusion, key, value, self.bias(image, audio))


def all_pairs(image: Tensor, audio: Tensor) -> Tensor:
    """Sums of every image token with every audio token: (B, I, D), (B, A, D) -> (B, I * A, D)"""
    return (image[:, :, None] + audio[:, None]).flatten(1, 2)


def with_blocks(encoder: AVEncoder, kind: type[DenseFusion]) -> AVEncoder:
    """The same encoder with a fresh `kind` in place of every `DenseFusion`, also of those inside other
    blocks.
    """
    for parent in list(encoder.modules()):
        for name, block in list(parent.named_children()):
            if type(block) is DenseFusion:
                setattr(parent, name, like(block, kind))
    return encoder


def like(block: DenseFusion, kind: type[DenseFusion]) -> DenseFusion:
    """A fresh block of another kind and the same sizes."""
    pair_bias = None if block.pair_bias is None else tuple(block.pair_bias.shape[1:])
    bias = block.time_bias
    time_bias = None if bias is None else (bias.reach, bias.table.shape[1])
    ratios = dict(attn_ratio=block.width / block.dim, mlp_ratio=block.mlp.fc1.out_features / block.dim)
    biases = dict(pair_bias=pair_bias, time_bias=time_bias)
    return kind(block.dim, block.num_heads, norm_eps=block.norm_eps, **biases, **ratios)


def folded(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state of a model with `PairTokenFusion`s as that of the same model with `DenseFusion`s: Eq. 4 is
    linear, so it folds into the key and value projections.
    """
    state = dict(state)
    for name in [name for name in state if name.endswith("pair_key_value.weight")]:
        block, key_value = name.removesuffix("pair_key_value.weight"), state.pop(name)
        for side in ("image", "audio"):
            state[f"{block}{side}_key_value.weight"] = key_value @ state.pop(f"{block}pair_{side}.weight")
    return state
