"""pytest-benchmark of what runs on every CPU: `make bench`, or `pytest benchmarks/operations.py`.

For looking at one operation before and after a change (`--benchmark-autosave`, `--benchmark-compare`);
numbers that are quoted come from the other files. The tests do not collect this one.
"""

import pytest
import torch

from avfuse import DenseFusion, FactorizedFusion, InputSettings, TokenFusion, pair_attention
from avfuse.data.transforms import Spectrogram, evaluation_image
from avfuse.mae import MaskSampler

I, A = 196, 96  # the paper's image and audio tokens


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def head_tensors(requires_grad=False):
    """Query, image key and value, audio key and value of one clip, 12 heads of width 16."""
    return [torch.randn(1, 12, n, 16, requires_grad=requires_grad) for n in (16, I, I, A, A)]


@pytest.mark.parametrize("kind", ["additive", "pair bias", "bilinear"])
def test_pair_attention(benchmark, kind):
    options = {"pair bias": dict(pair_bias=torch.randn(12, I, A)), "bilinear": dict(interaction="bilinear")}
    output = benchmark(pair_attention, *head_tensors(), **options.get(kind, {}))
    assert output.shape == (1, 12, 16, 16)


def test_pair_attention_and_gradients(benchmark):
    inputs = head_tensors(requires_grad=True)
    grads = benchmark(lambda: torch.autograd.grad(pair_attention(*inputs).sum(), inputs))
    assert len(grads) == 5


@pytest.mark.parametrize("kind", [DenseFusion, TokenFusion, FactorizedFusion])
def test_fusion_block(benchmark, kind):
    block, tokens = kind(768, 12), 32 if kind is FactorizedFusion else 16
    with torch.inference_mode():
        output = benchmark(block, torch.randn(1, tokens, 768), torch.randn(1, I, 768), torch.randn(1, A, 768))
    assert output.shape == (1, tokens, 768)


def test_spectrogram(benchmark):
    settings = InputSettings()
    assert benchmark(Spectrogram(settings), torch.randn(settings.samples)).shape == (1, 128, 192)


def test_image(benchmark):
    frame = torch.randint(256, (3, 360, 360), dtype=torch.uint8)
    assert benchmark(evaluation_image, frame, InputSettings()).shape == (3, 224, 224)


def test_masks(benchmark):
    sampler, generator = MaskSampler(I, A, 0.75, 0.8), torch.Generator().manual_seed(0)
    assert benchmark(sampler, generator)["image_removed"].sum() == 147
