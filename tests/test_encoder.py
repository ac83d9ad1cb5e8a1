"""The encoder against timm's own blocks run on the concatenation, the way the released code does it; masks,
kept patches, missing modalities, fused layers, budgets of arithmetic, and what it refuses.
"""

import ast
import json
import re

import pytest
import timm
import torch
from models import (
    AUDIO,
    AUDIO_TOKENS,
    IMAGE,
    IMAGE_TOKENS,
    count_flops,
    gradients,
    make_encoder,
    make_inputs,
    make_vit,
    randomized,
    relative_error,
)
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import ParallelScalingBlock, ResPostBlock
from torch import nn

from avfuse import AVMAE, AVEncoder, InputSettings, create_encoder
from avfuse.fusion import VARIANTS
from avfuse.inputs import IMAGENET_MEAN
from avfuse.released import ReleasedEncoder

EXACT = 1e-11  # float64 rounding through a few layers, relative to the largest value
VITS = {
    "plain": dict(),
    "class and register tokens": dict(class_token=True, reg_tokens=2),
    "no_embed_class": dict(class_token=True, reg_tokens=1, no_embed_class=True),
    "qk-norm, LayerScale": dict(qk_norm=True, init_values=0.1),
    "scaled norms": dict(scale_attn_norm=True, scale_mlp_norm=True),
    "no biases": dict(qkv_bias=False, proj_bias=False),
    "pre-norm, no positions": dict(pre_norm=True, pos_embed="none"),
}
every_interaction = pytest.mark.parametrize("interactions", VARIANTS)
DIRECT = [name for name, variant in VARIANTS.items() if variant.direct]  # of which test_direct.py has more


def run_direct(encoder, image, audio, image_keep=None, audio_keep=None):
    """Eq. 1-3 with timm's blocks on cat(fusion, tokens), whose fusion outputs are dropped.

    Returns image, audio and fusion tokens after every layer, before the last norm.
    """

    def embed(vit, pixels, keep):
        tokens = vit.norm_pre(vit._pos_embed(vit.patch_embed(pixels)))
        if keep is None:
            return tokens
        prefix = vit.num_prefix_tokens
        rows = [
            torch.cat([clip[:prefix], clip[prefix + kept]]) for clip, kept in zip(tokens, keep, strict=True)
        ]
        return torch.stack(rows)

    def unimodal(block, tokens, context):
        return (
            block(tokens)
            if context is None
            else block(torch.cat([context, tokens], 1))[:, context.shape[1] :]
        )

    image_tokens = embed(encoder.image, image, image_keep)
    audio_tokens = embed(encoder.audio, audio, audio_keep)
    state, layers = encoder.fusion_tokens.expand(len(image), -1, -1), []
    for layer in range(encoder.depth):
        fused, context = layer in encoder.fusion_layers, None
        before = image_tokens, audio_tokens
        if fused:
            context = state if isinstance(encoder, ReleasedEncoder) else state[:, :4]
            state = encoder.fusion_blocks[str(layer)](
                state,
                image_tokens[:, encoder.image.num_prefix_tokens :],
                audio_tokens[:, encoder.audio.num_prefix_tokens :],
                image_positions=image_keep,
                audio_positions=audio_keep,
            )
        image_tokens = unimodal(encoder.image.blocks[layer], before[0], context)
        audio_tokens = unimodal(encoder.audio.blocks[layer], before[1], context)
        layers.append((image_tokens, audio_tokens, state[:, :4]))
    return layers


def normed(encoder, image, audio, fusion):
    return encoder.image.norm(image), encoder.audio.norm(audio), encoder.fusion_norm(fusion)


def assert_equal(ours, truth, tolerance=EXACT):
    for name, part, true_part in zip(("image", "audio", "fusion"), ours, truth, strict=True):
        error = relative_error(part, true_part)
        assert error <= tolerance, f"{name} tokens are off by {error:.1e}"


def keeps(batch=2, image=5, audio=4):
    return dict(
        image_keep=torch.rand(batch, IMAGE_TOKENS).argsort(1)[:, :image],
        audio_keep=torch.rand(batch, AUDIO_TOKENS).argsort(1)[:, :audio],
    )


# --- the layers ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", VITS)
@pytest.mark.parametrize("kept", [False, True])
def test_unimodal_blocks_equal_timm_on_the_concatenation(name, kept):
    """Outputs of every layer and all gradients, whatever the blocks are made of."""
    encoder, (image, audio) = make_encoder(vit=VITS[name]), make_inputs()
    indices = keeps() if kept else {}
    image.requires_grad_(), audio.requires_grad_()
    ours = encoder(image, audio, return_layers=True, **indices)
    layers = run_direct(encoder, image, audio, **indices)
    for layer, truth in zip(ours.layers, layers, strict=True):
        assert layer.layers is None
        assert_equal(layer[:3], truth)
    truth = normed(encoder, *layers[-1])
    assert_equal(ours[:3], truth)

    weights = [torch.randn_like(part) for part in truth]
    true_grads, grads = (
        gradients(
            encoder, sum((w * part).sum() for w, part in zip(weights, parts, strict=True)), image, audio
        )
        for parts in (truth, ours[:3])
    )
    largest = max(grad.abs().max().item() for grad in true_grads.values())
    for name, grad in grads.items():
        assert (grad - true_grads[name]).abs().max() < EXACT * largest, f"gradient of {name}"


@pytest.mark.parametrize("interactions", [name for name in VARIANTS if name not in DIRECT])
@pytest.mark.parametrize("fusion_layers", ["all", "none", [2], (1, 0), 1])
def test_fused_layers_and_the_others(interactions, fusion_layers):
    encoder, (image, audio) = make_encoder(interactions, fusion_layers=fusion_layers), make_inputs()
    expected = {"all": (0, 1, 2), "none": (), 1: (1,), (1, 0): (0, 1)}.get(
        fusion_layers if isinstance(fusion_layers, (str, int, tuple)) else None, (2,)
    )
    assert encoder.fusion_layers == (() if interactions == "none" else expected)
    layers = run_direct(encoder, image, audio)
    ours = encoder(image, audio, return_layers=True)
    for layer, truth in zip(ours.layers, layers, strict=True):
        assert_equal(layer[:3], truth)
    assert_equal(ours[:3], normed(encoder, *layers[-1]))
    assert encoder(image, audio).layers is None


@pytest.mark.parametrize("name", VITS)
def test_without_fusion_they_are_two_timm_transformers(name):
    encoder, (image, audio) = make_encoder("none", vit=VITS[name]), make_inputs()
    truth = encoder.image.forward_features(image), encoder.audio.forward_features(audio)
    output = encoder(image, audio)
    assert_equal(output[:3], (*truth, encoder.fusion_norm(encoder.fusion_tokens).repeat(2, 1, 1)))


@pytest.mark.parametrize("interactions", ["dense", "bilinear", "factorized", "token", *DIRECT])
def test_layers_before_the_first_fused_one_are_plain_timm(interactions):
    encoder, (image, audio) = make_encoder(interactions, fusion_layers=[2]), make_inputs()
    layers = encoder(image, audio, return_layers=True).layers
    for name, pixels in ("image", image), ("audio", audio):
        truth = getattr(encoder, name).forward_intermediates(
            pixels, output_fmt="NLC", intermediates_only=True, norm=False
        )
        for layer in 0, 1:
            assert relative_error(getattr(layers[layer], name), truth[layer]) < EXACT
        assert relative_error(getattr(layers[2], name), truth[2]) > 1e-3  # now it fuses
    for layer in 0, 1:
        assert torch.equal(layers[layer].fusion, encoder.fusion_tokens[:, :4].expand(2, -1, -1))


def test_factorized_hides_its_aggregation_tokens():
    encoder, (image, audio) = make_encoder("factorized"), make_inputs()
    assert encoder.fusion_tokens.shape == (1, 4 + 3 + 2, 32)
    output = encoder(image, audio, return_layers=True)
    assert output.fusion.shape == output.layers[0].fusion.shape == (2, 4, 32)


# --- kept patches -------------------------------------------------------------------------------------------


@every_interaction
def test_keep_all_in_any_order_is_a_permutation(interactions):
    pair_bias = interactions in ("dense", "bilinear")
    encoder, (image, audio) = make_encoder(interactions, pair_bias=pair_bias), make_inputs()
    indices = keeps(image=IMAGE_TOKENS, audio=AUDIO_TOKENS)
    whole = encoder(image, audio)
    truth = [
        torch.stack([clip[kept] for clip, kept in zip(tokens, keep, strict=True)])
        for tokens, keep in ((whole.image, indices["image_keep"]), (whole.audio, indices["audio_keep"]))
    ]
    assert_equal(encoder(image, audio, **indices)[:3], (*truth, whole.fusion))


@every_interaction
def test_dropped_patches_equal_masked_ones(interactions):
    """With a pair bias too, which finds the kept tokens by their positions."""
    pair_bias = interactions in ("dense", "bilinear")
    encoder, (image, audio) = make_encoder(interactions, pair_bias=pair_bias), make_inputs()
    indices = keeps()
    masks = dict(
        image_mask=torch.zeros(2, IMAGE_TOKENS).bool(), audio_mask=torch.zeros(2, AUDIO_TOKENS).bool()
    )
    masks["image_mask"].scatter_(1, indices["image_keep"], True)
    masks["audio_mask"].scatter_(1, indices["audio_keep"], True)
    kept, masked = encoder(image, audio, **indices), encoder(image, audio, **masks)
    truth = [
        torch.stack([clip[index] for clip, index in zip(tokens, keep, strict=True)])
        for tokens, keep in ((masked.image, indices["image_keep"]), (masked.audio, indices["audio_keep"]))
    ]
    assert_equal(kept[:3], (*truth, masked.fusion))


def test_prefix_tokens_are_never_dropped_and_never_paired():
    encoder, (image, audio) = make_encoder(vit=VITS["class and register tokens"]), make_inputs()
    seen = []
    for block in encoder.fusion_blocks.values():
        block.register_forward_pre_hook(lambda _, streams: seen.append([s.shape[1] for s in streams]))
    output = encoder(image, audio, **keeps(image=5, audio=4))
    assert seen == [[4, 5, 4]] * 3
    assert output.image.shape[1] == 3 + 5 and output.audio.shape[1] == 3 + 4
    # What the prefix tokens are reaches fusion only through the patch tokens: not in one layer.
    encoder = make_encoder(vit=dict(class_token=True, depth=1))
    fusion = encoder(image, audio).fusion
    with torch.no_grad():
        encoder.image.cls_token += 1.0
    assert torch.equal(encoder(image, audio).fusion, fusion)


# --- masks and missing modalities ---------------------------------------------------------------------------


@every_interaction
@pytest.mark.parametrize("prefixes", [(0, 0), (3, 3), (3, 0), (0, 3)])
def test_a_masked_token_reaches_nobody(interactions, prefixes):
    pair_bias = interactions in ("dense", "bilinear")
    vits = (
        make_vit(shape, **VITS["class and register tokens" if prefix else "plain"])
        for shape, prefix in zip((IMAGE, AUDIO), prefixes, strict=True)
    )
    options = dict(fusion_tokens=4, image_aggregation_tokens=3, audio_aggregation_tokens=2)
    encoder = randomized(AVEncoder(*vits, interactions=interactions, pair_bias=pair_bias, **options))
    image, audio = make_inputs()
    masks = dict(image_mask=torch.ones(2, IMAGE_TOKENS).bool(), audio_mask=torch.ones(2, AUDIO_TOKENS).bool())
    masks["image_mask"][0, 4], masks["audio_mask"][1, 7] = False, False  # patches (1, 1) and (1, 2)
    before = encoder(image, audio, **masks)
    image[0, :, 8:16, 8:16] += 1.0
    audio[1, :, 8:16, 16:24] += 1.0
    after = encoder(image, audio, **masks)

    for prefix, name, clip, token in zip(prefixes, ("image", "audio"), (0, 1), (4, 7), strict=True):
        changed = (getattr(after, name) != getattr(before, name)).any(-1)
        assert changed.nonzero().tolist() == [[clip, prefix + token]]
    assert torch.equal(after.fusion, before.fusion)


@every_interaction
@pytest.mark.parametrize("missing", ["image", "audio"])
@pytest.mark.parametrize("vit", ["plain", "class and register tokens"])
def test_none_equals_a_modality_masked_everywhere(interactions, missing, vit):
    pair_bias = interactions in ("dense", "bilinear")
    encoder = make_encoder(interactions, pair_bias=pair_bias, vit=VITS[vit])
    inputs = dict(zip(("image", "audio"), make_inputs(), strict=True))
    tokens = IMAGE_TOKENS if missing == "image" else AUDIO_TOKENS
    masked = encoder(**inputs, **{f"{missing}_mask": torch.zeros(2, tokens).bool()})
    absent = encoder(**inputs | {missing: None}, return_layers=True)
    assert getattr(absent, missing) is None and getattr(absent.layers[0], missing) is None
    other = "audio" if missing == "image" else "image"
    assert relative_error(getattr(absent, other), getattr(masked, other)) < EXACT
    assert relative_error(absent.fusion, masked.fusion) < EXACT
    # With patches dropped as well: a learned pair bias must not ask where the missing tokens are.
    absent = encoder(**inputs | {missing: None}, **{f"{other}_keep": keeps()[f"{other}_keep"]})
    assert absent.fusion.isfinite().all()


@every_interaction
@pytest.mark.parametrize("absent", ["image", "audio", "both"])
def test_clips_that_miss_a_modality_are_finite_and_leave_the_others_alone(interactions, absent):
    encoder, (image, audio) = make_encoder(interactions), make_inputs(batch=3)
    masks = {}
    for name, tokens in ("image", IMAGE_TOKENS), ("audio", AUDIO_TOKENS):
        if absent in (name, "both"):
            masks[f"{name}_mask"] = torch.ones(3, tokens).bool()
            masks[f"{name}_mask"][1] = False
    output = encoder(image, audio, **masks)
    grads = gradients(encoder, sum(part.square().sum() for part in output[:3]))
    assert all(grad.isfinite().all() for grad in grads.values())
    alone = encoder(image[[0, 2]], audio[[0, 2]])
    assert_equal([part[[0, 2]] for part in output[:3]], alone[:3])


@every_interaction
def test_clips_without_any_token_are_finite_in_unfused_attention_too(interactions):
    """There, a softmax over nothing would be NaN."""
    encoder, (image, audio) = make_encoder(interactions, fusion_layers=[2]), make_inputs()
    for block in [*encoder.image.blocks, *encoder.audio.blocks]:
        block.attn.fused_attn = False
    output = encoder(image, audio, image_mask=torch.zeros(2, IMAGE_TOKENS).bool())
    assert all(part.isfinite().all() for part in output[:3])


@every_interaction
@pytest.mark.parametrize("kept", [False, True])
def test_clips_without_a_modality_equal_clips_masked_everywhere(interactions, kept):
    encoder, inputs = make_encoder(interactions), make_inputs()
    present = dict(image_present=torch.tensor([True, False]), audio_present=torch.ones(2).bool())
    masks = dict(image_mask=torch.ones(2, IMAGE_TOKENS).bool(), audio_mask=torch.ones(2, AUDIO_TOKENS).bool())
    masks["image_mask"][1] = False
    indices = keeps() if kept else {}
    inputs[0][1] = 0.0
    spoilt = inputs[0].clone(), inputs[1]
    spoilt[0][1] = torch.nan  # what stands for an image that is not there may be anything
    ours, truth = encoder(*spoilt, **present, **indices), encoder(*inputs, **masks, **indices)
    assert all(torch.equal(*parts) for parts in zip(ours[:3], truth[:3], strict=True))
    masks["image_mask"][0, 4] = masks["audio_mask"][1, 7] = False  # both together
    masks["image_mask"][1] = True
    ours = encoder(*inputs, **present, **masks, **indices)
    masks["image_mask"][1] = False
    truth = encoder(*inputs, **masks, **indices)
    assert all(torch.equal(*parts) for parts in zip(ours[:3], truth[:3], strict=True))
    if encoder.shows_attention:
        attention = encoder.fusion_attention(*inputs, **present), encoder.fusion_attention(*inputs, **masks)
        assert not attention[0][0][1].any() and attention[0][0][0].any()
        assert not attention[1][0][0, ..., 4].any()


def test_masks_and_kept_patches_together():
    """A mask is over all patches, also where some of them are dropped."""
    encoder, (image, audio) = make_encoder(), make_inputs()
    indices = keeps(image=6)
    mask = torch.ones(2, IMAGE_TOKENS).bool()
    mask[torch.arange(2), indices["image_keep"][:, 0]] = False
    masked = encoder(image, audio, image_mask=mask, **indices)
    dropped = encoder(image, audio, image_keep=indices["image_keep"][:, 1:], audio_keep=indices["audio_keep"])
    assert_equal((masked.image[:, 1:], masked.audio, masked.fusion), dropped[:3])


# --- attention of the fusion tokens -------------------------------------------------------------------------


@pytest.mark.parametrize("interactions", ["dense", "bilinear", "factorized", "token"])
def test_fusion_attention_is_that_of_the_block_on_its_inputs(interactions):
    encoder = make_encoder(interactions, fusion_layers=[0, 2], vit=dict(class_token=True))
    image, audio = make_inputs()
    states = []
    for layer in encoder.fusion_blocks.values():
        layer.register_forward_pre_hook(lambda block, streams: states.append((block, streams)))
    with torch.no_grad():  # as in `fusion_attention`, which rounds alike
        encoder(image, audio)
    for layer, index in (0, 0), (2, 1), (None, 1):
        block, streams = states[index]
        for ours, truth in zip(
            encoder.fusion_attention(image, audio, layer), block.attention_weights(*streams), strict=True
        ):
            assert torch.equal(ours, truth) and ours.shape[:3] == (2, 2, 4)
    with pytest.raises(ValueError, match=r"layer must be one of the fused layers \[0, 2\], got 1"):
        encoder.fusion_attention(image, audio, 1)
    assert all(len(block._forward_pre_hooks) == 1 for block in encoder.fusion_blocks.values())  # only ours


@pytest.mark.parametrize("interactions", ["dense", "bilinear", "factorized", "token"])
def test_fusion_attention_of_masked_tokens_is_that_without_them(interactions):
    encoder = make_encoder(interactions)
    block, state = encoder.fusion_blocks["0"], encoder.fusion_tokens.repeat(2, 1, 1)
    image, audio = (torch.randn(2, tokens, encoder.embed_dim).double() for tokens in (5, 4))
    mask = torch.tensor([True, False, True, True, False]).expand(2, -1)
    ours = block.attention_weights(state, image, audio, image_mask=mask)
    dropped = block.attention_weights(state, image[:, mask[0]], audio)
    for weights, truth in zip((ours[0][..., mask[0]], ours[1]), dropped, strict=True):
        torch.testing.assert_close(weights, truth, rtol=1e-12, atol=1e-14)
    assert not ours[0][..., ~mask[0]].any()


@pytest.mark.parametrize("interactions", ["dense", "bilinear", "factorized", "token"])
def test_fusion_attention_to_a_missing_modality_is_zero(interactions):
    encoder = make_encoder(interactions)
    image, audio = make_inputs()
    for absent in (image, None), (None, audio):
        weights = encoder.fusion_attention(*absent)
        present, missing = weights if absent[1] is None else weights[::-1]
        assert not missing.any()
        assert present.isfinite().all() and present.any() == (interactions != "bilinear")


def test_fusion_attention_needs_a_fused_layer():
    with pytest.raises(ValueError, match=r"fused layers \[\], got None"):
        make_encoder("none").fusion_attention(*make_inputs())


# --- training -----------------------------------------------------------------------------------------------


@every_interaction
def test_gradient_checkpointing_changes_memory_only(interactions):
    """Drop-path included: the recomputation draws the same paths."""
    encoder = make_encoder(
        interactions,
        drop=0.1,
        drop_path=0.2,
        vit=dict(drop_path_rate=0.2, class_token=True, proj_drop_rate=0.1),
    )
    (image, audio), indices = make_inputs(), keeps()
    calls = []
    encoder.image.blocks[1].mlp.register_forward_hook(lambda *_: calls.append("image"))
    results = []
    for enable in False, True:
        encoder.set_grad_checkpointing(enable)
        encoder.train()
        torch.manual_seed(1)
        output = encoder(image, audio, **indices)
        loss = sum(part.square().sum() for part in output[:3])
        results.append((loss, gradients(encoder, loss)))
    assert len(calls) == 1 + 2  # it really recomputed
    assert torch.equal(results[0][0], results[1][0])
    for name, grad in results[0][1].items():
        assert torch.equal(grad, results[1][1][name]), name


@pytest.mark.parametrize("interactions", ["dense", "joint"])
def test_gradient_checkpointing_of_timm(interactions):
    """The switch of a transformer alone, which a copy keeps."""
    encoder = make_encoder(interactions).train()
    encoder.image.set_grad_checkpointing()
    for model in encoder, encoder.with_frames(2):
        calls = []
        hooks = [
            branch.blocks[1].attn.register_forward_hook(lambda *_, name=name, to=calls: to.append(name))
            for name, branch in (("image", model.image), ("audio", model.audio))
        ]
        image, audio = make_inputs()
        image = image[:, None].expand(-1, model.frames, -1, -1, -1) if model.frames > 1 else image
        sum(part.sum() for part in model(image, audio)[:3]).backward()
        again = interactions == "joint"  # where both run in one
        assert calls.count("image") == 2 and calls.count("audio") == 1 + again
        for hook in hooks:
            hook.remove()


@every_interaction
def test_drop_path_acts_in_training_only(interactions):
    encoder = create_encoder("tiny", interactions, drop_path=0.5)
    inputs = torch.randn(2, 3, 96, 96), torch.randn(2, 1, 64, 128)
    rates = [getattr(block.drop_path1, "drop_prob", 0.0) for block in encoder.audio.blocks]
    assert rates == pytest.approx([0, 0.5 / 3, 1 / 3, 0.5])
    encoder.eval()
    assert torch.equal(encoder(*inputs).image, encoder(*inputs).image)
    encoder.train()
    assert not torch.equal(encoder(*inputs).image, encoder(*inputs).image)


@every_interaction
@pytest.mark.parametrize("fusion_layers", ["all", [2]])
@pytest.mark.parametrize("vit", ["plain", "class and register tokens", "qk-norm, LayerScale"])
@pytest.mark.parametrize("present", [True, False])
def test_every_trainable_parameter_gets_a_gradient(interactions, fusion_layers, vit, present):
    """In one step of pretraining, as distributed training demands; also where a clip lacks its image."""
    pair_bias = interactions in ("dense", "bilinear")
    encoder = make_encoder(interactions, fusion_layers=fusion_layers, pair_bias=pair_bias, vit=VITS[vit])
    mae = AVMAE(encoder, decoder_dim=32, decoder_depth=1, decoder_heads=2).double()
    options = {} if present else dict(image_present=torch.tensor([True, False]))
    mae(*make_inputs(), **options).loss.backward()
    without = {name for name, p in mae.named_parameters() if p.requires_grad and p.grad is None}
    assert not without
    if present:  # and a gradient that is more than rounding
        still = {n for n, p in mae.named_parameters() if p.requires_grad and p.grad.abs().max() < 1e-12}
        assert not {
            name for name in still if not name.endswith("k_norm.bias")
        }  # which cancels in the softmax


@every_interaction
def test_bfloat16_autocast_is_finite_and_near(interactions):
    encoder, (image, audio) = make_encoder(interactions, vit=VITS["qk-norm, LayerScale"]), make_inputs()
    masks = dict(image_mask=torch.tensor([[True] * IMAGE_TOKENS, [False] * IMAGE_TOKENS]))
    truth = encoder(image, audio, **masks)
    encoder.float()
    with torch.autocast("cpu", torch.bfloat16):
        output = encoder(image.float(), audio.float(), **masks)
    grads = gradients(encoder, sum(part.float().square().mean() for part in output[:3]))
    assert all(grad.isfinite().all() for grad in grads.values())
    assert_equal([part.double() for part in output[:3]], truth[:3], tolerance=0.1)


# --- transformers of unequal width and depth ----------------------------------------------------------------


def unequal_encoder(interactions="dense", *, swapped=False):
    """Image 3 blocks of width 32, audio 2 blocks of width 48, which run in layers 0 and 2; or the reverse."""
    wide, narrow = dict(embed_dim=48, depth=2, num_heads=4), {}
    image, audio = (
        make_vit(IMAGE, **wide if swapped else narrow),
        make_vit(AUDIO, **narrow if swapped else wide),
    )
    counts = dict(fusion_tokens=4, image_aggregation_tokens=3, audio_aggregation_tokens=2)
    return randomized(
        AVEncoder(image, audio, interactions=interactions, block_layers=(0, 2), num_heads=2, **counts)
    )


@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("interactions", ["dense", "bilinear", "factorized", "none"])
def test_unequal_transformers(interactions, swapped):
    """The fusion tokens have the width of the image's; audio blocks read them through one linear map."""
    encoder, (image, audio) = unequal_encoder(interactions, swapped=swapped), make_inputs()
    tokens = [
        vit._pos_embed(vit.patch_embed(x)) for vit, x in ((encoder.image, image), (encoder.audio, audio))
    ]
    state, runs = encoder.fusion_tokens.expand(2, -1, -1), [{0: 0, 1: 1, 2: 2}, {0: 0, 2: 1}]
    runs = runs[::-1] if swapped else runs
    for layer in range(3):
        context = state[:, :4]
        contexts = [context, context]
        if interactions == "none":
            contexts = [part[:, :0] for part in tokens]
        else:
            heard = encoder.context_to_audio
            contexts[1] = context @ heard.weight.T + heard.bias
            state = encoder.fusion_blocks[str(layer)](state, *tokens)
        for n, vit in enumerate((encoder.image, encoder.audio)):
            if layer in runs[n]:
                union = torch.cat([contexts[n], tokens[n]], 1)
                tokens[n] = vit.blocks[runs[n][layer]](union)[:, contexts[n].shape[1] :]
    assert_equal(encoder(image, audio)[:3], normed(encoder, *tokens, state[:, :4]))
    assert encoder.dims == dict(
        image=48 if swapped else 32, audio=32 if swapped else 48, fusion=encoder.embed_dim
    )
    for missing in (dict(image=None, audio=audio), dict(image=image, audio=None)):
        assert encoder(**missing).fusion.shape == (2, 4, encoder.embed_dim)


def test_an_unequal_autoencoder_trains_every_weight_and_is_saved(tmp_path):
    mae = randomized(AVMAE(unequal_encoder(), decoder_dim=16, decoder_depth=1, decoder_heads=2)).train()
    grads = gradients(mae, mae(*make_inputs()).loss)
    trained = {name for name, parameter in mae.named_parameters() if parameter.requires_grad}
    assert {name for name, grad in grads.items() if grad.abs().max() > 0} == trained
    mae.save_pretrained(tmp_path)
    loaded = AVMAE.from_pretrained(tmp_path).double()
    assert_equal(loaded.encoder(*(inputs := make_inputs()))[:3], mae.eval().encoder(*inputs)[:3], 1e-6)
    # The second block of audio runs in the third layer, and is trained at the rate of that.
    weight = mae.encoder.audio.blocks[1].mlp.fc1.weight
    (layer,) = {g["layer"] for g in mae.parameter_groups() if any(p is weight for p in g["params"])}
    assert layer == 3


@pytest.mark.parametrize(
    "image, audio, options, message",
    [
        (
            {},
            dict(embed_dim=48),
            dict(interactions="token"),
            "interactions='token' needs transformers of one width",
        ),
        ({}, dict(depth=2), {}, "such as block_layers=\\(0, 2\\)"),
        ({}, {}, dict(block_layers=(0, 1, 2)), "block_layers is for transformers of unequal depth"),
        ({}, dict(depth=2), dict(block_layers=(0, 3)), "block_layers must be 2 rising integers in 0..2"),
        ({}, dict(depth=2), dict(block_layers=(1, 1)), "block_layers must be 2 rising integers in 0..2"),
        ({}, dict(depth=2), dict(block_layers=(1,)), "block_layers must be 2 rising integers in 0..2"),
        (dict(depth=2), {}, dict(block_layers=7), "block_layers must be 2 rising integers in 0..2"),
    ],
)
def test_what_cannot_be_joined_is_refused(image, audio, options, message):
    with pytest.raises(ValueError, match=message):
        AVEncoder(make_vit(IMAGE, **image), make_vit(AUDIO, **audio), **options)


# --- inputs are never guessed -------------------------------------------------------------------------------


def test_a_spectrogram_of_unknown_seconds_needs_inputs_where_files_are_read():
    encoder = AVEncoder(make_vit((3, 48, 80)), make_vit((1, 64, 1000)), fusion_tokens=4)
    encoder(torch.zeros(1, 3, 48, 80), torch.zeros(1, 1, 64, 1000))  # tensors need none
    with pytest.raises(ValueError, match="made without inputs") as error:
        encoder.inputs  # noqa: B018
    line = ast.parse(re.search(r"write (AVEncoder\(.*\))$", str(error.value))[1], mode="eval").body
    options = {option.arg: ast.literal_eval(option.value) for option in line.keywords[0].value.keywords}
    assert InputSettings(**options).frames == 1000
    assert options == dict(image_size=(48, 80), mel_bins=64, hop=250, audio_seconds=15.625)
    loaded = AVEncoder.from_config(json.loads(json.dumps(encoder.to_config())))
    with pytest.raises(ValueError, match="made without inputs"):
        loaded.inputs  # noqa: B018


def test_the_normalisation_of_a_timm_model_is_taken():
    """Models of `augreg` were trained with 0.5, those of MAE with ImageNet's mean."""
    for name, mean in (
        ("vit_tiny_patch16_224.augreg_in21k", (0.5,) * 3),
        ("vit_base_patch16_224.mae", IMAGENET_MEAN),
    ):
        with torch.device("meta"):
            image = timm.create_model(name)
            audio = make_vit((1, 128, 192), embed_dim=image.embed_dim, depth=12)
            encoder = AVEncoder(image, audio)
        assert encoder.inputs.image_mean == mean
    assert AVEncoder.from_config(encoder.to_config()).inputs == encoder.inputs


# --- models that exist --------------------------------------------------------------------------------------


def test_real_timm_models_lose_their_heads_and_keep_their_features():
    image_vit = timm.create_model("vit_tiny_patch16_224", pretrained=False)
    audio_vit = timm.create_model("vit_tiny_patch16_224", pretrained=False, in_chans=1, img_size=(128, 192))
    inputs = torch.randn(1, 3, 224, 224), torch.randn(1, 1, 128, 192)
    with torch.no_grad():
        truth = image_vit.eval().forward_features(inputs[0]), audio_vit.eval().forward_features(inputs[1])
        encoder = AVEncoder(image_vit, audio_vit, interactions="none").eval()
        output = encoder(*inputs)
        assert relative_error(output.image, truth[0]) < 1e-5
        assert relative_error(output.audio, truth[1]) < 1e-5
    assert not any("head" in name for name, _ in encoder.named_parameters())
    assert encoder.inputs == InputSettings(image_mean=(0.5,) * 3, image_std=(0.5,) * 3)  # what timm states

    encoder = AVEncoder(image_vit, audio_vit)  # dense
    output = encoder(*inputs)
    assert [tuple(part.shape) for part in output[:3]] == [(1, 197, 192), (1, 97, 192), (1, 16, 192)]


def test_the_norm_behind_an_average_pool_becomes_that_of_the_tokens():
    vit = make_vit(global_pool="avg")
    nn.init.normal_(vit.fc_norm.weight)
    weight = vit.fc_norm.weight.detach().clone()
    encoder = AVEncoder(vit, make_vit(AUDIO), interactions="none", fusion_tokens=4).eval()
    image, audio = make_inputs(dtype=torch.float32)
    layer = encoder(image, audio, return_layers=True).layers[-1].image
    truth = nn.functional.layer_norm(layer, (32,), weight, torch.zeros(32), 1e-6)
    assert relative_error(encoder(image, audio).image, truth) < 1e-6


@pytest.mark.parametrize(
    "size, parameters",
    # Of one ViT: D (patch values + 1) + D positions + depth (12 D^2 + 13 D) + 2 D, by hand.
    [
        ("tiny", (192, 4, 36, 32)),
        ("small", (384, 12, 196, 96)),
        ("base", (768, 12, 196, 96)),
        ("large", (1024, 24, 196, 96)),
    ],
)
def test_presets_have_the_sizes_of_their_names(size, parameters):
    D, depth, image_tokens, audio_tokens = parameters
    with torch.device("meta"):
        encoder = create_encoder(size, "none")
    block = 12 * D**2 + 13 * D
    both = sum(
        D * (values + 1) + D * tokens + depth * block + 2 * D
        for values, tokens in ((3 * 256, image_tokens), (256, audio_tokens))
    )
    assert sum(p.numel() for p in encoder.parameters()) == both + 16 * D + 2 * D


def test_images_need_not_be_square():
    """Height before width, in settings, transformers and config.json, where old models have one number."""
    inputs = InputSettings((48, 80), mel_bins=64, hop=375)
    with torch.device("meta"):
        encoder = create_encoder("tiny", inputs=inputs)
        assert encoder.inputs == inputs and encoder.inputs.image_shape == (48, 80)
        assert encoder(torch.empty(2, 3, 48, 80), torch.empty(2, 1, 64, 128)).image.shape == (2, 15, 192)
        assert AVEncoder(encoder.image, encoder.audio, inputs=inputs).inputs == inputs
        loaded = AVEncoder.from_config(json.loads(json.dumps(encoder.to_config())))
    assert loaded.inputs == inputs and loaded.to_config() == encoder.to_config()
    assert InputSettings(96) == InputSettings((96, 96)) == InputSettings([96, 96])
    assert InputSettings(96).image_size == 96 and InputSettings(96).image_shape == (96, 96)


@pytest.mark.parametrize(
    "interactions, bound, stated",
    [
        ("none", 51.7, 51.6),
        ("dense", 55.7, 55.4),
        ("factorized", 57.0, 56.0),
        ("token", 60.1, 55.5),  # within the released code's
        ("bilinear", None, 58.1),
        ("joint", None, 53.0),
        ("cross", None, 56.1),
        ("wide cross", None, 69.5),
    ],
)
def test_arithmetic_stays_within_its_budget(interactions, bound, stated):
    """GFLOP of a clip, ViT-B, as the README states them; dense within 1.08 of no fusion."""
    with torch.device("meta"):
        options = dict(attn_ratio=1) if interactions == "wide cross" else {}
        flops = count_flops(create_encoder("base", interactions.removeprefix("wide "), **options))
        assert bound is None or 51.5e9 < flops <= bound * 1e9
        assert round(flops / 1e9, 1) == stated
        assert interactions != "dense" or flops <= 1.08 * 51.6e9


# --- bad input ----------------------------------------------------------------------------------------------


def make_gated(shape):
    vit = make_vit(shape)
    vit.blocks[2].attn.gate = nn.Linear(32, 32)
    return vit


GOOD = dict(image=lambda: make_vit(IMAGE), audio=lambda: make_vit(AUDIO))


@pytest.mark.parametrize("name", ["image", "audio"])
@pytest.mark.parametrize(
    "make_bad, message",
    [
        (lambda s: make_vit(s, block_fn=ParallelScalingBlock), "blocks.0. holds a ParallelScalingBlock"),
        (lambda s: make_vit(s, block_fn=ResPostBlock), "blocks.0. holds a ResPostBlock"),
        (lambda s: make_gated(s), "that of blocks.2. is gated"),
        (lambda s: make_vit(s, mlp_layer=timm.layers.GluMlp), "holds a GluMlp where a Mlp belongs"),
        (lambda s: make_vit(s, dynamic_img_size=True), "fixed img_size"),
        (lambda s: make_vit(s, patch_drop_rate=0.5), "patch_drop_rate"),
        (lambda s: nn.Linear(3, 3), "a timm VisionTransformer, got Linear"),
        (lambda s: None, "a timm VisionTransformer, got NoneType"),
        (
            lambda s: VisionTransformerDistilled(
                img_size=s[1:], patch_size=8, embed_dim=32, depth=3, num_heads=2
            ),
            "got VisionTransformerDistilled",
        ),
        (lambda s: timm.create_model("resnet10t", pretrained=False), "got ResNet"),
        (lambda s: make_vit((2, *s[1:])), r"takes inputs of shape \(2, "),
    ],
)
def test_other_architectures_are_refused(name, make_bad, message):
    shape = IMAGE if name == "image" else AUDIO
    vits = {key: make() for key, make in GOOD.items()} | {name: make_bad(shape)}
    with pytest.raises(ValueError, match=f"^{name} .*{message}"):
        AVEncoder(**vits)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(interactions="sparse"), "interactions must be one of .* got 'sparse'"),
        (dict(interactions="token", pair_bias=True), "pair_bias needs .* got 'token'"),
        (dict(fusion_tokens=0), "fusion_tokens must be a positive integer, got 0"),
        (dict(fusion_tokens=2.5), "fusion_tokens must be a positive integer, got 2.5"),
        (dict(num_heads=0), "num_heads must be a positive integer, got 0"),
        (dict(num_heads="3"), "num_heads must be a positive integer, got '3'"),
        (dict(fusion_layers=[3]), r"fusion_layers must be .* 0\.\.2, got \[3\]"),
        (dict(fusion_layers=[-1]), "fusion_layers"),
        (dict(fusion_layers="last"), "fusion_layers must be .* got 'last'"),
        (dict(fusion_layers=[True]), "fusion_layers"),
        (dict(interactions="none", fusion_layers="last"), "fusion_layers must be .* got 'last'"),
        (dict(pair_bias="x"), "pair_bias must be one of False, 'position', 'time', got 'x'"),
        (dict(inputs={"image_size": 24}), "inputs must be InputSettings, got dict"),
        (dict(fusion_layers=None), "fusion_layers must be .* got None"),
        (dict(fusion_layers=1.5), "fusion_layers must be .* got 1.5"),
        (dict(num_heads=3), "num_heads=3"),
        (dict(attn_ratio=0.3), "attn_ratio=0.3"),
        (dict(drop_path=1.0), "drop_path must .* got 1.0"),
        (dict(interactions="factorized", image_aggregation_tokens=0), "image_aggregation_tokens"),
        (
            dict(image=lambda: make_vit((3, 24, 32)), inputs=InputSettings((32, 24), mel_bins=16, hop=1200)),
            r"image takes .* \(3, 24, 32\), while inputs describes \(3, 32, 24\)",
        ),
        (dict(inputs=InputSettings()), "image takes inputs of shape .* inputs describes"),
        (
            dict(inputs=InputSettings(image_size=24, mel_bins=16, hop=1000)),
            r"audio takes .* \(1, 16, 40\), while inputs describes \(1, 16, 48\)",
        ),
    ],
)
def test_bad_settings_are_named(options, message):
    vits = {name: options.get(name, make)() for name, make in GOOD.items()}
    settings = {name: value for name, value in options.items() if name not in vits}
    with pytest.raises(ValueError, match=message):
        AVEncoder(**vits, **settings)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(image=None, audio=None), "image and audio cannot both be None"),
        (
            dict(image=torch.zeros(2, 3, 24, 32)),
            r"image must be \(B, 3, 24, 24\), got shape \(2, 3, 24, 32\)",
        ),
        (dict(audio=torch.zeros(2, 16, 40)), r"audio must be \(B, 1, 16, 40\)"),
        (
            dict(audio=torch.zeros(2, 1, 16, 40).int()),
            "audio must be a floating point tensor, got torch.int32",
        ),
        (dict(image=[1]), "image must be a floating point tensor, got list"),
        (
            dict(image=torch.zeros(2, 3, 24, 24)),
            "image must have the dtype of the weights, torch.float64, got torch.float32",
        ),
        (dict(audio=torch.zeros(2, 1, 16, 40).half()), "audio must have the dtype of the weights"),
        (dict(audio=torch.zeros(3, 1, 16, 40).double()), "audio must have the batch size of image, 2, got 3"),
        (
            dict(audio=torch.zeros(2, 1, 16, 40).double().to("meta")),
            "audio must be on the device of image, cpu",
        ),
        (dict(image_mask=torch.ones(2, 9)), "image_mask must be a bool tensor, got torch.float32"),
        (dict(image_mask=torch.ones(2, 10).bool()), r"image_mask must have shape \(2, 9\), got \(2, 10\)"),
        (dict(audio_mask=torch.ones(2, 10, device="meta").bool()), "audio_mask must be on cpu, got meta"),
        (dict(audio_keep=torch.zeros(2, 3)), "audio_keep must be a long tensor, got torch.float32"),
        (dict(audio_keep=torch.zeros(2, 11).long()), r"audio_keep must be \(2, n\) with 0 < n <= 10"),
        (dict(image_keep=torch.zeros(2, 0).long()), "image_keep must be"),
        (dict(image_keep=torch.zeros(9).long()), r"image_keep must be \(2, n\)"),
        (dict(image_keep=torch.tensor([[0], [9]])), r"image_keep must hold indices in 0\.\.8, got 0\.\.9"),
        (dict(image_keep=torch.tensor([[0], [-1]])), r"image_keep must hold indices in 0\.\.8, got -1\.\.0"),
        (dict(image_keep=torch.zeros(2, 1, device="meta").long()), "image_keep must be on cpu, got meta"),
        (dict(image=None, image_keep=torch.zeros(2, 1).long()), "image_keep needs image, which is None"),
        (dict(audio=None, audio_mask=torch.ones(2, 10).bool()), "audio_mask needs audio, which is None"),
        (dict(audio=None, audio_present=torch.ones(2).bool()), "audio_present needs audio, which is None"),
        (dict(image_present=torch.ones(2)), "image_present must be a bool tensor, got torch.float32"),
        (dict(audio_present=torch.ones(3).bool()), r"audio_present must have shape \(2,\), got \(3,\)"),
    ],
)
def test_bad_inputs_are_named(options, message):
    inputs = dict(zip(("image", "audio"), make_inputs(), strict=True))
    with pytest.raises(ValueError, match=f"^{message}"):
        make_encoder()(**inputs | options)


@pytest.mark.parametrize(
    "make_bad, message",
    [
        (lambda: create_encoder("huge"), "size must be one of .* got 'huge'"),
        (lambda: create_encoder("tiny", "sparse"), "interactions must be one of .* got 'sparse'"),
        (lambda: create_encoder("tiny", inputs=InputSettings(image_size=100)), "image_size=100"),
        (lambda: create_encoder("tiny", inputs=InputSettings((96, 100))), r"image_size=\(96, 100\)"),
        (lambda: create_encoder("tiny", inputs={"image_size": 96}), "inputs must be InputSettings, got dict"),
        (lambda: create_encoder("tiny", inputs=InputSettings(hop=480)), "frames=100"),
    ],
)
def test_bad_presets_are_named(make_bad, message):
    with pytest.raises(ValueError, match=message):
        make_bad()


def test_a_config_makes_weights_as_fresh_as_those_of_timm():
    encoder = AVEncoder.from_config(make_encoder().to_config())
    for vit in encoder.image, encoder.audio:
        weight = torch.cat([block.mlp.fc1.weight.flatten() for block in vit.blocks])
        assert weight.std().item() == pytest.approx(0.02, rel=0.1)
        assert not any(block.mlp.fc1.bias.any() for block in vit.blocks) and vit.pos_embed.any()
