"""Transformer blocks and cross-attention written out by hand for one clip, without batch and masks: what is
hidden is left out.
"""

import torch
from torch.nn.functional import linear


def attention(query, key, value):
    """(H, N, K), (H, M, K), (H, M, V) -> (N, H * V)"""
    logits = torch.einsum("hnk,hmk->hnm", query, key) * query.shape[-1] ** -0.5
    weights = logits.exp() / logits.exp().sum(-1, keepdim=True)
    return torch.einsum("hnm,hmv->hnv", weights, value).permute(1, 0, 2).flatten(1)


def split(tokens, heads):
    return tokens.unflatten(-1, (heads, -1)).permute(1, 0, 2)


def heads_of(attn, tokens):
    query, key, value = (split(part, attn.num_heads) for part in attn.qkv(tokens).chunk(3, -1))
    return attn.q_norm(query), attn.k_norm(key), value


def rest_of(block, tokens, attended):
    attn = block.attn
    tokens = tokens + block.ls1(attn.proj(attn.norm(attended)))
    return tokens + block.ls2(block.mlp(block.norm2(tokens)))


def run_block(block, tokens, seen, others=()):
    """Tokens (N, D) that attend to those of them that are `seen` (N,), and to `others`: heads that are."""
    query, key, value = heads_of(block.attn, block.norm1(tokens))
    if not seen.any() and not any(other[1].shape[1] for other in others):
        seen = torch.ones_like(seen)
    keys, values = [key[:, seen]], [value[:, seen]]
    for _, other_key, other_value in others:
        keys, values = [*keys, other_key], [*values, other_value]
    return rest_of(block, tokens, attention(query, torch.cat(keys, 1), torch.cat(values, 1)))


def cross_attended(cross, tokens, context):
    """`context` (M, D): the patch tokens that are seen."""
    if not len(context):
        return tokens
    query = split(cross.query(cross.norm(tokens)), cross.num_heads)
    context = cross.norm_context(context)
    weights, biases = cross.key_value.weight.chunk(2), cross.key_value.bias.chunk(2)
    key, value = (
        split(linear(context, *part), cross.num_heads) for part in zip(weights, biases, strict=True)
    )
    return tokens + cross.proj(attention(query, key, value))
