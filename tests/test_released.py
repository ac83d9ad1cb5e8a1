"""The semantics of the released code against its own outputs and gradients (tests/golden: weights, inputs and
outputs of tiny models, which say what they are in their metadata), and the strictness of reading its weights.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from models import count_flops, gradients, relative_error, remembered
from safetensors import safe_open
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from avfuse import AVMAE, AVEncoder, InputSettings, from_deepavfusion, released
from avfuse.mae import patchify, unpatchify
from avfuse.released import (
    ReleasedDense,
    ReleasedEncoder,
    ReleasedFactorized,
    ReleasedToken,
    infer_settings,
    make_released_encoder,
)

GOLDEN = Path(__file__).parent / "golden"
BLOCKS = {"block_dense": ReleasedDense, "block_factorized": ReleasedFactorized, "block_token": ReleasedToken}
ENCODERS = tuple(f"encoder_{kind}" for kind in ("dense", "factorized", "factorized_last", "none", "token"))
MODELS = (*BLOCKS, *ENCODERS, "mae_factorized")
PRECISE = 1e-5  # float32, relative to the largest value


def golden(name):
    """config, weights, inputs, outputs"""
    with safe_open(GOLDEN / f"{name}.safetensors", "pt") as file:
        parts = {"weights": {}, "inputs": {}, "outputs": {}}
        for key in file.keys():
            kind, tensor_name = key.split("/", 1)
            parts[kind][tensor_name] = file.get_tensor(key)
        return json.loads(file.metadata()["config"]), *parts.values()


def load(name, **changes):
    config, weights, *_ = golden(name)
    return from_deepavfusion(weights, config=config | changes)


def run_mae(mae, inputs):
    masks = {f"{name}_removed": inputs[f"{name}_mask"].bool() for name in ("image", "audio")}
    return mae(inputs["image"], inputs["audio"], **masks)


# --- outputs and gradients ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BLOCKS)
def test_blocks_give_the_released_outputs_and_gradients(name):
    config, weights, inputs, outputs = golden(name)
    block = from_deepavfusion(weights, config=config)
    assert type(block) is BLOCKS[name] and not block.training
    streams = [inputs[key].requires_grad_() for key in ("fusion", "image", "audio")]
    output = block(*streams)
    assert relative_error(output, outputs["fusion"]) < PRECISE
    grads = gradients(block, (output * inputs["cotangent"]).sum(), *streams)
    for index, key in enumerate(("fusion", "image", "audio")):
        assert relative_error(grads[f"input {index}"], outputs[f"grad_{key}"]) < PRECISE, f"gradient of {key}"


@pytest.mark.parametrize("name", ENCODERS)
def test_encoders_give_the_released_outputs(name):
    """After every layer, before the last norm, and at the end."""
    config, weights, inputs, outputs = golden(name)
    encoder = from_deepavfusion(weights, config=config)
    assert isinstance(encoder, AVEncoder) and not encoder.training
    ours = encoder(inputs["image"], inputs["audio"], return_layers=True)
    for key in "image", "audio", "fusion":
        for layer, tokens in enumerate(ours.layers):
            assert relative_error(getattr(tokens, key), outputs[f"layer{layer}_{key}"]) < PRECISE
        assert relative_error(getattr(ours, key), outputs[key]) < PRECISE


@pytest.mark.parametrize("name", ["encoder_dense", "mae_factorized"])
def test_images_need_not_be_square(name, tmp_path):
    """The same patches in 2 rows of 8 instead of 4 rows of 4: tokens, and so outputs, stay what they are."""
    _, _, inputs, outputs = golden(name)
    inputs["image"] = unpatchify(patchify(inputs["image"], (16, 16)), (16, 16), (2, 8))
    load(name, image_size=[32, 128]).save_pretrained(tmp_path)
    model = (AVMAE if name == "mae_factorized" else AVEncoder).from_pretrained(tmp_path)
    assert getattr(model, "encoder", model).image.patch_embed.img_size == (32, 128)
    if name == "mae_factorized":
        ours, truth = run_mae(model, inputs).image_pred, outputs["pred_image"]
    else:
        ours, truth = model(inputs["image"], inputs["audio"]).fusion, outputs["fusion"]
    assert relative_error(ours, truth) < PRECISE


def test_autoencoders_give_the_released_predictions_and_losses():
    config, weights, inputs, outputs = golden("mae_factorized")
    mae = from_deepavfusion(weights, config=config)
    assert isinstance(mae, AVMAE) and not mae.training
    output = run_mae(mae, inputs)
    for key in "image", "audio":
        assert relative_error(getattr(output, f"{key}_pred"), outputs[f"pred_{key}"]) < PRECISE
        assert relative_error(getattr(output, f"{key}_loss"), outputs[f"loss_{key}"]) < PRECISE
    # The released masks were drawn at its ratios, and what is kept is rounded down as there.
    assert mae.mask_sampler()(torch.Generator())["audio_removed"].sum() == inputs["audio_mask"][0].sum()
    assert mae.mask_sampler()(torch.Generator())["image_removed"].sum() == inputs["image_mask"][0].sum()


def test_every_golden_file_is_used():
    others = {"classifier"}  # tests/test_classify.py
    assert {path.stem for path in GOLDEN.glob("*.safetensors")} == {*MODELS} | others


def test_images_and_sounds_are_not_exchanged():
    """The token encoder exchanges the norms of image and audio, its block alone does not."""
    for name in "encoder_dense", "encoder_token":
        _, weights, *_ = golden(name)
        block = load(name).fusion_blocks["0"]
        image_norm = "aud" if name == "encoder_token" else "img"
        assert torch.equal(block.norm1_img.weight, weights[f"fusion_blocks.0.norm1_{image_norm}.weight"])
    assert torch.equal(load("block_token").norm1_img.weight, golden("block_token")[1]["norm1_img.weight"])


# --- what is trainable, missing modalities, checkpoints of our own ------------------------------------------


def test_positions_are_fixed_in_the_encoder_and_trained_in_the_decoders():
    frozen = {name for name, p in load("mae_factorized").named_parameters() if not p.requires_grad}
    key_biases = {f"encoder.fusion_blocks.{layer}.attn.k.bias" for layer in (0, 1)}  # cancel in the softmax
    assert frozen == {"encoder.image.pos_embed", "encoder.audio.pos_embed"} | key_biases


@pytest.mark.parametrize("name", MODELS)
def test_every_trainable_parameter_gets_a_gradient(name):
    """As distributed training demands."""
    _, _, inputs, _ = golden(name)
    model = load(name)
    if name in BLOCKS:
        loss = model(inputs["fusion"], inputs["image"], inputs["audio"]).square().sum()
    elif name in ENCODERS:
        loss = sum(part.square().sum() for part in model(inputs["image"], inputs["audio"])[:3])
    else:
        loss = run_mae(model, inputs).loss
    loss.backward()
    assert not [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]


@pytest.mark.parametrize("name", ENCODERS)
@pytest.mark.parametrize("absent", ["image", "audio", "both"])
def test_a_missing_modality_is_finite_and_leaves_the_other_clips_alone(name, absent):
    _, _, inputs, outputs = golden(name)
    encoder, masks = load(name), {}
    for key, tokens in ("image", 16), ("audio", 12):
        if absent in (key, "both"):
            masks[f"{key}_mask"] = torch.tensor([[True] * tokens, [False] * tokens])
    output = encoder(inputs["image"], inputs["audio"], **masks)
    for key in "image", "audio", "fusion":
        assert relative_error(getattr(output, key)[:1], outputs[key][:1]) < PRECISE
    grads = gradients(encoder, sum(part.square().sum() for part in output[:3]))
    assert all(grad.isfinite().all() for grad in grads.values())
    if absent != "both":
        alone = encoder(**{key: None if key == absent else inputs[key] for key in ("image", "audio")})
        assert relative_error(alone.fusion[1], output.fusion[1]) < PRECISE


@pytest.mark.parametrize("name", BLOCKS)
def test_masks_drop_tokens(name):
    _, _, inputs, _ = golden(name)
    block = load(name).double()
    fusion, image, audio = (inputs[key].double() for key in ("fusion", "image", "audio"))
    masks = dict(image_mask=torch.arange(16) < 11, audio_mask=torch.arange(12) >= 5)
    masked = block(fusion, image, audio, **{key: mask.expand(2, -1) for key, mask in masks.items()})
    assert relative_error(masked, block(fusion, image[:, :11], audio[:, 5:])) < 1e-11


@pytest.mark.parametrize("name", [*ENCODERS, "mae_factorized"])
def test_released_models_survive_our_own_checkpoints(name, tmp_path):
    _, _, inputs, _ = golden(name)
    model = load(name)
    model.save_pretrained(tmp_path)
    public = AVMAE if name.startswith("mae") else AVEncoder
    for loaded in public.from_pretrained(tmp_path), type(model).from_pretrained(tmp_path):
        assert type(loaded) is type(model) and loaded.to_config() == model.to_config()
        assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), model.parameters(), strict=True))
        trainable = [[p.requires_grad for p in each.parameters()] for each in (loaded, model)]
        assert trainable[0] == trainable[1]
        if public is AVMAE:
            assert isinstance(loaded.encoder, ReleasedEncoder)
            assert torch.equal(run_mae(loaded, inputs).loss, run_mae(model, inputs).loss)
        else:
            outputs = [each(inputs["image"], inputs["audio"]) for each in (loaded, model)]
            assert all(torch.equal(*parts) for parts in zip(outputs[0][:3], outputs[1][:3], strict=True))


# --- files and dictionaries ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["block_token", "encoder_dense", "mae_factorized"])
@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("kind", ["dictionary", "pth", "safetensors"])
def test_checkpoints_as_they_come(name, prefix, kind, tmp_path):
    """Bare or under "state_dict" beside the optimizer, with or without the prefix of distributed training."""
    config, weights, *_ = golden(name)
    weights = {f"{prefix}{key}": weight for key, weight in weights.items()}
    sources = [weights, {"state_dict": weights, "optimizer": {"state": {}}, "epoch": 3, "n_steps": 17}]
    if kind == "pth":
        for index, source in enumerate(sources):
            torch.save(source, tmp_path / f"{index}.pth")
            sources[index] = tmp_path / f"{index}.pth"
    if kind == "safetensors":  # holds nothing but tensors
        save_file(weights, tmp_path / "model.safetensors")
        sources = [str(tmp_path / "model.safetensors")]
    truth = load(name)
    for source in sources:
        model = from_deepavfusion(source, config=config)
        assert type(model) is type(truth)
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), truth.parameters(), strict=True))


def test_saved_again_they_load_where_nothing_else_was_imported(tmp_path):
    names = "encoder_dense", "mae_factorized"
    for name in names:
        config, weights, *_ = golden(name)
        from_deepavfusion(weights, config=config).save_pretrained(tmp_path / name)
    code = """
import avfuse, sys
kinds = avfuse.AVEncoder, avfuse.AVMAE
assert "avfuse.released" not in sys.modules
for kind, folder in zip(kinds, sys.argv[1:]):
    print(type(kind.from_pretrained(folder)).__name__)
"""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, "-c", code, *names]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.stdout.split() == ["ReleasedEncoder", "ReleasedAutoencoder"], done.stderr


def test_a_checkpoint_that_runs_code_is_refused(tmp_path):
    class Malicious:
        def __reduce__(self):
            return Path.touch, (tmp_path / "it ran",)

    _, weights, *_ = golden("block_token")
    torch.save({"state_dict": weights, "epoch": Malicious()}, tmp_path / "checkpoint.pth")
    with pytest.raises(ValueError, match="checkpoint.pth is no file of weights alone"):
        from_deepavfusion(tmp_path / "checkpoint.pth")
    with pytest.raises(ValueError, match=r"\(it holds getattr, which[^\n]* code\)$"):  # and no advice
        from_deepavfusion(tmp_path / "checkpoint.pth")
    assert not (tmp_path / "it ran").exists()


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("damage", ["missing", "short", "doubled", "scalar"])
def test_every_weight_is_needed_in_its_shape(name, damage, monkeypatch):
    monkeypatch.setattr(VisionTransformer, "init_weights", lambda *_, **__: None)  # they are slow
    for initialize in (name for name in vars(nn.init) if name.endswith("_") and name[0] != "_"):
        monkeypatch.setattr(nn.init, initialize, lambda tensor, *_, **__: tensor)
    config, weights, *_ = golden(name)
    from_deepavfusion(weights, config=config)  # is accepted as it is
    # One model for equal settings: to make it takes longer than to see that weights do not fit it.
    for make in "make_released_encoder", "make_released_autoencoder":
        monkeypatch.setattr(released, make, remembered(getattr(released, make), json.dumps))
    accepted = []
    for key, weight in weights.items():
        changed = dict(weights)
        if damage == "missing":
            del changed[key]
        elif damage == "short":
            changed[key] = weight[..., :-1]
        elif damage == "doubled":
            changed[key] = torch.cat([weight, weight])
        else:
            changed[key] = torch.zeros(())
        try:
            from_deepavfusion(changed, config=config)
            accepted.append(key)
        except ValueError:
            pass  # and nothing else
    assert not accepted


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("extra", ["extra", "head.weight", "encoder.extra", "fusion_blocks.7.norm2.bias"])
def test_extra_weights_are_refused(name, extra):
    config, weights, *_ = golden(name)
    with pytest.raises(ValueError):
        from_deepavfusion(weights | {extra: torch.zeros(32)}, config=config)


def test_files_that_hold_no_weights_are_named(tmp_path):
    contents = {name: b'{"weights": 1}' for name in ("notes.json", "cut.pth", "cut.safetensors")}
    contents |= {"empty.pth": b"", "text.pth": b"hello" * 9, "none.pth": None}
    for name, content in contents.items():
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=name):
            from_deepavfusion(tmp_path / name)
    with pytest.raises(ValueError, match=r"weights .* cannot be read \(it is no regular file\)"):
        from_deepavfusion(tmp_path)


def test_half_a_checkpoint_is_refused():
    """An encoder under the names of an autoencoder, without decoders, or without its transformers' blocks."""
    _, weights, *_ = golden("mae_factorized")
    encoder = {key: weight for key, weight in weights.items() if key.startswith("encoder.")}
    with pytest.raises(ValueError, match="state_dict_or_path holds no image_decoder_embed.weight"):
        from_deepavfusion(encoder)
    without_blocks = {key: weight for key, weight in weights.items() if "image.blocks" not in key}
    with pytest.raises(ValueError, match="state_dict_or_path holds no image.blocks"):
        from_deepavfusion(without_blocks)


@pytest.mark.parametrize(
    "source, message",
    [
        ({}, "must hold tensors by name"),
        ({"norm": torch.zeros(2)}, "no DeepAVFusion autoencoder, encoder or fusion block"),
        ({"layer.weight": torch.zeros(2)}, r"its names begin with \['layer.weight'\]"),
        ({"state_dict": {"weight": 3}}, "'weight' is no tensor but a int"),
        ({"state_dict": [1]}, "must hold tensors by name"),
        ([1, 2], "must be a path or a dictionary, got list"),
        (None, "must be a path or a dictionary, got NoneType"),
    ],
)
def test_weights_of_something_else_are_named(source, message):
    with pytest.raises(ValueError, match=f"state_dict_or_path.*{message}"):
        from_deepavfusion(source)


def test_bad_configs_are_named():
    with pytest.raises(ValueError, match="config has unknown keys heads, layers; known are embed_dim"):
        load("encoder_dense", heads=2, layers=3)
    with pytest.raises(ValueError, match="config: interactions must be one of 'dense_mmi', .* got 'dense'"):
        load("encoder_dense", interactions="dense")
    with pytest.raises(ValueError, match="config: num_heads must divide the width of 32, got 5"):
        load("encoder_dense", num_heads=5)
    with pytest.raises(ValueError, match="config: num_heads must be a positive integer, got 0"):
        load("block_dense", num_heads=0)
    for wrong, message in (
        (dict(interactions="none"), "config: interactions is 'none', but the weights are those of a fusion"),
        (dict(fusion_layers="first"), "config: fusion_layers must be .* got 'first'"),
        (dict(fusion_layers=[0, 1]), r"config: fusion_layers must be .* got \[0, 1\]"),
        (dict(image_size=224), "config: image_size must be .* got 224"),
        (dict(audio_size=(128, 192.0)), "config: audio_size must be a positive integer, got 192.0"),
        (dict(mlp_ratio="1"), "config: mlp_ratio must be a positive number, got '1'"),
        (dict(norm_loss="yes"), "config: norm_loss must be True or False, got 'yes'"),
    ):
        with pytest.raises(ValueError, match=message):
            load("block_dense", **wrong)
    with pytest.raises(ValueError, match="config must be a dictionary, got list"):
        from_deepavfusion(golden("block_dense")[1], config=["num_heads"])
    with pytest.raises(ValueError, match="the weights do not fit ReleasedEncoder"):
        load("encoder_dense", fusion_layers="0")
    with pytest.raises(ValueError, match="the weights do not fit ReleasedEncoder"):
        load("encoder_dense", audio_size=[64, 64])
    with pytest.raises(ValueError, match="the weights do not fit ReleasedFactorized"):
        load("block_dense", interactions="factorized_mmi")
    with pytest.raises(ValueError, match="fusion must hold"):
        load("block_factorized", fusion_tokens=5)(
            *(golden("block_factorized")[2][k] for k in ("fusion", "image", "audio"))
        )


@pytest.mark.parametrize(
    "name, layers", [("encoder_dense", "0-1"), ("encoder_factorized_last", "1"), ("encoder_none", "none")]
)
def test_layers_by_their_released_names(name, layers):
    model, truth = load(name, fusion_layers=layers), load(name)
    assert model.fusion_layers == truth.fusion_layers == {"0-1": (0, 1), "1": (1,), "none": ()}[layers]


# --- settings that names and shapes tell --------------------------------------------------------------------


def make_weights(
    interactions, *, decoders=True, layers="all", attn_ratio=0.25, mlp_ratio=1.0, dim=128, depth=3
):
    """A released checkpoint of standard proportions: heads of 64, 16 + 8 + 8 tokens, square images, audio of
    8 patch rows. Its names are those of the golden files; its shapes are this function's own.
    """
    golden_name = {
        "dense_mmi": "encoder_dense",
        "factorized_mmi": "encoder_factorized",
        "token": "encoder_token",
    }
    like = golden(golden_name.get(interactions, "encoder_none"))[1]
    width, tokens = int(dim * attn_ratio), 32 if interactions == "factorized_mmi" else 16
    attention = {
        "dense_mmi": {"q": (width, dim), "kv": (2 * width, 2 * dim), "proj": (dim, width)},
        "token": {"q": (width, dim), "kv": (2 * width, dim), "proj": (dim, width)},
        "factorized_mmi": {
            "q": (width, dim), "k": (width, 2 * dim), "v": (dim, 2 * dim), "proj": (dim, dim),
            **{f"attn_{x}.q": (dim, dim) for x in "va"}, **{f"attn_{x}.kv": (2 * dim, dim) for x in "va"},
            **{f"attn_{x}.proj": (dim, dim) for x in "va"},
        },
        "none": {},
    }[interactions]  # fmt: skip
    fusion_layers = range(depth) if layers == "all" else layers
    block = {f"attn.{name}": shape for name, shape in attention.items()}
    hidden = int(dim * mlp_ratio)
    block |= {"mlp.fc1": (hidden, dim), "mlp.fc2": (dim, hidden)}
    unimodal = {
        "attn.qkv": (3 * dim, dim),
        "attn.proj": (dim, dim),
        "mlp.fc1": (4 * dim, dim),
        "mlp.fc2": (dim, 4 * dim),
    }
    linears, norms = {}, ["fusion_norm"]
    shapes = {"fusion_tokens": (1, tokens, dim)}
    for modality, channels, patches in ("image", 3, 9), ("audio", 1, 16):
        shapes |= {
            f"{modality}.pos_embed": (1, patches, dim),
            f"{modality}.patch_embed.proj.weight": (dim, channels, 16, 16),
            f"{modality}.patch_embed.proj.bias": (dim,),
        }
        linears |= {
            f"{modality}.blocks.{l}.{n}": shape for l in range(depth) for n, shape in unimodal.items()
        }
        norms += [f"{modality}.blocks.{l}.norm{i}" for l in range(depth) for i in (1, 2)] + [
            f"{modality}.norm"
        ]
    if interactions != "none":
        linears |= {f"fusion_blocks.{l}.{n}": shape for l in fusion_layers for n, shape in block.items()}
        parts = "norm1_mm", "norm1_img", "norm1_aud", "norm2"
        norms += [f"fusion_blocks.{l}.{part}" for l in fusion_layers for part in parts]
    shapes |= {f"{name}.{kind}": (dim,) for name in norms for kind in ("weight", "bias")}
    shapes |= {f"{name}.weight": shape for name, shape in linears.items()}
    shapes |= {f"{name}.bias": shape[:1] for name, shape in linears.items()}
    if layers == "all":  # of the same names as the golden files, whose models have two layers
        assert {name for name in shapes if ".2." not in name} == like.keys()
    if decoders:
        shapes = {f"encoder.{name}": shape for name, shape in shapes.items()}
        for modality, patches, values in ("image", 9, 768), ("audio", 16, 256):
            linears = {"embed": (64, dim), "pred": (values, 64), "blocks.0.attn.qkv": (192, 64)}
            linears |= {
                "blocks.0.attn.proj": (64, 64),
                "blocks.0.mlp.fc1": (256, 64),
                "blocks.0.mlp.fc2": (64, 256),
            }
            norms = {f"{n}": (64,) for n in ("norm", "blocks.0.norm1", "blocks.0.norm2")}
            for name, shape in (linears | norms).items():
                shapes[f"{modality}_decoder_{name}.weight"] = shape
                shapes[f"{modality}_decoder_{name}.bias"] = shape[:1]
            shapes[f"{modality}_decoder_mask_token"] = (1, 1, 64)
            shapes[f"{modality}_decoder_pos_embed"] = (1, patches, 64)
    return {name: torch.randn(shape) for name, shape in shapes.items()}


@pytest.mark.parametrize("interactions", ["dense_mmi", "factorized_mmi", "token", "none"])
@pytest.mark.parametrize(
    "options", [dict(), dict(attn_ratio=1.0, mlp_ratio=4.0, layers=[2]), dict(decoders=False)]
)
def test_settings_are_inferred_without_a_config(interactions, options):
    model = from_deepavfusion(make_weights(interactions, **options))
    encoder = getattr(model, "encoder", model)
    assert isinstance(model, AVMAE) == options.get("decoders", True)
    settings = encoder.settings
    assert settings["interactions"] == interactions.removesuffix("_mmi")
    assert [settings[f"{kind}_tokens"] for kind in ("fusion", "image_aggregation", "audio_aggregation")] == [
        16,
        8,
        8,
    ]
    assert settings["num_heads"] == encoder.image.blocks[0].attn.num_heads == 2
    assert encoder.image.patch_embed.img_size == (48, 48) and encoder.audio.patch_embed.img_size == (128, 32)
    assert len(encoder.image.blocks) == 3
    if interactions != "none":
        assert (settings["attn_ratio"], settings["mlp_ratio"]) == (
            options.get("attn_ratio", 0.25),
            options.get("mlp_ratio", 1.0),
        )
        assert encoder.fusion_layers == tuple(options.get("layers", (0, 1, 2)))
    if isinstance(model, AVMAE):
        assert model.settings == dict(
            decoder_dim=64,
            decoder_depth=1,
            decoder_heads=16,
            image_mask_ratio=0.75,
            audio_mask_ratio=0.8,
            norm_target=True,
            decode_from="patches",
            tubes=False,
            contrastive=0.0,
        )
        assert model(torch.randn(1, 3, 48, 48), torch.randn(1, 1, 128, 32)).loss.isfinite()


def test_config_overrides_what_was_inferred():
    weights = make_weights("factorized_mmi")
    mae = from_deepavfusion(
        weights,
        config=dict(
            num_heads=4,
            fusion_tokens=20,
            image_aggregation_tokens=4,
            norm_loss=False,
            image_mask_ratio=0.5,
            decoder_heads=8,
        ),
    )
    assert mae.encoder.fusion_blocks["0"].split_sizes == [20, 4, 8]
    assert mae.encoder.settings["num_heads"] == 4 and mae.image_decoder.blocks[0].attn.num_heads == 8
    assert not mae.norm_target and mae.image_mask_ratio == 0.5


def test_the_papers_model_has_the_papers_inputs():
    with torch.device("meta"):
        assert make_base().inputs == InputSettings()
    with pytest.raises(ValueError, match="its 48 time steps may be any seconds of sound"):
        load("encoder_dense").inputs  # noqa: B018


# --- sizes --------------------------------------------------------------------------------------------------


def make_base(interactions="factorized_mmi", attn_ratio=0.25, mlp_ratio=1.0):
    settings = infer_settings(make_weights("factorized_mmi", decoders=False))
    settings |= dict(embed_dim=768, num_heads=12, depth=12, image_size=(224, 224), audio_size=(128, 192))
    settings |= dict(
        interactions=interactions, fusion_layers="all", attn_ratio=attn_ratio, mlp_ratio=mlp_ratio
    )
    return make_released_encoder(settings)


@pytest.mark.parametrize(
    "attn_ratio, mlp_ratio, whole, encoder_alone, block",
    [(0.25, 1.0, 320_563_712, 268_660_224, 8_125_824), (1.0, 4.0, 378_997_760, 327_094_272, 12_995_328)],
)
def test_released_parameter_counts(attn_ratio, mlp_ratio, whole, encoder_alone, block):
    """Known numbers of the released models, ViT-B with factorized interactions."""
    with torch.device("meta"):
        mae = AVMAE(make_base(attn_ratio=attn_ratio, mlp_ratio=mlp_ratio))
    assert sum(p.numel() for p in mae.parameters()) == whole
    assert sum(p.numel() for p in mae.encoder.parameters()) == encoder_alone
    assert sum(p.numel() for p in mae.encoder.fusion_blocks["3"].parameters()) == block


@pytest.mark.parametrize("interactions, bound", [("factorized_mmi", 65), ("dense_mmi", 56), ("none", 51.7)])
def test_arithmetic_stays_within_its_budget(interactions, bound):
    """GFLOP of a clip; the released code needs 75.6, 327.1 and 51.6."""
    with torch.device("meta"):
        assert 51.5e9 < count_flops(make_base(interactions)) <= bound * 1e9
