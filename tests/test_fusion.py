"""Fusion blocks against the paper's equations written out clip by clip: every pair formed, one plain softmax,
masked tokens dropped. Output and every gradient, in float64.
"""

import math

import pytest
import torch
from models import gradients, randomized, relative_error

from avfuse import DenseFusion, FactorizedFusion, TokenFusion
from avfuse.fusion import VARIANTS, Aggregation

B, F, I, A, D, H = 4, 5, 7, 6, 24, 3
EXACT = 1e-11  # float64 rounding through one block, relative to the largest value


# --- the truth: one clip at a time, (tokens, D) -------------------------------------------------------------


def norm(tokens, layer):
    centred = tokens - tokens.mean(-1, keepdim=True)
    variance = centred.square().mean(-1, keepdim=True)
    return centred / (variance + 1e-5).sqrt() * layer.weight + layer.bias


def linear(tokens, layer):
    return tokens @ layer.weight.T + (0 if layer.bias is None else layer.bias)


def residuals(block, tokens, attended):
    tokens = tokens + linear(attended, block.proj)
    hidden = linear(norm(tokens, block.norm_mlp), block.mlp.fc1)
    hidden = hidden * (1 + torch.erf(hidden / math.sqrt(2))) / 2  # GELU
    return tokens + linear(hidden, block.mlp.fc2)


def attention_maps(queries, keys, bias=None):
    """Plain softmax of (F, W) queries over (N, W) keys, head by head: (H, F, N)"""
    width, maps = queries.shape[-1] // H, []
    for h in range(H):
        part = slice(h * width, (h + 1) * width)
        logits = queries[:, part] @ keys[:, part].T / math.sqrt(width)
        logits = logits if bias is None else logits + bias[h].flatten()
        weights = (logits - logits.max()).exp()
        maps.append(weights / weights.sum(-1, keepdim=True))
    return torch.stack(maps)


def attend(queries, keys, values, bias=None):
    maps = attention_maps(queries, keys, bias)
    return torch.cat([weights @ part for weights, part in zip(maps, values.chunk(H, -1), strict=True)], -1)


def direct_pairs(block, fusion, image, audio, bias=None):
    """Eq. 4-8: the token of a pair is W_image x_i + W_audio x_j (or the product); all are formed."""
    queries = linear(norm(fusion, block.norm_fusion), block.query)
    image = linear(norm(image, block.norm_image), block.image_key_value)
    audio = linear(norm(audio, block.norm_audio), block.audio_key_value)
    if block.interaction == "bilinear":
        pairs = (image[:, None] * audio[None]).flatten(0, 1)
    elif len(image) and len(audio):
        pairs = (image[:, None] + audio[None]).flatten(0, 1)
    else:  # a missing modality takes its bias with it, and the other goes on alone
        pairs, bias = torch.cat([image, audio]), None
    keys, values = pairs.chunk(2, -1)
    if not len(pairs):
        attended = torch.zeros_like(queries)
    else:
        attended = attend(queries, keys, values, bias)
        attended = attended + (0 if block.value_bias is None else block.value_bias)
    return residuals(block, fusion, attended)


def direct_aggregation(block, aggregate, tokens):
    queries = linear(norm(aggregate, block.norm_fusion), block.query)
    keys, values = linear(norm(tokens, block.norm_tokens), block.key_value).chunk(2, -1)
    attended = attend(queries, keys, values) if len(tokens) else torch.zeros_like(queries)
    return residuals(block, aggregate, attended)


def direct_factorized(block, state, image, audio, bias=None):
    """Eq. 9-13; aggregation tokens that summarize nothing form no pairs."""
    fusion, image_aggregate, audio_aggregate = state.split(block.split_sizes)
    image_aggregate = direct_aggregation(block.image_aggregation, image_aggregate, image)
    audio_aggregate = direct_aggregation(block.audio_aggregation, audio_aggregate, audio)
    image_pairing, audio_pairing = image_aggregate[: 99 * len(image)], audio_aggregate[: 99 * len(audio)]
    fusion = direct_pairs(block.fusion, fusion, image_pairing, audio_pairing)
    return torch.cat([fusion, image_aggregate, audio_aggregate])


def direct_token(block, fusion, image, audio, bias=None):
    """One softmax over the union of fusion, image and audio tokens."""
    normed = norm(fusion, block.norm_fusion)
    union = torch.cat([normed, norm(image, block.norm_image), norm(audio, block.norm_audio)])
    keys, values = linear(union, block.key_value).chunk(2, -1)
    return residuals(block, fusion, attend(linear(normed, block.query), keys, values))


DIRECT = {DenseFusion: direct_pairs, FactorizedFusion: direct_factorized, TokenFusion: direct_token}


def direct(
    block, fusion, image, audio, image_mask=None, audio_mask=None, image_positions=None, audio_positions=None
):
    clips = []
    for b in range(len(fusion)):
        rows = torch.arange(I) if image_mask is None else image_mask[b].nonzero().flatten()
        columns = torch.arange(A) if audio_mask is None else audio_mask[b].nonzero().flatten()
        bias = getattr(block, "pair_bias", None)
        if bias is not None:
            row_places = rows if image_positions is None else image_positions[b, rows]
            column_places = columns if audio_positions is None else audio_positions[b, columns]
            bias = bias[:, row_places][:, :, column_places]  # (H, I, A)
        clips.append(DIRECT[type(block)](block, fusion[b], image[b, rows], audio[b, columns], bias))
    return torch.stack(clips)


# --- blocks against the truth -------------------------------------------------------------------------------

BLOCKS = {
    "dense": lambda **options: DenseFusion(D, H, **options),
    "bilinear": lambda **options: DenseFusion(D, H, interaction="bilinear", **options),
    "dense, pair bias": lambda **options: DenseFusion(D, H, pair_bias=(I, A), **options),
    "bilinear, pair bias": lambda **options: DenseFusion(
        D, H, interaction="bilinear", pair_bias=(I, A), **options
    ),
    "factorized": lambda **options: FactorizedFusion(
        D, H, fusion_tokens=F, image_aggregation_tokens=3, audio_aggregation_tokens=2, **options
    ),
    "token": lambda **options: TokenFusion(D, H, **options),
}
OF_ANY_WIDTH = [name for name in BLOCKS if "image_dim" in VARIANTS[name.partition(",")[0]].options]
every_block = pytest.mark.parametrize("name", BLOCKS)


def make(name, **options):
    return randomized(BLOCKS[name](**options))


def make_streams(block, image_tokens=I, audio_tokens=A):
    state = sum(getattr(block, "split_sizes", [F]))
    sizes = (state, block.dim), (image_tokens, block.image_dim), (audio_tokens, block.audio_dim)
    return [torch.randn(B, *size, dtype=torch.float64, requires_grad=True) for size in sizes]


def make_masks():
    """Clip 0 lacks some tokens, clip 1 its image, clip 2 its sound, clip 3 both."""
    image_mask, audio_mask = torch.rand(B, I) < 0.6, torch.rand(B, A) < 0.6
    image_mask[:, 2], audio_mask[:, 3], image_mask[0, 1] = True, True, False
    image_mask[[1, 3]], audio_mask[[2, 3]] = False, False
    return dict(image_mask=image_mask, audio_mask=audio_mask)


def assert_like_direct(block, streams, **options):
    ours, truth = block(*streams, **options), direct(block, *streams, **options)
    assert relative_error(ours, truth) < EXACT
    cotangent = torch.randn_like(truth)
    truths = gradients(block, (truth * cotangent).sum(), *streams)
    largest = max(gradient.abs().max().item() for gradient in truths.values())
    for name, gradient in gradients(block, (ours * cotangent).sum(), *streams).items():
        # A key bias cancels in the softmax: its gradient is rounding, which only the others can measure.
        error = (gradient - truths[name]).abs().max().item()
        assert error < EXACT * largest, f"gradient of {name} is off by {error:.1e}"


@every_block
@pytest.mark.parametrize("attn_ratio, mlp_ratio", [(0.25, 1.0), (1.0, 4.0)])
def test_block_equals_the_equations(name, attn_ratio, mlp_ratio):
    block = make(name, attn_ratio=attn_ratio, mlp_ratio=mlp_ratio)
    assert_like_direct(block, make_streams(block))


@every_block
@pytest.mark.parametrize("masked", ["image_mask", "audio_mask", "both"])
def test_masks_drop_tokens(name, masked):
    """Also whole modalities: of one clip the image, of one the sound, of one both."""
    block, masks = make(name), make_masks()
    assert_like_direct(block, make_streams(block), **masks if masked == "both" else {masked: masks[masked]})


@pytest.mark.parametrize("name", OF_ANY_WIDTH)
@pytest.mark.parametrize("dims", [dict(image_dim=36), dict(image_dim=8, audio_dim=40)])
def test_tokens_of_other_widths(name, dims):
    block = make(name, **dims)
    assert_like_direct(block, make_streams(block), **make_masks())
    assert (block.image_dim, block.audio_dim) == (dims["image_dim"], dims.get("audio_dim", D))
    with pytest.raises(ValueError, match=r"audio must be tokens \(B, N, "):
        block(*make_streams(block)[:2], torch.zeros(B, A, 7).double())
    with pytest.raises(ValueError, match="image_dim must be a positive integer, got 0"):
        make(name, image_dim=0)


@every_block
def test_masks_that_hide_nothing_change_nothing(name):
    block = make(name)
    streams = make_streams(block)
    masks = dict(image_mask=torch.ones(B, I).bool(), audio_mask=torch.ones(B, A).bool())
    assert relative_error(block(*streams, **masks), block(*streams)) < EXACT


@pytest.mark.parametrize("interaction", ["additive", "bilinear"])
@pytest.mark.parametrize("given", [("image",), ("audio",), ("image", "audio")])
@pytest.mark.parametrize("masked", [False, True])
def test_pair_bias_finds_its_pairs_by_position(interaction, given, masked):
    table = dict(image=12, audio=9)  # more places than tokens: the others were dropped
    counts = dict(image=I, audio=A)
    sizes = [table[name] if name in given else counts[name] for name in counts]
    block = randomized(DenseFusion(D, H, interaction=interaction, pair_bias=sizes))
    positions = {
        f"{name}_positions": torch.rand(B, table[name]).argsort(1)[:, : counts[name]] for name in given
    }
    assert_like_direct(block, make_streams(block), **positions, **make_masks() if masked else {})


def test_pair_bias_is_zero_at_first():
    torch.manual_seed(3)
    plain = DenseFusion(D, H)
    torch.manual_seed(3)
    biased = DenseFusion(D, H, pair_bias=(I, A))
    streams = [stream.float() for stream in make_streams(plain)]
    torch.testing.assert_close(biased(*streams), plain(*streams))


def test_factorized_pairs_form_from_the_outputs_of_the_aggregation_blocks():
    """Eq. 9-13 with ready-made parts, and the state in its order: fusion, image, audio."""
    block = make("factorized")
    state, image, audio = make_streams(block)
    parts = block(state, image, audio).split([F, 3, 2], dim=1)
    aggregates = (
        block.image_aggregation(state[:, F : F + 3], image),
        block.audio_aggregation(state[:, F + 3 :], audio),
    )
    assert isinstance(block.image_aggregation, Aggregation)
    assert torch.equal(parts[1], aggregates[0]) and torch.equal(parts[2], aggregates[1])
    assert torch.equal(parts[0], block.fusion(state[:, :F], *aggregates))


def test_image_and_audio_are_told_apart():
    for name in BLOCKS:
        block = make(name)
        if "bias" not in name:
            fusion, image, audio = make_streams(block)
            assert relative_error(block(fusion, audio, image), block(fusion, image, audio)) > 1e-3


# --- a missing modality -------------------------------------------------------------------------------------


@pytest.mark.parametrize("missing", ["image_mask", "audio_mask", "both"])
def test_the_value_bias_is_added_once_while_any_pair_is_left(missing):
    block = make("dense")
    fusion, image, audio = make_streams(block)
    masks = dict(image_mask=torch.ones(B, I).bool(), audio_mask=torch.ones(B, A).bool())
    for name in masks if missing == "both" else (missing,):
        masks[name][:] = False

    def attended():
        """What is projected, in the units of the values, by a projection that only copies."""
        seen = []
        hook = block.proj.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        block(fusion, image, audio, **masks)
        hook.remove()
        return seen[0]

    before = attended()
    with torch.no_grad():
        block.value_bias += 2.0
    gain = (attended() - before).detach()
    torch.testing.assert_close(gain, torch.full_like(gain, 0.0 if missing == "both" else 2.0))
    if missing == "both":
        assert not before.any()


@every_block
def test_tokens_of_a_missing_modality_get_no_gradient_and_no_nan(name):
    block, masks = make(name), make_masks()
    streams = make_streams(block)
    output = block(*streams, **masks)
    grads = gradients(block, output.square().sum(), *streams)
    assert all(grad.isfinite().all() for grad in grads.values())
    assert not grads["input 1"][[1, 3]].any() and not grads["input 2"][[2, 3]].any()
    if "bilinear" in name:  # no pair is left in clips 1, 2 and 3
        assert not grads["input 1"][2].any() and not grads["input 2"][1].any()


# --- attention weights --------------------------------------------------------------------------------------


def keys_of(tokens, norm_layer, layer):
    return linear(norm(tokens, norm_layer), layer).chunk(2, -1)[0]


def direct_weights(block, fusion, image, audio, bias=None):
    """Marginals of the softmax over all pairs of one clip, (H, F, I) and (H, F, A)."""
    queries = linear(norm(fusion, block.norm_fusion), block.query)
    image_keys = keys_of(image, block.norm_image, block.image_key_value)[:, None]
    audio_keys = keys_of(audio, block.norm_audio, block.audio_key_value)[None]
    keys = image_keys * audio_keys if block.interaction == "bilinear" else image_keys + audio_keys
    joint = attention_maps(queries, keys.flatten(0, 1), bias).unflatten(-1, (len(image), len(audio)))
    return joint.sum(-1), joint.sum(-2)


def assert_weights(ours, truths, *, sum_to_one=True):
    """Weights (B, H, F, I) and (B, H, F, A) against those of each clip."""
    for b, truth in enumerate(truths):
        for weights, true_weights in zip(ours, truth, strict=True):
            assert relative_error(weights[b], true_weights) < EXACT
    if sum_to_one:
        for weights in ours:
            torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]))
    assert not any(weights.requires_grad for weights in ours)


@pytest.mark.parametrize("name", [name for name in BLOCKS if "dense" in name or "bilinear" in name])
def test_attention_weights_are_the_marginals_over_pairs(name):
    block = make(name)
    fusion, image, audio = make_streams(block)
    truths = [direct_weights(block, fusion[b], image[b], audio[b], block.pair_bias) for b in range(B)]
    assert_weights(block.attention_weights(fusion, image, audio), truths)


def test_attention_weights_follow_positions():
    block = randomized(DenseFusion(D, H, pair_bias=(12, 9)))
    fusion, image, audio = make_streams(block)
    rows, columns = torch.rand(B, 12).argsort(1)[:, :I], torch.rand(B, 9).argsort(1)[:, :A]
    biases = [block.pair_bias[:, rows[b]][:, :, columns[b]] for b in range(B)]
    truths = [direct_weights(block, fusion[b], image[b], audio[b], biases[b]) for b in range(B)]
    ours = block.attention_weights(fusion, image, audio, image_positions=rows, audio_positions=columns)
    assert_weights(ours, truths)


def test_factorized_attention_weights_go_through_the_aggregation_tokens():
    block = make("factorized")
    state, image, audio = make_streams(block)

    def truth(state, image, audio):
        fusion, *aggregates = state.split([F, 3, 2])
        streams = (block.image_aggregation, image), (block.audio_aggregation, audio)
        maps, outputs = [], []
        for (part, tokens), aggregate in zip(streams, aggregates, strict=True):
            queries = linear(norm(aggregate, part.norm_fusion), part.query)
            maps.append(attention_maps(queries, keys_of(tokens, part.norm_tokens, part.key_value)))
            outputs.append(direct_aggregation(part, aggregate, tokens))
        over_aggregates = direct_weights(block.fusion, fusion, *outputs)
        return [over @ through for over, through in zip(over_aggregates, maps, strict=True)]

    truths = [truth(state[b], image[b], audio[b]) for b in range(B)]
    assert_weights(block.attention_weights(state, image, audio), truths)


def test_token_attention_weights_are_parts_of_one_softmax():
    block = make("token")
    fusion, image, audio = make_streams(block)

    def truth(fusion, image, audio):
        normed = norm(fusion, block.norm_fusion)
        union = torch.cat([normed, norm(image, block.norm_image), norm(audio, block.norm_audio)])
        keys = linear(union, block.key_value).chunk(2, -1)[0]
        return attention_maps(linear(normed, block.query), keys).split([F, I, A], -1)[1:]

    truths = [truth(fusion[b], image[b], audio[b]) for b in range(B)]
    assert_weights(block.attention_weights(fusion, image, audio), truths, sum_to_one=False)


# --- regularisation, initial values, precision --------------------------------------------------------------


@every_block
def test_dropout_and_drop_path_act_in_training_only(name):
    block = make(name, drop=0.3, drop_path=0.4)
    plain = make(name)
    plain.load_state_dict(block.state_dict())
    streams = make_streams(block)
    assert torch.equal(block(*streams), plain(*streams))
    block.train()
    assert not torch.equal(block(*streams), block(*streams))


def test_drop_path_drops_whole_branches_of_a_clip():
    """At a rate near 1 both residual branches are gone, and the block returns its input."""
    block = make("dense", drop_path=0.999999).train()
    streams = make_streams(block)
    torch.manual_seed(0)
    assert torch.equal(block(*streams), streams[0])


@every_block
def test_fresh_weights(name):
    """Xavier-uniform weights, zero biases, layer norms with eps 1e-5."""
    for layer in BLOCKS[name]().modules():
        if isinstance(layer, torch.nn.LayerNorm):
            assert layer.eps == 1e-5
        if isinstance(layer, torch.nn.Linear):
            bound = math.sqrt(6 / (layer.in_features + layer.out_features))
            assert layer.weight.abs().max() <= bound
            assert layer.weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.2)
            assert layer.bias is None or not layer.bias.any()


@every_block
def test_bfloat16_autocast_is_finite_and_near(name):
    block = make(name)
    streams, masks = make_streams(block), make_masks()
    truth = block(*streams, **masks)
    block.float()
    streams = [stream.detach().float().requires_grad_() for stream in streams]
    with torch.autocast("cpu", torch.bfloat16):
        output = block(*streams, **masks)
    grads = gradients(block, output.float().square().sum(), *streams)
    assert all(grad.isfinite().all() for grad in grads.values())
    assert relative_error(output.double(), truth) < 0.05  # a few roundings of 2**-9


# --- bad input ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make_block, message",
    [
        (lambda: DenseFusion(0, 3), "dim must be a positive integer, got 0"),
        (lambda: DenseFusion(D, 0), "num_heads must be a positive integer, got 0"),
        (lambda: DenseFusion(D, 5), "num_heads=5"),
        (lambda: DenseFusion(D, H, attn_ratio=0.01), "attn_ratio=0.01"),
        (lambda: DenseFusion(D, H, attn_ratio=0.3), "attn_ratio=0.3"),
        (lambda: DenseFusion(D, H, mlp_ratio=0.01), "mlp_ratio=0.01"),
        (lambda: DenseFusion(D, H, mlp_ratio=-1), "mlp_ratio must be a positive number, got -1"),
        (lambda: DenseFusion(D, H, drop=1.0), "drop must .* got 1.0"),
        (lambda: DenseFusion(D, H, drop_path=-0.1), "drop_path must .* got -0.1"),
        (lambda: DenseFusion(D, H, drop=float("nan")), "drop must .* got nan"),
        (lambda: DenseFusion(D, H, interaction="sum"), "interaction must .* got 'sum'"),
        (lambda: DenseFusion(D, H, pair_bias=(3,)), r"pair_bias .* got \(3,\)"),
        (lambda: DenseFusion(D, H, pair_bias=(3, 0)), r"pair_bias .* got \(3, 0\)"),
        (lambda: DenseFusion(D, H, pair_bias=True), "pair_bias .* got True"),
        (lambda: FactorizedFusion(D, H, fusion_tokens=0), "fusion_tokens must be a positive integer, got 0"),
        (
            lambda: FactorizedFusion(D, H, audio_aggregation_tokens=-1),
            "audio_aggregation_tokens must be a positive integer, got -1",
        ),
        (lambda: TokenFusion(D, 7), "num_heads=7"),
        (lambda: TokenFusion(D, H, attn_ratio="x"), "attn_ratio must be a positive number, got 'x'"),
        (lambda: TokenFusion(D, H, mlp_ratio=float("nan")), "mlp_ratio must be a positive number, got nan"),
        (lambda: TokenFusion(D, H, drop="x"), r"drop must be a number in \[0, 1\), got 'x'"),
    ],
)
def test_bad_settings_are_named(make_block, message):
    with pytest.raises(ValueError, match=message):
        make_block()


BAD_STREAMS = {
    "fusion": lambda s: s | dict(fusion=s["fusion"][0]),
    "image": lambda s: s | dict(image=s["image"][:, :, :-1]),
    "audio": lambda s: s | dict(audio=s["audio"][:, :0]),
    "image must have batch size": lambda s: s | dict(image=s["image"][:1]),
    "audio must be a floating": lambda s: s | dict(audio=s["audio"].long()),
    "fusion must be a floating": lambda s: s | dict(fusion=None),
    "image must be on cpu, got meta": lambda s: s | dict(image=s["image"].to("meta")),
    "fusion must have the dtype of the weights, torch.float64, got torch.float32": lambda s: (
        s | dict(fusion=s["fusion"].float())
    ),
    "audio must have the dtype of the weights": lambda s: s | dict(audio=s["audio"].bfloat16()),
    "image_mask must be a bool tensor": lambda s: s | dict(image_mask=torch.ones(B, I)),
    "audio_mask must have shape": lambda s: s | dict(audio_mask=torch.ones(B, I).bool()),
    "audio_mask must be on cpu": lambda s: s | dict(audio_mask=torch.ones(B, A).bool().to("meta")),
}


@every_block
@pytest.mark.parametrize("message", BAD_STREAMS)
def test_bad_streams_are_named(name, message):
    block = make(name)
    streams = dict(zip(("fusion", "image", "audio"), make_streams(block), strict=True))
    with pytest.raises(ValueError, match=f"^{message}"):
        block(**BAD_STREAMS[message](streams))


def test_factorized_state_must_hold_all_tokens():
    block = make("factorized")
    state, image, audio = make_streams(block)
    with pytest.raises(ValueError, match=r"fusion must hold 5 \+ 3 \+ 2 tokens, got 5"):
        block(state[:, :F], image, audio)
    with pytest.raises(ValueError, match="fusion must hold"):
        block.attention_weights(state[:, :F], image, audio)


def test_positions_that_a_pair_bias_needs():
    block = randomized(DenseFusion(D, H, pair_bias=(12, 9)))
    streams = make_streams(block)
    rows, columns = torch.zeros(B, I).long(), torch.zeros(B, A).long()
    with pytest.raises(ValueError, match="image_positions is needed: .* 12 tokens, there are 7"):
        block(*streams, audio_positions=columns)
    with pytest.raises(ValueError, match="audio_positions is needed: .* 9 tokens, there are 6"):
        block(*streams, image_positions=rows)
    with pytest.raises(ValueError, match="image_positions must be a long tensor"):
        block(*streams, image_positions=rows.int(), audio_positions=columns)
    for wrong in rows - 1, rows + 12:
        with pytest.raises(ValueError, match=r"image_positions must hold indices in 0\.\.11, got"):
            block(*streams, image_positions=wrong, audio_positions=columns)
    with pytest.raises(ValueError, match="image_positions must be a long tensor, got list"):
        block(*streams, image_positions=rows.tolist(), audio_positions=columns)
    with pytest.raises(ValueError, match=r"audio_positions must be \(4, 6\), got shape \(4, 5\)"):
        block(*streams, image_positions=rows, audio_positions=columns[:, :5])


def test_defaults_are_the_documented_ones():
    dense, factorized = DenseFusion(D, H), FactorizedFusion(D, H)
    assert dense.width == 0.25 * D and dense.mlp.fc1.out_features == D
    assert factorized.split_sizes == [16, 8, 8]
