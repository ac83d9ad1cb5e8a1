"""What every test shares: one seed, no network, no display, and no GPU tests where there is no GPU."""

import gc
import inspect
import os

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported
os.environ["MPLBACKEND"] = "Agg"
# The models of tests are so small that threads wait for each other longer than they compute, above all where
# several workers and the programs that they start share the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

torch.backends.cudnn.allow_tf32 = False  # PyTorch's default for convolutions, such as patch embeddings
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # kernels run on CPU tensors; read when they are imported
    from triton.runtime import interpreter


def pytest_collection_finish():
    """What has been imported and collected stays: it need not be looked through again and again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def undrawn(monkeypatch):
    """Runs draw no pictures and no report: to draw takes ten times as long as to train models this small."""
    monkeypatch.setattr("avfuse.training.judge.JudgedTask.show", lambda *_: None)
    monkeypatch.setattr("avfuse.training.judge.write_report", lambda *_: None)


def pytest_runtest_setup(item):
    """Skips from here rather than from a fixture, so that pytest reports all of them in one line."""
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


@pytest.fixture(scope="session", autouse=True)
def interpreter_of_few_patches():
    """The interpreter replaces all of triton.language anew for every function that a kernel calls, a third of
    its time. Once for each launch is enough.
    """
    if torch.cuda.is_available():
        yield
        return
    patch, run, languages = interpreter._patch_lang, interpreter.GridExecutor.__call__, set()

    def patch_once(fn):
        own = frozenset(id(value) for value in fn.__globals__.values() if inspect.ismodule(value))
        if own in languages:
            return interpreter._LangPatchScope()
        languages.add(own)
        return patch(fn)

    def run_patched(self, *args, **options):
        languages.clear()
        return run(self, *args, **options)

    with pytest.MonkeyPatch.context() as context:
        context.setattr(interpreter, "_patch_lang", patch_once)
        context.setattr(interpreter.GridExecutor, "__call__", run_patched)
        yield
