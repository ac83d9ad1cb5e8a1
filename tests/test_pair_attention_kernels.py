"""The Triton kernels of pair_attention against float64: on the GPU where there is one, else in Triton's
interpreter. With -m gpu also what only a GPU shows: bfloat16, memory, repetition, graphs, offsets.
"""

import contextlib
import functools
import itertools
import math
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import triton
from avfuse.kernels import biased_pair_attention as biased_kernels
from avfuse.kernels import blocked_pair_attention as blocked_kernels
from avfuse.kernels import pair_attention as kernels
from models import make_encoder, make_inputs
from packaging import version
from pair_rounding import Precision, largest_errors
from torch._subclasses import FakeTensorMode
from torch.autograd.forward_ad import dual_level, make_dual, unpack_dual
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode
from triton._C.libtriton.ir import INPUT_PRECISION
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

from avfuse import AVMAE, fusion
from avfuse.ops import operators
from avfuse.ops.pair_attention import attend_pairs, pair_attention

pytestmark = [  # of Triton's interpreter
    pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning"),
]

INF = math.inf
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOKENS = ("query", "image_key", "image_value", "audio_key", "audio_value")
KEYS = ("image_key", "audio_key")

OPTIONS = {
    "dtype": (torch.float32, torch.float16),
    "F": (1, 5, 16, 33),
    "I": (1, 7, 64, 65, 130),
    "A": (1, 3, 33, 96, 65 if DEVICE == "cpu" else 129),  # the interpreter walks tile by tile
    "K": (3, 16, 64),
    "V": (4, 64, 80),
    "masks": (None, "random", "dead"),
    "bias": (
        None,
        "own",
        "shared",
        "table",
        "image",
        "audio",
        "row, column",
        "few pairs",
        "opposed",
        "no pair",
    ),
    "magnitude": (1.0, 60.0, 3000.0),
    "layout": ("contiguous", "projections", "strided"),
    "splits": (1, 2, 4),
}
# With several tiles of queries, of image and of audio tokens at once, which drawn cases may lack.
LARGE = dict(F=33, I=65, A=96, K=16, V=80, masks="random", magnitude=1.0, layout="strided", splits=2)
LARGE = [dict(dtype=torch.float32, **LARGE, bias=bias) for bias in (None, "own")]


@pytest.fixture(autouse=True)
def poison(monkeypatch):
    """Memory that a kernel is given to fill holds NaN."""
    new_empty = torch.Tensor.new_empty

    def poisoned(*args, **options):
        tensor = new_empty(*args, **options)
        return tensor.fill_(math.nan) if tensor.is_floating_point() else tensor

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned)


@pytest.fixture(autouse=True)
def tensor_cores(monkeypatch):
    """Where the interpreter multiplies in tf32, it cuts the operands to it, as tensor cores do."""
    if DEVICE == "cuda":
        return
    create_dot = InterpreterBuilder.create_dot

    def cutting(self, a, b, d, input_precision, *options):
        if input_precision == INPUT_PRECISION.TF32 and a.data.dtype == np.float32:
            a, b = (TensorHandle(cut_to_tf32(x.data), x.dtype) for x in (a, b))
        return create_dot(self, a, b, d, input_precision, *options)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", cutting)


def cut_to_tf32(x):
    """float32 without the last 13 of its 23 bits after the point."""
    return (x.view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32)


def pairwise(options, count, seed=0, small=DEVICE == "cpu"):
    """`count` cases in which every two values of two options meet; `small` ones, of which few numbers of
    tokens are large at once, as the interpreter's time goes by pairs.
    """
    pick, cases = random.Random(seed), []
    wanted = {
        ((x, i), (y, j))
        for x, y in itertools.combinations(options, 2)
        for i, j in itertools.product(options[x], options[y])
    }
    while len(cases) < count:
        drawn = [{name: pick.choice(values) for name, values in options.items()} for _ in range(120)]
        if small:
            drawn = sorted(drawn, key=lambda case: math.prod(case.get(name, 1) for name in "FSITA"))[:80]
        pairs = [set(itertools.combinations(case.items(), 2)) for case in drawn]
        best = max(range(len(drawn)), key=lambda n: len(pairs[n] & wanted))
        wanted -= pairs[best]
        cases.append(drawn[best])
    assert not wanted, f"{count} cases leave {len(wanted)} pairs of options untested"
    return cases


def name_of(case):
    return "-".join(str(value).removeprefix("torch.") for value in case.values())


# --- cases --------------------------------------------------------------------------------------------------


def make(F=3, I=5, A=4, K=6, V=7, *, B=3, H=2, dtype=torch.float32, magnitude=1.0, device=DEVICE):
    """Inputs by name whose logits have about the given standard deviation."""
    shapes = {"query": (F, K), "image_key": (I, K), "image_value": (I, V)}
    shapes |= {"audio_key": (A, K), "audio_value": (A, V)}
    tensors = {name: torch.randn(B, H, *shape, dtype=torch.float64) for name, shape in shapes.items()}
    for name in "image_key", "audio_key":
        tensors[name] *= magnitude
    return {name: tensor.to(dtype).to(device) for name, tensor in tensors.items()}


def bias_of(kind, B, H, S, T, tensors, magnitude, dtype):
    """A bias (B or 1, H or 1, S or 1, T or 1) of about the size of the logits."""
    shapes = {"own": (B, H, S, T), "shared": (1, H, S, T), "table": (1, 1, S, T)}
    shapes |= {"image": (B, 1, S, 1), "audio": (1, H, 1, T)}
    bias = magnitude * torch.randn(shapes.get(kind, (B, H, S, T)), device=DEVICE)
    if kind == "row, column":
        bias[:, :, 0] = bias[..., -1] = -INF
    elif kind == "few pairs":
        bias.masked_fill_(torch.rand(bias.shape, device=DEVICE) < 0.97, -INF)
    elif kind == "opposed":  # the first query is left with the pairs that it would look at least
        image, audio = (tensors[name].double() @ tensors["query"][:, :, 0, :, None].double() for name in KEYS)
        image, audio = image.unflatten(2, (S, -1)).amax(3), audio.unflatten(2, (T, -1)).amax(3)
        logits = (image + audio.mT) * tensors["query"].shape[-1] ** -0.5
        bias.masked_fill_(logits > logits.flatten(-2).quantile(0.1, -1)[..., None, None], -INF)
    elif kind == "no pair":
        bias[0] = -INF
    return bias.to(dtype)


def masks_of(kind, B, I, A):
    """About 60 % of the tokens; with "dead", clip 0 lacks the image, clip 1 the sound, clip 2 both; with
    "half", none of the first half of the tokens; "image" and "audio" are of one modality alone.
    """
    if kind is None:
        return {}
    masks = {"image_mask": torch.rand(B, I) < 0.6, "audio_mask": torch.rand(B, A) < 0.6}
    for mask in masks.values():
        mask[:, : mask.shape[1] // 2 if kind == "half" else 0] = False
        mask[:, -1] = True
    if kind == "dead":
        masks["image_mask"][[0, 2]] = masks["audio_mask"][[1, 2]] = False
    kept = [f"{kind}_mask"] if kind in ("image", "audio") else masks
    return {name: masks[name].to(DEVICE) for name in kept}


def laid_out(tensor, layout):
    if layout == "projections":  # (B, N, H, width) in memory, as chunk and transpose leave it
        twice = torch.cat([tensor, tensor], -1).transpose(1, 2).contiguous()
        return twice.transpose(1, 2)[..., : tensor.shape[-1]]
    if layout == "strided":  # nothing adjacent, and NaN in between
        wide = tensor.new_full((*tensor.shape[:2], 2 * tensor.shape[2], 2 * tensor.shape[3]), math.nan)
        wide[:, :, ::2, ::2] = tensor
        return wide[:, :, ::2, ::2]
    return tensor


def run(tensors, output_grad, *, attend=pair_attention, dtype=None, **options):
    """Output and gradients by name."""
    leaves = {name: x.detach().to(dtype or x.dtype).requires_grad_() for name, x in tensors.items()}
    output = attend(**leaves, **options)
    grads = torch.autograd.grad(output, list(leaves.values()), output_grad.to(output.dtype))
    return {"output": output.detach(), **dict(zip(leaves, grads, strict=True))}


def assert_accurate(ours, truth, errors, dtype):
    """Each tensor to at most twice the error that rounding makes (`pair_rounding`), plus eps * max|truth|, or
    the smallest number there is.
    """
    for name, true in truth.items():
        assert ours[name].dtype == dtype and ours[name].isfinite().all(), name
        error = (ours[name].double() - true).abs().max().item()
        smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
        allowed = 2 * errors[name] + torch.finfo(dtype).eps * true.abs().max().item() + smallest
        assert error <= allowed, f"{name} is off by {error:.2e}, allowed {allowed:.2e}"


def check(monkeypatch, dtype, F, I, A, K, V, masks, bias, magnitude, layout, splits, blocks=None):
    B, H = (4, 1) if masks == "dead" else (2, 1) if bias in ("shared", "table", "no pair") else (1, 2)
    force_splits(monkeypatch, splits, block_n=16 if blocks else 64)
    tensors = make(F, I, A, K, V, B=B, H=H, dtype=dtype, magnitude=magnitude)
    if bias:
        tensors["pair_bias"] = bias_of(bias, B, H, *(blocks or (I, A)), tensors, magnitude, dtype)
    options = masks_of(masks, B, I, A)
    output_grad = torch.randn(B, H, F, V, device=DEVICE).to(dtype)
    truth = run(tensors, output_grad, dtype=torch.float64, backend="reference", **options)
    tf32 = torch.backends.cuda.matmul.fp32_precision == "tf32"
    of_pairs = bias is not None and tensors["pair_bias"].shape[2:] == (I, A)  # not of blocks of them
    precision = Precision.of(dtype, tf32=tf32, biased=of_pairs, on_gpu=DEVICE == "cuda")
    errors = largest_errors(tensors, truth, output_grad, precision, **options)
    tensors = {name: laid_out(tensor, layout) for name, tensor in tensors.items()}
    ours = run(tensors, laid_out(output_grad, layout), backend="triton", **options)
    assert_accurate(ours, truth, errors, dtype)


def force_splits(monkeypatch, splits, block_n):
    """Divides the tokens among this many programs, however few they are. The interpreter takes large tiles of
    pairs and of blocks: its time goes by tiles.
    """
    if DEVICE == "cpu":
        monkeypatch.setattr(blocked_kernels, "BLOCK", 16)  # of 19 and 17 there are still several programs
    settings, biased_settings = kernels.settings, biased_kernels.settings
    usual = {} if DEVICE == "cuda" else dict(BLOCK_N=block_n)
    large = {} if DEVICE == "cuda" else dict(BLOCK_N=128 // splits)
    forced, large = {**usual, "SPLITS": splits}, {**large, "SPLITS": splits}
    monkeypatch.setattr(kernels, "settings", lambda *sizes, **way: {**settings(*sizes, **way), **forced})
    monkeypatch.setattr(
        biased_kernels, "settings", lambda *sizes, **way: {**biased_settings(*sizes, **way), **large}
    )


@pytest.mark.parametrize("case", [*pairwise(OPTIONS, 65), *LARGE], ids=name_of)
def test_output_and_gradients(monkeypatch, case):
    check(monkeypatch, **case)


def test_small_tiles_of_few_pairs_with_all_the_weight(monkeypatch):
    """As on a GPU, where other tests take larger ones: each split finds bounds of its own."""
    settings = biased_kernels.settings
    monkeypatch.setattr(
        biased_kernels,
        "settings",
        lambda *sizes, **way: {**settings(*sizes, **way), "BLOCK_N": 16, "SPLITS": 4},
    )
    monkeypatch.setattr(sys.modules[__name__], "force_splits", lambda *_, **__: None)
    for seed in range(2):
        torch.manual_seed(seed)
        check(monkeypatch, torch.float32, 1, 64, 3, 64, 64, "dead", "table", 60.0, "contiguous", 4)


BLOCK_OPTIONS = {
    "dtype": (torch.float32, torch.float16),
    "F": (1, 3, 17),
    "S": (1, 2, 19),
    "I": (1, 5, 17),  # in a block, as A
    "T": (1, 7, 17),
    "A": (1, 3, 17),
    "K": (3, 16),
    "V": (4, 64),
    "masks": (None, "random", "half", "dead"),
    "bias": ("own", "shared", "table", "row, column", "few pairs", "opposed", "no pair"),
    "magnitude": (1.0, 60.0, 3000.0),
    "layout": ("contiguous", "projections", "strided"),
    "splits": (1, 2),
}


@pytest.mark.parametrize("case", pairwise(BLOCK_OPTIONS, 38), ids=name_of)
def test_output_and_gradients_of_a_bias_in_blocks(monkeypatch, case):
    check_blocks(monkeypatch, **case)


def check_blocks(monkeypatch, S, I, T, A, **case):
    check(monkeypatch, I=S * I, A=T * A, blocks=(S, T), **case)


@pytest.mark.parametrize("masks", ["image", "audio"])
@pytest.mark.parametrize("bias, blocks", [(None, None), ("own", None), ("own", (2, 3))])
def test_a_mask_of_one_modality_alone(monkeypatch, masks, bias, blocks):
    check(monkeypatch, torch.float32, 3, 8, 9, 16, 4, masks, bias, 1.0, "contiguous", 1, blocks)


TF32_OPTIONS = {
    "dtype": (torch.float32,),
    "F": (1, 16, 33),
    "I": (1, 7, 65),
    "A": (1, 33),
    "K": (3, 16, 64),
    "V": (4, 64),
    "masks": (None, "random", "dead"),
    "bias": (None, "own", "image", "few pairs", "opposed"),
    "magnitude": (1.0, 60.0, 3000.0),
    "layout": ("contiguous", "strided"),
    "splits": (1, 2),
}


@pytest.mark.parametrize("case", pairwise(TF32_OPTIONS, 24), ids=name_of)
def test_output_and_gradients_in_tf32(monkeypatch, case):
    with float32_products("tf32"):
        check(monkeypatch, **case)


@contextlib.contextmanager
def float32_products(precision):
    """ "tf32" or "ieee", as the kernels and the rest of PyTorch are told."""
    matmul = torch.backends.cuda.matmul
    before, matmul.fp32_precision = matmul.fp32_precision, precision
    try:
        yield
    finally:
        matmul.fp32_precision = before


@pytest.mark.skipif(DEVICE == "cuda", reason="of the interpreter")
def test_the_interpreter_cuts_operands_to_tf32():
    """Of a single token each, whose weights are 1, the output is the sum of their values as they are read."""
    numbers = torch.tensor([1.0, 1 + 2**-10, 1 + 2**-11, -1 - 2**-11, 1 / 3, 3e-39, 0.0])
    cut = torch.from_numpy(cut_to_tf32(numbers.numpy()))
    assert cut[:4].tolist() == [1.0, 1 + 2**-10, 1.0, -1.0]
    assert ((numbers - cut).abs() <= 2**-10 * numbers.abs())[:5].all()
    tensors = make(I=1, A=1, V=7)
    tensors["image_value"][:], tensors["audio_value"][:] = numbers, 2 * numbers
    for precision, values in ("ieee", numbers), ("tf32", cut):
        with float32_products(precision):
            output = pair_attention(**tensors, backend="triton")
        assert torch.equal(output, (values + 2 * values).expand(output.shape))


@pytest.mark.skipif(DEVICE == "cuda", reason="of the interpreter")
@pytest.mark.parametrize("blocks", [(2, 2), (5, 4)], ids=str)
def test_a_bias_that_is_not_a_number_is_not_passed_over(monkeypatch, blocks):
    """As by the maximum of a GPU, which takes the other operand where one is NaN."""
    monkeypatch.setattr(
        InterpreterBuilder, "create_maxnumf", lambda self, x, y: self.binary_op(x, y, np.fmax), raising=True
    )
    bias = torch.zeros(1, 1, *blocks)
    bias[0, 0, 0, 0] = math.nan
    tensors = make(I=10 if blocks == (2, 2) else 5) | dict(pair_bias=bias)
    assert pair_attention(**tensors, backend="triton").isnan().all()


@pytest.mark.parametrize("gradients", [True, False])
def test_forward_mode_is_refused_not_forgotten(gradients):
    tensors = make()
    query = tensors.pop("query")
    with torch.set_grad_enabled(gradients), dual_level():
        with pytest.raises(NotImplementedError, match="jvp"):
            pair_attention(make_dual(query, query), **tensors, backend="triton")
        output, tangent = unpack_dual(pair_attention(make_dual(query, query), **tensors, backend="reference"))
    assert tangent.shape == output.shape and tangent.any()


@pytest.mark.parametrize("shape", [(0, 2, 5, 4), (1, 2, 5, 4), (0, 2, 5, 2), (0, 1, 1, 4)], ids=str)
@pytest.mark.parametrize("backend", ["triton", "torch", "reference"])
def test_no_clips(backend, shape):
    tensors = make(B=0) | dict(pair_bias=torch.randn(shape, device=DEVICE))
    found = run(tensors, torch.randn(0, 2, 3, 7, device=DEVICE), backend=backend)
    assert found["output"].shape == (0, 2, 3, 7)
    for name, tensor in tensors.items():
        assert found[name].shape == tensor.shape and not found[name].any()


# --- compiled for GPUs that are not here --------------------------------------------------------------------


KERNELS = {"forward_kernel", "merge_kernel", "statistics_kernel", "backward_kernel", "bias_kernel"}
KERNELS |= {"block_kernel", "beside_kernel", "softmax_kernel", "block_bias_kernel"}
NORMS = {"residual_norm_kernel", "residual_norm_backward_kernel"}


SCRIPT = Path(__file__).parents[1] / "benchmarks/kernel_resources.py"
COMPILING = {
    **os.environ,
    "TRITON_INTERPRET": "0",
    "PYTHONPATH": os.pathsep.join(map(str, (SCRIPT.parents[1], SCRIPT.parent))),
}


GPUS = ("80", "90", "100", "120")


# Bytes that may be spilled: a few registers; more with a bias of blocks and wide heads; and what one warp has
# to of a tile of pairs, by dtype and width. It is faster nonetheless (kernels/README.md). Triton 3.9 spills
# more, and in two kernels fuses a product with a sum over lanes (there, too).
NEWER = version.parse(triton.__version__) >= version.parse("3.9")
FEW, OF_WIDE_BLOCKS = (48, 256) if NEWER else (32, 160)
OF_PAIRS = {("bfloat16", "16"): 512, ("bfloat16", "64"): 768, ("float32", "16"): 1344 + 64 * NEWER}
OF_NORMS = itertools.product(GPUS, ("float32", "bfloat16"), ["residual_norm_kernel"])
UNEVEN = {("100", "float32", "forward_kernel"), *OF_NORMS} if NEWER else set()


def assert_little_is_spilled(gpus, *options, kernels=KERNELS | NORMS):
    """Runs benchmarks/kernel_resources.py for each GPU at once and prints what it prints."""
    pipes = dict(env=COMPILING, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    commands, found = [[sys.executable, SCRIPT, gpu, *options] for gpu in gpus], set()
    for process in [subprocess.Popen(command, **pipes) for command in commands]:
        printed, errors = process.communicate(timeout=1800)
        assert process.returncode == 0, errors
        columns, *lines = printed.splitlines()
        print("", columns, *lines, sep="\n")
        rows = [dict(zip(columns.split(), line.split(), strict=True)) for line in lines]
        found |= {(row["sm"], row["kernel"]) for row in rows}
        for row in rows:
            wide_blocks = row["options"].startswith("frames") and row["K"] == "64"
            allowed = OF_WIDE_BLOCKS if wide_blocks else FEW
            if row["options"].startswith("bias"):
                allowed = OF_PAIRS[row["dtype"], row["K"]]
            assert int(row["STACK"]) <= allowed, row
            assert int(row["SHARED"]) <= 99 * 1024, row  # what a program may have on any GPU from 8.0 on
            known = (row["sm"], row["dtype"], row["kernel"]) in UNEVEN
            assert row["UNEVEN"] == "0" or known, row
    assert found == {*itertools.product(gpus, kernels)}


def test_a_product_that_is_fused_with_another_lanes_is_found():
    cases = {
        "": 1,
        "LDS R5, [R1]": 1,
        "@P0 MOV R6, R9": 1,
        "STS [R6], R9": 1,
        "FADD R6, R5, R6": 0,
        "LDS.128 R4, [R1]": 0,
    }
    around = "FMUL R5, R7, R7", "SHFL.BFLY PT, R6, R5, 0x1, 0x1f", "{}", "FFMA R12, R7, R7.reuse, R6"
    lines = ([line.format(between) for line in around if line != "{}" or between] for between in cases)
    codes = ["\n".join(f"/*0000*/   {line} ;" for line in each) for each in lines]
    command = [sys.executable, "-c", "import sys, kernel_resources as k; print(*map(k.uneven, sys.argv[1:]))"]
    printed = subprocess.run([*command, *codes], env=COMPILING, capture_output=True, text=True, timeout=600)
    assert printed.stdout.split() == [str(found) for found in cases.values()], printed.stderr


def test_kernels_compile_spilling_little():
    assert_little_is_spilled(GPUS[:2], "--few")
    own = {"forward_kernel", "backward_kernel"} | NORMS
    assert_little_is_spilled(GPUS[2:], "--few", "masks", "norm", kernels=own)


@pytest.mark.slow
def test_every_variant_compiles_spilling_little():
    assert_little_is_spilled(GPUS)


def test_whatever_may_be_absent_the_types_of_a_kernel_agree(tmp_path):
    """The interpreter knows no types, and runs what a compiler refuses. Only the first stage is compiled."""
    code = """
import itertools
import torch
from avfuse.kernels import residual_norm
from kernel_resources import BOTH, attend, compiled
from triton.backends.nvidia.compiler import CUDABackend
from triton.runtime.jit import JITFunction

add_stages, run, names = CUDABackend.add_stages, JITFunction.run, set()

def add_first(self, stages, *args, **options):
    add_stages(self, stages, *args, **options)
    for name in stages.keys() - {"ttir"}:
        del stages[name]

def run_first(kernel, *args, **options):
    names.add(kernel.__name__)
    try:
        return run(kernel, *args, **options)
    except AttributeError as error:
        assert "shared" in str(error), error  # what later stages find out

def norm(update, context, weight, sums):
    x, w = torch.empty(2, 7, 48, device="meta"), torch.empty(48, device="meta")
    update, context, weight = (y if there else None for y, there in ((x, update), (x, context), (w, weight)))
    residual_norm.forward(x, update, context, weight, weight, 1e-6, torch.float32)
    norms = x if context is None else torch.cat([x, x], 1)
    half = None if update is None else torch.bfloat16
    residual_norm.backward(norms, update, x, context, weight, 1e-6, half, sums, 4)

CUDABackend.add_stages, JITFunction.run = add_first, run_first
biases = {}, dict(bias=1), dict(bias=1, blocks=4)
for masks, bias, N in itertools.product(((), BOTH[:1], BOTH[1:], BOTH), biases, (64, 4096)):
    compiled(90, lambda: attend(torch.bfloat16, 1, 16, N, 16, 16, masks, **bias))
for there in itertools.product((True, False), repeat=4):
    compiled(90, lambda: norm(*there))
print(*names)
"""
    env = {**COMPILING, "TRITON_CACHE_DIR": str(tmp_path)}  # no other run may find what is half compiled
    command = [sys.executable, "-c", code]
    printed = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)
    assert printed.returncode == 0, printed.stderr
    assert set(printed.stdout.split()) == KERNELS | NORMS


def test_kernels_are_compiled_once_for_all_numbers_of_tokens_and_clips():
    code = """
import torch
from kernel_resources import BOTH, attend, compiled

for F, N in (16, 64), (7, 2), (1, 33):  # image tokens; audio tokens are half as many
    kernels = compiled(90, lambda: attend(torch.bfloat16, 2, F, N, 16, 16, BOTH))
    print(*(kernel.hash for _, kernel in kernels))
for B in 2, 16:  # of a bias, which all clips share
    kernels = compiled(90, lambda: attend(torch.bfloat16, B, 16, 64, 16, 16, BOTH, 1))
    print(*(kernel.hash for _, kernel in kernels))
"""
    command = [sys.executable, "-c", code]
    printed = subprocess.run(command, env=COMPILING, capture_output=True, text=True, timeout=600)
    assert printed.returncode == 0, printed.stderr
    hashes = [line.split() for line in printed.stdout.splitlines()]
    assert len(hashes) == 5 and len(set(hashes[0])) == 2 and hashes[0] == hashes[1] == hashes[2]
    assert len(set(hashes[3])) == len(hashes[3]) == 3 and hashes[3] == hashes[4]


def test_fusion_of_products_and_sums_is_not_left_to_the_default():
    code = """
import torch
from kernel_resources import attend, compiled

for B, N, *bias in (1, 4096), (2, 64, 1), (2, 64, 1, 4):
    for name, kernel in compiled(80, lambda: attend(torch.float32, B, 16, N, 16, 16, (), *bias)):
        print(name, kernel.metadata.enable_fp_fusion)
"""
    command, env = [sys.executable, "-c", code], {**COMPILING, "TRITON_DEFAULT_FP_FUSION": "0"}
    printed = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)
    assert printed.returncode == 0, printed.stderr
    assert set(printed.stdout.splitlines()) == {f"{kernel} True" for kernel in KERNELS}


# --- the operator in PyTorch --------------------------------------------------------------------------------

MASKS = dict(
    image_mask=torch.tensor([[True] * 5, [False] * 5]), audio_mask=torch.ones(2, 4, dtype=torch.bool)
)
INPUTS = {
    "plain": lambda: (make(B=1), {}),
    "masks": lambda: (make(B=2, H=1), {name: mask.to(DEVICE) for name, mask in MASKS.items()}),
    "bias": lambda: ({**make(B=1), "pair_bias": torch.randn(1, 2, 5, 4, device=DEVICE)}, {}),
    "bias in blocks": lambda: ({**make(B=1), "pair_bias": torch.randn(1, 5, 2, device=DEVICE)}, {}),
    "masks and bias": lambda: (
        {**make(B=2, H=1), "pair_bias": torch.randn(5, 1, device=DEVICE)},
        {name: mask.to(DEVICE) for name, mask in MASKS.items()},
    ),
}
all_inputs = pytest.mark.parametrize("kind", INPUTS)
triton_attention = functools.partial(pair_attention, backend="triton")


@all_inputs
def test_opcheck(kind):
    tensors, options = INPUTS[kind]()
    bias = tensors.pop("pair_bias", None)
    bias = None if bias is None else bias[(None,) * (4 - bias.ndim)]
    masks = (options.get("image_mask"), options.get("audio_mask"))
    inputs = (*tensors.values(), *masks, bias, 0.3)
    output_grad = torch.randn(*tensors["query"].shape[:3], 7, device=DEVICE)
    both = torch.ops.avfuse.pair_attention, torch.ops.avfuse.pair_attention_backward
    bias_grad = kind in ("bias", "bias in blocks")
    for run_it, given in zip(both, (inputs, (output_grad, *inputs, bias_grad)), strict=True):
        torch.library.opcheck(run_it.default, given)
        with FakeTensorMode() as mode:
            fake = run_it(*tree_map_only(torch.Tensor, mode.from_tensor, given))
        strides = [[x.stride() for x in tree_leaves(results)] for results in (fake, run_it(*given))]
        assert strides[0] == strides[1]  # which PyTorch compares on CUDA alone


def test_a_bias_of_pairs_and_one_of_blocks_have_kernels_of_their_own():
    tensors = make(B=1, I=4, A=2)
    for shape, own in (None, kernels), ((4, 2), biased_kernels), ((2, 2), blocked_kernels):
        bias = None if shape is None else torch.zeros(1, 1, *shape, device=DEVICE)
        assert operators.kernels_for(*tensors.values(), None, None, bias, 0.3)[0] is own


@all_inputs
def test_compile_checkpoint_autocast_and_repetition_change_nothing(kind):
    tensors, options = INPUTS[kind]()
    output_grad = torch.randn(*tensors["query"].shape[:3], 7, device=DEVICE)
    torch._dynamo.reset()
    ways = {
        "again": triton_attention,
        "compile": torch.compile(triton_attention, fullgraph=True, backend="aot_eager"),
        "checkpoint": functools.partial(checkpoint, triton_attention, use_reentrant=False),
        "autocast": torch.autocast(DEVICE, torch.bfloat16)(triton_attention),
    }
    truth = run(tensors, output_grad, attend=triton_attention, **options)
    for way, attend in ways.items():
        for name, tensor in run(tensors, output_grad, attend=attend, **options).items():
            assert torch.equal(tensor, truth[name]), f"{way}: {name}"


def test_one_dynamic_graph_serves_all_sizes():
    torch._dynamo.reset()
    compiled = torch.compile(triton_attention, fullgraph=True, dynamic=True, backend="aot_eager")
    for I, A in (5, 4), (9, 7), (70, 3):
        with torch._dynamo.config.patch(error_on_recompile=(I, A) != (5, 4)):
            tensors = make(I=I, A=A, B=1)
            assert torch.equal(compiled(**tensors), triton_attention(**tensors))


@all_inputs
def test_export(kind):
    tensors, options = INPUTS[kind]()

    class Model(torch.nn.Module):
        def forward(self, inputs):
            return triton_attention(**inputs)

    inputs = {**tensors, **options}
    exported = torch.export.export(Model(), (inputs,))
    assert torch.equal(exported.module()(inputs), triton_attention(**inputs))


@pytest.mark.parametrize("bias", [None, (5, 4), (1, 4), (5, 2)], ids=str)
def test_flop_formulas_count_products(bias):
    tensors, entries = make(B=2, F=3, I=5, A=4, K=6, V=7), math.prod(bias or [0])
    if bias:
        tensors["pair_bias"] = torch.randn(bias, device=DEVICE)
    with FlopCounterMode(display=False) as forward:
        triton_attention(**tensors)
    assert forward.get_total_flops() == 2 * (2 * 2 * 3) * ((5 + 4) * (6 + 7) + 2 * entries)
    with FlopCounterMode(display=False) as both:
        run(tensors, torch.randn(2, 2, 3, 7, device=DEVICE), attend=triton_attention)
    backward = both.get_total_flops() - forward.get_total_flops()
    assert backward == 2 * (2 * 2 * 3) * ((5 + 4) * (3 * 6 + 2 * 7) + 6 * entries)


def test_only_needed_gradients_of_a_bias_are_computed():
    tensors = {**make(), "pair_bias": torch.randn(5, 4, device=DEVICE)}
    tensors["query"].requires_grad_()
    triton_attention(**tensors).sum().backward()
    assert tensors["query"].grad is not None and tensors["pair_bias"].grad is None


def test_a_bias_in_blocks_stores_neither_pairs_nor_blocks_of_them_for_each_query(monkeypatch):
    """2 queries, 64 + 32 tokens of width 3: the largest tensors are gradients of image keys and values."""
    sizes, new_empty = [], torch.Tensor.new_empty

    def recorded(*args, **options):
        tensor = new_empty(*args, **options)
        sizes.append(tensor.numel())
        return tensor

    tensors = make(2, 64, 32, 3, 3, B=1, H=1) | dict(pair_bias=torch.randn(4, 32, device=DEVICE))
    monkeypatch.setattr(torch.Tensor, "new_empty", recorded)
    run(tensors, torch.randn(1, 1, 2, 3, device=DEVICE), attend=triton_attention)
    assert max(sizes) == 64 * 3 < 2 * 4 * 32


def test_distributed_data_parallel_changes_nothing(monkeypatch):
    monkeypatch.setattr(fusion, "attend_pairs", functools.partial(attend_pairs, backend="triton"))
    block = fusion.DenseFusion(16, 2, attn_ratio=1.0).to(DEVICE)
    inputs = [torch.randn(2, n, 16, device=DEVICE) for n in (3, 5, 4)]
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        grads = []
        for module in block, DistributedDataParallel(block):
            block.zero_grad()
            module(*inputs).square().sum().backward()
            grads.append([parameter.grad.clone() for parameter in block.parameters()])
    finally:
        torch.distributed.destroy_process_group()
    assert all(torch.equal(*pair) for pair in zip(*grads, strict=True))


@pytest.mark.parametrize("pair_bias", [False, True])
def test_dense_masked_autoencoder_trains_as_through_pytorch(monkeypatch, pair_bias):
    """A few steps of AVMAE, whose losses must agree to float32's rounding."""
    losses = {}
    inputs = [x.to(DEVICE) for x in make_inputs(dtype=torch.float32)]
    for backend in "triton", "torch":
        monkeypatch.setattr(fusion, "attend_pairs", functools.partial(attend_pairs, backend=backend))
        torch.manual_seed(0)
        mae = AVMAE(make_encoder(pair_bias=pair_bias), decoder_dim=16, decoder_depth=1, decoder_heads=2)
        mae = mae.float().to(DEVICE).train()
        optimizer = torch.optim.SGD(mae.parameters(), lr=0.05)
        losses[backend] = []
        for _ in range(3):
            torch.manual_seed(1)
            loss = mae(*inputs).loss
            losses[backend].append(loss.item())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    assert losses["triton"] == pytest.approx(losses["torch"], rel=1e-5)
    assert losses["torch"][-1] < 0.99 * losses["torch"][0]


# --- what only a GPU shows ----------------------------------------------------------------------------------

GPU_OPTIONS = {**OPTIONS, "dtype": (torch.bfloat16, torch.float32), "tf32": (False, True)}


@pytest.mark.gpu
@pytest.mark.parametrize("case", pairwise(GPU_OPTIONS, 110, seed=1, small=False), ids=name_of)
def test_output_and_gradients_in_bfloat16_and_tf32(monkeypatch, case):
    tf32 = case.pop("tf32")
    with float32_products("tf32" if tf32 else "ieee"):
        check(monkeypatch, **case)


def gpu_inputs(bias=None, dtype=torch.bfloat16):
    tensors = make(16, 196, 96, 16, 16, B=8, H=12, dtype=dtype)
    return tensors if bias is None else {**tensors, "pair_bias": torch.randn(bias, device=DEVICE)}


@pytest.mark.gpu
@pytest.mark.parametrize("bias", [None, (196, 96), (8, 12, 196, 96), (196, 1), (4, 96)], ids=str)
def test_twenty_runs_are_equal_bit_by_bit(bias):
    for B in 8, 1:
        tensors = {name: x[:B] if name in TOKENS else x for name, x in gpu_inputs(bias).items()}
        if bias and len(bias) == 4:
            tensors["pair_bias"] = tensors["pair_bias"][:B]
        output_grad = torch.randn(B, 12, 16, 16, device=DEVICE)
        truth = run(tensors, output_grad, attend=triton_attention)
        for _ in range(20):
            results = run(tensors, output_grad, attend=triton_attention)
            assert all(torch.equal(results[name], tensor) for name, tensor in truth.items())


@pytest.mark.gpu
@pytest.mark.parametrize("bias", [None, (4096, 1), (16, 4096), (64, 512), (4096, 4096)], ids=str)
def test_memory_holds_no_pairs_but_those_of_the_bias(bias):
    tensors = make(16, 4096, 4096, 16, 16, B=1, H=1)
    if bias:
        tensors["pair_bias"] = torch.randn(bias, device=DEVICE)
    output_grad = torch.randn(1, 1, 16, 16, device=DEVICE)
    run(tensors, output_grad, attend=triton_attention)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run(tensors, output_grad, attend=triton_attention)
    pairs = 4 * 4096 * 4096
    assert torch.cuda.max_memory_allocated() - before < pairs / 4 + pairs * (bias == (4096, 4096))


@pytest.mark.gpu
@pytest.mark.parametrize("bias", [None, (12, 196, 96), (12, 4, 96)], ids=str)
def test_a_cuda_graph_replays_forward_and_backward(bias):
    tensors, output_grad = gpu_inputs(bias), torch.randn(8, 12, 16, 16, device=DEVICE)
    truth = run(tensors, output_grad, attend=triton_attention)
    leaves = {name: torch.zeros_like(tensor).requires_grad_() for name, tensor in tensors.items()}
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # compiles before the capture
        torch.autograd.grad(triton_attention(**leaves), list(leaves.values()), output_grad.bfloat16())
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = triton_attention(**leaves)
        grads = torch.autograd.grad(output, list(leaves.values()), output_grad.bfloat16())
    with torch.no_grad():
        for name, leaf in leaves.items():
            leaf.copy_(tensors[name])
    graph.replay()
    assert torch.equal(output, truth["output"])
    assert all(torch.equal(grad, truth[name]) for name, grad in zip(leaves, grads, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("bias", [None, (1, 2, 5, 4), (1, 2, 5, 2)], ids=str)
def test_offsets_beyond_32_bits(bias):
    """Clips, heads and tokens that lie 2**31 elements apart, in a memory of 2**32 elements (8 GiB)."""
    memory = torch.empty(2**32 + 2**20, dtype=torch.float16, device=DEVICE)
    tensors = make(dtype=torch.float16, B=2, H=2, K=16, V=16)
    far, gap = {}, 2**31 + 2**16
    strides = (gap, 64, 16), (128, gap, 16), (128, gap, 16), (gap, 128, 2**23), (64, 32, gap // 4)
    for (name, x), stride in zip(tensors.items(), strides, strict=True):
        start = 4096 * len(far)
        far[name] = memory[start:].as_strided(x.shape, (*stride, 1)).copy_(x)
    for name, x in tensors.items():
        assert torch.equal(far[name], x), name
    if bias:
        tensors["pair_bias"] = far["pair_bias"] = torch.randn(bias, device=DEVICE)
    output_grad = torch.randn(2, 2, 3, 16, device=DEVICE)
    ours, truth = (run(x, output_grad, attend=triton_attention) for x in (far, tensors))
    assert all(torch.equal(ours[name], tensor) for name, tensor in truth.items())


@pytest.mark.parametrize("biased", [False, True])
def test_second_derivatives_are_refused_not_forgotten(biased):
    sizes = dict(zip(TOKENS, ((3, 6), (5, 6), (5, 7), (4, 6), (4, 7)), strict=True))
    inputs = {name: torch.randn(1, 1, *size, device=DEVICE) for name, size in sizes.items()}
    inputs["query"].requires_grad_()
    bias = torch.randn(5, 4, device=DEVICE) if biased else None
    output = pair_attention(**inputs, pair_bias=bias, backend="triton")
    with pytest.raises(RuntimeError, match="second derivatives of pair_attention need backend='reference'"):
        torch.autograd.grad(output.sum(), inputs["query"], create_graph=True)
