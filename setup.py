"""Metadata and dependencies of avfuse.

The kernels lie in their own top-level folder and are installed as avfuse.kernels: a top-level package called
`kernels` would overwrite the unrelated one of that name on PyPI.
"""

import re
from pathlib import Path

from setuptools import find_packages, setup

root = Path(__file__).parent

setup(
    name="avfuse",
    version=re.search(r'^__version__ = "(.+)"', (root / "avfuse/__init__.py").read_text(), re.M)[1],
    description="Audio-visual early fusion transformers: exact dense interactions at linear cost",
    long_description=(root / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license_expression="Apache-2.0",
    license_files=["LICENSE"],
    packages=find_packages(include=["avfuse", "avfuse.*"]) + ["avfuse.kernels"],
    package_dir={"avfuse.kernels": "kernels"},
    package_data={"avfuse": ["py.typed"], "avfuse.kernels": ["README.md", "settings/*.json"]},
    entry_points={"console_scripts": ["avfuse = avfuse.__main__:main"]},
    python_requires=">=3.11",
    install_requires=[
        "torch>=2.11",
        "torchvision>=0.26",
        "timm>=1.0.31",  # mixes targets of several classes
        "numpy>=2.0",
        "av>=17.1,<20",  # 17.0 crashes on FLV; each major version drops some of what the reader uses
        "accelerate>=1.1",  # restores the state of the random generators
        "tyro>=1.0",
        "safetensors>=0.4.5",
        "huggingface_hub>=1.0",
        "tensorboard>=2.18",
        "matplotlib>=3.9",
        "pillow>=10.4",  # tells pictures of 16 bits
        "tqdm>=4.66",
        "scikit-learn>=1.5",  # tasks: average precision, ROC, the NMF baseline
        "webdataset>=1.0",  # data: shards
    ],
    extras_require={
        "test": [
            "fast-bss-eval>=0.1.4",
            "mir_eval>=0.8,<0.9",
            "psutil>=6",
            "pytest>=8",
            "pytest-xdist>=3.5",
            "ruff>=0.17",
            "setuptools>=77",
            "torchmetrics>=1.4",
        ],
        # More for tests, which skip what is not there. Adapters and eval need a newer huggingface_hub than
        # avfuse: constraints-oldest.txt goes without. The last torchaudio, with which spectrograms are
        # compared, does not import beside torch 2.15, and breaks peft there: constraints-newest.txt goes
        # without.
        "adapters": ["peft>=0.21", "torchao>=0.18"],
        "torchaudio": ["torchaudio>=2.11"],
        "docs": ["mkdocs-material>=9.7", "mkdocstrings[python]>=1.0"],
        "demo": ["gradio>=6.31,<7"],  # needs pillow<13
        "browser": ["selenium>=4.51"],  # for tests of the demo: make browser
        "eval": ["vggsounder>=1.0,<2"],  # labels of VGGSounder, and its metrics
        "mteb": ["mteb>=2.26,<3"],  # tested by hand: a harness of text models, with what these need
        "parquet": ["pyarrow>=21"],  # tables of features and of answers
        "onnx": ["onnx>=1.23", "onnxscript>=0.7", "onnxruntime>=1.32"],
        "xformers": ["xformers>=0.0.35"],  # operators for CUDA alone, built for torch 2.10: none beside 2.15
    },
)
