"""What a call asks of a GPU, counted without one: the operators that it runs, on tensors without numbers.

Every operator that is not a view is one launch, which reads its arguments and writes its results once.
Attention, PyTorch's and `pair_attention`, is one operator, as its kernels are.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import prod
from typing import NamedTuple
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.function import BackwardCFunction
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from avfuse import AVEncoder
from avfuse.folding import FoldedDense

WITHOUT_LAUNCH = {"_unsafe_view", "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}
OVERWRITE = {"copy_", "fill_", "zero_"}  # their first argument, without reading it
MADE_OF_OTHERS = torch._C.DispatchKey.CompositeImplicitAutograd


class Operator(NamedTuple):
    """One operator that ran."""

    name: str
    shapes: str  # of the tensors that it reads
    bytes: int
    flop: int
    half: bool  # computes in a 16-bit dtype
    aside: bool  # belongs to the fusion branch, for which nothing in its layer waits

    @property
    def is_attention(self) -> bool:
        return "attention" in self.name


def operators_of(call: Callable[[], object]) -> list[Operator]:
    """The operators of a call."""
    traffic = Traffic()

    def aside(run_fusion):
        def run(*args):
            traffic.aside = True
            tokens = run_fusion(*args)
            traffic.aside = False
            return tokens

        return run

    with (
        mock.patch.object(AVEncoder, "run_fusion", aside(AVEncoder.run_fusion)),
        mock.patch.object(FoldedDense, "forward", aside(FoldedDense.forward)),
        traffic,
    ):
        call()
    return traffic.operators


class Traffic(TorchDispatchMode):
    """Collects the operators that run under it."""

    def __init__(self):
        super().__init__()
        self.operators, self.aside = [], False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if is_made_of_others(func):
            with self:  # under inference_mode they come whole
                return func._op_dk(MADE_OF_OTHERS, *args, **kwargs)
        result = func(*args, **kwargs)
        name, written = func.overloadpacket.__name__, tensors(result)
        if written and not func.is_view and name not in WITHOUT_LAUNCH:
            targets = [id(kwargs[key]) for key in kwargs if key.startswith("out")]
            targets += [id(args[0])] if name in OVERWRITE else []
            read = [tensor for tensor in tensors((args, kwargs)) if id(tensor) not in targets]
            formula = flop_registry.get(func.overloadpacket)
            numbers = [tensor for tensor in (*read, *written) if tensor.is_floating_point()]
            operator = Operator(
                name=name,
                shapes=", ".join("x".join(map(str, tensor.shape)) for tensor in read),
                bytes=sum(map(bytes_of, (*read, *written))),
                flop=formula(*args, **kwargs, out_val=result) if formula else 0,
                half=bool(numbers) and numbers[0].dtype.itemsize == 2,
                aside=self.aside,
            )
            self.operators.append(operator)
        return result


def is_made_of_others(func) -> bool:
    asks = func is torch.ops.prim.device.default  # for the device of a tensor
    return not asks and torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), MADE_OF_OTHERS)


def tensors(tree) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def bytes_of(tensor: torch.Tensor) -> int:
    """What is in memory: an expanded tensor is there once."""
    sizes = zip(tensor.shape, tensor.stride(), strict=True)
    return tensor.element_size() * prod(size for size, stride in sizes if stride or size == 0)


@contextmanager
def imagined_gpu() -> Iterator[None]:
    """Tensors on "cuda" need no GPU here. Dispatch, autocast and kernels are those of a GPU of today."""
    with (
        FakeTensorMode(allow_non_fake_inputs=True),
        mock.patch("torch.nn.functional.scaled_dot_product_attention", fused_attention),
        mock.patch("avfuse.ops.pair_attention.HAS_TRITON", True),
        mock.patch("avfuse.ops.residual_norm.HAS_TRITON", True),
        mock.patch("torch.cuda.get_device_capability", return_value=(9, 0)),
        mock.patch("torch.cuda.amp.common.amp_definitely_not_available", return_value=False),
        mock.patch("torch.cuda.is_bf16_supported", return_value=True),
    ):
        yield


def fused_attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, *, scale=None):
    """By the kernels that CUDA would choose; where there is no GPU, PyTorch would take attention apart."""
    if attn_mask is None and query.dtype.itemsize == 2:
        flash = torch.ops.aten._scaled_dot_product_flash_attention
        return flash(query, key, value, dropout_p, is_causal, scale=scale)[0]
    efficient, needs_grad = torch.ops.aten._scaled_dot_product_efficient_attention, torch.is_grad_enabled()
    return efficient(query, key, value, attn_mask, needs_grad, dropout_p, is_causal, scale=scale)[0]


@torch.no_grad()
def backward(loss: torch.Tensor) -> None:
    """What `loss.backward()` runs. (The engine of autograd asks CUDA for its streams, which takes a GPU.)"""
    pending = {loss.grad_fn: {0: torch.ones_like(loss)}}  # nodes of the graph, and gradients of their outputs
    parameters = {}
    while pending:
        node = max(pending, key=lambda node: node._sequence_nr())  # the youngest waits for no other
        grads, edges = pending.pop(node), node.next_functions
        grads = [grads.get(number) for number in range(len(node._input_metadata))]
        if isinstance(node, BackwardCFunction):  # an autograd.Function has a gradient for every argument
            given = zip(node.apply(*grads), node.needs_input_grad, strict=True)
            grads, edges = [grad for grad, needed in given if needed], [edge for edge in edges if edge[0]]
        else:
            grads = node(*grads)
        grads = grads if isinstance(grads, tuple | list) else [grads]
        for grad, (other, number) in zip(grads, edges, strict=True):
            if grad is not None and other is not None:
                like = other._input_metadata[number]
                grad = grad if grad.shape == like.shape else grad.sum_to_size(like.shape)
                sums = (parameters if hasattr(other, "variable") else pending).setdefault(other, {})
                sums[number] = sums[number] + grad.to(like.dtype) if number in sums else grad.to(like.dtype)
