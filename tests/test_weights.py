"""Weights of others, under the names and in the shapes in which they were published but narrower, against a
forward pass written from those names alone; and nothing lost without a word.
"""

import argparse
import json
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from models import AUDIO, IMAGE, make_encoder, make_vit, randomized
from safetensors.torch import load_file, save_file
from torch import nn

from avfuse import AVMAE, AVEncoder, InputSettings, load_audio_weights, load_image_weights
from avfuse.model_card import strictest, strictness
from avfuse.weight_sources import grid_in, normalisation_beside
from avfuse.weights import of_sounds

D, HEADS, DEPTH = 32, 2, 3


def published(rows, patch=(8, 8), channels=3, norm="norm"):
    """An encoder by the names of facebookresearch/mae and facebookresearch/AudioMAE (both those of timm)."""
    shapes = {"cls_token": (1, 1, D), "pos_embed": (1, 1 + rows, D)}
    shapes |= {"patch_embed.proj.weight": (D, channels, *patch), "patch_embed.proj.bias": (D,)}
    for i in range(DEPTH):
        for name, shape in (
            *(("norm1.weight", (D,)), ("norm1.bias", (D,))),
            *(("attn.qkv.weight", (3 * D, D)), ("attn.qkv.bias", (3 * D,))),
            *(("attn.proj.weight", (D, D)), ("attn.proj.bias", (D,))),
            *(("norm2.weight", (D,)), ("norm2.bias", (D,))),
            *(("mlp.fc1.weight", (2 * D, D)), ("mlp.fc1.bias", (2 * D,))),
            *(("mlp.fc2.weight", (D, 2 * D)), ("mlp.fc2.bias", (D,))),
        ):
            shapes[f"blocks.{i}.{name}"] = shape
    shapes |= {f"{norm}.weight": (D,), f"{norm}.bias": (D,)}
    return {name: 0.3 * torch.randn(shape) for name, shape in shapes.items()}


def decoder(rows, pixels):
    """What a whole pretraining checkpoint has besides (MAE's decoder; AudioMAE's blocks have other parts)."""
    shapes = {"mask_token": (1, 1, 16), "decoder_pos_embed": (1, 1 + rows, 16)}
    shapes |= {"decoder_embed.weight": (16, D), "decoder_embed.bias": (16,)}
    shapes |= {"decoder_blocks.0.attn.qkv.weight": (48, 16), "decoder_blocks.0.attn.qkv.bias": (48,)}
    shapes |= {
        "decoder_norm.weight": (16,),
        "decoder_pred.weight": (pixels, 16),
        "decoder_pred.bias": (pixels,),
    }
    return {name: torch.randn(shape) for name, shape in shapes.items()}


def forward(weights, pixels, class_token=True, norm="norm"):
    """All tokens (B, N, D) of a ViT, straight from the published names."""
    w = {name: weight.double() for name, weight in weights.items()}
    kernel = w["patch_embed.proj.weight"]
    x = F.conv2d(pixels.double(), kernel, w["patch_embed.proj.bias"], stride=kernel.shape[2:])
    x = x.flatten(2).transpose(1, 2) + w["pos_embed"][:, 1:]
    if class_token:
        first = w["cls_token"] + w["pos_embed"][:, :1]
        x = torch.cat([first.expand(len(x), -1, -1), x], dim=1)

    def linear(name, x):
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def layer_norm(name, x):
        return F.layer_norm(x, (D,), w[f"{name}.weight"], w[f"{name}.bias"], eps=1e-6)

    for i in range(DEPTH):
        qkv = linear(f"blocks.{i}.attn.qkv", layer_norm(f"blocks.{i}.norm1", x))
        q, k, v = qkv.reshape(*x.shape[:2], 3, HEADS, D // HEADS).permute(2, 0, 3, 1, 4)
        weight = (q @ k.transpose(-1, -2) * (D // HEADS) ** -0.5).softmax(-1)
        x = x + linear(f"blocks.{i}.attn.proj", (weight @ v).transpose(1, 2).flatten(2))
        hidden = F.gelu(linear(f"blocks.{i}.mlp.fc1", layer_norm(f"blocks.{i}.norm2", x)))
        x = x + linear(f"blocks.{i}.mlp.fc2", hidden)
    return layer_norm(norm, x)


def outputs(vit, pixels):
    with torch.no_grad():
        return vit.double().eval().forward_features(pixels.double())


def silent(_):
    pass


def assert_accounted(loaded, weights, beside=()):
    """Every tensor is in one list; the norm behind a pool is listed under its new name."""
    told = [*loaded.used, *loaded.converted, *loaded.dropped]
    names = {name.replace("fc_norm", "norm") if name not in loaded.dropped else name for name in weights}
    assert sorted(told) == sorted(names | set(beside))


# --- MAE ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("class_token", [True, False])
@pytest.mark.parametrize("kind", ["pretrained", "with decoder", "fine-tuned"])
def test_mae_gives_its_own_outputs(kind, class_token, tmp_path):
    norm = "fc_norm" if kind == "fine-tuned" else "norm"
    weights, beside = published(9, norm=norm), {}
    if kind == "with decoder":
        weights |= decoder(9, 192)
        beside = dict(optimizer={"state": {}}, epoch=3, args=argparse.Namespace(lr=1e-4, device="cuda"))
    if kind == "fine-tuned":
        weights |= {"head.weight": torch.randn(10, D), "head.bias": torch.randn(10)}
    path = tmp_path / "mae_vit_base.pth"
    torch.save({"model": weights} | beside, path)

    encoder = make_encoder(vit=dict(class_token=class_token))
    loaded = load_image_weights(encoder, path, say=silent)
    pixels = torch.randn(2, *IMAGE)
    truth = forward(weights, pixels, class_token, norm)
    torch.testing.assert_close(outputs(encoder.image, pixels), truth, rtol=1e-9, atol=1e-9)
    assert_accounted(loaded, weights, beside)
    assert loaded.origin.family == "MAE" and loaded.origin.licence == "CC-BY-NC-4.0"
    if not class_token:
        assert loaded.dropped["cls_token"] == "the transformer has no class token"
        assert loaded.converted["pos_embed"] == "row of cls_token dropped"


def test_mae_is_known_by_decoder_positions_or_name(tmp_path):
    plain, fixed = published(9), published(9)
    fixed["pos_embed"][0, :2] = torch.cat([torch.zeros(D), torch.arange(D) % 2]).unflatten(0, (2, D))
    for weights, name, family in (
        (plain, "weights", "ViT"),
        (plain, "maestro", "ViT"),
        (plain, "mae_pretrain_vit_base", "MAE"),
        (plain | decoder(9, 192), "weights", "MAE"),
        (fixed, "weights", "MAE"),
    ):
        torch.save({"model": weights}, tmp_path / f"{name}.pth")
        origin = load_image_weights(make_encoder(), tmp_path / f"{name}.pth", say=silent).origin
        assert origin.family == family
        assert origin.licence == ("CC-BY-NC-4.0" if family == "MAE" else "unknown")


# --- AudioMAE -----------------------------------------------------------------------------------------------


def as_ours(tokens, time, mels):
    """Tokens of a time x frequency model in the order of a frequency x time model; class token first."""
    prefix, patches = tokens[:, : -time * mels], tokens[:, -time * mels :]
    return torch.cat([prefix, patches.unflatten(1, (time, mels)).transpose(1, 2).flatten(1, 2)], dim=1)


@pytest.mark.parametrize("class_token", [True, False])
@pytest.mark.parametrize("kind", ["pretrained", "fine-tuned"])
def test_audiomae_gives_its_own_outputs_on_the_transposed_input(kind, class_token, tmp_path):
    """1024 frames x 128 mel bins in 64 x 8 patches of 16, as published."""
    norm = "fc_norm" if kind == "fine-tuned" else "norm"
    weights = published(512, (16, 16), channels=1, norm=norm)
    if kind == "fine-tuned":
        weights |= {"head.weight": torch.randn(527, D), "head.bias": torch.randn(527)}
    else:
        weights |= decoder(512, 256)
        weights["decoder_blocks.0.attn.relative_position_bias_table"] = torch.randn(49, 16)
    torch.save({"model": weights, "epoch": 1}, tmp_path / "weights.pth")

    vit = make_vit((1, 128, 1024), patch_size=16, class_token=class_token)
    loaded = load_audio_weights(vit, tmp_path / "weights.pth", say=silent)
    spectrogram = torch.randn(1, 1, 1024, 128)  # time x frequency
    truth = as_ours(forward(weights, spectrogram, class_token, norm), 64, 8)
    ours = outputs(vit, spectrogram.transpose(2, 3))
    torch.testing.assert_close(ours, truth, rtol=1e-9, atol=1e-9)
    assert_accounted(loaded, weights, {"epoch"})
    assert loaded.origin.family == "AudioMAE" and loaded.origin.licence == "CC-BY-NC-4.0"
    assert loaded.converted["patch_embed.proj.weight"].endswith("axes swapped")
    assert "re-ordered" in loaded.converted["pos_embed"]
    assert "AudioMAE on time x frequency, licence CC-BY-NC-4.0" in str(loaded)
    assert str(loaded).endswith(
        "inputs     trained on Kaldi filter banks of 10 s, see InputSettings.audiomae()"
    )


def test_other_time_first_weights_say_so():
    """Patches that are not square, and a grid that the number of positions does not tell."""
    weights = published(10, (4, 8), channels=1)
    vit = make_vit((1, 16, 20), patch_size=(8, 4))
    loaded = load_audio_weights(vit, weights, axes="time-frequency", grid=(5, 2), say=silent)
    spectrogram = torch.randn(2, 1, 20, 16)
    truth = as_ours(forward(weights, spectrogram, class_token=False), 5, 2)
    torch.testing.assert_close(outputs(vit, spectrogram.transpose(2, 3)), truth, rtol=1e-9, atol=1e-9)
    assert loaded.origin.licence == "unknown"


def test_frequency_first_weights_are_left_alone():
    weights = published(10, channels=1)
    vit = make_vit(AUDIO)
    loaded = load_audio_weights(vit, weights, say=silent)
    spectrogram = torch.randn(2, *AUDIO)
    truth = forward(weights, spectrogram, class_token=False)
    torch.testing.assert_close(outputs(vit, spectrogram), truth, rtol=1e-9, atol=1e-9)
    assert "ViT on frequency x time, licence unknown" in str(loaded)


# --- positions of other grids -------------------------------------------------------------------------------


def interpolated(patches, old, new):
    """(old rows * columns, D) -> (new rows * columns, D)"""
    planes = patches.T.unflatten(1, old)[None]
    planes = F.interpolate(planes, size=new, mode="bicubic", antialias=True, align_corners=False)
    return planes[0].flatten(1).T


@pytest.mark.parametrize("class_token", [True, False])
@pytest.mark.parametrize("side", [2, 3, 5, 7])
def test_image_positions_are_interpolated(side, class_token):
    weights = published(25)
    vit = make_vit((3, 8 * side, 8 * side), class_token=class_token)
    loaded = load_image_weights(vit, weights, say=silent)
    first, patches = weights["pos_embed"][0, :1], weights["pos_embed"][0, 1:]
    if side != 5:
        patches = interpolated(patches, (5, 5), (side, side))
        assert f"interpolated from 5 x 5 to {side} x {side} patches" in loaded.converted["pos_embed"]
    truth = torch.cat([first, patches]) if class_token else patches
    torch.testing.assert_close(vit.pos_embed[0], truth)


def test_image_positions_of_an_oblong_grid():
    weights = published(10)
    vit = make_vit((3, 24, 40))
    load_image_weights(vit, weights, grid=(2, 5), say=silent)
    truth = interpolated(weights["pos_embed"][0, 1:], (2, 5), (3, 5))
    torch.testing.assert_close(vit.pos_embed[0], truth)


def test_audiomae_positions_onto_three_seconds():
    """64 x 8 (time x mel) onto the 8 x 12 (mel x time) patches of avfuse's spectrograms."""
    weights = published(512, (16, 16), channels=1)
    # Half of the width tells the mel patch, half the time: neither may leak into the other.
    time, mel = torch.meshgrid(torch.arange(64.0), torch.arange(8.0), indexing="ij")
    weights["pos_embed"][0, 1:, : D // 2] = mel.flatten()[:, None]
    weights["pos_embed"][0, 1:, D // 2 :] = time.flatten()[:, None]
    vit = make_vit((1, 128, 192), patch_size=16)
    loaded = load_audio_weights(vit, weights, say=silent)
    table = vit.pos_embed.detach().unflatten(1, (8, 12))[0]
    torch.testing.assert_close(table[..., 0], torch.arange(8.0)[:, None].expand(8, 12))
    times = interpolated(torch.arange(64.0)[:, None], (1, 64), (1, 12))
    torch.testing.assert_close(table[..., -1], times.T.expand(8, 12))
    assert (table[0].diff(dim=0)[:, -1] > 4).all()
    assert loaded.converted["pos_embed"] == (
        "row of cls_token dropped, re-ordered from time x frequency to frequency x time, "
        "interpolated from 8 x 64 to 8 x 12 patches"
    )


def test_frequency_first_positions_of_another_length():
    weights = published(2 * 3, channels=1)
    vit = make_vit(AUDIO)  # 2 x 5 patches
    load_audio_weights(vit, weights, say=silent)
    truth = interpolated(weights["pos_embed"][0, 1:], (2, 3), (2, 5))
    torch.testing.assert_close(vit.pos_embed[0], truth)


@pytest.mark.parametrize("saved", [False, True])
def test_the_grid_of_positions_is_that_of_their_transformer(saved, tmp_path):
    """4 x 3 audio patches, which into 2 x 5 might be 2 x 6; 3 x 12 of a picture, which might be 6 x 6. Those
    of models that are wrapped, for several processes or by the compiler, are told, too.
    """
    image, audio = make_vit((3, 24, 96), class_token=False), make_vit((1, 32, 24), class_token=False)
    inputs = InputSettings(image_size=(24, 96), mel_bins=32, audio_seconds=0.375)
    theirs = randomized(AVEncoder(image, audio, inputs=inputs)).float()
    encoder = make_encoder()
    if saved:
        theirs.save_pretrained(tmp_path / "model")
    for load, branch, old in (load_image_weights, "image", (3, 12)), (load_audio_weights, "audio", (4, 3)):
        before = getattr(theirs, branch)
        wrapped = nn.DataParallel(theirs), torch.compile(before), nn.DataParallel(torch.compile(theirs))
        for source in (tmp_path / "model",) if saved else (theirs, before, *wrapped):
            ours = getattr(encoder, branch)
            loaded, new = load(encoder, source, say=silent), ours.patch_embed.grid_size
            truth = interpolated(before.pos_embed[0].detach(), old, new)
            torch.testing.assert_close(ours.pos_embed[0].float(), truth)
            assert f"from {old[0]} x {old[1]} to {new[0]} x {new[1]} " in loaded.converted["pos_embed"]


def test_what_only_looks_like_a_wrapper_loses_nothing():
    """A module of a user that calls a transformer `module`, and has weights of its own."""
    theirs = nn.Module()
    theirs.module, theirs.scale = make_vit((3, 24, 96)), nn.Parameter(torch.ones(D))
    with pytest.raises(ValueError, match="without a place: .*scale"):
        load_image_weights(make_vit((3, 24, 96)), theirs, say=silent)


def test_a_row_of_patches_is_no_class_token():
    """14 x 14 patches besides a class token without a position are one more than 15 x 13."""
    theirs = make_vit((3, 112, 112), class_token=True, no_embed_class=True)
    vit = make_vit((3, 120, 104), class_token=False)
    load_image_weights(vit, theirs, say=silent)
    torch.testing.assert_close(vit.pos_embed[0], interpolated(theirs.pos_embed[0], (14, 14), (15, 13)))


def test_positions_replaced_by_hand_are_of_no_stated_grid():
    """A timm model keeps the size that it was made for."""
    theirs, vit = make_vit((3, 24, 96), class_token=False), make_vit((3, 40, 40), class_token=False)
    theirs.pos_embed = nn.Parameter(torch.randn(1, 49, D))
    load_image_weights(vit, theirs, say=silent)
    torch.testing.assert_close(vit.pos_embed[0], interpolated(theirs.pos_embed[0], (7, 7), (5, 5)))


def test_what_avfuse_has_turned_is_not_turned_again():
    theirs, vit = (make_vit((1, 128, 1024), patch_size=16, class_token=True) for _ in range(2))
    loaded = load_audio_weights(vit, theirs, say=silent)
    torch.testing.assert_close(vit.state_dict(), theirs.state_dict(), rtol=0, atol=0)
    assert loaded.axes == "frequency-time" and not loaded.converted


@pytest.mark.parametrize("saved", [False, True])
def test_what_others_heard_and_computed_is_told(saved, tmp_path):
    heard = InputSettings(
        image_size=24, front_end="kaldi", mel_bins=16, audio_seconds=0.625, max_frequency=7e3
    )
    theirs = AVEncoder(
        make_vit(num_heads=4), make_vit(AUDIO, norm_layer=partial(nn.LayerNorm, eps=1e-3)), inputs=heard
    )
    ours = AVEncoder(make_vit(), make_vit(AUDIO), inputs=replace(heard, front_end="log-mel"))
    if saved:
        theirs.save_pretrained(tmp_path / "model")
        theirs = tmp_path / "model"
    assert load_image_weights(ours, theirs, say=silent).differs == ("num_heads 4 there, 2 here",)
    loaded = load_audio_weights(ours, theirs, say=silent)
    assert loaded.inputs == "trained on spectrograms of front_end kaldi"
    assert str(loaded).endswith(f"differs    norm_eps 0.001 there, {ours.audio.blocks[0].norm1.eps} here")
    ours.given_inputs = heard
    assert load_audio_weights(ours, theirs, say=silent).inputs == ""


def test_every_field_of_a_spectrogram_and_of_what_a_transformer_computes_is_compared():
    theirs, ours = InputSettings(), make_encoder()
    for change in dict(sample_rate=32_000), dict(max_frequency=7e3), dict(mel_bins=64), dict(hop=125):
        ours.given_inputs = replace(theirs, **change)
        (name,) = change
        assert of_sounds(ours, theirs) == f"trained on spectrograms of {name} {getattr(theirs, name)}"
    other = make_vit(act_layer=nn.ReLU, norm_layer=partial(timm.layers.RmsNorm, eps=1e-6))
    for place in "norm1", "norm2":  # with a bias, so that its weights fit
        for block in other.blocks:
            getattr(block, place).bias = nn.Parameter(torch.zeros(D))
    other.norm.bias = nn.Parameter(torch.zeros(D))
    differs = load_image_weights(make_vit(), other, say=silent).differs
    assert {"act_layer", "norm_layer"} <= {each.split()[0] for each in differs}


@pytest.mark.parametrize("sizes", ["16", [[16, 8], [0, 8]], [[1e999, 8], [8, 8]], [["a", 8], [8, 8]], None])
def test_a_damaged_description_tells_no_grid(sizes):
    made = dict(img_size=sizes and sizes[0], patch_size=sizes and sizes[1])
    assert grid_in(made) is None


# --- timm and whole models ----------------------------------------------------------------------------------


SIZES = dict(img_size=24, patch_size=8, embed_dim=D, depth=DEPTH, num_heads=HEADS, mlp_ratio=2.0)


@pytest.mark.parametrize(
    "options",
    [
        dict(),
        dict(num_classes=0),
        dict(class_token=False, global_pool="avg"),
        dict(global_pool="avg"),
        dict(reg_tokens=2, no_embed_class=True),
        dict(reg_tokens=2),
        dict(class_token=False, global_pool="map"),
        dict(qk_norm=True, init_values=0.1, pre_norm=True),
    ],
    ids=str,
)
def test_timm_models_give_their_outputs(options):
    """With the same prefix tokens all tokens are equal; the norm behind a pool becomes that of the tokens."""
    model = randomized(timm.create_model("vit_tiny_patch16_224.augreg_in21k", **SIZES | options))
    kept = {
        name: options[name]
        for name in ("qk_norm", "init_values", "pre_norm", "reg_tokens")
        if name in options
    }
    kept |= dict(class_token=options.get("class_token", True), no_embed_class="no_embed_class" in options)
    encoder = make_encoder(vit=kept)
    loaded = load_image_weights(encoder, model, say=silent)
    pixels = torch.randn(2, *IMAGE)
    truth = model.forward_features(pixels.double())
    if options.get("global_pool") == "avg":
        truth = model.fc_norm(truth)
    torch.testing.assert_close(outputs(encoder.image, pixels), truth, rtol=1e-9, atol=1e-9)
    assert_accounted(loaded, model.state_dict())


def test_register_tokens_and_their_positions_are_dropped():
    model = randomized(timm.create_model("vit_tiny_patch16_224", **SIZES, reg_tokens=2))
    vit = make_vit()
    loaded = load_image_weights(vit, model, say=silent)
    torch.testing.assert_close(vit.pos_embed.double(), model.pos_embed[:, 3:])
    assert {"cls_token", "reg_token"} < loaded.dropped.keys()


def test_licences_of_timm_models(tmp_path):
    """From the model itself or from the config.json that timm writes beside its weights."""
    for name, licence in (
        ("vit_tiny_patch16_224.augreg_in21k", "unknown"),
        ("vit_base_patch16_224.mae", "CC-BY-NC-4.0"),
        ("vit_tiny_patch16_224.augreg_in21k_ft_in1k", "apache-2.0"),
    ):
        model = timm.create_model(name, **SIZES)
        model.pretrained_cfg["license"] = {"unknown": None}.get(licence, licence)
        folder = tmp_path / name
        folder.mkdir()
        save_file(model.state_dict(), folder / "model.safetensors")
        said = {key: value for key, value in model.pretrained_cfg.items() if key != "architecture"}
        config = {"architecture": model.pretrained_cfg["architecture"], "pretrained_cfg": said}
        (folder / "config.json").write_text(json.dumps(config))
        for source in model, folder, folder / "model.safetensors":
            origin = load_image_weights(make_encoder(), source, say=silent).origin
            assert (origin.weights, origin.licence) == (name, licence)


def test_the_normalisation_of_images_comes_with_weights_that_tell_it(tmp_path):
    halves, said = ((0.5, 0.4, 0.3), (0.5, 0.25, 0.2)), []
    timm_model = timm.create_model("vit_tiny_patch16_224", **SIZES)
    timm_model.pretrained_cfg = dict(timm_model.pretrained_cfg, mean=halves[0], std=halves[1])
    others = InputSettings(image_size=24, mel_bins=16, hop=256, audio_seconds=0.64)
    own = replace(others, image_mean=halves[0], image_std=halves[1])
    encoder = make_encoder(inputs=own)
    encoder.save_pretrained(tmp_path / "encoder")
    AVMAE(encoder, decoder_dim=16, decoder_depth=1, decoder_heads=2).save_pretrained(tmp_path / "autoencoder")
    named = dict(mean=halves[0], std=halves[1]), dict(image_mean=halves[0], image_std=halves[1])
    for name, file, content in (
        ("timm", "config.json", dict(architecture="vit", pretrained_cfg=named[0])),
        ("timm before", "config.json", dict(architecture="vit", **named[0])),
        ("transformers", "preprocessor_config.json", named[1]),
        ("nothing", "preprocessor_config.json", dict(image_mean=[0.5], image_std="x")),
    ):
        (tmp_path / name).mkdir()
        save_file(timm_model.state_dict(), tmp_path / name / "model.safetensors")
        (tmp_path / name / file).write_text(json.dumps(content))
    told = [
        timm_model,
        *(tmp_path / name for name in ("encoder", "autoencoder", "timm", "timm before", "transformers")),
    ]
    for source in told:
        mae = AVMAE(make_encoder(inputs=others), decoder_dim=16, decoder_depth=1, decoder_heads=2)
        load_image_weights(mae, source, say=said.append)
        assert mae.encoder.inputs == own and mae.encoder.to_config()["inputs"] == asdict(own)
        assert said[-1].endswith("(0.5, 0.25, 0.2), by which the model normalises them from now on")
        load_image_weights(mae, source, say=said.append)
        assert "  inputs " not in said[-1]
    for source in tmp_path / "nothing", timm_model.state_dict():
        load_image_weights(encoder := make_encoder(inputs=others), source, say=said.append)
        assert encoder.inputs == others and "  inputs " not in said[-1]
    load_image_weights(mae, make_encoder(inputs=others), say=said.append)
    assert mae.encoder.inputs == others  # what a first load brought is no wish of anybody
    load_image_weights(vit := make_vit(), timm_model, say=said.append)
    assert said[-1].endswith("deviation (0.5, 0.25, 0.2)")
    audio = make_vit((1, 128, 192))
    assert AVEncoder(vit, audio, fusion_tokens=4).inputs.image_mean == halves[0]


def test_a_normalisation_of_other_pixels_is_none(tmp_path):
    save_file(published(9), tmp_path / "model.safetensors")
    halves = dict(image_mean=[0.5] * 3, image_std=[0.5] * 3)
    for switch, taken in (
        ({}, True),
        (dict(do_normalize=True, do_rescale=True, rescale_factor=0.00392156862745098), True),
        (dict(do_normalize=False), False),
        (dict(do_rescale=False), False),
        (dict(rescale_factor=1 / 127.5), False),
        (dict(rescale_factor="x"), False),
    ):
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(halves | switch))
        assert (normalisation_beside(tmp_path / "model.safetensors") is not None) == taken


def test_mae_saw_what_imagenet_is_normalised_by(tmp_path):
    inputs = InputSettings(image_size=24, mel_bins=16, hop=256, audio_seconds=0.64)
    encoder = make_encoder(inputs=replace(inputs, image_mean=(0.5,) * 3))
    torch.save({"model": published(9) | decoder(9, 192)}, tmp_path / "weights.pth")
    audio = {**published(10, channels=1), **decoder(10, 64)}
    load_audio_weights(encoder, audio, say=silent)
    assert encoder.inputs.image_mean == (0.5,) * 3  # sounds tell nothing of images
    load_image_weights(encoder, tmp_path / "weights.pth", say=silent)
    assert encoder.inputs == inputs


@pytest.mark.parametrize("kind", ["encoder", "autoencoder"])
def test_branches_of_whole_models(kind, tmp_path):
    other = make_encoder("factorized", vit=dict(class_token=True)).float()
    model = other if kind == "encoder" else AVMAE(other, decoder_dim=16, decoder_depth=1, decoder_heads=2)
    model.save_pretrained(tmp_path)
    encoder = make_encoder(vit=dict(class_token=True)).float()
    for name, load in ("image", load_image_weights), ("audio", load_audio_weights):
        loaded = load(encoder, tmp_path, say=silent)
        ours, theirs = (getattr(whole, name).state_dict() for whole in (encoder, other))
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
        assert len(loaded.used) + len(loaded.dropped) == len(model.state_dict())
        assert loaded.origin.family == "avfuse" and not loaded.converted


def test_branches_of_released_models_carry_their_licence(tmp_path):
    golden = Path(__file__).parent / "golden" / "mae_factorized.safetensors"
    weights = {
        n.removeprefix("weights/"): w for n, w in load_file(golden).items() if n.startswith("weights/")
    }
    torch.save({"state_dict": {f"module.{name}": w for name, w in weights.items()}}, tmp_path / "a.pth")
    kernel = weights["encoder.image.patch_embed.proj.weight"]
    side = kernel.shape[-1] * round(weights["encoder.image.pos_embed"].shape[1] ** 0.5)
    width = kernel.shape[0]
    depth = 1 + max(int(n.split(".")[3]) for n in weights if n.startswith("encoder.image.blocks."))
    sizes = dict(embed_dim=width, depth=depth, num_heads=2, patch_size=kernel.shape[-1], mlp_ratio=4.0)
    vit = make_vit((3, side, side), **sizes)
    loaded = load_image_weights(vit, tmp_path / "a.pth", say=silent)
    assert torch.equal(vit.patch_embed.proj.weight, kernel)
    assert loaded.origin.family == "DeepAVFusion" and loaded.origin.licence == "CC-BY-NC-4.0"


# --- names --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "prefix", ["module.", "_orig_mod.", "model.", "backbone.", "encoder.", "a.b-c.model."]
)
@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_a_prefix_of_all_names_is_taken_off_and_announced(prefix, suffix, tmp_path):
    weights, said = published(9), []
    path = tmp_path / f"weights.{suffix}"
    prefixed = {prefix + name: weight for name, weight in weights.items()}
    save_file(prefixed, path) if suffix == "safetensors" else torch.save({"model": prefixed}, path)
    for source in path, prefixed:
        vit = make_vit(class_token=True)
        loaded = load_image_weights(vit, source, say=said.append)
        assert all(torch.equal(vit.state_dict()[name], weight) for name, weight in weights.items())
        assert loaded.used and loaded.names == (f"without the prefix '{prefix}'",)
        assert said[-1].splitlines()[1] == f"  names      without the prefix '{prefix}'"


def test_a_prefix_of_some_names_is_not_taken_off():
    weights = {f"module.{name}" if "norm" in name else name: w for name, w in published(9).items()}
    with pytest.raises(ValueError, match="missing: .*norm.*without a place: module.blocks.0.norm1"):
        load_image_weights(make_vit(class_token=True), weights)
    blocks = {name: w for name, w in published(9).items() if name.startswith("blocks.0.")}
    with pytest.raises(ValueError, match="missing: cls_token, pos_embed"):  # which is told of "blocks."
        load_image_weights(make_vit(class_token=True), blocks)


def test_averages_are_found_under_their_keys(tmp_path):
    weights, other = published(9), published(9)
    averaged = {"n_averaged": torch.tensor(3)} | {f"module.{name}": w for name, w in weights.items()}
    for content, told, beside in (
        ({"model": weights, "model_ema": other}, (), {"model_ema": "weights beside those of 'model'"}),
        ({"model_ema": weights, "epoch": 3}, ("of 'model_ema'",), {"epoch": "not a weight"}),
        ({"state_dict_ema": weights}, ("of 'state_dict_ema'",), {}),
        ({"ema": {"state_dict": weights}, "step": 1}, ("of 'ema'",), {"step": "not a weight"}),
        ({"ema": averaged}, ("of 'ema'", "without the prefix 'module.'"), {"n_averaged": "not a weight"}),
        (
            {"teacher": {f"module.backbone.{n}": w for n, w in weights.items()}, "student": other},
            ("of 'teacher'", "without the prefix 'module.backbone.'"),
            {"student": "not a weight"},
        ),
    ):
        torch.save(content, tmp_path / "a.pth")
        vit = make_vit(class_token=True)
        loaded = load_image_weights(vit, tmp_path / "a.pth", say=silent)
        assert all(torch.equal(vit.state_dict()[name], weight) for name, weight in weights.items())
        assert loaded.names == told and loaded.dropped == beside


def of_transformers(weights, root="", version=4):
    """The same weights by the names of the library transformers, as `save_pretrained` writes them (version 5
    calls them otherwise in memory). Compared with ViTMAEForPreTraining, ViTMAEModel, ViTModel,
    ViTForImageClassification and ASTForAudioClassification of version 5.24: equal outputs.
    """
    layer = "encoder.layer.{}" if version == 4 else "layers.{}"
    names = dict(norm1="layernorm_before", norm2="layernorm_after")
    names |= (
        {"attn.proj": "attention.output.dense", "mlp.fc1": "intermediate.dense", "mlp.fc2": "output.dense"}
        if version == 4
        else {"attn.proj": "attention.o_proj", "mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2"}
    )
    thirds = "attention.attention.{}" if version == 4 else "attention.{}_proj"
    thirds = [thirds.format(x if version == 4 else x[0]) for x in ("query", "key", "value")]
    top = {"pos_embed": "embeddings.position_embeddings", "norm": "layernorm"}
    top |= {"cls_token": "embeddings.cls_token", "patch_embed.proj": "embeddings.patch_embeddings.projection"}
    renamed = {}
    for name, weight in weights.items():
        path, _, kind = name.rpartition(".") if name.endswith(("weight", "bias")) else (name, "", "")
        if path.startswith("blocks."):
            _, number, part = path.split(".", 2)
            new = [names[part]] if part != "attn.qkv" else thirds
            new = [f"{layer.format(number)}.{x}" for x in new]
        else:
            new = [top[path]]
        for x, tensor in zip(new, weight.chunk(len(new)), strict=True):
            renamed[".".join(filter(None, (root, x, kind)))] = tensor.clone()
    return renamed


@pytest.mark.parametrize("version", [4, 5])
@pytest.mark.parametrize("root", ["vit", "", "deit"])
def test_transformers_vits_give_their_outputs(root, version, tmp_path):
    weights = published(9)
    theirs = of_transformers(weights, root, version)
    theirs |= {f"decoder.{name}": tensor for name, tensor in decoder(9, 192).items()} if root == "vit" else {}
    theirs |= {"classifier.weight": torch.ones(5, D), "pooler.dense.bias": torch.ones(D)} if root else {}
    save_file(theirs, tmp_path / "model.safetensors")
    encoder = make_encoder(vit=dict(class_token=True))
    loaded = load_image_weights(encoder, tmp_path, say=silent)
    pixels = torch.randn(2, *IMAGE)
    torch.testing.assert_close(outputs(encoder.image, pixels), forward(weights, pixels), rtol=1e-9, atol=1e-9)
    assert loaded.names == ("those of transformers turned into timm's",)
    assert loaded.converted == {
        f"blocks.{i}.attn.qkv.{kind}": "query, key and value joined"
        for i in range(DEPTH)
        for kind in ("weight", "bias")
    }
    assert "  converted  blocks (6 tensors): query, key and value joined" in str(loaded).splitlines()
    assert loaded.origin.family == ("MAE" if root == "vit" else "ViT")


def test_a_layer_of_transformers_that_lacks_its_key_is_named():
    theirs = of_transformers(published(9), "vit")
    with pytest.raises(ValueError, match="missing: blocks.1.attn.qkv.weight; without a place: .*attn.query"):
        load_image_weights(
            make_vit(class_token=True),
            without(theirs, "vit.encoder.layer.1.attention.attention.key.weight"),
        )


def test_ast_of_transformers_loses_its_second_token_and_says_so():
    """12 x 101 patches (frequency x time) of 16 x 16, 10 apart, behind a class and a distillation token."""
    root = "audio_spectrogram_transformer"
    weights = published(1212, (16, 16), channels=1)
    theirs = of_transformers(weights, root)
    table, distilled = weights["pos_embed"], torch.randn(1, 1, D)
    theirs[f"{root}.embeddings.position_embeddings"] = torch.cat(
        [table[:, :1], distilled, table[:, 1:]], dim=1
    )
    theirs |= {f"{root}.embeddings.distillation_token": torch.randn(1, 1, D)}
    theirs |= {"classifier.layernorm.weight": torch.ones(D), "classifier.dense.bias": torch.ones(527)}
    vit = make_vit((1, 128, 192), patch_size=16)
    loaded = load_audio_weights(vit, theirs, say=silent)
    patches = interpolated(table[0, 1:], (12, 101), (8, 12))
    torch.testing.assert_close(vit.pos_embed[0], patches)
    moved = weights | {"pos_embed": torch.cat([table[:, :1], patches[None]], dim=1)}
    spectrogram = torch.randn(1, 1, 128, 192)
    truth = forward(moved, spectrogram, class_token=False)
    torch.testing.assert_close(outputs(vit, spectrogram), truth, rtol=1e-9, atol=1e-9)
    assert loaded.origin.family == "AST" and loaded.origin.licence == "BSD-3-Clause"
    assert "dist_token: the transformer has no distillation token, to which the others attended" in str(
        loaded
    )
    assert loaded.converted["pos_embed"] == (
        "row of cls_token dropped, row of dist_token dropped, interpolated from 12 x 101 to 8 x 12 patches"
    )


# --- what is said, and kept ---------------------------------------------------------------------------------


def test_licences_stay_with_the_model(tmp_path):
    mae = AVMAE(make_encoder().float(), decoder_dim=16, decoder_depth=1, decoder_heads=2)
    said = []
    load_image_weights(mae, published(9) | decoder(9, 192), say=said.append)
    load_audio_weights(mae, published(10, channels=1), say=said.append)
    origins = {
        "image": {"weights": "a state dict", "family": "MAE", "licence": "CC-BY-NC-4.0"},
        "audio": {"weights": "a state dict", "family": "ViT", "licence": "unknown"},
    }
    assert mae.encoder.origins == origins
    mae.save_pretrained(tmp_path / "mae")
    loaded = AVMAE.from_pretrained(tmp_path / "mae")
    assert loaded.encoder.origins == origins
    loaded.encoder.save_pretrained(tmp_path / "encoder")
    assert AVEncoder.from_pretrained(tmp_path / "encoder").origins == origins
    assert said[0].splitlines() == [
        "image weights a state dict: MAE, licence CC-BY-NC-4.0",
        "  used       patch_embed (2 tensors), blocks (36 tensors), norm (2 tensors)",
        "  converted  pos_embed: row of cls_token dropped",
        "  dropped    cls_token: the transformer has no class token",
        "  dropped    mask_token, decoder_pos_embed, decoder_embed (2 tensors), decoder_blocks (2 tensors), "
        "decoder_norm, decoder_pred (2 tensors): decoder of the masked autoencoder",
    ]
    again = load_image_weights(make_encoder(), tmp_path / "encoder", say=silent)
    assert again.origin.licence == "unknown"  # the strictest of what went into that model


def test_the_strictest_licence_is_found():
    for licences, strictest_one in (
        ([], None),
        (["apache-2.0", "mit"], "apache-2.0"),
        (["apache-2.0", "CC-BY-NC-4.0", "gpl-3.0"], "CC-BY-NC-4.0"),
        (["mit", "cc-by-sa-4.0"], "cc-by-sa-4.0"),
        (["unknown", "cc-by-nc-4.0"], "unknown"),
        (["cc-by-nc-sa-4.0", "other"], "other"),
        (["apache-2.0", "CC BY-NC 4.0"], "CC BY-NC 4.0"),
        (["apache-2.0", "non-commercial"], "non-commercial"),
        (["CC BY 4.0", "GPLv3"], "GPLv3"),
        (["cc0-1.0", "BSD 3-Clause", "all rights reserved"], "all rights reserved"),
        (["mit", "research only"], "research only"),
        (["gpl-3.0", "research only"], "other"),
        (["cc-by-nc-4.0", "openrail"], "other"),
        (["mpl-2.0", "cc-by-nc-4.0", "zlib", "odc-by"], "cc-by-nc-4.0"),
        (["apache-2.0", "MIT (research only)"], "MIT (research only)"),
        (["MIT", "Apache 2.0, no commercial use"], "Apache 2.0, no commercial use"),
        (["MIT", "openrail"], "openrail"),
        (["mit", ""], ""),
    ):
        assert strictest(licences) == strictest_one


def test_licences_are_known_by_all_their_words():
    for allowed in (
        "MIT",
        "Apache-2.0",
        "BSD 3-Clause",
        "cc0-1.0",
        "Creative Commons Attribution 4.0 International",
    ):
        assert strictness(allowed) == 0
    assert strictness("MIT (research only)") == 3


# --- refusals -----------------------------------------------------------------------------------------------


def without(weights, name):
    return {key: weight for key, weight in weights.items() if key != name}


def test_every_tensor_is_needed_in_its_shape():
    weights = published(9)
    for name, weight in weights.items():
        for changed, kind in (
            (without(weights, name), "missing"),
            (weights | {name: weight[..., :-1]}, "shape"),
            (weights | {name: torch.full_like(weight, torch.nan)}, "not finite"),
        ):
            vit = make_vit(class_token=True)
            before = {key: value.clone() for key, value in vit.state_dict().items()}
            with pytest.raises(ValueError, match=rf"a state dict does not fit .*{kind}.*{name}"):
                load_image_weights(vit, changed, say=silent)
            assert all(torch.equal(vit.state_dict()[key], before[key]) for key in before)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda w: w | {"blocks.3.norm1.weight": torch.ones(D)}, "without a place: blocks.3.norm1.weight"),
        (lambda w: w | {"extra": torch.ones(1)}, "without a place: extra"),
        (lambda w: without(w, "blocks.2.mlp.fc2.bias"), "missing: blocks.2.mlp.fc2.bias"),
        (lambda w: {k: v for k, v in w.items() if "blocks." not in k}, r"missing: blocks.0.* and 32 more"),
        (lambda w: w | {"norm.bias": torch.ones(D + 1)}, r"norm.bias is \(33,\), not \(32,\)"),
        (lambda w: w | {"patch_embed.proj.weight": torch.ones(D, 3, 14, 14)}, r"\(32, 3, 14, 14\), not"),
        (lambda w: w | {"pos_embed": torch.ones(1, 9, D)[0]}, "pos_embed is"),
        (lambda w: w | {"pos_embed": torch.ones(1, 12, D)}, "pos_embed has 12 rows.*grid is needed"),
        (lambda w: w | {"norm.bias": "words"}, "weights: 'norm.bias' is no tensor but a str"),
        (lambda w: {}, "weights must hold tensors by name"),
        (lambda w: {"model": None}, "weights must hold tensors by name"),
        (lambda w: 3, "weights must be a path, a model or a dictionary, got int"),
    ],
)
def test_what_does_not_fit_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        load_image_weights(make_encoder(), change(published(9)), say=silent)


def test_arguments_that_make_no_sense_are_named():
    weights = published(9)
    for options, message in (
        (dict(grid=9), r"grid must be \(rows, columns\), got 9"),
        (dict(grid=(3, 0)), "grid must be a positive integer, got 0"),
        (dict(grid=(2, 4)), r"grid is not \(rows, columns\) of them"),
    ):
        with pytest.raises(ValueError, match=message):
            load_image_weights(make_encoder(), weights, say=silent, **options)
    with pytest.raises(
        ValueError, match="axes must be one of 'frequency-time', 'time-frequency', got 'both'"
    ):
        load_audio_weights(make_encoder(), weights, axes="both")
    with pytest.raises(
        ValueError, match="model must have an encoder or be a timm VisionTransformer, got Linear"
    ):
        load_image_weights(torch.nn.Linear(1, 1), weights)
    with pytest.raises(ValueError, match=r"patch_embed.proj.weight is \(32, 3, 8, 8\), not \(32, 1, 8, 8\)"):
        load_audio_weights(make_encoder(), published(10))


def test_files_that_hold_no_weights_are_named(tmp_path):
    for name in "cut.pth", "cut.safetensors":
        (tmp_path / name).write_bytes(b"cut")
    for name in "nowhere.pth", "cut.pth", "cut.safetensors", "":
        with pytest.raises(ValueError, match=f"weights {tmp_path / name}"):
            load_image_weights(make_encoder(), tmp_path / name)


def test_no_code_in_a_file_is_run(tmp_path):
    """A Namespace of plain values is let in; what it holds is restricted as everything else."""

    class Malicious:
        def __reduce__(self):
            return Path.touch, (tmp_path / "it ran",)

    for beside in Malicious(), argparse.Namespace(lr=1e-3, name=Malicious()):
        torch.save({"model": published(9), "args": beside}, tmp_path / "weights.pth")
        with pytest.raises(ValueError, match="weights.pth is no file of weights alone"):
            load_image_weights(make_encoder(), tmp_path / "weights.pth", say=silent)
    assert not (tmp_path / "it ran").exists()
