"""Residual sum and norm in one pass: kernels against float64 and PyTorch, alone and in models that train."""

import contextlib
import copy
import itertools
import math
import re
from functools import partial

import pytest
import torch
from avfuse.kernels import residual_norm as kernels
from models import AUDIO_TOKENS, IMAGE_TOKENS, make_encoder, make_inputs, relative_error
from timm.layers import LayerNorm, RmsNorm
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.autograd.forward_ad import dual_level, make_dual
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils.checkpoint import checkpoint

from avfuse import AVMAE
from avfuse.fusion import VARIANTS
from avfuse.ops import operators
from avfuse.ops import residual_norm as ops
from avfuse.ops.residual_norm import residual_norm, sum_and_norm

pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")  # of Triton

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAMES = "tokens", "update", "context", "weight", "bias"
PARTS = ["tokens", "update", "context", "update context", "weight", "update context weight bias"]


@pytest.fixture(autouse=True)
def poison(monkeypatch):
    """Memory that a kernel is given to fill holds NaN."""
    new_empty = torch.Tensor.new_empty
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *args, **kw: new_empty(*args, **kw).fill_(math.nan))


def make(dtype=torch.float32, width=16, parts="update context weight bias", clips=2, tokens=5, context=3):
    """What residual_norm is called with, in this dtype; weights as they are in training, in float32."""
    shapes = [(clips, n, width) for n in (tokens, tokens, context)] + [(width,)] * 2
    inputs = dict(zip(NAMES, (3 * torch.randn(shape, device=DEVICE) + 2 for shape in shapes), strict=True))
    inputs = {name: x for name, x in inputs.items() if name == "tokens" or name in parts.split()}
    return {name: x if name in NAMES[3:] else x.to(dtype) for name, x in inputs.items()}


def gradients_of(inputs, used=("total", "norm"), needed=NAMES, call=residual_norm, eps=1e-6, **options):
    """What a call gives, and the gradients of a weighted sum of those results that are `used`, by name."""
    leaves = {name: x.detach().requires_grad_(name in needed) for name, x in inputs.items()}
    results = dict(zip(("total", "norm"), call(**leaves, eps=eps, **options), strict=True))
    torch.manual_seed(1)
    loss = sum(
        (results[name].double() * torch.randn(results[name].shape, device=DEVICE).double()).sum()
        for name in ("norm", "total")
        if name in used
    )
    loss.backward()
    grads = {f"gradient of {name}": leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
    return {name: x.detach() for name, x in results.items()} | grads


def in_double(inputs):
    return {name: x.double() for name, x in inputs.items()}


def assert_as_near_as_pytorch(ours, plain, truth, dtype):
    assert ours.keys() == plain.keys() == truth.keys()
    for name, true in truth.items():
        assert ours[name].shape == true.shape and ours[name].isfinite().all(), name
        error, allowed = ((x[name].double() - true).norm() / true.norm() for x in (ours, plain))
        assert error <= 2 * allowed + torch.finfo(dtype).eps, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("width", [3, 40, 192, 768, 1025])
@pytest.mark.parametrize("parts", PARTS)
def test_results_and_gradients_are_as_near_to_float64_as_those_of_pytorch(dtype, width, parts):
    if dtype == torch.bfloat16 and DEVICE == "cpu":
        pytest.skip("Triton's interpreter truncates to bfloat16 where a GPU rounds")
    inputs = {name: x.to(dtype) for name, x in make(dtype, width, parts).items()}
    truth = gradients_of(in_double(inputs), backend="torch")
    ours, plain = (gradients_of(inputs, backend=backend) for backend in ("triton", "torch"))
    assert {x.dtype for x in ours.values()} == {dtype}
    assert len(ours) == 2 + len(inputs)
    assert_as_near_as_pytorch(ours, plain, truth, dtype)


@pytest.mark.parametrize("width", [3, 40, 192, 768, 1025])
@pytest.mark.parametrize("half", ["update", "update context", "tokens"])
def test_under_autocast_sums_are_float32_and_norms_are_not(width, half):
    inputs = make(torch.float32, width)
    inputs |= {name: inputs[name].half() for name in half.split()}
    with torch.autocast(DEVICE, torch.float16):
        ours = gradients_of(inputs, backend="triton")
    rounded = dict(ours) | {"norm": ours["norm"].float()}
    plain = gradients_of(inputs, call=in_float16)
    truth = gradients_of(in_double(inputs), backend="torch")
    assert (ours["total"].dtype, ours["norm"].dtype) == (torch.float32, torch.float16)
    assert all(ours[f"gradient of {name}"].dtype == x.dtype for name, x in inputs.items())
    torch.testing.assert_close(ours["total"], inputs["tokens"] + inputs["update"], rtol=0, atol=0)
    assert_as_near_as_pytorch(rounded, plain, truth, torch.float32)


def test_norms_are_those_of_the_sum_as_it_was_rounded():
    inputs = make(torch.float16, 192, "update")
    total, norm = residual_norm(**inputs, eps=1e-6, backend="triton")
    assert torch.equal(total, inputs["tokens"] + inputs["update"])
    assert torch.equal(norm, residual_norm(total, eps=1e-6, backend="triton")[1])
    finer = residual_norm(inputs["tokens"], inputs["update"].float(), eps=1e-6, backend="triton")
    assert [x.dtype for x in finer] == [torch.float32, torch.float32]


def test_gradients_of_weights_are_sums_in_float32_of_half_precision():
    inputs = make(torch.float16, 192, "weight bias", tokens=40)
    norm_grad, found = torch.randn(2, 40, 192, device=DEVICE).half(), []
    for dtype, backend in (torch.float16, "triton"), (torch.float64, "torch"):
        weights = [inputs[name].to(torch.promote_types(dtype, torch.float32)) for name in NAMES[3:]]
        weights = [weight.requires_grad_() for weight in weights]
        _, norm = residual_norm(inputs["tokens"].to(dtype), None, None, *weights, eps=1e-6, backend=backend)
        found.append(torch.autograd.grad(norm, weights, norm_grad.to(dtype)))
    for ours, true in zip(*found, strict=True):
        torch.testing.assert_close(ours.double(), true, rtol=1e-5, atol=1e-5)


def in_float16(tokens, update, context, weight, bias, eps):
    """What autocast makes of it on CUDA: a norm in float32 that the product behind it rounds."""
    total, norm = residual_norm(tokens, update, context.float(), weight, bias, eps=eps, backend="torch")
    return total, norm.half()


@pytest.mark.parametrize("used", ["total", "norm"])
@pytest.mark.parametrize("parts", PARTS)
def test_one_of_both_results_is_used(used, parts):
    inputs = make(parts=parts)
    ours, truth = (gradients_of(inputs, [used], eps=0.5, backend=each) for each in ("triton", "torch"))
    assert ours.keys() == truth.keys()
    for name, true in truth.items():
        torch.testing.assert_close(ours[name], true, msg=name, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("needed", [each for n in (1, 2, 4) for each in itertools.combinations(NAMES, n)])
def test_only_some_inputs_need_gradients(needed):
    inputs = make()
    ours, truth = (gradients_of(inputs, needed=needed, backend=backend) for backend in ("triton", "torch"))
    assert ours.keys() == truth.keys() == {"total", "norm", *(f"gradient of {name}" for name in needed)}
    for name, true in truth.items():
        torch.testing.assert_close(ours[name], true, msg=name, rtol=1e-4, atol=1e-4)


def test_the_kernel_writes_no_gradient_that_nobody_needs(monkeypatch):
    """Neither sums for the weights, nor another gradient of an update that has the dtype of the sum."""
    asked, backward = [], kernels.backward
    monkeypatch.setattr(kernels, "backward", lambda *inputs: asked.append(inputs[6:8]) or backward(*inputs))
    for needed in (NAMES[:3], NAMES, ("tokens", "bias")):
        gradients_of(make(), needed=needed, backend="triton")
    half = make()
    half["update"] = half["update"].half()
    for needed in (NAMES, ("tokens", "bias")):
        gradients_of(half, needed=needed, backend="triton")
    nothing, both = (None, False), (torch.float16, True)
    assert asked == [nothing, (None, True), (None, True), both, (None, True)]


@pytest.mark.parametrize("programs, at_least", [(1, 1), (2, 1), (3, 2), (256, 1), (256, 32)])
@pytest.mark.parametrize("width, tokens", [(1025, 5), (600, 7), (16, 60)])
def test_more_tokens_than_programs_and_fewer(monkeypatch, programs, at_least, width, tokens):
    monkeypatch.setattr(operators, "PROGRAMS", programs)
    monkeypatch.setattr(operators, "TOKENS_OF_PROGRAM", at_least)
    ran, backward = [], kernels.backward
    monkeypatch.setattr(kernels, "backward", lambda *inputs: ran.append(inputs[8]) or backward(*inputs))
    inputs, rows = make(width=width, tokens=tokens), 2 * (3 + tokens)
    ours, again = (gradients_of(inputs, backend="triton") for _ in range(2))
    assert 1 <= ran[0] <= programs and (ran[0] == 1 or ran[0] * at_least <= rows)
    assert ran[0] == programs or (ran[0] + 1) * at_least > rows
    assert all(torch.equal(x, again[name]) for name, x in ours.items())
    plain, truth = (gradients_of(x, backend="torch") for x in (inputs, in_double(inputs)))
    assert_as_near_as_pytorch(ours, plain, truth, torch.float32)


def test_no_clips_and_no_context_tokens():
    for empty in dict(clips=0), dict(context=0):
        ours, truth = (gradients_of(make(**empty), backend=backend) for backend in ("triton", "torch"))
        for name, true in truth.items():
            assert ours[name].shape == true.shape, name
        assert not ours["gradient of bias"].any() if "clips" in empty else True


@pytest.mark.parametrize("updated", [True, False])
@pytest.mark.parametrize("kind", ["transposed", "part", "one clip for all"])
def test_strided_tensors_are_read_and_every_number_is_written(kind, updated):
    B, F, N, D = 3, 4, 7, 16

    def strided(n, more):
        if kind == "transposed":
            return torch.randn(B, D, n, device=DEVICE).mT
        rows = torch.randn(B, n + more, D, device=DEVICE)[:, 2 : n + 2]
        return rows if kind == "part" else rows[:1].expand(B, -1, -1)

    weights = torch.randn(2 * D, 2, device=DEVICE)[::2].unbind(1)
    inputs = [*map(strided, (N, N, F), (6, 7, 8)), *weights]
    assert not any(x.is_contiguous() for x in inputs)
    grads = strided(N, 9), strided(F + N, 10)
    found = []
    for backend in "triton", "torch":
        tokens, update, *others = (x.detach().requires_grad_() for x in inputs)
        results = residual_norm(tokens, update if updated else None, *others, eps=1e-6, backend=backend)
        leaves = [tokens, update, *others] if updated else [tokens, *others]
        found.append([*results, *torch.autograd.grad(results, leaves, grads)])
    for ours, true in zip(*found, strict=True):
        torch.testing.assert_close(ours, true, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("parts", PARTS)
def test_the_operators_are_known_without_running(parts):
    inputs = make(parts=parts)
    given = [inputs.get(name) for name in NAMES]
    for dtype, of_norm in (torch.float32, torch.float16), (torch.float16, torch.float32):
        tokens, *others = given
        torch.library.opcheck(torch.ops.avfuse.residual_norm, (tokens.to(dtype), *others, 1e-6, of_norm))
    total, norm = residual_norm(**inputs, eps=1e-6, backend="torch")
    for total_grad, update_dtype, sums_needed in (total, torch.float32, True), (None, None, False):
        backward = norm, total_grad, total.half(), given[2], given[3], 1e-6, update_dtype, sums_needed, 2
        torch.library.opcheck(torch.ops.avfuse.residual_norm_backward, backward)


def test_compiled_and_checkpointed_gradients_are_the_same():
    inputs = make()
    truth = gradients_of(inputs, backend="triton")
    for call in (
        torch.compile(residual_norm, fullgraph=True, backend="aot_eager"),
        lambda **options: checkpoint(residual_norm, **options, use_reentrant=False),
    ):
        for name, ours in gradients_of(inputs, backend="triton", call=call).items():
            assert torch.equal(ours, truth[name]), name


def test_second_derivatives_are_refused_not_forgotten():
    inputs = {name: x.requires_grad_() for name, x in make().items()}
    total, norm = residual_norm(**inputs, eps=1e-6, backend="triton")
    for result in total.square() + norm[:, 3:], norm:
        with pytest.raises(RuntimeError, match="second derivatives of residual_norm need float64, or"):
            torch.autograd.grad(result.sum(), inputs["tokens"], create_graph=True)


@pytest.mark.parametrize("gradients", [True, False])
def test_forward_mode_is_refused_not_forgotten(gradients):
    inputs = make()
    tokens = inputs.pop("tokens")
    with torch.set_grad_enabled(gradients), dual_level(), pytest.raises(NotImplementedError, match="jvp"):
        residual_norm(make_dual(tokens, tokens), **inputs, eps=1e-6, backend="triton")


# --- in models ----------------------------------------------------------------------------------------------


@pytest.fixture
def by_kernel(monkeypatch):
    """Wherever a GPU would run the kernel, it runs. Returns the shapes of its norms, as they come."""
    ran, forward = [], kernels.forward
    monkeypatch.setattr(ops, "kernel_can_run", lambda tokens: tokens.dtype != torch.float64)
    monkeypatch.setattr(ops, "ENOUGH", 0)
    monkeypatch.setattr(kernels, "forward", lambda *inputs: record(ran, forward(*inputs)))
    return ran


def record(ran, results):
    ran.append(tuple(results[0].shape))
    return results


@contextlib.contextmanager
def plainly():
    """As where no kernel can run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ops, "kernel_can_run", lambda _: False)
        yield


def trained(model, call):
    """What a call gives, and the gradients of a weighted sum of it, by name."""
    model.zero_grad()
    results = call()
    torch.manual_seed(1)
    sum((x * torch.randn(x.shape, device=x.device)).sum() for x in results).backward()
    found = {f"result {i}": x.detach() for i, x in enumerate(results)}
    return found | {name: x.grad for name, x in model.named_parameters() if x.grad is not None}


def assert_same(ours, truth, allowed=1e-4):
    assert ours.keys() == truth.keys() and len(truth) > 10
    for name, true in truth.items():
        assert relative_error(ours[name], true) < allowed, name


def single(encoder):
    """In float32 on the device of these tests."""
    return encoder.float().to(DEVICE), [x.float().to(DEVICE) for x in make_inputs(2)]


# Norms of a fused layer: two of each transformer's block, and in training those of the fusion block.
NORMS = dict(dense=8, cross=4, none=0)


def norms_of(encoder):
    """How many the kernel takes in a fused layer, by default all that there are but the three last ones."""
    norms = sum(isinstance(part, nn.LayerNorm) for part in encoder.modules()) - 3
    return NORMS.get(encoder.settings["interactions"], norms / max(1, len(encoder.fusion_layers)))


@pytest.mark.parametrize("interactions", VARIANTS)
def test_an_encoder_trains_the_same(by_kernel, interactions):
    """With class tokens, LayerScale, patches that are dropped or masked, and a clip without sound."""
    encoder, inputs = single(make_encoder(interactions, vit=dict(class_token=True, init_values=0.5)))
    options = dict(
        image_keep=torch.rand(2, IMAGE_TOKENS).argsort(1)[:, :6].to(DEVICE),
        audio_mask=(torch.rand(2, AUDIO_TOKENS) > 0.4).to(DEVICE),
        audio_present=torch.tensor([True, False], device=DEVICE),
    )
    ours = trained(encoder, lambda: encoder(*inputs, **options)[:3])
    assert len(by_kernel) == 3 * norms_of(encoder)
    with plainly():
        truth = trained(encoder, lambda: encoder(*inputs, **options)[:3])
    assert_same(ours, truth)


def test_a_masked_autoencoder_trains_the_same_with_checkpoints(by_kernel):
    encoder, inputs = single(make_encoder())
    model = AVMAE(encoder, decoder_dim=32, decoder_depth=1, decoder_heads=2).to(DEVICE).train()

    def loss():
        torch.manual_seed(2)  # masks
        return [model(*inputs).loss]

    ours = trained(model, loss)
    with plainly():
        truth = trained(model, loss)
    assert_same(ours, truth)
    encoder.set_grad_checkpointing()
    again = trained(model, loss)
    assert all(torch.equal(again[name], x) for name, x in ours.items())
    assert len(by_kernel) == 3 * 3 * NORMS["dense"]  # once, once more, and anew in the backward


def test_autocast_trains_as_near_to_float64(by_kernel):
    encoder, inputs = single(make_encoder())
    with torch.autocast(DEVICE, torch.float16):
        ours = trained(encoder, lambda: encoder(*inputs)[:3])
        with plainly():
            plain = trained(encoder, lambda: encoder(*inputs)[:3])
    truth = copy.deepcopy(encoder).double()
    truth = trained(truth, lambda: truth(*(x.double() for x in inputs))[:3])
    errors, allowed = (
        sum(relative_error(found[name].double(), true) for name, true in truth.items()) / len(truth)
        for found in (ours, plain)
    )
    assert len(by_kernel) == 3 * NORMS["dense"] and 0 < errors <= 1.2 * allowed < 0.02


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("fused", [False, True])
def test_outputs_without_gradients_are_the_same(by_kernel, mode, fused):
    encoder, inputs = single(make_encoder())
    model = encoder.fused() if fused else encoder
    with mode(), plainly():
        truth = model(*inputs)[:3]
    with mode():
        ours = model(*inputs)[:3]
    assert len(by_kernel) > 10
    for mine, true in zip(ours, truth, strict=True):
        assert relative_error(mine, true) < 1e-5


def test_gradients_of_the_inputs_of_a_fused_encoder(by_kernel):
    encoder, inputs = single(make_encoder())
    fused, found = encoder.fused(), []
    for around in contextlib.nullcontext, plainly:
        leaves = [x.clone().requires_grad_() for x in inputs]
        with around():
            loss = sum(x.square().sum() for x in fused(*leaves)[:3])
        found.append(torch.autograd.grad(loss, leaves))
    assert by_kernel and all(relative_error(*pair) < 1e-4 for pair in zip(*found, strict=True))


def test_hooks_and_replaced_norms_take_effect(by_kernel):
    encoder, inputs = single(make_encoder())
    truth = trained(encoder, lambda: encoder(*inputs)[:3])
    names = "image.blocks.1.norm1", "audio.blocks.0.norm2", "fusion_blocks.2.norm_mlp"
    norms, calls = list(map(encoder.get_submodule, names)), []
    hooks = [norm.register_forward_hook(lambda norm, *_: calls.append(norm)) for norm in norms]
    by_kernel.clear()
    assert_same(trained(encoder, lambda: encoder(*inputs)[:3]), truth)
    assert len(calls) == 3 and {*calls} == {*norms} and len(by_kernel) == 3 * NORMS["dense"] - 3
    for hook in hooks:
        hook.remove()
    for norm in norms:
        norm.forward = partial(double, norm)
        by_kernel.clear()
        ours = encoder(*inputs)[:3]
        assert len(by_kernel) == 3 * NORMS["dense"] - 1
        with plainly():
            for mine, plain in zip(ours, encoder(*inputs)[:3], strict=True):
                assert relative_error(mine, plain) < 1e-5
        assert relative_error(ours[2], truth["result 2"]) > 1e-3
        del norm.forward


def double(norm, tokens):
    return 2 * nn.LayerNorm.forward(norm, tokens)


class Doubled(nn.LayerNorm):
    forward = double


@pytest.mark.parametrize(
    "norm, plain",
    [
        (nn.LayerNorm(16), True),
        (LayerNorm(16), True),
        (nn.LayerNorm(16, bias=False), True),
        (nn.LayerNorm(16, elementwise_affine=False), True),
        (nn.LayerNorm(16, eps=0.5), True),
        (RmsNorm(16), False),
        (Doubled(16), False),
        (nn.utils.parametrizations.weight_norm(nn.LayerNorm(16), dim=None), False),
        (nn.Identity(), False),
    ],
    ids=str,
)
def test_which_norms_the_kernel_can_take_the_place_of(by_kernel, norm, plain):
    norm = norm.to(DEVICE)
    tokens, update, context = (torch.randn(2, n, 16, device=DEVICE) for n in (5, 5, 3))
    total, ours = sum_and_norm(norm, tokens, update, context)
    assert len(by_kernel) == plain
    torch.testing.assert_close(total, tokens + update, rtol=0, atol=0)
    torch.testing.assert_close(ours, norm(torch.cat([context, total], dim=1)))
    same, ours = sum_and_norm(norm, tokens)
    torch.testing.assert_close(ours, norm(tokens))
    assert torch.equal(same, tokens)


def test_a_norm_over_several_dimensions_is_called(by_kernel):
    norm, tokens = nn.LayerNorm((5, 16), elementwise_affine=False), torch.randn(2, 5, 16, device=DEVICE)
    assert torch.equal(sum_and_norm(norm, tokens)[1], norm(tokens)) and not by_kernel


def test_a_norm_whose_weight_is_made_of_other_tensors_is_called(by_kernel):
    norm, tokens = nn.LayerNorm(16).to(DEVICE), torch.randn(2, 5, 16, device=DEVICE)
    norm.weight = nn.Parameter(TwoTensor(norm.weight.detach(), norm.weight.detach()))
    assert torch.equal(sum_and_norm(norm, tokens)[1], norm(tokens)) and not by_kernel


def test_where_no_kernel_can_run_the_module_is_called():
    """To the last bit."""
    norm, (tokens, update, context) = nn.LayerNorm(16), (torch.randn(2, n, 16) for n in (5, 5, 3))
    for double in (False, True):
        if double:
            norm, tokens, update, context = (x.double().to(DEVICE) for x in (norm, tokens, update, context))
        total, ours = sum_and_norm(norm, tokens, update, context)
        assert torch.equal(total, tokens + update)
        assert torch.equal(ours, norm(torch.cat([context, tokens + update], dim=1)))
        assert sum_and_norm(norm, tokens)[0] is tokens


@pytest.mark.parametrize(
    "name, shape, said",
    [
        ("tokens", (5, 16), "tokens must be (B, N, D), got shape (5, 16)"),
        ("update", (1, 5, 16), "update must be (2, 5, 16) beside tokens (2, 5, 16), got shape (1, 5, 16)"),
        ("context", (2, 3, 8), "context must be (2, 'F', 16) beside"),
        ("weight", (7,), "weight must be (16,) beside"),
        ("bias", (16, 1), "bias must be (16,) beside"),
    ],
)
def test_shapes_that_a_kernel_would_read_past_are_refused(name, shape, said):
    inputs = dict(tokens=(2, 5, 16), update=(2, 5, 16), context=(2, 3, 16), weight=(16,), bias=(16,))
    inputs = {key: torch.randn(size, device=DEVICE) for key, size in (inputs | {name: shape}).items()}
    with pytest.raises(ValueError, match=re.escape(said)):
        residual_norm(**inputs, eps=1e-6, backend="triton")


def test_the_kernel_refuses_float64_which_it_would_compute_in_float32():
    with pytest.raises(ValueError, match="^backend='triton' takes float32, .* got tokens of torch.float64"):
        residual_norm(torch.randn(2, 5, 16, dtype=torch.float64), eps=1e-6, backend="triton")


def test_without_an_eps_rows_beyond_the_tokens_add_nothing():
    """Of which the last tile has some: 0 / 0 there must not reach the gradients of weight and bias."""
    tokens, context = torch.randn(1, 3, 48, device=DEVICE), torch.randn(1, 2, 48, device=DEVICE)
    grads = []
    for backend in "triton", "torch":
        weight, bias = (torch.ones(48, device=DEVICE, requires_grad=True) for _ in range(2))
        residual_norm(tokens, None, context, weight, bias, eps=0.0, backend=backend)[
            1
        ].square().sum().backward()
        grads.append((weight.grad, bias.grad))
    torch.testing.assert_close(*grads)


def test_few_tokens_are_left_to_the_module(by_kernel, monkeypatch):
    norm, tokens = nn.LayerNorm(16).to(DEVICE), torch.randn(2, 5, 16, device=DEVICE)
    for enough, runs in ((160, 1), (161, 1)):
        monkeypatch.setattr(ops, "ENOUGH", enough)
        sum_and_norm(norm, tokens)
        assert len(by_kernel) == runs
    residual_norm(tokens, eps=1e-6, backend="torch")
    assert len(by_kernel) == 1
    with pytest.raises(ValueError, match="^backend must be one of .*, got 'cuda'"):
        residual_norm(tokens, eps=1e-6, backend="cuda")


def test_which_tokens_the_kernel_takes(monkeypatch):
    """Of tensors that are not there, as a machine without a GPU has none."""
    devices, compiling = {"cuda"}, []
    monkeypatch.setattr(ops, "runs_kernels", lambda device: device.type in devices)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: bool(compiling))
    with FakeTensorMode():
        half, double = (
            torch.empty(2, 5, 16, dtype=dtype, device="cuda") for dtype in (torch.half, torch.double)
        )
        on_cpu = torch.empty(2, 5, 16)
        assert [ops.kernel_can_run(x) for x in (half, double, on_cpu)] == [ops.HAS_TRITON, False, False]
        devices.add("cpu")
        assert not ops.kernel_can_run(on_cpu)
        devices.clear()
        assert not ops.kernel_can_run(half)
        devices.add("cuda")
        compiling.append(True)
        assert not ops.kernel_can_run(half)


@pytest.mark.gpu
def test_on_a_gpu_it_runs_unless_compiled():
    tokens = torch.randn(2, 5, 16, device=DEVICE)
    assert ops.kernel_can_run(tokens) and not ops.kernel_can_run(tokens.double())
    assert not torch.compile(ops.kernel_can_run, backend="eager", fullgraph=True)(tokens)
