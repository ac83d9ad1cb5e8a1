"""CUDA graphs: all launches of a call are recorded once, and played back as one."""

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from functools import cache, partial
from itertools import chain
from operator import is_

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

from .ops.operators import once_differentiable

KEPT = 8  # recordings; each holds the memory of a call


class CudaGraphs:
    """`function(**inputs)` without gradients, recorded for each kind of inputs that it meets.

    Inputs are tensors on one CUDA device, and options, which are part of the kind. Results are copies, which
    the next call leaves alone. A recording reads the weights that a module had; once it has others, a new one
    is made. Whatever else changes in the module later, as by `train()` or a hook, it does not see. Threads
    and streams may share one: a call waits for the one before.

    Args:
        function: a module, or a method of one.
    """

    def __init__(self, function: Callable):
        self.function, self.recordings = function, OrderedDict()
        self.lock = threading.RLock()

    def __call__(self, **inputs):
        with self.lock:
            return self.play(inputs)

    def play(self, inputs: dict):
        refuse_gradients(inputs)
        kind = kind_of_call(inputs)
        device = next(x.device for x in inputs.values() if isinstance(x, Tensor))
        with torch.cuda.device(device):  # whose streams record and play
            if kind not in self.recordings or not self.recordings[kind].weights.are_there():
                self.recordings.pop(kind, None)  # whose memory the next one needs
                with torch.inference_mode(False), torch.no_grad():  # all can write to what it holds
                    self.recordings[kind] = Recording(self.function, inputs)
                if len(self.recordings) > KEPT:
                    self.recordings.popitem(last=False)
            self.recordings.move_to_end(kind)
            return self.recordings[kind](inputs)

    def __getstate__(self) -> dict:
        """Copies record for themselves."""
        return dict(function=self.function)

    def __setstate__(self, state: dict) -> None:
        self.__init__(**state)


class Recording:
    """One call on inputs of its own, which every later call is copied into."""

    def __init__(self, function: Callable, inputs: dict):
        self.weights = Weights(getattr(function, "__self__", function))
        self.inputs = {name: x.clone() if isinstance(x, Tensor) else x for name, x in inputs.items()}
        self.graph, self.done = torch.cuda.CUDAGraph(), torch.cuda.Event()
        torch.clear_autocast_cache()  # of weights in another dtype: they are made in each call
        with aside():
            for _ in range(2):
                function(**self.inputs)
        torch.clear_autocast_cache()
        with record(self.graph):
            self.outputs = function(**self.inputs)
        torch.clear_autocast_cache()

    def __call__(self, inputs: dict):
        self.done.wait()  # the call before may have been on another stream
        fill(self.inputs, inputs)
        self.graph.replay()
        outputs = tree_map_only(Tensor, torch.clone, self.outputs)
        self.done.record()
        return outputs


class TrainingGraphs:
    """`module(**inputs)` in training, whose forward and backward are recorded at the first call and played
    back for inputs of the same kind. For modules that return losses: of the results, single numbers can be
    differentiated; all other tensors are detached, and the next call overwrites them. Each call has one
    backward, before the next call.

    Inputs of another kind, such as a smaller batch, run without it, beside the memory that the recording
    holds; those that come twice in a row are recorded instead. In `eval()` and without gradients nothing is
    recorded or played. A recording knows the weights by their place in memory, which parameters need a
    gradient and which parts train; whatever else changes in the module later, such as hooks and numbers that
    are not tensors, it does not see.

    Args:
        module: on a CUDA device; not one that waits for numbers from it, or keeps running statistics.

    Raises:
        ValueError: an input requires a gradient; or the module is spread over processes, or has no parameters
            that do.
        RuntimeError: in a second backward of a call, or in one after the next call.
    """

    def __init__(self, module: nn.Module):
        if isinstance(module, DistributedDataParallel):
            raise ValueError("module is spread over processes: TrainingGraphs is for one")
        self.module, self.kind, self.before, self.recording = module, None, None, None

    def __call__(self, **inputs):
        if not (self.module.training and torch.is_grad_enabled()):
            return self.module(**inputs)
        refuse_gradients(inputs)
        kind, before = (*kind_of_call(inputs), *kind_of_module(self.module)), self.before
        self.before = kind
        if self.recording is None or kind == before != self.kind or not self.recording.weights.are_there():
            self.recording = None  # whose memory the next one needs
            self.recording, self.kind = TrainingRecording(self.module, inputs), kind
        if kind == self.kind:
            return self.recording(inputs)
        return tree_map_only(Tensor, lambda x: x if is_loss(x) else x.detach(), self.module(**inputs))

    def __getstate__(self) -> dict:
        """Copies record for themselves."""
        return dict(module=self.module, kind=None, before=None, recording=None)


class TrainingRecording:
    """Forward and backward of one call on inputs of its own."""

    def __init__(self, module: nn.Module, inputs: dict):
        self.weights, self.calls = Weights(module), 0
        named = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self.parameters = list(named.values())
        if not named:
            raise ValueError("module has no parameters to train, and a recorded call is for training")
        self.inputs = {name: x.clone() if isinstance(x, Tensor) else x for name, x in inputs.items()}
        self.graphs = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        device = self.parameters[0].device
        # The same memory as other leaves: where gradients of a parameter are added up belongs to the stream
        # of whoever used it first, which cannot be part of a recording.
        leaves = {name: p.detach().requires_grad_() for name, p in named.items()}
        call = partial(torch.func.functional_call, module, leaves, kwargs=self.inputs)
        with torch.cuda.device(device), torch.random.fork_rng([device]):
            with aside():
                self.run(call, leaves)
            self.run(call, leaves, partial(record, pool=torch.cuda.graph_pool_handle()))

    def run(self, call, leaves, around=lambda graph: nullcontext()) -> None:
        torch.clear_autocast_cache()  # of weights in another dtype: they are made in each call
        with around(self.graphs[0]):
            outputs = call()
        losses = [x for x in tree_leaves(outputs) if is_loss(x)]
        self.loss_grads = [torch.ones_like(loss) for loss in losses]
        with around(self.graphs[1]):
            self.grads = torch.autograd.grad(
                losses, list(leaves.values()), self.loss_grads, allow_unused=True
            )
        torch.clear_autocast_cache()
        self.is_loss = [is_loss(x) for x in tree_leaves(outputs)]
        self.outputs = tree_map_only(Tensor, torch.detach, outputs)

    def __call__(self, inputs: dict):
        fill(self.inputs, inputs)
        losses, kinds = iter(Played.apply(self, *self.parameters)), iter(self.is_loss)
        return tree_map(lambda x: next(losses) if next(kinds) else x, self.outputs)


class Played(torch.autograd.Function):
    """The losses of a recording, and the gradients of its parameters."""

    @staticmethod
    def forward(ctx, recording, *parameters):
        recording.calls += 1
        ctx.recording, ctx.call = recording, recording.calls
        recording.graphs[0].replay()
        outputs = zip(tree_leaves(recording.outputs), recording.is_loss, strict=True)
        return tuple(x.clone() for x, is_loss in outputs if is_loss)

    @staticmethod
    @once_differentiable("a recorded call", "a call without TrainingGraphs")
    def backward(ctx, *grads):
        recording = ctx.recording
        if ctx.call != recording.calls:  # the backward itself takes the place of what the call left
            raise RuntimeError("a recorded call has one backward, before the next call")
        ctx.call = None
        for own, grad in zip(recording.loss_grads, grads, strict=True):
            own.copy_(grad)
        recording.graphs[1].replay()
        # Copies, as gradients of several calls may be added up.
        copies = iter(torch._foreach_mul([grad for grad in recording.grads if grad is not None], 1.0))
        return None, *(None if grad is None else next(copies) for grad in recording.grads)


# --- what is recorded ---------------------------------------------------------------------------------------


@contextmanager
def aside() -> Iterator[None]:
    """Runs the body on another stream and waits for it: for what cannot be recorded, as compiling kernels."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    try:
        with torch.cuda.stream(stream):
            yield
    finally:
        torch.cuda.current_stream().wait_stream(stream)


FAILED: list[torch.cuda.CUDAGraph] = []  # PyTorch's allocator (2.11) goes on asking them what is theirs


@cache
def recording_stream(device: int) -> torch.cuda.Stream:
    """Of its own for every device: PyTorch's is that of the device which recorded first."""
    return torch.cuda.Stream(device)


ONE_AT_A_TIME = threading.RLock()  # on a stream of recordings


@contextmanager
def own_workspaces() -> Iterator[None]:
    """What products need for themselves cuBLAS keeps by stream: recordings of one stream would share it where
    they are played on several, and lose it with the first of them that ends (PyTorch 2.12 to 2.14).
    """
    torch._C._cuda_clearCublasWorkspaces()
    try:
        yield
    finally:
        torch._C._cuda_clearCublasWorkspaces()


@contextmanager
def record(graph: torch.cuda.CUDAGraph, **options) -> Iterator[None]:
    """`torch.cuda.graph` on the current device, but what other threads do meanwhile, such as pinning memory,
    is none of it; and where it fails, stream and generator are left as they were. PyTorch's allocator (2.11)
    is not: it goes on as in a recording, and gives less memory back.

    Raises:
        RuntimeError: the call waits for the GPU, or does something else that cannot be recorded.
    """
    own = dict(stream=recording_stream(torch.cuda.current_device()), capture_error_mode="thread_local")
    before = torch.cuda.stream(torch.cuda.current_stream())  # which `torch.cuda.graph` leaves if it fails
    fault = None  # of the call itself
    with ONE_AT_A_TIME, own_workspaces(), before:
        try:
            with torch.cuda.graph(graph, **own, **options):
                try:
                    yield
                except BaseException as error:
                    fault = error
                    raise
        except torch.AcceleratorError as error:
            FAILED.append(graph)
            # Until a recording succeeds, PyTorch's generator believes that it is being recorded (2.11).
            with suppress(RuntimeError), torch.cuda.graph(torch.cuda.CUDAGraph(), **own):
                torch.zeros((), device="cuda")  # an empty one is warned of
            if not (fault is None or isinstance(fault, torch.AcceleratorError)):
                raise fault from None
            raise RuntimeError(
                f"this call cannot be recorded as a CUDA graph: does it wait for the GPU? ({error})"
            ) from error


def is_loss(x) -> bool:
    return isinstance(x, Tensor) and x.ndim == 0 and x.requires_grad


# --- for which calls a recording serves ---------------------------------------------------------------------


class Weights:
    """Parts, parameters and buffers of a module as they are now; what is written into them changes none."""

    def __init__(self, module: nn.Module):
        homes = ((part._modules, part._parameters, part._buffers) for part in module.modules())
        self.homes = [home for home in chain.from_iterable(homes) if home]
        self.before = list(self.now())
        self.memory = [(x, x.detach()) for x in self.before if isinstance(x, Tensor)]  # which stays theirs

    def now(self) -> Iterator[nn.Module | Tensor | None]:
        return chain.from_iterable(map(dict.values, self.homes))

    def are_there(self) -> bool:
        """Whether none has been exchanged for another, as `load_state_dict(assign=True)` does, or lies
        elsewhere, as after `to`.
        """
        return all(map(is_, self.now(), self.before)) and all(
            x.data_ptr() == memory.data_ptr() for x, memory in self.memory
        )


def fill(own: dict, inputs: dict) -> None:
    """Writes the inputs of a call where its recording reads them."""
    for name, x in inputs.items():
        if isinstance(x, Tensor):
            own[name].copy_(x)


def refuse_gradients(inputs: dict) -> None:
    needing = [name for name, x in inputs.items() if isinstance(x, Tensor) and x.requires_grad]
    if needing and torch.is_grad_enabled():
        raise ValueError(f"{needing[0]} requires a gradient, which a recorded call does not give")


def kind_of_module(module: nn.Module) -> tuple:
    """Which parts train, and which parameters need a gradient."""
    return (
        tuple(part.training for part in module.modules()),
        tuple(p.requires_grad for p in module.parameters()),
    )


def kind_of_call(inputs: dict) -> tuple:
    """What must be the same for a recording to serve."""
    autocast = torch.is_autocast_enabled("cuda") and torch.get_autocast_dtype("cuda")
    precisions = torch.backends.cuda.matmul.fp32_precision, torch.backends.cudnn.conv.fp32_precision
    is_deterministic = torch.are_deterministic_algorithms_enabled()
    return autocast, *precisions, is_deterministic, *((name, kind_of(x)) for name, x in inputs.items())


def kind_of(value):
    return (value.shape, value.dtype, value.device) if isinstance(value, Tensor) else value
