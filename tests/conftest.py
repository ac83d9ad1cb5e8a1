"""What every test shares: one seed, no network, no display, and no GPU tests where there is no GPU."""

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
