"""Joint attention and cross-attention, the ways to fuse without fusion tokens, against attention written out
by hand clip by clip: masked tokens and missing modalities are left out of it, instead of masked.
"""

import pytest
import torch
from by_hand import cross_attended, heads_of, run_block
from models import (
    AUDIO,
    AUDIO_TOKENS,
    IMAGE,
    IMAGE_TOKENS,
    gradients,
    make_encoder,
    make_inputs,
    make_vit,
    randomized,
    relative_error,
)

from avfuse import AVMAE, AVEncoder

EXACT = 1e-12
WAYS = ("joint", "cross")
every_way = pytest.mark.parametrize("interactions", WAYS)
VITS = {
    "plain": dict(),
    "class and register tokens": dict(class_token=True, reg_tokens=2),
    "qk-norm, LayerScale": dict(qk_norm=True, init_values=0.1, class_token=True),
    "scaled norms": dict(scale_attn_norm=True, scale_mlp_norm=True),
    "no biases": dict(qkv_bias=False, proj_bias=False),
}


def random_mask(batch, tokens):
    mask = torch.rand(batch, tokens) > 0.4
    mask[1] = True
    return mask


def selections():
    """Options of a call on three clips, by what they do."""
    image_keep = torch.rand(3, IMAGE_TOKENS).argsort(1)[:, :5]
    audio_keep = torch.rand(3, AUDIO_TOKENS).argsort(1)[:, :4]
    masks = random_mask(3, IMAGE_TOKENS), random_mask(3, AUDIO_TOKENS)
    masks[0][2] = False
    masks[1][0] = False
    nothing = masks[0].clone(), masks[1].clone()
    nothing[0][0] = False  # nor any sound in that clip
    return {
        "all": {},
        "kept": dict(image_keep=image_keep, audio_keep=audio_keep),
        "masked": dict(image_mask=masks[0], audio_mask=masks[1]),
        "one masked": dict(audio_mask=masks[1]),
        "kept and masked": dict(image_keep=image_keep, image_mask=masks[0]),
        "nothing left": dict(image_mask=nothing[0], audio_mask=nothing[1]),
        "absent": dict(image_present=torch.tensor([True, False, True]), audio_present=torch.arange(3) != 0),
    }


# --- by hand ------------------------------------------------------------------------------------------------


def run_clip(encoder, pixels, keeps, masks):
    """Tokens after each layer of one clip; a modality that is None is in neither list."""
    vits = [getattr(encoder, name) for name in ("image", "audio")]
    tokens, seen = [None, None], [None, None]
    for n, vit in enumerate(vits):
        if pixels[n] is None:
            continue
        prefix, (embedded,) = vit.num_prefix_tokens, vit._pos_embed(vit.patch_embed(pixels[n][None]))
        patches = torch.arange(len(embedded) - prefix) if keeps[n] is None else keeps[n]
        tokens[n] = torch.cat([embedded[:prefix], embedded[prefix + patches]])
        mask = torch.ones(len(patches)).bool() if masks[n] is None else masks[n][patches]
        seen[n] = torch.cat([torch.ones(prefix).bool(), mask])
    layers, both = [], tokens[0] is not None and tokens[1] is not None
    for layer in range(encoder.depth):
        others, before = [[], []], list(tokens)
        if both and layer in encoder.fusion_layers:
            for n, vit in enumerate(vits):
                own, other, prefix = before[n], 1 - n, vit.num_prefix_tokens
                patches = own[prefix:][seen[n][prefix:]]
                if encoder.settings["interactions"] == "joint":
                    block = vit.blocks[layer]
                    others[other] = [heads_of(block.attn, block.norm1(patches))]
                else:
                    cross = encoder.fusion_blocks[str(layer)]
                    tokens[other] = cross_attended((cross.image, cross.audio)[other], before[other], patches)
        for n, name in enumerate(("image", "audio")):
            at = encoder.block_layers[name]
            if tokens[n] is not None and layer in at:
                block = vits[n].blocks[list(at).index(layer)]
                tokens[n] = run_block(block, tokens[n], seen[n], others[n])
        layers.append(list(tokens))
    return layers


def run_by_hand(encoder, *pixels, **options):
    """Image and audio tokens after each layer."""
    clips = []
    for index in range(len(next(x for x in pixels if x is not None))):
        keeps, masks, inputs = [], [], []
        for name, x in zip(("image", "audio"), pixels, strict=True):
            keep, mask, present = (options.get(f"{name}_{what}") for what in ("keep", "mask", "present"))
            clip = None if x is None else x[index]
            mask = None if mask is None else mask[index]
            if present is not None and not present[index]:
                clip, mask = torch.zeros_like(clip), torch.zeros(len(mask_like(name))).bool()
            keeps.append(None if keep is None else keep[index])
            masks.append(mask)
            inputs.append(clip)
        clips.append(run_clip(encoder, inputs, keeps, masks))
    layers = zip(*clips, strict=True)
    return [
        [None if part[0] is None else torch.stack(part) for part in zip(*layer, strict=True)]
        for layer in layers
    ]


def mask_like(name):
    return range(IMAGE_TOKENS if name == "image" else AUDIO_TOKENS)


def assert_same(output, layers, encoder):
    last = [norm(x) for norm, x in zip((encoder.image.norm, encoder.audio.norm), layers[-1], strict=True)]
    ours = [(layer.image, layer.audio) for layer in output.layers] + [(output.image, output.audio)]
    for mine, true in zip(ours, [*layers, last], strict=True):
        for part, true_part in zip(mine, true, strict=True):
            assert relative_error(part, true_part) < EXACT


# --- the layers ---------------------------------------------------------------------------------------------


@every_way
@pytest.mark.parametrize("vit", VITS)
@pytest.mark.parametrize("what", selections())
def test_outputs_and_all_gradients(interactions, vit, what):
    encoder, inputs = make_encoder(interactions, vit=VITS[vit]), make_inputs(3)
    for part in inputs:
        part.requires_grad_()
    options = selections()[what]
    output, layers = encoder(*inputs, **options, return_layers=True), run_by_hand(encoder, *inputs, **options)
    assert_same(output, layers, encoder)
    assert all(torch.equal(x.fusion, encoder.fusion_tokens.expand(3, -1, -1)) for x in output.layers)
    assert torch.equal(output.fusion, encoder.fusion_norm(encoder.fusion_tokens).expand(3, -1, -1))

    weights = [torch.randn_like(part) for part in layers[-1]]
    grads, true_grads = (
        gradients(encoder, sum((w * x).sum() for w, x in zip(weights, parts, strict=True)), *inputs)
        for parts in ((output.layers[-1].image, output.layers[-1].audio), layers[-1])
    )
    largest = max(grad.abs().max() for grad in true_grads.values())
    for name, grad in grads.items():
        assert (grad - true_grads[name]).abs().max() < EXACT * largest, name


@every_way
@pytest.mark.parametrize("fusion_layers", [[2], [0, 1], "none"])
def test_layers_that_do_not_fuse_are_plain(interactions, fusion_layers):
    encoder, inputs = make_encoder(interactions, fusion_layers=fusion_layers), make_inputs()
    output = encoder(*inputs, return_layers=True)
    assert_same(output, run_by_hand(encoder, *inputs), encoder)
    assert len(encoder.fusion_blocks) == (len(encoder.fusion_layers) if interactions == "cross" else 0)


@every_way
@pytest.mark.parametrize("vit", ["plain", "class and register tokens"])
def test_one_modality_without_the_other_is_plain_timm(interactions, vit):
    encoder, (image, audio) = make_encoder(interactions, vit=VITS[vit]), make_inputs()
    assert relative_error(encoder(image, None).image, encoder.image.forward_features(image)) < EXACT
    nowhere = dict(image_present=torch.zeros(2).bool())
    absent, masked = encoder(None, audio), encoder(torch.full_like(image, torch.nan), audio, **nowhere)
    assert relative_error(absent.audio, encoder.audio.forward_features(audio)) < EXACT
    assert relative_error(masked.audio, absent.audio) < EXACT and masked.image.isfinite().all()


@every_way
def test_prefix_tokens_of_the_other_modality_are_not_read(interactions):
    encoder, inputs = make_encoder(interactions, vit=dict(class_token=True, depth=1)), make_inputs()
    before = encoder(*inputs)
    with torch.no_grad():
        encoder.image.cls_token += 1.0
    after = encoder(*inputs)
    assert torch.equal(after.audio, before.audio) and not torch.equal(after.image, before.image)


def test_cross_attention_between_unequal_transformers():
    """Where a block of the shallower one waits, its tokens are still crossed."""
    audio = make_vit(AUDIO, embed_dim=48, depth=2, num_heads=4)
    encoder = AVEncoder(make_vit(), audio, interactions="cross", block_layers=(0, 2), fusion_tokens=4)
    encoder, inputs = randomized(encoder), make_inputs()
    assert_same(encoder(*inputs, return_layers=True), run_by_hand(encoder, *inputs), encoder)
    assert encoder.context_to_audio is None  # nobody would read through it
    mae = AVMAE(encoder, decoder_dim=16, decoder_depth=1, decoder_heads=2).double()
    grads = gradients(mae, mae(*inputs).loss)
    trained = {name for name, parameter in mae.named_parameters() if parameter.requires_grad}
    assert {name for name, grad in grads.items() if grad.abs().max() > 0} == trained


def test_cross_attention_is_as_wide_and_as_random_as_told():
    encoder = make_encoder("cross", attn_ratio=1.0, num_heads=4, drop=0.5, drop_path=0.9)
    cross = encoder.fusion_blocks["1"].audio
    assert cross.query.weight.shape == (32, 32) and cross.num_heads == 4
    inputs = make_inputs()
    assert_same(encoder(*inputs, return_layers=True), run_by_hand(encoder, *inputs), encoder)
    encoder.train()
    assert not torch.equal(encoder(*inputs).image, encoder(*inputs).image)


# --- what it refuses ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "audio, options, message",
    [
        (dict(embed_dim=48), {}, "interactions='joint' needs transformers of one width, got 32 .* and 48"),
        (dict(num_heads=4), {}, "needs equal heads of image and audio, got 2 of width 16 and 4 of width 8"),
        (
            dict(depth=2),
            dict(block_layers=(0, 2)),
            r"fusion_layers may hold \[0, 2\], got \[0, 1, 2\]",
        ),
    ],
)
def test_what_cannot_attend_jointly_is_refused(audio, options, message):
    with pytest.raises(ValueError, match=message):
        AVEncoder(make_vit(IMAGE), make_vit(AUDIO, **audio), interactions="joint", **options)


def test_joint_attention_of_unequal_depth_fuses_where_both_have_blocks():
    audio = make_vit(AUDIO, depth=2)
    options = dict(block_layers=(0, 2), fusion_layers=(2,), fusion_tokens=4)
    encoder, inputs = randomized(AVEncoder(make_vit(), audio, interactions="joint", **options)), make_inputs()
    output = encoder(*inputs, return_layers=True)
    before, after = output.layers[1], output.layers[2]
    blocks = encoder.image.blocks[2], audio.blocks[1]
    others = [heads_of(block.attn, block.norm1(x[0])) for block, x in zip(blocks, before[:2], strict=True)]
    for n in range(2):
        true = run_block(blocks[n], before[n][0], torch.ones(before[n].shape[1]).bool(), [others[1 - n]])
        assert relative_error(after[n][0], true) < EXACT


def test_hooks_that_joint_attention_would_run_too_late_are_refused():
    for part in ("image.blocks.1", "audio.blocks.0.attn"):
        encoder = make_encoder("joint")
        encoder.get_submodule(part).register_forward_pre_hook(lambda *_: None)
        with pytest.raises(ValueError, match="joint attention cannot run the pre-hooks of a Context"):
            encoder(*make_inputs())
        for module in encoder.modules():  # as tools do that watch all of a model
            module.register_forward_pre_hook(lambda *_: None)
        encoder(*make_inputs())


@every_way
def test_there_is_no_attention_of_fusion_tokens_to_show(interactions):
    encoder = make_encoder(interactions)
    with pytest.raises(ValueError, match=f"interactions='{interactions}': .* no weights to show"):
        encoder.fusion_attention(*make_inputs())
    assert not encoder.shows_attention and make_encoder().shows_attention
