"""CUDA graphs: all launches of a call are recorded once, and played back as one."""

from collections import OrderedDict
from collections.abc import Callable, Iterator
from itertools import chain
from operator import is_

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

KEPT = 8  # recordings; each holds the memory of a call


class CudaGraphs:
    """`function(**inputs)` without gradients, recorded for each kind of inputs that it meets.

    Inputs are tensors on one CUDA device, and options, which are part of the kind. Results are copies, which
    the next call leaves alone. A recording reads the weights that a module had; once it has others, a new one
    is made.

    Args:
        function: a module, or a method of one.
    """

    def __init__(self, function: Callable):
        self.function, self.recordings = function, OrderedDict()

    def __call__(self, **inputs):
        needing = [name for name, x in inputs.items() if isinstance(x, Tensor) and x.requires_grad]
        if needing and torch.is_grad_enabled():
            raise ValueError(f"{needing[0]} requires a gradient, which a recorded call does not give")
        autocast = torch.is_autocast_enabled("cuda") and torch.get_autocast_dtype("cuda")
        kind = (autocast, *((name, kind_of(x)) for name, x in inputs.items()))
        if kind not in self.recordings or not self.recordings[kind].weights.are_there():
            device = next(x.device for x in inputs.values() if isinstance(x, Tensor))  # whose streams record
            with torch.cuda.device(device), torch.inference_mode(False), torch.no_grad():  # all can write to
                self.recordings[kind] = Recording(self.function, inputs)
            if len(self.recordings) > KEPT:
                self.recordings.popitem(last=False)
        self.recordings.move_to_end(kind)
        return self.recordings[kind](inputs)

    def __getstate__(self) -> dict:
        """Copies record for themselves."""
        return dict(function=self.function, recordings=OrderedDict())


class Recording:
    """One call on inputs of its own, which every later call is copied into."""

    def __init__(self, function: Callable, inputs: dict):
        self.weights = Weights(getattr(function, "__self__", function))
        self.inputs = {name: x.clone() if isinstance(x, Tensor) else x for name, x in inputs.items()}
        self.graph = torch.cuda.CUDAGraph()
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):  # kernels are compiled and chosen, which cannot be recorded
            for _ in range(2):
                function(**self.inputs)
        torch.cuda.current_stream().wait_stream(aside)
        # What other threads do meanwhile, such as pinning memory, is none of it.
        with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
            self.outputs = function(**self.inputs)

    def __call__(self, inputs: dict):
        for name, x in inputs.items():
            if isinstance(x, Tensor):
                self.inputs[name].copy_(x)
        self.graph.replay()
        return tree_map_only(Tensor, torch.clone, self.outputs)


class Weights:
    """The parameters and buffers of a module as they are now; what is written into them changes none."""

    def __init__(self, module: nn.Module):
        self.homes = [home for part in module.modules() for home in (part._parameters, part._buffers) if home]
        self.tensors = list(self.now())

    def now(self) -> Iterator[Tensor | None]:
        return chain.from_iterable(map(dict.values, self.homes))

    def are_there(self) -> bool:
        """Whether none has been exchanged for another tensor, as `load_state_dict(assign=True)` does."""
        return all(map(is_, self.now(), self.tensors))


def kind_of(value):
    """What must be the same for a recording to serve."""
    return (value.shape, value.dtype, value.device) if isinstance(value, Tensor) else value
