"""CUDA graphs: all launches of a call are recorded once, and played back as one."""

from collections import OrderedDict
from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

KEPT = 8  # recordings; each holds the memory of a call


class CudaGraphs:
    """`function(**inputs)` without gradients, recorded for each kind of inputs that it meets.

    Inputs are tensors on one CUDA device, and options, which are part of the kind. Results are copies, which
    the next call leaves alone.
    """

    def __init__(self, function: Callable):
        self.function, self.recordings = function, OrderedDict()

    def __call__(self, **inputs):
        needing = [name for name, x in inputs.items() if isinstance(x, Tensor) and x.requires_grad]
        if needing and torch.is_grad_enabled():
            raise ValueError(f"{needing[0]} requires a gradient, which a recorded call does not give")
        autocast = torch.is_autocast_enabled("cuda") and torch.get_autocast_dtype("cuda")
        kind = (autocast, *((name, kind_of(x)) for name, x in inputs.items()))
        if kind not in self.recordings:
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


def kind_of(value):
    """What must be the same for a recording to serve."""
    return (value.shape, value.dtype, value.device) if isinstance(value, Tensor) else value
