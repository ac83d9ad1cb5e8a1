"""Parts that somebody replaced, froze, hooked or resized are kept by what copies an encoder, or refused."""

import copy

import numpy as np
import pytest
import timm
import torch
from models import make_encoder, make_inputs, make_vit, relative_error
from timm.layers import Attention, Mlp
from torch import nn

import avfuse
from avfuse import AVMAE, AVEncoder, create_encoder
from avfuse.predictor import evaluating
from avfuse.tasks.classifier import Classifier


class Scaled(Mlp):
    def forward(self, x):
        return 3 * super().forward(x)


class Doubled(nn.Module):
    """Around a part, or in the place of one."""

    def __init__(self, part=None):
        super().__init__()
        self.part = part or nn.Identity()

    def forward(self, x, *args, **options):
        return self.part(2 * x, *args, **options)


def outputs(encoder, inputs):
    return torch.cat(encoder(*inputs)[:3], dim=1)


def with_heads(attn, heads):
    """The same weights, in other heads."""
    other = Attention(32, num_heads=heads, qkv_bias=True)
    other.load_state_dict(attn.state_dict())
    other.__class__ = type(attn)
    return other


REPLACED = {
    "image.blocks.0.mlp": lambda mlp: Scaled(32, 128),
    "image.blocks.1.mlp.act": lambda act: nn.ReLU(),
    "image.blocks.1.mlp.drop1": Doubled,
    "audio.blocks.0.ls1": Doubled,
    "audio.blocks.0.drop_path1": Doubled,
    "audio.blocks.2.mlp": Doubled,
    "fusion_blocks.0.mlp": lambda mlp: Scaled(32, 32),
    "fusion_blocks.1.mlp.act": lambda act: nn.ReLU(),
    "fusion_blocks.0.drop": Doubled,
    "fusion_blocks.0.drop_path": Doubled,
    "image.blocks.2.attn": lambda attn: with_heads(attn, 4),
    "audio.norm": lambda norm: nn.LayerNorm(32, eps=norm.eps, bias=False),
    "fusion_norm": lambda norm: nn.LayerNorm(32, eps=0.5),
}


@pytest.mark.parametrize("name", REPLACED)
def test_a_replaced_part_is_kept_or_refused(name, tmp_path):
    encoder, inputs = make_encoder(), make_inputs()
    plain, part = outputs(encoder, inputs), encoder.get_submodule(name)
    encoder.set_submodule(name, REPLACED[name](part).double().eval())
    changed = outputs(encoder, inputs)
    assert relative_error(changed, plain) > 1e-3
    try:
        assert relative_error(outputs(encoder.fused(), inputs), changed) < 1e-12
    except ValueError as error:
        assert name.split(".")[0] in str(error)
    with pytest.raises(ValueError, match="config.json"):
        encoder.save_pretrained(tmp_path / "saved")
    with pytest.raises(ValueError, match="config.json"):
        encoder.with_frames(2)
    assert not (tmp_path / "saved").exists()


def test_blocks_that_share_their_weights_are_refused(tmp_path):
    encoder = create_encoder("micro")
    encoder.image.blocks[1] = encoder.image.blocks[0]
    with pytest.raises(ValueError, match="image.blocks.1.norm1.weight is image.blocks.0.norm1.weight, too"):
        encoder.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_replaced_parts_of_an_autoencoder_are_refused(tmp_path):
    mae = AVMAE(create_encoder("micro"))
    mae.image_decoder.blocks[0].mlp.act = nn.ReLU()
    with pytest.raises(ValueError, match="mlp.act, a ReLU, is none that config.json can describe"):
        mae.save_pretrained(tmp_path)


@pytest.mark.parametrize("interactions", ["dense", "token", "factorized", "joint"])
@pytest.mark.parametrize("way", ["hook", "wrapper"])
def test_what_attention_is_given_is_the_same_with_and_without_gradients(interactions, way):
    encoder, inputs = make_encoder(interactions), make_inputs()
    block = encoder.image.blocks[0]
    if way == "hook":
        block.attn.register_forward_pre_hook(lambda _, args: (2 * args[0], *args[1:]))
    else:
        block.attn = Doubled(block.attn)
    if interactions == "joint":
        with pytest.raises(ValueError, match="joint attention cannot run"):
            encoder(*inputs)
        return
    with torch.no_grad():
        evaluated = outputs(encoder, inputs)
    assert relative_error(evaluated, outputs(encoder, inputs)) < 1e-12
    with pytest.raises(ValueError, match="has hooks|blocks.0. holds a Doubled"):
        encoder.fused()


@pytest.mark.parametrize("spoil", ["fused", "act", "facts", "meta"])
def test_a_model_that_cannot_be_saved_leaves_the_one_that_is_there(spoil, tmp_path):
    encoder = create_encoder("micro")
    encoder.save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    if spoil == "fused":
        encoder = encoder.fused()
    elif spoil == "act":
        encoder.image.blocks[0].mlp.act = nn.Tanh()
    elif spoil == "facts":
        encoder.facts = dict(tables=3)
    else:
        encoder = encoder.to("meta")
    with pytest.raises((ValueError, NotImplementedError)):
        encoder.save_pretrained(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_numbers_of_numpy_are_saved(tmp_path):
    create_encoder("micro", drop=np.float32(0.25)).save_pretrained(tmp_path)
    assert avfuse.load_encoder(tmp_path).settings["drop"] == 0.25


@pytest.mark.parametrize("pair_bias", [False, "position"])
def test_a_transformer_of_another_input_size_is_refused(pair_bias, tmp_path):
    encoder = create_encoder("micro", pair_bias=pair_bias)
    image, audio = torch.randn(1, 3, 144, 48), torch.randn(1, 1, 64, 128)
    encoder.image.set_input_size(img_size=(144, 48))  # three times as many patches
    if pair_bias:
        with pytest.raises(ValueError, match="image takes inputs of shape .3, 144, 48., while inputs"):
            encoder(image, audio)
        encoder.given_inputs = None
        with pytest.raises(ValueError, match=r"pair_bias is of \(9, 32\) positions, while image and audio"):
            encoder(image, audio)
    else:
        encoder(image, audio)
    with pytest.raises(ValueError, match=r"while inputs describes|pair_bias is of"):
        encoder.save_pretrained(tmp_path)


def test_a_bias_of_time_knows_the_seconds_of_its_inputs_alone():
    encoder = create_encoder("micro", frames=2, pair_bias="time")
    encoder.audio.set_input_size(img_size=(64, 256))
    for model in encoder, encoder.fused():
        with pytest.raises(ValueError, match="audio takes inputs of shape .1, 64, 256., while inputs"):
            model(torch.randn(1, 2, 3, 48, 48), torch.randn(1, 1, 64, 256))


def test_evaluation_leaves_each_part_in_its_mode():
    encoder = create_encoder("micro").train()
    encoder.image.eval()
    modes = [part.training for part in encoder.modules()]
    with pytest.raises(KeyError), evaluating(encoder):
        assert not any(part.training for part in encoder.modules())
        raise KeyError
    assert [part.training for part in encoder.modules()] == modes
    mae = AVMAE(create_encoder("micro").fused())
    with evaluating(mae):  # whose encoder cannot be told to train
        pass


def test_a_copy_for_frames_is_as_frozen():
    encoder = create_encoder("micro").train()
    encoder.image.requires_grad_(False).eval()
    encoder.set_grad_checkpointing()
    copied = encoder.with_frames(4, pair_bias="time")
    assert copied.grad_checkpointing and copied.training and not copied.image.training
    frozen = {name for name, parameter in copied.named_parameters() if not parameter.requires_grad}
    assert frozen == {name for name, _ in copied.named_parameters() if name.startswith("image.")}
    encoder.audio.blocks[0].register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="audio.blocks.0 has hooks, which a copy would not run"):
        encoder.with_frames(2)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(drop=2), "drop must be"),
        (dict(frames=0), "frames must be"),
        (dict(interactions="joint", mlp_ratio="x"), "mlp_ratio must be"),
        (dict(interactions="none", attn_ratio=-1), "attn_ratio must be"),
        (dict(interactions="joint", drop_path=7.0), "drop_path must be"),
    ],
)
def test_what_is_refused_stays_as_it_was(options, message):
    image, audio = (timm.create_model("vit_tiny_patch16_224", img_size=48, in_chans=n) for n in (3, 1))
    before = copy.deepcopy(image.state_dict())
    with pytest.raises(ValueError, match=message):
        AVEncoder(image, audio, **options)
    assert image.state_dict().keys() == before.keys() and image(torch.randn(1, 3, 48, 48)).shape == (1, 1000)


def test_rates_are_checked_before_transformers_are_made():
    with pytest.raises(ValueError, match="drop_path must be"):
        create_encoder("micro", drop_path="x")


def test_weights_are_not_loaded_where_there_is_no_memory(tmp_path):
    encoder = create_encoder("micro")
    encoder.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="VisionTransformer on the meta device has no memory for weights"):
        avfuse.load_image_weights(create_encoder("micro").to("meta"), encoder.image)
    with torch.device("meta"), pytest.raises(ValueError, match="on the meta device has no memory"):
        avfuse.load(tmp_path)


def test_float64_under_autocast_is_refused():
    encoder = create_encoder("micro").eval()
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(ValueError, match="must have the dtype"):
        encoder(torch.randn(1, 3, 48, 48, dtype=torch.float64), torch.randn(1, 1, 64, 128))


def test_a_loss_is_of_the_dtype_of_the_model():
    mae = AVMAE(create_encoder("micro")).double()
    output = mae(torch.randn(2, 3, 48, 48).double(), torch.randn(2, 1, 64, 128).double())
    assert output.loss.dtype == torch.float64


def test_what_serves_training_alone_is_no_hindrance(tmp_path):
    model = Classifier(create_encoder("micro"), 3, batch_norm=True)
    nn.SyncBatchNorm.convert_sync_batchnorm(model).save_pretrained(tmp_path / "classifier")
    encoder = create_encoder("micro")
    encoder.loss = nn.CrossEntropyLoss()
    encoder.save_pretrained(tmp_path / "encoder")
    for name in "classifier", "encoder":
        avfuse.load(tmp_path / name)


def test_what_config_json_cannot_hold_is_named(tmp_path):
    encoder = create_encoder("micro")
    encoder.facts = dict(recipe=dict(path=tmp_path))
    with pytest.raises(ValueError, match="config.json cannot hold a PosixPath|facts: a"):
        encoder.save_pretrained(tmp_path)


def test_a_standard_encoder_still_folds_whole():
    fused = AVEncoder(make_vit(drop_path_rate=0.2), make_vit((1, 16, 40)), drop=0.1, drop_path=0.1).fused()
    assert {type(block).__name__ for block in fused.fusion_blocks.values()} == {"FoldedDense"}
