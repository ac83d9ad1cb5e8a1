"""Tiny models whose every weight is random: fresh ones hide mistakes behind zero biases and equal norms."""

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from avfuse import AVEncoder
from avfuse.vit import plain_vit

IMAGE, AUDIO = (3, 24, 24), (1, 16, 40)  # patches of 8: 9 = 3 x 3 and 10 = 2 x 5 tokens
IMAGE_TOKENS, AUDIO_TOKENS = 9, 10


def randomized(module: nn.Module, std: float = 0.2) -> nn.Module:
    """The module in float64 and eval mode, with noise on every parameter."""
    module.double().eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += std * torch.randn_like(parameter)
    return module


def make_vit(shape=IMAGE, **options) -> VisionTransformer:
    channels, *size = shape
    options = dict(patch_size=8, embed_dim=32, depth=3, num_heads=2, mlp_ratio=2.0) | options
    return plain_vit(channels, size, **options)


def make_encoder(interactions="dense", *, vit=None, **options) -> AVEncoder:
    """An encoder of 3 layers, width 32 and 4 fusion tokens; `vit` holds options of both transformers."""
    options = dict(fusion_tokens=4, image_aggregation_tokens=3, audio_aggregation_tokens=2) | options
    image, audio = make_vit(IMAGE, **vit or {}), make_vit(AUDIO, **vit or {})
    return randomized(AVEncoder(image, audio, interactions=interactions, **options))


def make_inputs(batch=2, dtype=torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(batch, *IMAGE, dtype=dtype), torch.randn(batch, *AUDIO, dtype=dtype)


def count_flops(encoder: AVEncoder) -> int:
    """Floating-point operations of one clip, on fake tensors: shapes without numbers."""
    shapes = {name: weight.shape for name, weight in encoder.state_dict().items()}
    with FakeTensorMode(), torch.no_grad(), sdpa_kernel(SDPBackend.MATH), torch.device("cpu"):
        weights = {name: torch.empty(shape) for name, shape in shapes.items()}
        inputs = tuple(torch.empty(1, *shape) for shape in encoder.input_shapes.values())
        with FlopCounterMode(display=False) as counter:
            torch.func.functional_call(encoder.eval(), weights, inputs)
    return counter.get_total_flops()


def relative_error(ours: torch.Tensor, truth: torch.Tensor) -> float:
    """Largest difference over the largest value of the truth."""
    assert ours.shape == truth.shape, f"{tuple(ours.shape)} instead of {tuple(truth.shape)}"
    difference = (ours - truth).abs().max().item()
    return difference / max(truth.abs().max().item(), 1e-300) if difference else 0.0


def gradients(module: nn.Module, *losses_and_inputs) -> dict[str, torch.Tensor]:
    """Gradients by name of a scalar with respect to all parameters and the inputs that follow."""
    loss, *inputs = losses_and_inputs
    named = {name: p for name, p in module.named_parameters() if p.requires_grad}
    named |= {f"input {i}": x for i, x in enumerate(inputs)}
    grads = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return {
        name: torch.zeros_like(x) if g is None else g
        for (name, x), g in zip(named.items(), grads, strict=True)
    }


def remembered(function, key_of):
    """The function, which is called once for all arguments of the same `key_of(*arguments)`."""
    results = {}

    def call_once(*arguments):
        key = key_of(*arguments)
        if key not in results:
            results[key] = function(*arguments)
        return results[key]

    return call_once
