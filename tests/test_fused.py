"""Fused encoders against the encoders they were made from; on a GPU, recorded calls."""

import contextlib
import copy
import pickle
import threading
from types import SimpleNamespace

import pytest
import timm
import torch
from models import AUDIO_TOKENS, IMAGE_TOKENS, make_encoder, make_inputs, make_vit, randomized, relative_error
from torch import nn

from avfuse import AVEncoder, create_encoder
from avfuse.folding import FoldedDense
from avfuse.fusion import VARIANTS
from avfuse.graphs import ONE_AT_A_TIME, CudaGraphs, Weights, kind_of_call, record, recording_stream
from avfuse.tasks.classifier import Classifier

EXACT = 1e-12
VITS = {
    "plain": dict(),
    "class and register tokens": dict(class_token=True, reg_tokens=2),
    "qk-norm, LayerScale": dict(qk_norm=True, init_values=0.1),
    "scaled norms": dict(scale_attn_norm=True, scale_mlp_norm=True),
    "no biases": dict(qkv_bias=False, proj_bias=False),
    "pre-norm, no positions": dict(pre_norm=True, pos_embed="none"),
}


def random_mask(batch, tokens):
    mask = torch.rand(batch, tokens) > 0.4
    mask[0] = False  # nothing left
    mask[1] = True
    return mask


def selections(batch):
    """Options of a call, by what they do."""
    kept = [torch.rand(batch, n).argsort(1)[:, : n - 3] for n in (IMAGE_TOKENS, AUDIO_TOKENS)]
    masks = random_mask(batch, IMAGE_TOKENS), random_mask(batch, AUDIO_TOKENS)
    return {
        "all": {},
        "kept": dict(image_keep=kept[0], audio_keep=kept[1]),
        "masked": dict(image_mask=masks[0], audio_mask=masks[1]),
        "kept and masked": dict(image_keep=kept[0], image_mask=masks[0]),
        "absent": dict(image_present=torch.arange(batch) != 1, audio_present=torch.arange(batch) != 0),
    }


def tokens_of(output):
    return [x for tokens in (output, *(output.layers or ())) for x in tokens[:3]]


def assert_same(ours, truth, allowed=EXACT):
    for mine, true in zip(tokens_of(ours), tokens_of(truth), strict=True):
        assert (mine is None) == (true is None)
        assert mine is None or relative_error(mine, true) < allowed


@pytest.mark.parametrize("options", VITS.values(), ids=VITS)
@pytest.mark.parametrize("interactions", VARIANTS)
def test_every_output_is_that_of_the_encoder(interactions, options):
    encoder = make_encoder(interactions, vit=options)
    fused, inputs = encoder.fused(), make_inputs(3)
    for selection in selections(3).values():
        assert_same(
            fused(*inputs, **selection, return_layers=True), encoder(*inputs, **selection, return_layers=True)
        )
    for part in (inputs[0], None), (None, inputs[1]):
        assert_same(fused(*part), encoder(*part))


@pytest.mark.parametrize(
    "options",
    [
        dict(pair_bias=True),
        dict(interactions="bilinear", pair_bias=True),
        dict(fusion_layers=[1]),
        dict(fusion_layers=[0, 2]),
        dict(norm_eps=1e-3),
        dict(num_heads=4, attn_ratio=0.5),
    ],
    ids=str,
)
def test_options_of_fusion(options):
    encoder, inputs = make_encoder(**options), make_inputs(3)
    for selection in selections(3).values():
        assert_same(encoder.fused()(*inputs, **selection), encoder(*inputs, **selection))


@pytest.mark.parametrize("missing", [None, 0, 1])
@pytest.mark.parametrize("interactions", VARIANTS)
def test_an_empty_batch(interactions, missing):
    encoder, inputs = make_encoder(interactions), [x[:0] for x in make_inputs()]
    if missing is not None:
        inputs[missing] = None
    for ours, truth in zip(encoder.fused()(*inputs)[:3], encoder(*inputs)[:3], strict=True):
        assert (ours is None) == (truth is None)
        assert ours is None or ours.shape == truth.shape


def test_transformers_of_unequal_width():
    audio = make_vit((1, 16, 40), embed_dim=48, num_heads=3)
    encoder = randomized(AVEncoder(make_vit(), audio, fusion_tokens=4))
    inputs = make_inputs()
    assert_same(encoder.fused()(*inputs), encoder(*inputs))


def test_norms_are_shared_only_where_they_are_the_same():
    assert all(isinstance(block, FoldedDense) for block in make_encoder().fused().fusion_blocks.values())
    other = make_encoder(norm_eps=1e-3).fused()
    assert not any(isinstance(block, FoldedDense) for block in other.fusion_blocks.values())


def test_a_new_encoder_takes_the_eps_of_its_transformers_and_an_old_config_keeps_its_own():
    encoder = create_encoder("tiny")
    assert encoder.settings["norm_eps"] == encoder.image.blocks[0].norm1.eps == 1e-6
    config = encoder.to_config()
    assert AVEncoder.from_config(config).fusion_blocks["0"].norm_image.eps == 1e-6
    del config["norm_eps"]  # as written before there was a choice
    assert AVEncoder.from_config(config).fusion_blocks["0"].norm_image.eps == 1e-5


def test_the_encoder_stays_as_it_is_and_the_copy_does_not_follow_it():
    encoder, inputs = make_encoder(), make_inputs()
    before = {name: weight.clone() for name, weight in encoder.state_dict().items()}
    output, fused = encoder(*inputs), encoder.fused()
    assert all(torch.equal(weight, before[name]) for name, weight in encoder.state_dict().items())
    randomized(encoder)
    assert_same(fused(*inputs), output)
    assert relative_error(encoder(*inputs).fusion, output.fusion) > 1e-3


def test_gradients_of_the_inputs_are_those_of_the_encoder():
    encoder, inputs = make_encoder(), [x.requires_grad_() for x in make_inputs()]
    truth, ours = (
        torch.autograd.grad(sum(x.square().sum() for x in model(*inputs)[:3]), inputs)
        for model in (encoder, encoder.fused())
    )
    assert all(relative_error(mine, true) < EXACT for mine, true in zip(ours, truth, strict=True))
    assert not any(weight.requires_grad for weight in encoder.fused().parameters())


class Scaled(nn.Linear):
    """What an adapter is to whoever reads `weight`."""

    def forward(self, tokens):
        return 1.5 * super().forward(tokens)


@pytest.mark.parametrize("part", ["query", "mlp.fc1", "image_key_value", "norm_fusion", "norm_mlp"])
def test_parts_of_fusion_blocks_that_cannot_be_folded(part):
    encoder, inputs = make_encoder(), make_inputs()
    block = encoder.fusion_blocks["1"]
    if part.startswith("norm"):
        block.set_submodule(part, timm.layers.RmsNorm(32).double())
    else:
        block.get_submodule(part).__class__ = Scaled
    assert_same(encoder.fused()(*inputs), encoder(*inputs))


@pytest.mark.parametrize("tied", ["block", "mlp", "transformers"])
def test_parts_that_several_layers_share(tied):
    encoder, inputs = make_encoder(), make_inputs()
    if tied == "block":
        encoder.fusion_blocks["1"] = encoder.fusion_blocks["0"]
    elif tied == "mlp":
        encoder.fusion_blocks["1"].mlp = encoder.fusion_blocks["0"].mlp
    else:
        encoder.audio.blocks = encoder.image.blocks
    assert_same(encoder.fused()(*inputs), encoder(*inputs))


@pytest.mark.parametrize("interactions", VARIANTS)
@pytest.mark.parametrize("missing", ["image", "audio", None])
def test_autocast(missing, interactions):
    encoder, (image, audio) = make_encoder(interactions).float(), (x.float() for x in make_inputs())
    inputs = dict(image=image, audio=audio) | ({missing: None} if missing else {})
    with torch.autocast("cpu", torch.bfloat16):
        output = encoder.fused()(**inputs)
    assert_same(output, encoder(**inputs), 0.2)


def test_copies_record_for_themselves():
    fused, inputs = make_encoder().fused(cuda_graphs=True), make_inputs()
    fused.graphs.recordings["a kind"] = (x for x in ())  # which can neither be copied nor pickled
    for other in copy.deepcopy(fused), pickle.loads(pickle.dumps(fused)):
        assert other.graphs.function.__self__ is other and not other.graphs.recordings
        assert_same(other(*inputs), fused(*inputs))


def test_it_serves_in_a_task():
    inputs = make_inputs()
    model = Classifier(make_encoder(), classes=5).double().eval()
    logits = model(*inputs)[0]
    model.encoder = model.encoder.fused()
    assert relative_error(model(*inputs)[0], logits) < EXACT


def test_what_it_refuses():
    encoder = make_encoder()
    fused = encoder.fused()
    assert not fused.train().training  # nor where something around it is
    with pytest.raises(ValueError, match="cannot be saved"):
        fused.to_config()
    with pytest.raises(ValueError, match="attention maps"):
        fused.fusion_attention(*make_inputs())
    with pytest.raises(ValueError, match="image must be"):
        fused(torch.zeros(1, 3, 8, 8).double(), None)
    handle = encoder.image.blocks[1].register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match=r"image\.blocks\.1 has hooks"):
        encoder.fused()
    handle.remove()
    encoder.audio.blocks[2].norm2 = timm.layers.RmsNorm(32)
    with pytest.raises(ValueError, match=r"audio\.blocks\[2\]\.norm2 is a RmsNorm"):
        encoder.fused()
    uneven = AVEncoder(make_vit(), make_vit((1, 16, 40), depth=2), block_layers=(0, 2))
    with pytest.raises(ValueError, match="equal depth"):
        uneven.fused()


def test_hooks_that_would_not_run_are_refused():
    block, inputs = (fused := make_encoder().fused()).image.blocks[0], make_inputs()
    for kind in "forward_hook", "forward_pre_hook", "full_backward_hook", "full_backward_pre_hook":
        with pytest.raises(ValueError, match="blocks of a fused encoder run no hooks"):
            getattr(block, f"register_{kind}")(print)
    met = []
    for part in fused, block.fc1, fused.fusion_blocks["0"]:
        part.register_forward_hook(lambda module, *_: met.append(module))
    fused(*inputs)
    assert {*met} == {block.fc1, fused.fusion_blocks["0"], fused} and len(met) == 3


def test_a_recording_knows_when_its_weights_are_others():
    fused = make_encoder().fused()
    weights, state = Weights(fused), copy.deepcopy(fused.state_dict())
    fused.load_state_dict(state)  # in place, where recordings read
    assert weights.are_there()
    fused.load_state_dict(state, assign=True)
    assert not weights.are_there() and (weights := Weights(fused)).are_there()
    part = fused.image.blocks[0].fc1
    part.bias = nn.Parameter(part.bias.clone(), requires_grad=False)
    assert not weights.are_there() and (weights := Weights(fused)).are_there()
    fused.image.blocks[1].act = nn.ReLU()
    assert not weights.are_there()


# --- recording, with stand-ins for CUDA ---------------------------------------------------------------------


@pytest.fixture
def cuda(monkeypatch):
    """What is recorded runs once; `cuda.device` is the current device, `cuda.recorded` lists those on which
    something was recorded, `cuda.waited_for` the streams that others waited for, and `cuda.fault` is what the
    end of a recording raises.
    """
    cuda = SimpleNamespace(device=0, recorded=[], fault=None, waited_for=[])

    class Stream:
        def __init__(self, device=None):
            self.device = cuda.device if device is None else device

        def wait_stream(self, other):
            cuda.waited_for.append(other)

    @contextlib.contextmanager
    def on(device):
        cuda.device, before = getattr(device, "device", device), cuda.device
        try:
            yield
        finally:
            cuda.device = before

    @contextlib.contextmanager
    def graph(graph, stream=None, **options):
        """Without a stream, that of the device which was the first."""
        with on(stream or (cuda.recorded or [cuda.device])[0]):
            cuda.recorded.append(cuda.device)
            try:
                yield
            finally:
                if cuda.fault is not None:
                    raise cuda.fault

    for name, stand_in in dict(
        Stream=Stream,
        stream=on,
        device=lambda device: on(cuda.device if isinstance(device, torch.device) else device),
        graph=graph,
        current_device=lambda: cuda.device,
        current_stream=Stream,
        CUDAGraph=lambda: SimpleNamespace(replay=lambda: None),
        Event=lambda: SimpleNamespace(wait=lambda: None, record=lambda: None),
    ).items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    recording_stream.cache_clear()
    yield cuda
    recording_stream.cache_clear()


def test_each_device_records_for_itself(cuda):
    for cuda.device in 0, 1, 0:
        assert torch.equal(CudaGraphs(nn.Identity())(input=torch.ones(2)), torch.ones(2))
    assert cuda.recorded == [0, 1, 0]


@pytest.mark.parametrize(
    "fault, raised, message",
    [
        (None, RuntimeError, "cannot be recorded as a CUDA graph"),
        (torch.AcceleratorError("not while recording"), RuntimeError, "cannot be recorded as a CUDA graph"),
        (torch.OutOfMemoryError("no memory"), torch.OutOfMemoryError, "no memory"),
        (KeyboardInterrupt(), KeyboardInterrupt, None),
    ],
    ids=repr,
)
def test_what_ends_a_recording_is_said(cuda, fault, raised, message):
    cuda.fault = torch.AcceleratorError("streams were not joined")
    with pytest.raises(raised, match=message), record(None):
        if fault is not None:
            raise fault
    assert len(cuda.recorded) == 2  # so that the generator is as before


def test_streams_are_joined_where_a_call_fails(cuda, monkeypatch):
    """PyTorch could not end the recording, and would say that instead of what went wrong."""
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    fused, (image, audio) = make_encoder().fused(), make_inputs()
    beside = []

    def run_out(module, inputs):
        beside.append(fused.side)
        raise torch.OutOfMemoryError

    fused.image.blocks[1].fc1.register_forward_pre_hook(run_out)
    with pytest.raises(torch.OutOfMemoryError):
        fused.recorded_forward(image=image, audio=audio)
    assert beside[0] is not None and cuda.waited_for[-1] is beside[0] and fused.side is None


def test_threads_wait_for_one_another(cuda):
    graphs, free = CudaGraphs(nn.Identity()), []
    graphs(input=torch.ones(2))
    (recording,) = graphs.recordings.values()

    def ask():
        free.append(graphs.lock.acquire(blocking=False))

    def ask_from_another_thread():
        thread = threading.Thread(target=ask)
        thread.start()
        thread.join()

    recording.graph.replay = ask_from_another_thread
    graphs(input=torch.zeros(2))
    assert free == [False]
    copy.deepcopy(graphs)(input=torch.zeros(2))
    ask_from_another_thread()
    assert free == [False, True]


def test_one_call_is_recorded_at_a_time_with_workspaces_of_its_own(cuda, monkeypatch):
    """Where recordings share one, it goes with the first that ends (PyTorch 2.12 to 2.14)."""
    cleared, free = [], []
    monkeypatch.setattr(torch._C, "_cuda_clearCublasWorkspaces", lambda: cleared.append(len(cuda.recorded)))

    def ask():
        free.append(ONE_AT_A_TIME.acquire(blocking=False))

    with record(None):
        thread = threading.Thread(target=ask)
        thread.start()
        thread.join()
    assert free == [False] and cleared == [0, 1]  # before it and after


def test_results_and_inputs_of_a_call_are_left_alone_by_the_next(cuda):
    graphs, (ones, zeros) = CudaGraphs(nn.Identity()), (torch.ones(2), torch.zeros(2))
    first, second = graphs(input=ones), graphs(input=zeros)
    assert first.tolist() == ones.tolist() == [1, 1] and second.tolist() == [0, 0]


def test_the_recordings_used_last_are_kept(cuda):
    graphs = CudaGraphs(nn.Identity())
    for size in (1, 2, 3, 4, 5, 6, 7, 8, 1, 9):
        graphs(input=torch.ones(size))
    assert [len(each.inputs["input"]) for each in graphs.recordings.values()] == [3, 4, 5, 6, 7, 8, 1, 9]


def test_a_call_waits_for_the_one_before_wherever_that_was(cuda, monkeypatch):
    done, events = [], SimpleNamespace(wait=lambda: done.append("wait"), record=lambda: done.append("record"))
    monkeypatch.setattr(torch.cuda, "Event", lambda: events)
    graphs = CudaGraphs(nn.Identity())
    graphs(input=torch.ones(2))
    (recording,) = graphs.recordings.values()
    recording.graph.replay = lambda: done.append("replay")
    graphs(input=torch.ones(2))
    assert done[-3:] == ["wait", "replay", "record"]


def test_a_recording_waits_for_what_was_before_and_not_for_other_threads(cuda, monkeypatch):
    modes, graph = [], torch.cuda.graph

    def observe(recorded, *, capture_error_mode, **options):
        modes.append(capture_error_mode)
        return graph(recorded, **options)

    monkeypatch.setattr(torch.cuda, "graph", observe)
    CudaGraphs(nn.Identity())(input=torch.ones(2))
    assert modes == ["thread_local"] and len(cuda.waited_for) == 2  # to run aside, and to go on


def test_what_is_recorded_before_serves_in_any_mode(cuda):
    graphs = CudaGraphs(nn.Linear(2, 2))
    with torch.inference_mode():
        graphs(input=torch.ones(1, 2))
    assert not graphs(input=torch.zeros(1, 2)).requires_grad and len(graphs.recordings) == 1
    with pytest.raises(ValueError, match="input requires a gradient"):
        graphs(input=torch.ones(1, 2, requires_grad=True))
    with torch.no_grad():
        graphs(input=torch.ones(1, 2, requires_grad=True))


def test_other_weights_make_another_recording(cuda):
    norm = nn.BatchNorm1d(2).eval()
    graphs, inputs = CudaGraphs(norm), dict(input=torch.ones(1, 2))
    ones = graphs(**inputs)
    norm.running_mean = torch.ones(2)
    assert graphs(**inputs).abs().max() < ones.min()
    norm.bias = nn.Parameter(torch.full((2,), 5.0))
    assert graphs(**inputs).min() > 4
    assert len(graphs.recordings) == 1


def test_calls_of_another_kind_are_told_apart(monkeypatch):
    x = torch.ones(2)
    calls = [dict(x=x), dict(y=x), dict(x=x.double()), dict(x=x[:1]), dict(x=x.to("meta"))]
    calls += [dict(x=x, way=1), dict(x=x, way=2)]
    kinds = {kind_of_call(call) for call in calls}
    try:
        torch.use_deterministic_algorithms(True)
        kinds.add(kind_of_call(calls[0]))
    finally:
        torch.use_deterministic_algorithms(False)
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: True)
    for dtype in torch.float16, torch.bfloat16:
        monkeypatch.setattr(torch, "get_autocast_dtype", lambda device, dtype=dtype: dtype)
        kinds.add(kind_of_call(calls[0]))
    assert len(kinds) == len(calls) + 3


@pytest.mark.parametrize("switch", [torch.backends.cuda.matmul, torch.backends.cudnn.conv])
def test_switches_of_pytorch_make_another_recording(cuda, switch):
    graphs, before = CudaGraphs(nn.Identity()), switch.fp32_precision
    try:
        for switch.fp32_precision in "ieee", "tf32", "ieee":
            graphs(input=torch.ones(2))
    finally:
        switch.fp32_precision = before
    assert len(graphs.recordings) == 2


# --- on a GPU -----------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("interactions", VARIANTS)
def test_recorded_calls(interactions):
    encoder = make_encoder(interactions).float().cuda()
    fused = encoder.fused(cuda_graphs=True)
    results = []
    for batch in (3, 2, 3):
        inputs = [x.float().cuda() for x in make_inputs(batch)]
        with torch.inference_mode(batch == 2):
            results.append((fused(*inputs, return_layers=True), encoder(*inputs, return_layers=True)))
    for ours, truth in results:  # of the first too: a later call leaves results alone
        assert_same(ours, truth, 1e-4)
    assert len(fused.graphs.recordings) == 2
    image = inputs[0]
    keep = torch.arange(IMAGE_TOKENS - 2, device="cuda").repeat(3, 1)
    assert_same(fused(image, None, image_keep=keep), encoder(image, None, image_keep=keep), 1e-4)


@pytest.mark.gpu
def test_recordings_end_where_weights_move():
    encoder = make_encoder().float().cuda()
    fused, inputs = encoder.fused(cuda_graphs=True), [x.cuda() for x in make_inputs()]
    fused(*[x.float() for x in inputs])
    fused.double()
    assert_same(fused(*inputs), encoder.double()(*inputs), 1e-6)
    other = randomized(copy.deepcopy(encoder))
    fused.load_state_dict(other.fused().state_dict(), assign=True)
    assert_same(fused(*inputs), other(*inputs), 1e-6)
    with pytest.raises(ValueError, match="image requires a gradient"):
        fused(inputs[0].requires_grad_(), inputs[1])


@pytest.mark.gpu
def test_a_recording_outlives_those_before_it():
    encoder = make_encoder().float().cuda()
    fused, (image, audio) = encoder.fused(cuda_graphs=True), [x.float().cuda() for x in make_inputs(4)]
    fused(image[:1], audio[:1])
    truth = encoder(image, audio)
    fused(image, audio)
    fused.graphs.recordings.popitem(last=False)
    torch.cuda.empty_cache()
    spoilt = torch.full((2**26,), torch.nan, device="cuda")  # what was given back
    assert_same(fused(image, audio), truth, 1e-4)
    del spoilt


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_as_near_as_the_encoder(dtype):
    encoder, inputs = make_encoder(), make_inputs(3)
    truth = encoder(*inputs)
    half, inputs = encoder.to("cuda", dtype), [x.to("cuda", dtype) for x in inputs]
    plain = half(*inputs)
    for graphs in (False, True):
        ours = half.fused(cuda_graphs=graphs)(*inputs)
        for mine, other, true in zip(tokens_of(ours), tokens_of(plain), tokens_of(truth), strict=True):
            error, allowed = ((x.double().cpu() - true).norm() / true.norm() for x in (mine, other))
            assert error <= 2 * allowed + torch.finfo(dtype).eps
