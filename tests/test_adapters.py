"""What others attach to an encoder takes effect, or a ValueError says that it cannot: adapters, hooks,
quantized layers."""

import copy
import warnings

import pytest
import torch
from models import make_encoder, make_inputs, make_vit, randomized, relative_error
from torch import nn

from avfuse.fusion import VARIANTS
from avfuse.released import ReleasedEncoder

every_way = pytest.mark.parametrize("interactions", VARIANTS)
LINEAR = set("qkv proj fc1 fc2 query key_value image_key_value audio_key_value".split())  # by which LoRA asks
NEVER_CALLED = {"image", "audio", "image.blocks", "audio.blocks", "fusion_blocks"}  # their parts are


def outputs(encoder, image, audio):
    image, audio, fusion, _ = encoder(image, audio)
    return torch.cat([image, audio, fusion], dim=1)


def linear_layers(encoder):
    return {name: part for name, part in encoder.named_modules() if isinstance(part, nn.Linear)}


@every_way
def test_every_module_is_called_so_that_its_hooks_run(interactions):
    encoder, inputs = make_encoder(interactions, vit=dict(class_token=True, qk_norm=True)), make_inputs()
    expected, calls = outputs(encoder, *inputs), set()
    modules = {name: part for name, part in encoder.named_modules() if name and name not in NEVER_CALLED}
    unused = {"attn_drop", "attn_pool", "head", "fc_norm", "head_drop", "patch_drop"}  # of the transformers
    modules = {name: part for name, part in modules.items() if name.split(".")[-1] not in unused}
    for name, part in modules.items():
        part.register_forward_hook(lambda *_, name=name: calls.add(name))
    assert relative_error(outputs(encoder, *inputs), expected) < 1e-12
    assert calls == set(modules)


@every_way
def test_a_hook_that_changes_a_linear_layer_changes_the_output_as_its_weights_do(interactions):
    encoder, inputs = make_encoder(interactions), make_inputs()
    plain = outputs(encoder, *inputs)
    for name in linear_layers(encoder):
        scaled = copy.deepcopy(encoder)
        layer = scaled.get_submodule(name)
        with torch.no_grad():
            for parameter in layer.parameters():
                parameter.mul_(1.5)
        expected = outputs(scaled, *inputs)
        assert relative_error(plain, expected) > 1e-6, name
        with encoder.get_submodule(name).register_forward_hook(lambda _module, _inputs, output: 1.5 * output):
            assert relative_error(outputs(encoder, *inputs), expected) < 1e-12, name


@pytest.mark.parametrize("part", sorted(NEVER_CALLED - {"fusion_blocks"}))
def test_a_hook_that_cannot_run_is_refused(part):
    encoder = make_encoder()
    encoder.get_submodule(part).register_forward_pre_hook(lambda *_: None)
    with pytest.raises(ValueError, match=f"{part.split('.')[0]} cannot run the hooks of {part},"):
        encoder(*make_inputs())
    for module in encoder.modules():  # as tools do that watch all of a model
        module.register_forward_hook(lambda *_: None)
    encoder(*make_inputs())


def test_a_forward_that_was_replaced_is_called():
    encoder, inputs = make_encoder(), make_inputs()
    expected, calls = outputs(encoder, *inputs), []
    qkv = encoder.audio.blocks[1].attn.qkv
    qkv.forward = lambda tokens: calls.append(tokens.shape) or nn.Linear.forward(qkv, tokens)
    assert relative_error(outputs(encoder, *inputs), expected) < 1e-12
    assert calls == [(2, 14, 32)]  # 4 fusion tokens, 10 of the audio


@every_way
def test_lora_trains_and_merges(interactions):
    peft = pytest.importorskip("peft", reason="peft is in the adapters extra")
    encoder, inputs = make_encoder(interactions), make_inputs()
    expected = outputs(encoder, *inputs)
    names = {name.split(".")[-1] for name in linear_layers(encoder)}
    assert names <= LINEAR
    config = peft.LoraConfig(r=2, target_modules=sorted(names), init_lora_weights=False)
    adapted = peft.get_peft_model(encoder, config).double().eval()
    before = outputs(adapted, *inputs)
    assert relative_error(before, expected) > 1e-3

    before.square().sum().backward()
    gradients = {name: w.grad for name, w in adapted.named_parameters() if w.requires_grad}
    adapted_layers = len(linear_layers(make_encoder(interactions))) + 2  # and both patch embeddings
    assert len(gradients) == 2 * adapted_layers
    assert all(grad is not None and grad.abs().max() > 0 for grad in gradients.values())

    adapted.merge_adapter()
    assert relative_error(outputs(adapted, *inputs), before) < 1e-12
    adapted.unmerge_adapter()
    assert relative_error(outputs(adapted, *inputs), before) < 1e-12
    merged = adapted.merge_and_unload()
    assert type(merged.image.blocks[0].attn.qkv) is nn.Linear
    assert relative_error(outputs(merged, *inputs), before) < 1e-12


@every_way
def test_dynamic_quantization(interactions):
    """It computes what the encoder does when each linear layer does what its quantized one does."""
    encoder = make_encoder(interactions).float()
    inputs = make_inputs(dtype=torch.float32)
    with warnings.catch_warnings(action="ignore", category=DeprecationWarning):
        quantized = torch.ao.quantization.quantize_dynamic(encoder, {nn.Linear}, torch.qint8)
    assert not linear_layers(quantized)
    ours, plain = outputs(quantized, *inputs), outputs(encoder, *inputs)
    for name, layer in linear_layers(encoder).items():
        layer.forward = quantized.get_submodule(name).forward
    assert relative_error(ours, outputs(encoder, *inputs)) < 1e-6
    assert relative_error(ours, plain) > 1e-6


@every_way
def test_torchao_quantization(interactions):
    """Its weights are used, which differ from those before."""
    quantization = pytest.importorskip("torchao.quantization", reason="torchao is in the adapters extra")
    encoder = make_encoder(interactions).float()
    inputs, truth = make_inputs(dtype=torch.float32), copy.deepcopy(encoder)
    plain = outputs(encoder, *inputs)
    quantization.quantize_(encoder, quantization.Int8WeightOnlyConfig())
    for name, layer in linear_layers(encoder).items():
        assert type(layer.weight) is not nn.Parameter
        truth.get_submodule(name).weight = nn.Parameter(layer.weight.dequantize())
    ours = outputs(encoder, *inputs)
    assert relative_error(ours, outputs(truth, *inputs)) < 1e-4
    assert relative_error(ours, plain) > 1e-3


@pytest.mark.parametrize(
    "interactions, halved", [("dense", ["kv"]), ("factorized", ["k", "v"]), ("token", []), ("none", [])]
)
def test_released_blocks_refuse_what_half_a_weight_cannot_do(interactions, halved):
    vits = make_vit(), make_vit((1, 16, 40))
    encoder, inputs = randomized(ReleasedEncoder(*vits, interactions=interactions)), make_inputs()
    for name, layer in linear_layers(encoder).items():
        if name.startswith("fusion_blocks.2.attn") and name.count(".") == 3:
            hook = layer.register_forward_hook(lambda *_: None)
            if (short := name.split(".")[-1]) in halved:
                with pytest.raises(ValueError, match=rf"attn\.{short} of Released.* must be a plain Linear"):
                    encoder(*inputs)
            else:
                encoder(*inputs)
            hook.remove()
