"""Training steps that are recorded as CUDA graphs: the same losses and gradients as without, to the bit."""

import pytest
import torch
from models import make_encoder, make_inputs
from torch import nn

from avfuse import AVMAE
from avfuse.fusion import VARIANTS
from avfuse.graphs import TrainingGraphs

pytestmark = pytest.mark.gpu


def make_mae(interactions="dense"):
    torch.manual_seed(0)
    encoder = make_encoder(interactions, **(dict(drop_path=0.2) if interactions != "none" else {}))
    return AVMAE(encoder, decoder_dim=16, decoder_depth=1, decoder_heads=2).float().cuda().train()


def make_batch(mae, clips=3):
    names = "image", "audio"
    batch = {name: x.float().cuda() for name, x in zip(names, make_inputs(clips), strict=True)}
    masks = [mae.mask_sampler()(torch.Generator().manual_seed(clip)) for clip in range(clips)]
    return batch | {name: torch.stack([mask[name] for mask in masks]).cuda() for name in masks[0]}


def gradients(call, mae, *batches):
    """The loss, and the gradients that all batches add up to."""
    mae.zero_grad()
    torch.manual_seed(1)
    for batch in batches:
        output = call(**batch)
        output.loss.backward()
    return [output.loss.detach(), *(p.grad for p in mae.parameters())]


def assert_same(ours, truth):
    for mine, true in zip(ours, truth, strict=True):
        assert (mine is None and true is None) or torch.equal(mine, true)


@pytest.mark.parametrize("interactions", VARIANTS)
@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=str)
def test_recorded_steps(interactions, dtype):
    mae = make_mae(interactions)
    graphs, batches = TrainingGraphs(mae), [make_batch(mae) for _ in range(4)]
    with torch.autocast("cuda", dtype, enabled=dtype is not None):
        for batch in batches:
            assert_same(gradients(graphs, mae, batch), gradients(mae, mae, batch))
            with torch.no_grad():
                for parameter in mae.parameters():  # in place, as optimizers do
                    parameter += 0.01 * torch.randn_like(parameter)
    assert graphs.recording.calls == 4


def test_gradients_of_micro_batches_add_up():
    mae = make_mae()
    graphs, batches = TrainingGraphs(mae), [make_batch(mae) for _ in range(3)]
    assert_same(gradients(graphs, mae, *batches), gradients(mae, mae, *batches))


def test_what_is_recorded():
    mae = make_mae()
    graphs, large, small = TrainingGraphs(mae), make_batch(mae), make_batch(mae, clips=2)
    calls = []
    for batch in large, small, large, small, small, small:
        assert_same(gradients(graphs, mae, batch), gradients(mae, mae, batch))
        calls.append(graphs.recording.calls)
    assert calls == [1, 1, 2, 2, 1, 2]
    mae.image_decoder.norm.weight = nn.Parameter(torch.full_like(mae.image_decoder.norm.weight, 2.0))
    assert_same(gradients(graphs, mae, small), gradients(mae, mae, small))
    assert graphs.recording.calls == 1
    present = dict(image_present=torch.tensor([True, False], device="cuda"))
    for _ in range(3):
        assert_same(gradients(graphs, mae, small | present), gradients(mae, mae, small | present))
    assert graphs.recording.calls == 2
    mae.eval()
    assert_same(gradients(graphs, mae, small | present), gradients(mae, mae, small | present))
    with torch.no_grad():
        assert torch.equal(graphs(**large).loss, mae(**large).loss)
    assert graphs.recording.calls == 2


def test_a_backward_after_the_next_call_is_refused():
    mae = make_mae()
    graphs, batch = TrainingGraphs(mae), make_batch(mae)
    first = graphs(**batch)
    graphs(**batch)
    with pytest.raises(RuntimeError, match="a recorded call needs its backward before the next call"):
        first.loss.backward()
