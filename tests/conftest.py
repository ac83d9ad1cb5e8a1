"""What every test shares: one seed, no network, no display, and no GPU tests where there is no GPU."""

import gc
import os
import signal
from types import SimpleNamespace

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported
os.environ["MPLBACKEND"] = "Agg"
# The models of tests are so small that threads wait for each other longer than they compute, above all where
# several workers and the programs that they start share the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

signal.signal(signal.SIGINT, signal.default_int_handler)  # what a script has started with & ignores it
torch.backends.cudnn.allow_tf32 = False  # PyTorch's default for convolutions, such as patch embeddings
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # kernels run on CPU tensors; read when they are imported
    from triton.language import core as language
    from triton.runtime import interpreter

from avfuse.command import keep_what_is_imported  # noqa: E402 (Triton is to find its mode set)

# The first backward starts threads for the devices there are, and a process with such threads cannot fork.
# Once torch.compile has been at work, PyTorch counts more devices than the CPU.
torch.ones((), requires_grad=True).backward()
gc.disable()  # until all tests are collected: what is imported stays


def pytest_collection_finish():
    """What has been imported and collected stays: it need not be looked through again and again."""
    keep_what_is_imported()
    gc.enable()


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def undrawn(monkeypatch):
    """Runs draw no pictures and no report: to draw takes ten times as long as to train models this small."""
    monkeypatch.setattr("avfuse.training.judge.JudgedTask.show", lambda *_: None)
    monkeypatch.setattr("avfuse.training.judge.write_report", lambda *_: None)


@pytest.fixture(scope="session", autouse=True)
def uncollected():
    """A run ends with a search for garbage, here among all that thousands of tests have left."""
    with pytest.MonkeyPatch.context() as context:
        context.setattr("accelerate.utils.memory.gc", SimpleNamespace(collect=lambda: 0))
        yield


def pytest_runtest_setup(item):
    """Skips from here rather than from a fixture, so that pytest reports all of them in one line."""
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


@pytest.fixture(scope="session", autouse=True)
def quick_interpreter():
    """The interpreter replaces all of triton.language anew for every function that a kernel calls, and works
    out the types of shapes and arrays for every operation: half of its time. Here it does so once for each
    file of kernels and launch, and once for each type.
    """
    if torch.cuda.is_available():
        yield
        return
    patch, run, patched = interpreter._patch_lang, interpreter.GridExecutor.__call__, set()
    type_of_array, array_types = interpreter._get_np_dtype, {}
    type_of_tuple, tuple_types = language._type_for_tuple_values, {}

    def patch_once(fn):
        if id(fn.__globals__) in patched:
            return interpreter._LangPatchScope()
        patched.add(id(fn.__globals__))
        return patch(fn)

    def run_patched(self, *args, **options):
        patched.clear()
        return run(self, *args, **options)

    def find_array_type(dtype):
        name = dtype.scalar.name
        if name not in array_types:
            array_types[name] = type_of_array(dtype)
        return array_types[name]

    def find_tuple_type(values, fields=None):
        shape = tuple(getattr(value, "value", value) for value in values)
        if fields or not all(type(size) is int for size in shape):
            return type_of_tuple(values, fields)
        if shape not in tuple_types:
            tuple_types[shape] = type_of_tuple(values)
        return tuple_types[shape]

    with pytest.MonkeyPatch.context() as context:
        context.setattr(interpreter, "_patch_lang", patch_once)
        context.setattr(interpreter.GridExecutor, "__call__", run_patched)
        context.setattr(interpreter, "_get_np_dtype", find_array_type)
        context.setattr(language, "_type_for_tuple_values", find_tuple_type)
        yield
