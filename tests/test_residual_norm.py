"""Residual sum and norm in one pass: the kernel against float64 and PyTorch, and what torch knows of it."""

import pytest
import torch

from avfuse.ops.residual_norm import residual_norm

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("width", [3, 40, 192, 768, 1025])
@pytest.mark.parametrize("parts", ["tokens", "update", "context", "update and context"])
def test_the_kernel_is_as_near_to_float64_as_pytorch(dtype, width, parts):
    torch.manual_seed(0)
    if dtype == torch.bfloat16 and DEVICE == "cpu":
        pytest.skip("Triton's interpreter truncates to bfloat16 where a GPU rounds")
    tokens, update, context = ((3 * torch.randn(2, n, width, device=DEVICE) + 2).to(dtype) for n in (5, 5, 3))
    inputs = tokens, update if "update" in parts else None, context if "context" in parts else None
    truth = residual_norm(*(x if x is None else x.double() for x in inputs), eps=1e-6, backend="torch")
    for ours, plain, true in zip(
        residual_norm(*inputs, eps=1e-6, backend="triton"),
        residual_norm(*inputs, eps=1e-6, backend="torch"),
        truth,
        strict=True,
    ):
        assert ours.shape == true.shape and ours.dtype == dtype
        error, allowed = ((x.double() - true).norm() / true.norm() for x in (ours, plain))
        assert error <= 2 * allowed + torch.finfo(dtype).eps


def test_the_kernel_reads_strided_tokens_and_writes_every_number():
    tokens = torch.randn(3, 16, 7, device=DEVICE).mT  # (3, 7, 16), not contiguous
    context = torch.randn(3, 9, 16, device=DEVICE)[:, 2:6]
    for ours, true in zip(
        residual_norm(tokens, tokens, context, eps=1e-6, backend="triton"),
        residual_norm(tokens, tokens, context, eps=1e-6, backend="torch"),
        strict=True,
    ):
        torch.testing.assert_close(ours, true)


def test_the_operator_is_known_without_running():
    inputs = (
        torch.randn(2, 5, 8, device=DEVICE),
        torch.randn(2, 5, 8, device=DEVICE),
        torch.randn(2, 3, 8, device=DEVICE),
    )
    for given in inputs, (*inputs[:2], None), (inputs[0], None, inputs[2]), (inputs[0], None, None):
        torch.library.opcheck(torch.ops.avfuse.residual_norm, (*given, 1e-6))
