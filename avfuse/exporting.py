"""Files that run a model where avfuse is not: ONNX, and programs of torch.export."""

import json
import os
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor, nn

from .encoder import AVEncoder
from .files import aside, check_target
from .predictor import evaluating
from .tasks.classifier import Classifier

ONE_FILE = 2**30  # bytes of weights: protobuf has no file of 2 GiB


class Tokens(nn.Module):
    """An encoder whose outputs have names."""

    def __init__(self, encoder: AVEncoder):
        super().__init__()
        self.encoder = encoder

    def forward(self, image: Tensor, audio: Tensor) -> dict[str, Tensor]:
        image, audio, fusion, _ = self.encoder(image, audio)
        return dict(image_tokens=image, audio_tokens=audio, fusion_tokens=fusion)


class Logits(nn.Module):
    """What a classifier says by image, by audio and by both."""

    def __init__(self, classifier: Classifier):
        super().__init__()
        self.classifier = classifier

    def forward(self, image: Tensor, audio: Tensor) -> dict[str, Tensor]:
        ways = self.classifier.ways(image, audio)
        return {f"logits_by_{what}": self.classifier(*inputs).logits for what, inputs in ways.items()}


def export(model: AVEncoder | Classifier, path: str | Path) -> None:
    """Writes a model for inference, made of plain operators alone: an ONNX file or a program of torch.export.

    It takes any number of clips at once: image (B, 3, height, width), of several frames (B, T, 3, height,
    width), and audio (B, 1, mel, time). An encoder gives image_tokens, audio_tokens and fusion_tokens, a
    classifier logits_by_image, logits_by_audio and logits_by_both (B, classes), as far as it has heads for
    them. As JSON, `inputs` (of `avfuse.InputSettings`) and `class_names` go along: as metadata of ONNX, as
    extra files of a program.

    Args:
        model: in float32 for onnxruntime on a CPU.
        path: .onnx, or .pt2 for `torch.export.load`. Weights of more than 1 GiB lie beside an ONNX file, as
            PATH.data.

    Raises:
        ValueError: another model or another ending, or the extra onnx is not installed.
    """
    path = Path(path)
    if not isinstance(model, (AVEncoder, Classifier)):
        holds = ", which has one as its encoder" * isinstance(getattr(model, "encoder", None), AVEncoder)
        raise ValueError(f"model must be an AVEncoder or a Classifier, got a {type(model).__name__}{holds}")
    if path.suffix not in (".onnx", ".pt2"):
        raise ValueError(f"path must end on .onnx or .pt2, got {str(path)!r}")
    check_target("path", path)
    if path.suffix == ".onnx":
        check_onnx()
    encoder = getattr(model, "encoder", model)
    module = Tokens(model) if model is encoder else Logits(model)
    about = dict(
        inputs=json.dumps(None if encoder.given_inputs is None else asdict(encoder.given_inputs)),
        class_names=json.dumps(getattr(model, "class_names", None)),
    )
    # The graph of a single clip would be for single clips.
    clips = {name: encoder.fusion_tokens.new_zeros(3, *shape) for name, shape in encoder.input_shapes.items()}
    with evaluating(module):  # and the model in it
        write = write_onnx if path.suffix == ".onnx" else write_program
        write(module, clips, path, about)


@torch.no_grad()
def write_program(module: nn.Module, clips: dict[str, Tensor], path: Path, about: dict[str, str]) -> None:
    batch = {0: torch.export.Dim("batch")}
    program = torch.export.export(module, (), clips, dynamic_shapes=dict.fromkeys(clips, batch))
    with aside(path) as partial, partial.open("wb") as file:
        torch.export.save(program, file, extra_files=about)


@torch.no_grad()
def write_onnx(module: nn.Module, clips: dict[str, Tensor], path: Path, about: dict[str, str]) -> None:
    onnx = torch.onnx.export(
        module,
        kwargs=clips,
        input_names=list(clips),
        output_names=list(module(**clips)),
        dynamic_shapes=dict.fromkeys(clips, {0: "batch"}),
        dynamo=True,
        verbose=False,
    )
    onnx.model.metadata_props.update(about)
    weights = sum(parameter.nbytes for parameter in module.parameters())
    if weights <= ONE_FILE:
        with aside(path) as partial:
            onnx.save(partial)
        return
    # The weights lie beside it, in a file that it names: both are moved.
    with TemporaryDirectory(dir=path.parent, prefix=".") as folder:
        onnx.save(Path(folder, path.name), external_data=True)
        for file in sorted(Path(folder).iterdir(), key=lambda file: file.name == path.name):
            os.replace(file, path.with_name(file.name))


def check_onnx() -> None:
    """Raises ValueError unless what torch.onnx asks for is installed."""
    try:
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ValueError(f'path .onnx takes onnxscript, pip install "avfuse[onnx]": {error}') from error
