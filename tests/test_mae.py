"""The masked autoencoder against loops and numpy: patches, targets, losses, masks, decoders."""

import math

import numpy as np
import pytest
import torch
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
from torch import nn

from avfuse import AVMAE, AVEncoder, InputSettings, create_encoder
from avfuse.fusion import VARIANTS
from avfuse.mae import MaskSampler, count_removed, info_nce, patchify, random_removed, unpatchify

EXACT = 1e-11  # float64 rounding through the model, relative to the largest value
TOKENS = dict(image=IMAGE_TOKENS, audio=AUDIO_TOKENS)
every_interaction = pytest.mark.parametrize("interactions", VARIANTS)


def make_mae(interactions="dense", *, vit=None, layers="all", **options):
    """Decoders of width 16, 2 layers and 2 heads; keeps 2 of 9 image and 3 of 10 audio patches."""
    settings = dict(decoder_dim=16, decoder_depth=2, decoder_heads=2, audio_mask_ratio=0.7) | options
    return randomized(AVMAE(make_encoder(interactions, vit=vit, fusion_layers=layers), **settings))


def make_removed(batch=2, image=7, audio=7):
    """Random masks that hide so many patches of every clip."""
    return {
        f"{name}_removed": torch.rand(batch, tokens).argsort(1) < hidden
        for name, tokens, hidden in (("image", IMAGE_TOKENS, image), ("audio", AUDIO_TOKENS, audio))
    }


def keep_of(removed):
    return torch.stack([row.logical_not().nonzero().flatten() for row in removed])


# --- patches ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "channels, size, patch", [(3, (24, 24), (8, 8)), (1, (16, 40), (8, 8)), (2, (6, 20), (3, 5))]
)
def test_patches_are_rows_then_columns_then_pixels_then_channels(channels, size, patch):
    pixels = torch.randn(2, channels, *size)
    p, q = patch
    rows, columns = size[0] // p, size[1] // q
    truth = torch.empty(2, rows * columns, p * q * channels)
    for r in range(rows):
        for c in range(columns):
            for y in range(p):
                for x in range(q):
                    for channel in range(channels):
                        value = (y * q + x) * channels + channel
                        truth[:, r * columns + c, value] = pixels[:, channel, r * p + y, c * q + x]
    assert torch.equal(patchify(pixels, patch), truth)
    assert torch.equal(unpatchify(truth, patch, (rows, columns)), pixels)


def test_patches_are_in_the_order_of_the_tokens():
    """A light patch of the image is the light row of the targets and the light token of the embedding."""
    vit = make_vit((3, 24, 24)).eval()
    nn.init.ones_(vit.patch_embed.proj.weight)
    for token in range(9):
        pixels = torch.zeros(1, 3, 24, 24)
        pixels[:, :, token // 3 * 8 :, token % 3 * 8 :][:, :, :8, :8] = 1.0
        assert patchify(pixels, (8, 8)).sum(-1).argmax() == token
        assert vit.patch_embed(pixels).sum(-1).argmax() == token


# --- targets and losses -------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm_target", [True, False])
def test_targets_by_numpy(norm_target):
    mae = make_mae(norm_target=norm_target)
    for name, pixels in zip(("image", "audio"), make_inputs(dtype=torch.float32), strict=True):
        patches = patchify(pixels * 3 + 1, (8, 8)).double().numpy()
        if norm_target:
            deviation = np.sqrt(patches.var(-1, keepdims=True, ddof=1) + 1e-6)
            patches = (patches - patches.mean(-1, keepdims=True)) / deviation
        ours = mae.target(name, pixels * 3 + 1)
        np.testing.assert_allclose(ours.numpy(), patches, rtol=1e-4, atol=1e-5)


def test_targets_of_a_flat_patch_are_finite():
    mae = make_mae()
    assert not mae.target("image", torch.full((1, *IMAGE), 0.5)).any()
    assert mae.target("image", torch.zeros(1, *IMAGE, dtype=torch.bfloat16)).dtype == torch.float32


@every_interaction
@pytest.mark.parametrize("norm_target", [True, False])
def test_losses_are_of_the_hidden_patches_only(interactions, norm_target):
    mae, inputs = make_mae(interactions, norm_target=norm_target), make_inputs()
    removed = make_removed()
    output = mae(*inputs, **removed)
    total = 0.0
    for name, pixels, patches in zip(("image", "audio"), inputs, TOKENS.values(), strict=True):
        errors, pred = [], getattr(output, f"{name}_pred")
        assert torch.equal(getattr(output, f"{name}_removed"), removed[f"{name}_removed"])
        assert pred.shape == (2, patches, 64 * pixels.shape[1])
        target = mae.target(name, pixels)
        for clip in range(2):
            for patch in range(patches):
                if removed[f"{name}_removed"][clip, patch]:
                    errors.append(((pred[clip, patch] - target[clip, patch]) ** 2).mean().item())
        total += np.mean(errors)
        assert getattr(output, f"{name}_loss").item() == pytest.approx(np.mean(errors), rel=1e-6)
    assert output.loss.item() == pytest.approx(total, rel=1e-6)


@every_interaction
def test_hidden_patches_reach_no_prediction(interactions):
    """What is under the masks changes targets, and nothing else."""
    mae, (image, audio) = make_mae(interactions), make_inputs()
    removed = make_removed()
    before = mae(image, audio, **removed)
    hidden = patchify(image, (8, 8)), patchify(audio, (8, 8))
    for patches, mask in zip(hidden, removed.values(), strict=True):
        patches[mask] = 9.0
    image, audio = unpatchify(hidden[0], (8, 8), (3, 3)), unpatchify(hidden[1], (8, 8), (2, 5))
    after = mae(image, audio, **removed)
    assert torch.equal(after.image_pred, before.image_pred)
    assert torch.equal(after.audio_pred, before.audio_pred)
    assert after.image_loss != before.image_loss and after.audio_loss != before.audio_loss


# --- masks --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "patches, ratio, kept",
    [(196, 0.75, 49), (96, 0.8, 19), (36, 0.75, 9), (32, 0.8, 6), (9, 0.7, 2), (10, 0.9, 1)],
)
def test_what_is_kept_is_rounded_down(patches, ratio, kept):
    assert patches - count_removed("ratio", patches, ratio) == kept
    assert (~random_removed(patches, ratio)).sum() == kept


def test_random_masks_have_the_ratio_in_every_clip():
    encoder = create_encoder("tiny")
    mae = AVMAE(encoder, decoder_dim=16, decoder_depth=1, decoder_heads=1)
    output = mae(torch.randn(3, 3, 96, 96), torch.randn(3, 1, 64, 128))
    assert (~output.image_removed).sum(1).tolist() == [9, 9, 9]
    assert (~output.audio_removed).sum(1).tolist() == [6, 6, 6]
    assert not torch.equal(output.image_removed[0], output.image_removed[1])
    torch.manual_seed(0)
    first = mae(torch.randn(3, 3, 96, 96), torch.randn(3, 1, 64, 128))
    torch.manual_seed(0)
    assert torch.equal(
        mae(torch.randn(3, 3, 96, 96), torch.randn(3, 1, 64, 128)).image_removed, first.image_removed
    )


def test_every_patch_is_hidden_equally_often():
    generator = torch.Generator().manual_seed(0)
    often = sum(random_removed(20, 0.75, generator).double() for _ in range(4000)) / 4000
    assert (often - 0.75).abs().max() < 4 * math.sqrt(0.75 * 0.25 / 4000)  # standard errors


def test_masks_of_a_clip_come_from_its_own_generator():
    sampler = make_mae().mask_sampler()
    assert sampler == MaskSampler(9, 10, 0.75, 0.7)
    first, same, other = (sampler(torch.Generator().manual_seed(seed)) for seed in (5, 5, 6))
    torch.manual_seed(1)  # the global generator takes no part
    assert all(torch.equal(first[name], same[name]) for name in ("image_removed", "audio_removed"))
    assert not torch.equal(first["audio_removed"], other["audio_removed"])
    assert first["image_removed"].shape == (9,) and first["image_removed"].sum() == 7
    assert first["audio_removed"].shape == (10,) and first["audio_removed"].sum() == 7


def test_given_masks_may_hide_another_share():
    mae, inputs = make_mae(), make_inputs()
    output = mae(*inputs, **make_removed(image=4, audio=9))
    assert output.image_removed.sum(1).tolist() == [4, 4] and output.audio_removed.sum(1).tolist() == [9, 9]
    assert output.loss.isfinite()


def test_the_encoder_sees_the_kept_patches_in_order():
    mae, inputs = make_mae(vit=dict(class_token=True)), make_inputs()
    removed, seen = make_removed(), {}
    mae.encoder.register_forward_pre_hook(lambda _, args, kwargs: seen.update(kwargs), with_kwargs=True)
    mae(*inputs, **removed)
    assert torch.equal(seen["image_keep"], keep_of(removed["image_removed"]))
    assert torch.equal(seen["audio_keep"], keep_of(removed["audio_removed"]))
    assert seen["image_present"] is None and seen["audio_present"] is None


# --- decoders -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["image", "audio"])
@pytest.mark.parametrize("vit", [dict(), dict(class_token=True, reg_tokens=1)])
@every_interaction
def test_decoders_by_hand(name, vit, interactions):
    """Fusion tokens without positions, then every patch in its place: what was kept, or the mask token."""
    mae, inputs = make_mae(interactions, vit=vit), make_inputs()
    removed = make_removed()
    keep = {f"{key}_keep": keep_of(removed[f"{key}_removed"]) for key in TOKENS}
    latent = mae.encoder(*inputs, **keep)
    decoder = getattr(mae, f"{name}_decoder")
    prefix, truth = getattr(mae.encoder, name).num_prefix_tokens, []
    for clip in range(2):
        visible = iter(getattr(latent, name)[clip, prefix:])
        tokens = [decoder.embed(token) for token in latent.fusion[clip]]
        for patch, hidden in enumerate(removed[f"{name}_removed"][clip]):
            token = decoder.mask_token[0, 0] if hidden else decoder.embed(next(visible))
            tokens.append(token + decoder.pos_embed[0, patch])
        tokens = torch.stack(tokens)[None]
        for block in decoder.blocks:
            tokens = block(tokens)
        truth.append(decoder.pred(decoder.norm(tokens))[0, 4:])
    assert relative_error(getattr(mae(*inputs, **removed), f"{name}_pred"), torch.stack(truth)) < EXACT


def test_decoders_place_visible_tokens_by_their_indices():
    decoder = make_mae().image_decoder
    fusion, visible = torch.randn(2, 4, 32).double(), torch.randn(2, 5, 32).double()
    keep = torch.rand(2, IMAGE_TOKENS).argsort(1)[:, :5]
    order = torch.tensor([3, 0, 4, 1, 2])
    truth = decoder(fusion, visible, keep)
    assert relative_error(decoder(fusion, visible[:, order], keep[:, order]), truth) < EXACT
    assert relative_error(decoder(fusion, visible[:, order], keep), truth) > 1e-3


@pytest.mark.parametrize("interactions", ["dense", "factorized", "token"])
def test_decoders_of_fusion_tokens_alone_see_no_patches(interactions):
    mae, removed = make_mae(interactions, decode_from="fusion"), make_removed()
    inputs = make_inputs()
    latent = mae.encoder(*inputs, **{f"{name}_keep": keep_of(removed[f"{name}_removed"]) for name in TOKENS})
    output = mae(*inputs, **removed)
    for name, count in TOKENS.items():
        decoder = getattr(mae, f"{name}_decoder")
        masked = (decoder.mask_token + decoder.pos_embed).expand(2, count, -1)
        tokens = torch.cat([decoder.embed(latent.fusion), masked], dim=1)
        for block in decoder.blocks:
            tokens = block(tokens)
        truth = decoder.pred(decoder.norm(tokens[:, latent.fusion.shape[1] :]))
        assert relative_error(getattr(output, f"{name}_pred"), truth) < EXACT
    output.loss.backward()
    last = [mae.encoder.image.blocks[-1], mae.encoder.audio.blocks[-1], mae.encoder.image.norm]
    without = {id(parameter) for part in [*last, mae.encoder.audio.norm] for parameter in part.parameters()}
    for name, parameter in mae.named_parameters():
        trained = parameter.requires_grad and id(parameter) not in without
        assert (parameter.grad is not None) == trained, name
    assert mae.to_config()["decode_from"] == "fusion"
    assert not type(mae).from_config(mae.to_config()).image_decoder.sees_patches
    old = {name: value for name, value in mae.to_config().items() if name != "decode_from"}
    assert AVMAE.from_config(old).image_decoder.sees_patches  # a model that was saved before


def test_decoders_of_fusion_tokens_alone_need_them_and_one_frame():
    for encoder in create_encoder("tiny", "joint"), create_encoder("tiny", fusion_layers="none"):
        with pytest.raises(ValueError, match="decode_from='fusion' needs .*: encoder has no fusion tokens"):
            AVMAE(encoder, decode_from="fusion")
    with pytest.raises(ValueError, match="decode_from='fusion' needs .*: encoder has 8 frames"):
        AVMAE(create_encoder("micro", frames=8), decode_from="fusion")
    with pytest.raises(ValueError, match="decode_from must be one of"):
        AVMAE(create_encoder("micro"), decode_from="tokens")


def test_decoder_positions_are_sines_and_cosines_of_row_and_column():
    mae = AVMAE(make_encoder().float(), decoder_dim=16, decoder_depth=1, decoder_heads=2)
    rates = 10000.0 ** (-np.arange(4) / 4)
    for decoder, columns in (mae.image_decoder, 3), (mae.audio_decoder, 5):
        assert not decoder.pos_embed.requires_grad
        for token, position in enumerate(decoder.pos_embed[0].numpy()):
            angles = np.stack([at * rates for at in divmod(token, columns)])
            np.testing.assert_allclose(
                position, np.stack([np.sin(angles), np.cos(angles)]).flatten(), atol=1e-6
            )


def test_layer_norm_epsilons():
    """1e-6 in both transformers and, so that they can be shared, in fusion blocks; 1e-5 elsewhere."""
    for name, layer in AVMAE(create_encoder("tiny")).named_modules():
        if isinstance(layer, nn.LayerNorm):
            in_layers = name.startswith(("encoder.image.", "encoder.audio.", "encoder.fusion_blocks."))
            assert layer.eps == (1e-6 if in_layers else 1e-5), name


def test_the_papers_defaults():
    with torch.device("meta"):
        mae = AVMAE(create_encoder("base"))
    assert mae.settings == dict(
        decoder_dim=512,
        decoder_depth=8,
        decoder_heads=16,
        image_mask_ratio=0.75,
        audio_mask_ratio=0.8,
        norm_target=True,
        decode_from="patches",
        tubes=False,
        contrastive=0.0,
    )
    assert mae.mask_sampler() == MaskSampler(196, 96, 0.75, 0.8)
    for decoder, values in (mae.image_decoder, 768), (mae.audio_decoder, 256):
        assert len(decoder.blocks) == 8 and decoder.embed.weight.shape == (512, 768)
        assert decoder.blocks[0].attn.num_heads == 16 and decoder.blocks[0].mlp.fc1.out_features == 4 * 512
        assert decoder.pred.weight.shape == (values, 512)


# --- absent modalities --------------------------------------------------------------------------------------


@every_interaction
@pytest.mark.parametrize("absent", ["image", "audio"])
def test_an_absent_modality_is_masked_everywhere_and_leaves_its_loss(interactions, absent):
    mae, inputs = make_mae(interactions), make_inputs(batch=3)
    removed = make_removed(batch=3)
    present = torch.tensor([True, False, True])
    output = mae(*inputs, **removed, **{f"{absent}_present": present})

    # What encoder and decoders make of it is what they make of an explicit mask over nothing.
    inputs[absent == "audio"][1] = 0.0
    keep = {f"{key}_keep": keep_of(removed[f"{key}_removed"]) for key in TOKENS}
    mask = {f"{absent}_mask": present[:, None].expand(3, TOKENS[absent])}
    latent = mae.encoder(*inputs, **keep, **mask)
    truth = mae.decode(latent, keep["image_keep"], keep["audio_keep"])
    assert torch.equal(output.image_pred, truth[0]) and torch.equal(output.audio_pred, truth[1])

    # Its loss is that of the clips that have it; the other loss is over all clips.
    both = mae(inputs[0][[0, 2]], inputs[1][[0, 2]], **{name: mask[[0, 2]] for name, mask in removed.items()})
    assert getattr(output, f"{absent}_loss").item() == pytest.approx(
        getattr(both, f"{absent}_loss").item(), rel=1e-6
    )
    other = "audio" if absent == "image" else "image"
    pixels = dict(zip(TOKENS, inputs, strict=True))[other]
    errors = (getattr(output, f"{other}_pred").float() - mae.target(other, pixels)).square().mean(-1)
    assert getattr(output, f"{other}_loss").item() == pytest.approx(
        errors[removed[f"{other}_removed"]].mean().item(), rel=1e-6
    )


@every_interaction
@pytest.mark.parametrize("absent", ["image", "audio"])
def test_what_stands_in_for_an_absent_modality_changes_nothing(interactions, absent):
    mae, removed = make_mae(interactions), make_removed()
    inputs = dict(zip(TOKENS, make_inputs(), strict=True))
    present = {f"{absent}_present": torch.tensor([True, False])}
    before = mae(**inputs, **removed, **present)
    inputs[absent] = torch.cat([inputs[absent][:1], 7 * torch.randn_like(inputs[absent][1:])])
    after = mae(**inputs, **removed, **present)
    other = "audio" if absent == "image" else "image"
    assert torch.equal(getattr(after, f"{other}_pred"), getattr(before, f"{other}_pred"))
    assert torch.equal(after.loss, before.loss)
    inputs[absent][1] = torch.nan
    pixels = inputs[absent].requires_grad_()  # as those that a front end has learned
    spoilt = mae(**inputs, **removed, **present)
    assert torch.equal(spoilt.loss, before.loss)
    assert not torch.autograd.grad(spoilt.loss, pixels, retain_graph=True)[0][1].any()
    assert all(grad.isfinite().all() for grad in gradients(mae, spoilt.loss).values())


@every_interaction
def test_nothing_present_is_no_loss_and_no_nan(interactions):
    mae, nobody = make_mae(interactions), torch.zeros(2).bool()
    output = mae(*make_inputs(), image_present=nobody, audio_present=nobody)
    assert output.loss == output.image_loss == output.audio_loss == 0
    grads = gradients(mae, output.loss)
    assert not any(grad.any() for grad in grads.values())  # NaN would count as something


def test_present_everywhere_changes_nothing():
    mae, inputs, removed = make_mae(), make_inputs(), make_removed()
    everybody = torch.ones(2).bool()
    truth = mae(*inputs, **removed).loss
    given = mae(*inputs, **removed, image_present=everybody, audio_present=everybody).loss
    assert relative_error(given, truth) < 1e-6


# --- bad input ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(encoder=lambda: make_vit()), "encoder must be an AVEncoder, got VisionTransformer"),
        (dict(image_mask_ratio=0.0), "image_mask_ratio=0.0 must hide some and keep some of 9 patches"),
        (dict(audio_mask_ratio=1.0), "audio_mask_ratio=1.0 must hide some and keep some of 10 patches"),
        (dict(image_mask_ratio=0.95), "image_mask_ratio=0.95"),  # keeps less than one patch of 9
        (dict(audio_mask_ratio=1e-9), "audio_mask_ratio=1e-09"),  # hides less than one of 10
        (dict(image_mask_ratio=float("nan")), "image_mask_ratio=nan"),
        (dict(image_mask_ratio="x"), "image_mask_ratio='x'"),
        (dict(norm_target=1), "norm_target must be True or False, got 1"),
        (dict(decoder_depth=0), "decoder_depth must be a positive integer, got 0"),
        (dict(decoder_dim=0), "decoder_dim must be a positive integer, got 0"),
        (dict(decoder_dim=18), "decoder_dim=18"),
        (dict(decoder_heads=5), "decoder_heads=5"),
        (dict(decoder_heads=0), "decoder_heads must be a positive integer, got 0"),
        (
            dict(encoder=lambda: AVEncoder(make_vit(IMAGE), make_vit((1, 16, 42)), fusion_tokens=4)),
            r"encoder takes inputs of size \(16, 42\): not whole patches of \(8, 8\)",
        ),
    ],
)
def test_bad_settings_are_named(options, message):
    encoder = options.pop("encoder", make_encoder)()
    with pytest.raises(ValueError, match=message):
        AVMAE(encoder, **dict(decoder_dim=16, decoder_depth=1, decoder_heads=2) | options)


UNEQUAL = torch.arange(9) < torch.tensor([[3], [4]])


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(image=None), "image and audio must both be given"),
        (dict(audio=None), "image and audio must both be given"),
        (dict(audio=torch.zeros(2, 1, 16, 41)), "audio must be"),
        (dict(image_removed=UNEQUAL), r"image_removed must hide the same number in every row, got \[3, 4\]"),
        (dict(image_removed=torch.ones(2, 9).bool()), "image_removed must hide some and keep some of 9"),
        (dict(image_removed=torch.zeros(2, 9).bool()), "image_removed must hide some .* hides 0"),
        (dict(audio_removed=torch.ones(2, 10)), "audio_removed must be a bool tensor.* got torch.float32"),
        (
            dict(audio_removed=torch.ones(2, 9).bool()),
            r"audio_removed must have shape \(2, 10\), got \(2, 9\)",
        ),
        (
            dict(image=torch.zeros(0, *IMAGE).double(), audio=torch.zeros(0, *AUDIO).double()),
            "image must hold at least one clip",
        ),
        (dict(image_present=torch.ones(2)), "image_present must be a bool tensor, got torch.float32"),
        (dict(audio_present=torch.ones(3).bool()), r"audio_present must have shape \(2,\), got \(3,\)"),
        (dict(audio_present=True), r"audio_present must be .* got bool"),
        (dict(audio_present=torch.ones(2, device="meta").bool()), "audio_present must be on cpu, got meta"),
    ],
)
def test_bad_inputs_are_named(options, message):
    inputs = dict(zip(TOKENS, make_inputs(), strict=True))
    with pytest.raises(ValueError, match=f"^{message}"):
        make_mae()(**inputs | options)


def test_a_compiled_model_refuses_masks_that_hide_another_number_than_the_ratio():
    """It cannot look before it runs, and would show the encoder what they hide."""
    torch._dynamo.reset()
    mae, inputs = make_mae(), make_inputs()
    compiled = torch.compile(mae, fullgraph=True, backend="eager")
    assert torch.equal(compiled(*inputs, **(removed := make_removed())).loss, mae(*inputs, **removed).loss)
    message = "image_removed must hide as many patches as image_mask_ratio does: 7 in each row"
    for wrong in make_removed(image=8), make_removed() | dict(image_removed=UNEQUAL):
        with pytest.raises(RuntimeError, match=message):
            compiled(*inputs, **wrong)


def test_export_takes_any_number_of_clips():
    mae, clips = make_mae().eval(), torch.export.Dim("clips", min=2, max=64)
    two = dict(zip(TOKENS, make_inputs(), strict=True)) | make_removed()
    exported = torch.export.export(mae, (), two, dynamic_shapes={name: {0: clips} for name in two}).module()
    five = dict(zip(TOKENS, make_inputs(batch=5), strict=True)) | make_removed(batch=5)
    for ours, truth in zip(exported(**five), mae(**five), strict=True):
        torch.testing.assert_close(ours, truth)


def test_other_inputs_keep_their_sizes():
    """Patches that are not square, and a grid of its own for each modality."""
    inputs = InputSettings(image_size=24, mel_bins=16, hop=1000)
    image, audio = make_vit(IMAGE, patch_size=(8, 4)), make_vit((1, 16, 48), patch_size=(4, 8))
    encoder = AVEncoder(image, audio, inputs=inputs, fusion_tokens=4)
    mae = AVMAE(encoder, decoder_dim=16, decoder_depth=1, decoder_heads=2)
    output = mae(torch.randn(2, *IMAGE), torch.randn(2, 1, 16, 48))
    assert output.image_pred.shape == (2, 18, 96) and output.audio_pred.shape == (2, 24, 32)


def test_audio_and_image_shapes_of_the_tiny_models():
    assert (IMAGE, AUDIO) == ((3, 24, 24), (1, 16, 40)) and make_mae().encoder.audio.patch_embed.img_size == (
        16,
        40,
    )


# --- contrastive term ---------------------------------------------------------------------------------------


def contrastive_by_hand(image, audio, paired):
    """Both cross-entropies, pair by pair, by Python's own exponentials and logarithms."""
    pairs = [n for n in range(len(paired)) if paired[n]]
    unit = [[v / v.norm() for v in rows] for rows in (image, audio)]
    total = 0
    for queries, keys in unit, unit[::-1]:
        for n in pairs:
            logits = [(queries[n] * keys[other]).sum() / 0.05 for other in pairs]
            total = total - (logits[pairs.index(n)].exp() / sum(x.exp() for x in logits)).log()
    return total / (2 * len(pairs))


@pytest.mark.parametrize(
    "paired", [[True] * 5, [True, False, True, True, False], [False, True] + [False] * 3]
)
def test_the_contrastive_term_by_hand(paired):
    image, audio = (torch.randn(5, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    ours, truth = info_nce(image, audio, torch.tensor(paired)), contrastive_by_hand(image, audio, paired)
    assert ours.item() == pytest.approx(truth.item(), rel=1e-12, abs=1e-12)
    grads = (torch.autograd.grad(loss, (image, audio)) for loss in (ours, truth))
    for name, mine, true in zip(("image", "audio"), *grads, strict=True):
        torch.testing.assert_close(mine, true, rtol=1e-9, atol=1e-12, msg=name)


def test_without_pairs_the_contrastive_term_is_0_and_so_are_its_gradients():
    image, audio = (torch.randn(3, 4, requires_grad=True) for _ in range(2))
    loss = info_nce(image, audio, torch.zeros(3, dtype=torch.bool))
    loss.backward()
    assert loss == 0 and not image.grad.any() and not audio.grad.any()


@pytest.mark.parametrize("layers", [(1,), "none"])
def test_the_contrastive_term_is_of_visible_tokens_before_fusion(layers):
    """Those of each transformer alone on its visible patches; clips that lack a modality take no part."""
    mae = make_mae(layers=layers, contrastive=0.5)
    image, audio = make_inputs(4)
    masks = make_removed(4)
    present = torch.tensor([True, True, False, True])
    output = mae(image, audio, **masks, image_present=present)
    means = []
    for name, pixels in ("image", image), ("audio", audio):
        other = dict(image=None, audio=None) | {name: pixels}
        keep = {f"{name}_keep": keep_of(masks[f"{name}_removed"])}
        layer = mae.encoder(**other, **keep, return_layers=True).layers[0 if layers == (1,) else -1]
        tokens = getattr(layer, name)
        centred = tokens - tokens.mean(-1, keepdim=True)
        means.append((centred / (tokens.var(-1, keepdim=True, unbiased=False) + 1e-5).sqrt()).mean(1))
    truth = 0.5 * contrastive_by_hand(*means, present.tolist())
    assert output.contrastive_loss.item() == pytest.approx(truth.item(), rel=1e-5)
    assert output.loss == output.image_loss + output.audio_loss + output.contrastive_loss


def test_without_weight_nothing_changes():
    with torch.random.fork_rng():
        torch.manual_seed(1)
        plain = make_mae(layers=(1,))
    with torch.random.fork_rng():
        torch.manual_seed(1)
        weightless = make_mae(layers=(1,), contrastive=0.0)
    inputs, masks = make_inputs(3), make_removed(3)
    outputs = [mae(*inputs, **masks) for mae in (plain, weightless)]
    assert outputs[0].loss == outputs[1].loss and outputs[1].contrastive_loss is None
    assert plain.state_dict().keys() == weightless.state_dict().keys()


def test_a_contrastive_term_of_fused_tokens_is_refused():
    with pytest.raises(ValueError, match="layer 0 is fused: fused tokens give away which belong together"):
        make_mae(contrastive=0.1)
    for weight in -1, float("nan"), True, "much":
        with pytest.raises(ValueError, match="contrastive must be a weight of 0 or more, got"):
            make_mae(layers=(1,), contrastive=weight)
