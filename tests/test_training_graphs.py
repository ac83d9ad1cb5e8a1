"""Training steps that are recorded as CUDA graphs: the same losses and gradients as without, to the bit."""

import copy

import pytest
import torch
from models import make_encoder, make_inputs
from torch import nn

from avfuse import AVMAE, graphs
from avfuse.fusion import VARIANTS
from avfuse.graphs import CudaGraphs, TrainingGraphs


def make_mae(interactions="dense", **options):
    torch.manual_seed(0)
    encoder = make_encoder(interactions, **(dict(drop_path=0.2) if interactions != "none" else {}))
    return AVMAE(encoder, decoder_dim=16, decoder_depth=1, decoder_heads=2, **options).float().cuda().train()


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


class Recorded:
    """Stands in for a recording where there is no GPU: counts what is played, and computes it."""

    def __init__(self, module, inputs):
        self.module, self.weights, self.calls = module, graphs.Weights(module), 0

    def __call__(self, inputs):
        self.calls += 1
        return self.module(**inputs)


def test_which_calls_are_played(monkeypatch):
    monkeypatch.setattr(graphs, "TrainingRecording", Recorded)
    module = Scaled().train()
    player = TrainingGraphs(module)
    large, small = dict(x=torch.ones(3)), dict(x=torch.ones(2))

    def played(*batches):
        found = []
        for batch in batches:
            assert torch.equal(player(**batch), module(**batch))
            found.append(player.recording and player.recording.calls)
        return found

    with torch.no_grad():
        assert played(large) == [None]
    assert played(large, small, large, small, small, small) == [1, 1, 2, 2, 1, 2]
    assert played(dict(x=torch.ones(2, dtype=torch.float64)), small) == [2, 3]
    module.eval()
    assert played(small) == [3]
    module.train().weight = nn.Parameter(torch.tensor(3.0))
    assert played(small) == [1]
    module.weight.data = torch.tensor(4.0)  # as `to` and `cuda` do
    assert played(small, small) == [1, 2]
    module.bias.requires_grad_(True)  # not played as it was recorded
    assert played(small, small, small) == [2, 1, 2]
    module.part.eval()
    assert played(small, small) == [2, 1]


def test_nothing_is_recorded_in_eval(monkeypatch):
    monkeypatch.setattr(graphs, "TrainingRecording", Recorded)
    player = TrainingGraphs(Scaled().eval())
    for _ in range(3):
        assert player(x=torch.ones(2)) == 4
    assert player.recording is None


def test_the_memory_of_a_recording_is_free_for_the_next(monkeypatch):
    held = []
    monkeypatch.setattr(
        graphs, "TrainingRecording", lambda *args: held.append(player.recording) or Recorded(*args)
    )
    player = TrainingGraphs(Scaled().train())
    for size in (3, 2, 2):
        player(x=torch.ones(size))
    assert held == [None, None]


def test_a_single_number_that_needs_a_gradient_is_a_loss():
    kinds = torch.tensor(1.0), torch.ones(1, requires_grad=True), torch.tensor(1.0, requires_grad=True), 1.0
    assert [graphs.is_loss(x) for x in kinds] == [False, False, True, False]


def test_a_module_without_anything_to_train_is_refused():
    with pytest.raises(ValueError, match="module has no parameters to train"):
        TrainingGraphs(torch.nn.Linear(2, 2).requires_grad_(False))(input=torch.ones(1, 2))


def test_what_is_left_of_other_results(monkeypatch):
    """Whether a call is played or not."""
    monkeypatch.setattr(graphs, "TrainingRecording", Recorded)
    player = TrainingGraphs(Scaled().train())
    player(x=torch.ones(3))
    loss, tokens = player.module(x=torch.ones(2)), torch.ones(2, requires_grad=True)
    player.module.forward = lambda x: (loss, tokens)
    found = player(x=torch.ones(2))
    assert found[0] is loss and not found[1].requires_grad
    with pytest.raises(ValueError, match="x requires a gradient"):
        player(x=torch.ones(3, requires_grad=True))
    copied = copy.deepcopy(player)
    assert copied.recording is None and player.recording is not None
    monkeypatch.setattr(graphs, "DistributedDataParallel", Scaled)
    with pytest.raises(ValueError, match="module is spread over processes"):
        TrainingGraphs(Scaled())


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(2.0))
        self.bias = nn.Parameter(torch.tensor(0.0), requires_grad=False)
        self.part = nn.Identity()

    def forward(self, x):
        return (self.weight * x).sum()


class Replayed:
    """Stands in for a CUDA graph."""

    def __init__(self, replay):
        self.replay = replay


def test_what_is_played_has_gradients(monkeypatch):
    weight, unused = nn.Parameter(torch.tensor(2.0)), nn.Parameter(torch.tensor(1.0))
    recording = object.__new__(graphs.TrainingRecording)
    recording.calls, recording.parameters, recording.inputs = 0, [weight, unused], dict(x=torch.zeros(2))
    loss, twice, tokens = torch.zeros(()), torch.zeros(()), torch.zeros(2)
    recording.outputs, recording.is_loss = (loss, tokens, twice), [True, False, True]
    recording.loss_grads, recording.grads = [torch.ones(()), torch.ones(())], (torch.zeros(()), None)

    def forward():
        tokens.copy_(weight.detach() * recording.inputs["x"])
        loss.copy_(tokens.sum())
        twice.copy_(2 * loss)

    def backward():
        of_loss, of_twice = recording.loss_grads
        recording.grads[0].copy_((of_loss + 2 * of_twice) * recording.inputs["x"].sum())

    recording.graphs = Replayed(forward), Replayed(backward)
    for x in [1.0, 2.0], [3.0, 4.0]:  # whose gradients add up
        first, read, second = recording(dict(x=torch.tensor(x)))
        assert (first.item(), second.item(), read.tolist()) == (2 * sum(x), 4 * sum(x), [2 * x[0], 2 * x[1]])
        assert not read.requires_grad
        (first + 10 * second).backward(retain_graph=True)
        with pytest.raises(RuntimeError, match="one backward"):
            first.backward()
    assert weight.grad == 21 * 10 and unused.grad is None
    one, two = (torch.autograd.grad(recording(dict(x=torch.full((2,), x)))[0], weight)[0] for x in (1.0, 2.0))
    assert (one, two) == (2, 4)  # the first is left alone by the second
    with pytest.raises(RuntimeError, match="second derivatives of a recorded call need"):
        torch.autograd.grad(recording(dict(x=torch.ones(2)))[0], weight, create_graph=True)
    first = recording(dict(x=torch.ones(2)))[0]
    assert (
        recording(dict(x=torch.zeros(2)))[0] == 0 and first == 4
    )  # a copy, which the next call leaves alone
    with pytest.raises(RuntimeError, match="a recorded call has one backward, before the next call"):
        first.backward()


# --- on a GPU -----------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("interactions", VARIANTS)
@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=str)
def test_recorded_steps(interactions, dtype):
    mae = make_mae(interactions)
    player, batches = TrainingGraphs(mae), [make_batch(mae) for _ in range(4)]
    for batch in batches:
        # Casts each weight once, until it ends.
        with torch.autocast("cuda", dtype, enabled=dtype is not None):
            ours, truth = gradients(player, mae, batch), gradients(mae, mae, batch)
        assert_same(ours, truth)
        with torch.no_grad():
            for parameter in mae.parameters():  # in place, as optimizers do
                parameter += 0.01 * torch.randn_like(parameter)
    assert player.recording.calls == 4


@pytest.mark.gpu
def test_gradients_of_micro_batches_add_up():
    mae = make_mae()
    player, batches = TrainingGraphs(mae), [make_batch(mae) for _ in range(3)]
    assert_same(gradients(player, mae, *batches), gradients(mae, mae, *batches))


@pytest.mark.gpu
def test_what_is_recorded():
    mae = make_mae()
    player, large, small = TrainingGraphs(mae), make_batch(mae), make_batch(mae, clips=2)
    calls = []
    for batch in large, small, large, small, small, small:
        assert_same(gradients(player, mae, batch), gradients(mae, mae, batch))
        calls.append(player.recording.calls)
    assert calls == [1, 1, 2, 2, 1, 2]
    mae.image_decoder.norm.weight = nn.Parameter(torch.full_like(mae.image_decoder.norm.weight, 2.0))
    assert_same(gradients(player, mae, small), gradients(mae, mae, small))
    assert player.recording.calls == 1
    present = dict(image_present=torch.tensor([True, False], device="cuda"))
    for _ in range(3):
        assert_same(gradients(player, mae, small | present), gradients(mae, mae, small | present))
    assert player.recording.calls == 2
    mae.eval()
    assert_same(gradients(player, mae, small | present), gradients(mae, mae, small | present))
    with torch.no_grad():
        assert torch.equal(player(**large).loss, mae(**large).loss)
    assert player.recording.calls == 2


@pytest.mark.gpu
def test_a_backward_after_the_next_call_is_refused():
    mae = make_mae()
    player, batch = TrainingGraphs(mae), make_batch(mae)
    first = player(**batch)
    player(**batch)
    with pytest.raises(RuntimeError, match="a recorded call has one backward, before the next call"):
        first.loss.backward()


@pytest.mark.gpu
@pytest.mark.parametrize("decode_from", ["patches", "fusion"])
def test_masks_drawn_inside_norm_kernels_and_unused_parameters(monkeypatch, decode_from):
    monkeypatch.setattr("avfuse.ops.residual_norm.ENOUGH", 0)
    mae = make_mae(decode_from=decode_from)
    player, batch = TrainingGraphs(mae), make_batch(mae)
    batch = {name: batch[name] for name in ("image", "audio")}
    for _ in range(3):
        assert_same(gradients(player, mae, batch), gradients(mae, mae, batch))
    assert (None in player.recording.grads) == (decode_from == "fusion")


@pytest.mark.gpu
def test_half_precision_with_a_scaler():
    mae = make_mae()
    player, batch, scaler = TrainingGraphs(mae), make_batch(mae), torch.amp.GradScaler("cuda")
    found = []
    for call in player, mae:
        mae.zero_grad()
        torch.manual_seed(1)
        with torch.autocast("cuda", torch.float16):
            loss = call(**batch).loss
        scaler.scale(loss).backward()
        found.append([loss.detach(), *(p.grad for p in mae.parameters())])
    assert_same(*found)


@pytest.mark.gpu
def test_a_call_that_waits_is_refused():
    class Waits(Scaled):
        def forward(self, x):
            return super().forward(x) * x.sum().item()

    mae = make_mae()
    before, batch = TrainingGraphs(mae), make_batch(mae)
    gradients(before, mae, batch)
    stream, x = torch.cuda.current_stream(), torch.ones(2, device="cuda")
    torch.manual_seed(1)
    for player in TrainingGraphs(Waits().cuda().train()), CudaGraphs(Waits().cuda().forward):
        with pytest.raises(RuntimeError, match="cannot be recorded as a CUDA graph"):
            player(x=x)
    assert torch.cuda.current_stream() == stream
    drawn = torch.rand(3, device="cuda")  # as if nothing had been tried
    torch.manual_seed(1)
    assert torch.equal(drawn, torch.rand(3, device="cuda"))
    for player in before, TrainingGraphs(mae):
        assert_same(gradients(player, mae, batch), gradients(mae, mae, batch))
