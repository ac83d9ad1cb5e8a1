"""Saved models come back with the same weights, outputs and input transforms, or say what is wrong; optimizer
groups hold every parameter once.
"""

import json
import math
import os
import re
import socket
from pathlib import Path

import huggingface_hub
import pytest
import timm
import torch
from huggingface_hub.errors import EntryNotFoundError
from models import AUDIO, IMAGE, make_encoder, make_inputs, make_vit, randomized
from safetensors.torch import load_file, save_file
from torch import nn
from videos import write_video

import avfuse
from avfuse import AVMAE, AVEncoder, InputSettings, create_encoder, load_encoder, pretrained
from avfuse.fusion import VARIANTS
from avfuse.released import ReleasedEncoder
from avfuse.tasks.classifier import Classifier
from avfuse.vit import build_vit, describe_vit, ratio_of
from avfuse.weight_files import read_metadata

VITS = {
    "plain": dict(),
    "class and register tokens": dict(class_token=True, reg_tokens=2),
    "no_embed_class": dict(class_token=True, no_embed_class=True),
    "qk-norm, LayerScale": dict(qk_norm=True, init_values=0.1),
    "scaled norms": dict(scale_attn_norm=True, scale_mlp_norm=True),
    "no biases": dict(qkv_bias=False, proj_bias=False),
    "pre-norm, no positions": dict(pre_norm=True, pos_embed="none"),
    "no final norm": dict(final_norm=False),
    "norm behind the pool": dict(global_pool="avg"),
    "rates": dict(drop_path_rate=0.3, pos_drop_rate=0.1, proj_drop_rate=0.2, attn_drop_rate=0.4),
    "RMS norm": dict(norm_layer="rmsnorm"),
    "LayerNorm, eps 1e-3": dict(norm_layer=lambda dim, **kind: nn.LayerNorm(dim, eps=1e-3, **kind)),
    "timm's GELU": dict(act_layer="gelu"),
    "tanh GELU": dict(act_layer="gelu_tanh"),
    "quick GELU": dict(act_layer="quick_gelu"),
    "SiLU": dict(act_layer=nn.SiLU),
    "odd sizes": dict(mlp_ratio=1.7, num_heads=4, patch_size=(8, 4)),
}


def make_mae(interactions="dense", **options):
    encoder = make_encoder(interactions, **options)
    settings = dict(decoder_dim=16, decoder_depth=1, decoder_heads=2, audio_mask_ratio=0.7, norm_target=False)
    return randomized(AVMAE(encoder, **settings))


def round_trip(model, folder):
    model.save_pretrained(folder)
    return type(model).from_pretrained(folder)


def assert_same(loaded, model):
    """Of the same class, in eval mode, with the same parts, settings and weights, as trainable as before."""
    assert type(loaded) is type(model) and not loaded.training
    # Every layer with its sizes, rates and epsilons. timm's GELU comes back as torch's.
    assert repr(loaded).replace("GELU(approximate='none')", "GELU()") == repr(model).replace(
        "GELU(approximate='none')", "GELU()"
    )
    assert loaded.to_config() == model.to_config()
    weights, saved = loaded.state_dict(), model.state_dict()
    assert weights.keys() == saved.keys()
    assert all(torch.equal(weights[name], saved[name]) for name in saved)
    trainable = [{n for n, p in m.named_parameters() if p.requires_grad} for m in (loaded, model)]
    assert trainable[0] == trainable[1]


# --- round trips --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("interactions", VARIANTS)
@pytest.mark.parametrize("fusion_layers", ["all", "none", [1, 2]])
def test_encoders_come_back(interactions, fusion_layers, tmp_path):
    options = dict(attn_ratio=0.5, mlp_ratio=1.5, num_heads=4, drop=0.1, drop_path=0.2)
    pair_bias = interactions in ("dense", "bilinear")
    encoder = make_encoder(interactions, fusion_layers=fusion_layers, pair_bias=pair_bias, **options).float()
    loaded = round_trip(encoder, tmp_path)
    assert_same(loaded, encoder)
    inputs = make_inputs(dtype=torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(loaded(*inputs)[:3], encoder(*inputs)[:3], strict=True))


@pytest.mark.parametrize("name", VITS)
def test_transformers_come_back(name, tmp_path):
    encoder = make_encoder(vit=VITS[name]).float()
    loaded = round_trip(encoder, tmp_path)
    assert_same(loaded, encoder)
    inputs = make_inputs(dtype=torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(loaded(*inputs)[:3], encoder(*inputs)[:3], strict=True))


@pytest.mark.parametrize("interactions", VARIANTS)
def test_autoencoders_come_back(interactions, tmp_path):
    mae = make_mae(interactions).float()
    loaded = round_trip(mae, tmp_path)
    assert_same(loaded, mae)
    inputs, losses = make_inputs(dtype=torch.float32), []
    for model in mae, loaded:
        torch.manual_seed(0)
        losses.append(model(*inputs).loss)
    assert torch.equal(*losses)


@pytest.mark.parametrize(
    "name",
    [
        "vit_tiny_patch16_224",
        "deit3_small_patch16_224",
        "vit_base_patch16_siglip_224",
        "vit_base_patch16_clip_quickgelu_224",
        "vit_small_patch14_reg4_dinov2",
    ],
)
def test_timm_models_can_be_described(name):
    """Popular pretrained transformers keep their architecture in config.json."""
    with torch.device("meta"):
        vit = timm.create_model(name, pretrained=False, num_classes=0)
        if name.endswith("dinov2"):
            assert vit.num_prefix_tokens == 5
        vit.attn_pool, vit.global_pool = None, ""
        description = json.loads(json.dumps(describe_vit(vit)))
        assert repr(build_vit(description).blocks) == repr(vit.blocks)


def test_what_config_json_cannot_describe_is_refused(tmp_path):
    for options, message in (
        (
            dict(embed_norm_layer=nn.LayerNorm),
            "patch_embed.norm, a LayerNorm, is none that config.json can",
        ),
        (dict(act_layer=nn.Tanh), "act_layer: a Tanh cannot be described"),
        (dict(act_layer=lambda: nn.GELU(approximate="tanh")), "act_layer: a GELU cannot be described"),
    ):
        with pytest.raises(ValueError, match=message):
            make_encoder(vit=options).save_pretrained(tmp_path)


@pytest.mark.parametrize("dim", [32, 192, 448, 704, 768, 832])
def test_ratios_give_back_their_widths(dim):
    assert all(int(dim * ratio_of(width, dim)) == width for width in range(1, 4 * dim + 1))


# --- the folder ---------------------------------------------------------------------------------------------


def test_config_holds_the_input_transforms(tmp_path):
    inputs = InputSettings(
        image_size=24, image_mean=(0.1, 0.2, 0.3), image_std=(0.4, 0.5, 0.6), sample_rate=8000,
        audio_seconds=1.0, window=300, hop=200, mel_bins=16, max_frequency=3500.0,
        front_end="kaldi", audio_mean=-4.0, audio_std=9.0, padded_frames=40,
    )  # fmt: skip
    encoder = AVEncoder(make_vit(IMAGE), make_vit(AUDIO), inputs=inputs, fusion_tokens=4)
    for model, place in (encoder, ("model",)), (AVMAE(encoder), ("model", "encoder")):
        assert round_trip(model, tmp_path / place[-1]) is not None
        config = json.loads((tmp_path / place[-1] / "config.json").read_text())
        assert config["library"] == "avfuse" and config["class"] == type(model).__name__
        for key in place:
            config = config[key]
        assert config["inputs"] == dict(
            image_size=24, image_mean=[0.1, 0.2, 0.3], image_std=[0.4, 0.5, 0.6], sample_rate=8000,
            audio_seconds=1.0, window=300, hop=200, mel_bins=16, max_frequency=3500.0,
            front_end="kaldi", audio_mean=-4.0, audio_std=9.0, padded_frames=40, image_frames=1,
        )  # fmt: skip
        loaded = type(model).from_pretrained(tmp_path / place[-1])
        assert getattr(loaded, "encoder", loaded).inputs == inputs


def test_inputs_default_to_the_papers_at_the_sizes_of_the_transformers():
    assert create_encoder("small").inputs == InputSettings()
    encoder = AVEncoder(make_vit(IMAGE), make_vit((1, 16, 192)), fusion_tokens=4)
    assert encoder.inputs == InputSettings(image_size=24, mel_bins=16)


def test_weights_are_safetensors_by_the_names_of_the_state_dict(tmp_path):
    encoder = make_encoder().float()
    encoder.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    assert weights.keys() == encoder.state_dict().keys()
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "model.safetensors", "README.md"}


def test_a_failed_save_leaves_the_old_weights(tmp_path, monkeypatch):
    encoder = make_encoder().float()
    encoder.save_pretrained(tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()

    def interrupted(weights, path, **options):
        path.write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr("avfuse.weight_files.save_file", interrupted)
    with pytest.raises(OSError, match="no space"):
        randomized(encoder).float().save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == before


def test_saving_twice_overwrites(tmp_path):
    encoder = make_encoder().float()
    encoder.save_pretrained(tmp_path)
    randomized(encoder).float().save_pretrained(tmp_path)
    assert_same(AVEncoder.from_pretrained(tmp_path), encoder)


# --- what cannot be loaded ----------------------------------------------------------------------------------


def test_a_model_of_another_class_is_named(tmp_path):
    make_encoder().save_pretrained(tmp_path / "encoder")
    make_mae().save_pretrained(tmp_path / "mae")
    with pytest.raises(ValueError, match="encoder holds a model of class AVEncoder, not AVMAE"):
        AVMAE.from_pretrained(tmp_path / "encoder")
    with pytest.raises(ValueError, match="mae holds a model of class AVMAE, not AVEncoder"):
        AVEncoder.from_pretrained(tmp_path / "mae")


def test_folders_that_hold_no_model_are_named(tmp_path):
    with pytest.raises(ValueError, match=f"{tmp_path} holds no config.json of an avfuse model"):
        AVEncoder.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"architectures": ["Other"]}')
    with pytest.raises(ValueError, match=f"{tmp_path} holds no config.json of an avfuse model"):
        AVEncoder.from_pretrained(str(tmp_path))
    with pytest.raises(ValueError, match="no/such/folder is no file, no folder and no name on the hub"):
        AVEncoder.from_pretrained("no/such/folder")


def test_a_config_that_may_not_be_read_is_named(tmp_path, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied")

    make_encoder().save_pretrained(tmp_path)
    monkeypatch.setattr(Path, "read_bytes", refuse)  # the mode of a file is nothing to root
    for load in AVEncoder.from_pretrained, load_encoder:
        with pytest.raises(ValueError, match="config.json cannot be read: .*Permission denied"):
            load(tmp_path)


def test_models_that_are_not_here_are_not_looked_for_without_the_network():
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    with pytest.raises(ValueError, match="nobody/nothing is no file or folder, nor found on the hub: "):
        AVEncoder.from_pretrained("nobody/nothing")


def test_a_folder_is_read_without_the_network(tmp_path, monkeypatch):
    encoder = make_encoder().float()
    encoder.save_pretrained(tmp_path)

    def no_network(*_, **__):
        raise AssertionError("asked the hub for a folder that exists")

    monkeypatch.setattr("avfuse.pretrained.hf_hub_download", no_network)
    assert_same(AVEncoder.from_pretrained(tmp_path), encoder)


def test_models_of_the_hub_are_downloaded_file_by_file(tmp_path, monkeypatch):
    """The same two files, asked for with the options of the caller; the hub is played by a folder."""
    encoder, asked = make_encoder().float(), []
    encoder.save_pretrained(tmp_path)

    def download(repo_id, filename, **options):
        asked.append((repo_id, filename, options["revision"], options["token"]))
        return str(tmp_path / filename)

    monkeypatch.setattr("avfuse.pretrained.hf_hub_download", download)
    assert_same(AVEncoder.from_pretrained("someone/model", revision="v1", token="t"), encoder)
    assert asked == [("someone/model", name, "v1", "t") for name in ("config.json", "model.safetensors")]


def test_weights_must_fit_strictly(tmp_path):
    encoder = make_encoder().float()
    encoder.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    weights = load_file(path)
    for damaged, message in (
        (weights | {"extra": torch.zeros(1)}, "extra"),
        ({name: w for name, w in weights.items() if name != "fusion_tokens"}, "fusion_tokens"),
        (weights | {"fusion_norm.weight": torch.zeros(31)}, "fusion_norm.weight"),
    ):
        save_file(damaged, path)
        with pytest.raises(ValueError, match=f"(?s)the weights do not fit AVEncoder.*{message}"):
            AVEncoder.from_pretrained(tmp_path)


def test_a_model_on_the_hub_without_weights_is_named(tmp_path, monkeypatch):
    make_encoder().save_pretrained(tmp_path)

    def download(source, name, **_):
        if name != "config.json":
            raise EntryNotFoundError(f"404: no {name}")
        return tmp_path / name

    monkeypatch.setattr("avfuse.pretrained.hf_hub_download", download)
    monkeypatch.setattr("avfuse.pretrained.unreachable_hub", lambda: None)
    for load in AVEncoder.from_pretrained, load_encoder:
        with pytest.raises(ValueError, match="^model.safetensors of some/one cannot be fetched: 404"):
            load("some/one")


def test_damaged_files_are_named(tmp_path):
    encoder = make_encoder().float()
    for name, damage, message in (
        ("model.safetensors", lambda whole: whole[:100], "weights .*model.safetensors cannot be read"),
        ("model.safetensors", None, "weights .*model.safetensors cannot be read"),
        ("config.json", lambda whole: whole[:100], "config.json is damaged"),
        ("config.json", lambda whole: whole.replace(b'"embed_dim"', b'"width"'), "config.json is damaged"),
        ("config.json", lambda whole: whole.replace(b'"image"', b'"picture"'), "config.json is damaged"),
    ):
        encoder.save_pretrained(tmp_path)
        path = tmp_path / name
        path.write_bytes(damage(path.read_bytes())) if damage else path.unlink()
        with pytest.raises(ValueError, match=message):
            AVEncoder.from_pretrained(tmp_path)


def test_options_that_would_be_ignored_are_refused(tmp_path):
    make_encoder().save_pretrained(tmp_path)
    with pytest.raises(TypeError, match="interactions"):
        AVEncoder.from_pretrained(tmp_path, interactions="token")


# --- the encoder of whatever there is -----------------------------------------------------------------------


def test_encoders_are_found_in_runs_and_saved_models(tmp_path):
    mae = make_mae().float()
    for folder in tmp_path / "saved", tmp_path / "run" / "model":
        mae.save_pretrained(folder)
    (tmp_path / "run" / "config.json").write_text('{"settings": {}}')  # a run's, which is no model's
    mae.encoder.save_pretrained(tmp_path / "encoder")
    for place in tmp_path / "saved", tmp_path / "run", str(tmp_path / "run"), tmp_path / "encoder":
        assert_same(load_encoder(place), mae.encoder)


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_encoders_are_found_in_released_files(suffix, tmp_path):
    image, audio = (
        make_vit(shape, embed_dim=64, num_heads=1, mlp_ratio=4.0) for shape in (IMAGE, (1, 64, 16))
    )
    image.origin = audio.origin = dict(weights="DeepAVFusion", family="DeepAVFusion", licence="CC-BY-NC-4.0")
    encoder = ReleasedEncoder(image, audio, interactions="factorized").eval()
    mae = AVMAE(encoder, decoder_dim=16, decoder_depth=1, decoder_heads=16)
    names = {name: re.sub(r"^(image|audio)_decoder\.", r"\1_decoder_", name) for name in mae.state_dict()}
    released = {names[name]: weight.contiguous() for name, weight in mae.state_dict().items()}
    classifier = {f"encoder.{name}": weight for name, weight in encoder.state_dict().items()}
    classifier |= {"fusion_head.weight": torch.ones(5, 64), "fusion_head.bias": torch.ones(5)}
    kinds = dict(autoencoder=released, encoder=encoder.state_dict(), classifier=classifier)
    for kind, weights in kinds.items():
        path = tmp_path / f"{kind}.{suffix}"
        save_file(weights, path) if suffix == "safetensors" else torch.save({"state_dict": weights}, path)
        assert_same(load_encoder(path), encoder)
        loaded = avfuse.load(path)  # as what it is
        assert_same(getattr(loaded, "encoder", loaded), encoder)
    assert torch.equal(loaded.fusion_head.weight, torch.ones(5, 64)) and not loaded.training
    inputs = (torch.randn(2, *shape) for shape in encoder.input_shapes.values())
    with torch.no_grad():
        assert loaded(*inputs).logits.shape == (2, 5)


def test_encoders_of_the_hub_are_downloaded(tmp_path, monkeypatch):
    mae = make_mae().float()
    mae.save_pretrained(tmp_path)
    place = "avfuse.pretrained.hf_hub_download"
    monkeypatch.setattr(place, lambda repo_id, filename, **_: str(tmp_path / filename))
    assert_same(load_encoder("someone/model"), mae.encoder)


def test_what_holds_no_encoder_is_told(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos" / "a.mp4").touch()
    (tmp_path / "running" / "checkpoints").mkdir(parents=True)
    for name, config in ("other", '{"architectures": []}'), ("list", "[]"), ("damaged", "{"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(config)
    make_encoder().save_pretrained(tmp_path / "head")
    config = json.loads((tmp_path / "head" / "config.json").read_text())
    (tmp_path / "head" / "config.json").write_text(json.dumps(config | {"class": "AVHead"}))
    (tmp_path / "noise.pth").write_bytes(b"noise")
    block = make_encoder("factorized", fusion_layers=[0])
    torch.save(block.state_dict(), tmp_path / "ours.pth")
    for name, message in (
        ("empty", "empty must hold an AVEncoder or AVMAE, but holds nothing"),
        ("videos", "but holds a.mp4"),
        ("running", "but holds checkpoints: a run that has not ended"),
        ("other", "but holds config.json"),
        ("list", "but holds config.json"),
        ("head", "but holds a model of class AVHead"),
        ("damaged", "config.json is damaged"),
        ("noise.pth", "noise.pth is no file of weights alone"),
        ("ours.pth", "ours.pth is no released DeepAVFusion model"),
    ):
        with pytest.raises(ValueError, match=message):
            load_encoder(tmp_path / name)
    with pytest.raises(ValueError, match="no such/run/folder is no file, no folder and no name on the hub"):
        load_encoder("no such/run/folder")
    with pytest.raises(ValueError, match="nobody/nothing is no file or folder, nor found on the hub"):
        load_encoder("nobody/nothing")
    with pytest.raises(ValueError, match="nobody/nothing is no file or folder, nor found on the hub"):
        AVEncoder.from_pretrained("nobody/nothing")


def test_a_hub_without_an_address_is_not_called(monkeypatch):
    """huggingface_hub would call it six times, in half a minute."""

    def no_address(*_):
        raise socket.gaierror("Name or service not known")

    calls = []
    monkeypatch.setattr(pretrained.socket, "getaddrinfo", no_address)
    monkeypatch.setattr(pretrained, "getproxies", dict)
    monkeypatch.setattr(pretrained, "hf_hub_download", lambda *_, **options: calls.append(options) or "here")
    assert pretrained.file_at("nobody/nothing", "config.json") == Path("here")
    assert calls == [{"local_files_only": True}]
    monkeypatch.setattr(pretrained, "hf_hub_download", huggingface_hub.hf_hub_download)
    with pytest.raises(ValueError, match="nor found on the hub: there is no copy here, and no way to"):
        AVEncoder.from_pretrained("nobody/nothing")


def test_a_single_block_is_no_encoder(tmp_path):
    golden = load_file(Path(__file__).parent / "golden" / "block_dense.safetensors")
    weights = {n.removeprefix("weights/"): w for n, w in golden.items() if n.startswith("weights/")}
    save_file(weights, tmp_path / "block.safetensors")
    with pytest.raises(ValueError, match="block.safetensors holds a single ReleasedDense, no encoder"):
        load_encoder(tmp_path / "block.safetensors")


# --- optimizer groups ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("interactions", VARIANTS)
@pytest.mark.parametrize("kind", ["encoder", "autoencoder"])
@pytest.mark.parametrize("vit", ["plain", "class and register tokens", "qk-norm, LayerScale"])
def test_parameter_groups_hold_everything_once_by_decay_and_layer(interactions, kind, vit):
    pair_bias = interactions in ("dense", "bilinear")
    model = make_encoder(interactions, vit=VITS[vit], pair_bias=pair_bias)
    encoder = model
    if kind == "autoencoder":
        model = AVMAE(encoder, decoder_dim=16, decoder_depth=2, decoder_heads=2)
    groups = model.parameter_groups(weight_decay=0.3)
    assert len({(group["layer"], group["weight_decay"]) for group in groups}) == len(groups)

    pair_biases = {id(block.pair_bias) for block in encoder.fusion_blocks.values() if pair_bias}
    found = {}
    for group in groups:
        assert group.keys() == {"params", "weight_decay", "layer"}
        for parameter in group["params"]:
            assert id(parameter) not in found
            decayed = parameter.ndim > 1 and id(parameter) not in pair_biases
            assert group["weight_decay"] == (0.3 if decayed else 0.0)
            found[id(parameter)] = group["layer"]
    trainable = {id(p) for p in model.parameters() if p.requires_grad}
    assert found.keys() == trainable

    # Layers by module, not by name: blocks of three branches, what comes before, what comes after.
    def layers(*modules):
        return {found[id(p)] for m in modules for p in m.parameters() if p.requires_grad}

    for layer in range(3):
        fusion = [encoder.fusion_blocks[str(layer)]] if encoder.fusion_blocks else []
        assert layers(encoder.image.blocks[layer], encoder.audio.blocks[layer], *fusion) == {layer + 1}
    for branch in encoder.image, encoder.audio:
        assert layers(branch.patch_embed) == {0} and layers(branch.norm) == {4}
        tokens = [branch.pos_embed, branch.cls_token, branch.reg_token]
        assert {found[id(p)] for p in tokens if p is not None} == {0}
    assert found[id(encoder.fusion_tokens)] == 0 and layers(encoder.fusion_norm) == {4}
    if kind == "autoencoder":
        assert layers(model.image_decoder, model.audio_decoder) == {4}
    torch.optim.AdamW(groups, lr=1e-3)


def test_default_weight_decay_is_the_papers():
    assert {group["weight_decay"] for group in make_encoder().parameter_groups()} == {0.0, 0.05}
    assert {group["weight_decay"] for group in make_mae().parameter_groups()} == {0.0, 0.05}


@pytest.mark.parametrize("name", ["here/gone", "runs/gone", "encoder.pth", "someone/encoder.safetensors"])
def test_what_is_meant_as_a_path_is_not_looked_for_on_the_hub(name, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("avfuse.pretrained.hf_hub_download", lambda *_, **__: pytest.fail("asked the hub"))
    for load in load_encoder, avfuse.load, AVEncoder.from_pretrained:
        with pytest.raises(ValueError, match=f"^{name} is no file or folder"):
            load(name)


@pytest.mark.parametrize(
    "name", ["c", "./m", "../m", "~/m", "m/", "/no/m", "C:\\m", "C:/m", "a/b/c", "no/m m"]
)
def test_only_owner_and_name_are_looked_for_on_the_hub(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("avfuse.pretrained.hf_hub_download", lambda *_, **__: pytest.fail("asked the hub"))
    for load in load_encoder, avfuse.load, AVEncoder.from_pretrained:
        with pytest.raises(ValueError, match="no(r a)? name on the hub, which is OWNER/NAME"):
            load(name)


def test_finite_weights_that_overflow_are_refused(tmp_path):
    """As float32, 1e300 is infinite."""
    encoder = make_encoder().float()
    encoder.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights["fusion_norm.weight"] = torch.full((32,), 1e300, dtype=torch.float64)
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="not finite: fusion_norm.weight"):
        AVEncoder.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("drop_path_rate", 1e9, "drop_path_rate must be a number in"),
        ("attn_drop_rate", -3, "attn_drop_rate must be a number in"),
        ("pos_drop_rate", float("nan"), "pos_drop_rate must be a number in"),
        ("proj_drop_rate", "x", "proj_drop_rate must be a number in"),
        ("qkv_bias", "yes", "qkv_bias must be True or False, got 'yes'"),
        ("class_token", -3, "class_token must be True or False, got -3"),
    ],
)
def test_a_description_with_an_absurd_part_is_refused(tmp_path, key, value, message):
    make_encoder().float().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["model"]["image"][key] = value
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        AVEncoder.from_pretrained(tmp_path)


# --- what is stated, and saves that end half way ------------------------------------------------------------


def test_a_stated_licence_stays_with_the_encoder(tmp_path):
    """Also where it is taken out of another model, and put into a third."""
    model = AVMAE(make_encoder(), decoder_dim=16, decoder_depth=1, decoder_heads=2)
    model.facts = {"licence": "CC-BY-NC-4.0"}
    model.save_pretrained(tmp_path / "first")
    encoder = load_encoder(tmp_path / "first")
    encoder.save_pretrained(tmp_path / "second")
    Classifier(load_encoder(tmp_path / "second"), 3).save_pretrained(tmp_path / "third")
    Classifier(avfuse.load(tmp_path / "first").encoder, 3).save_pretrained(tmp_path / "fourth")
    avfuse.load(tmp_path / "fourth").encoder.with_frames(2).save_pretrained(tmp_path / "fifth")
    for folder in ("second", "third", "fourth", "fifth"):
        assert read_metadata(tmp_path / folder / "model.safetensors")["licence"] == "CC-BY-NC-4.0"


def test_what_is_no_number_in_facts_is_null(tmp_path):
    model = make_encoder()
    model.facts = {"metrics": {"accuracy": 0.5, "precision of no clips": math.nan, "loss": -math.inf}}
    model.save_pretrained(tmp_path)

    def refuse(constant):
        raise AssertionError(constant)

    config = json.loads((tmp_path / "config.json").read_text(), parse_constant=refuse)
    assert config["facts"]["metrics"] == {"accuracy": 0.5, "precision of no clips": None, "loss": None}
    assert avfuse.load(tmp_path).facts == config["facts"]


def test_what_is_saved_in_the_folder_of_a_run_is_what_is_loaded_from_it(tmp_path):
    """A folder called model makes one that of a run only where it holds no weights itself."""
    first, second = Classifier(make_encoder(), 3), Classifier(make_encoder(), 3)
    first.save_pretrained(tmp_path / "model")
    assert torch.equal(avfuse.load(tmp_path).image_head.weight, first.image_head.weight)
    second.save_pretrained(tmp_path)
    assert torch.equal(avfuse.load(tmp_path).image_head.weight, second.image_head.weight)


def test_a_save_that_is_interrupted_leaves_the_model_before(tmp_path, monkeypatch):
    """Not the new weights with the names of the old."""
    Classifier(make_encoder(), 3, class_names=("dog", "harp", "rain")).save_pretrained(tmp_path)
    before = avfuse.load(tmp_path)

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    after = Classifier(make_encoder(), 3, class_names=("rain", "dog", "harp"))
    for step in ("write_safetensors", "aside"):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(f"avfuse.pretrained.{step}", interrupted)
            after.save_pretrained(tmp_path)
        again = avfuse.load(tmp_path)
        assert again.class_names == before.class_names
        assert all(map(torch.equal, again.state_dict().values(), before.state_dict().values()))
        assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(
    "change",
    [
        {"class": ["Classifier"]},
        {"class": {}},
        {"model": None},
        {"model": 3},
        {"model": "encoder"},
        {"facts": [1]},
    ],
    ids=str,
)
def test_a_config_of_other_types_is_damaged(tmp_path, change):
    Classifier(make_encoder(), 3).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    for read in (avfuse.load, load_encoder, Classifier.from_pretrained):
        with pytest.raises(ValueError, match="config.json is damaged"):
            read(tmp_path)


def test_a_class_that_is_not_known_is_no_encoder(tmp_path):
    Classifier(make_encoder(), 3).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"class": "Future"}))
    with pytest.raises(ValueError, match="a Future, a class not known here"):
        avfuse.load(tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(several="no"), "several must be True or False"),
        (dict(batch_norm=1), "batch_norm must be True or False"),
        (dict(class_names=("dog", "dog", "rain")), "class_names must name all 3 classes, got 2"),
        (dict(class_names={"a": 1, "b": 2, "c": 3}), "class_names must be a sequence of names"),
        (dict(class_names=[1, 2, None]), "class_names must be a sequence of names"),
        (dict(class_names=3), "class_names must be a sequence of names"),
        (dict(encoder=None), "encoder must be an AVEncoder, got NoneType"),
    ],
    ids=str,
)
def test_arguments_of_a_classifier(options, message):
    with pytest.raises(ValueError, match=message):
        Classifier(**dict(encoder=make_encoder(), classes=3) | options)


def test_predict_in_the_dtype_of_the_weights(tmp_path):
    path, model = write_video(tmp_path / "a.mp4", 3), Classifier(create_encoder("micro"), 3).eval()
    odds = model.predict(path)["both"]
    assert model.double().predict(path)["both"] == pytest.approx(odds, abs=1e-4)
    assert model.to(torch.bfloat16).predict(path)["both"] == pytest.approx(odds, abs=0.05)
