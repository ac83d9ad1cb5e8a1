"""Exported models give the outputs of the model itself, for any number of clips, without avfuse."""

import json
import subprocess
import sys
import warnings

import pytest
import torch

import avfuse
from avfuse.checks import is_exporting
from avfuse.fusion import VARIANTS
from avfuse.tasks.classifier import Classifier

WAYS = [(way, {}) for way in VARIANTS]
BIASED = [
    ("dense", dict(pair_bias="position")),
    ("bilinear", dict(pair_bias="position")),
    ("dense", dict(frames=4, pair_bias="time", time_peak=3.0)),
    ("bilinear", dict(frames=4, pair_bias="time", time_peak=3.0)),
]
FRAMES = [pytest.param(way, dict(frames=2), marks=pytest.mark.slow) for way, _ in WAYS]
TOKENS = ("image_tokens", "audio_tokens", "fusion_tokens")


def made(interactions="dense", **options):
    encoder = avfuse.create_encoder("micro", interactions, **options).eval()
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return encoder


def clips_of(encoder, count):
    return {name: torch.randn(count, *shape) for name, shape in encoder.input_shapes.items()}


def loaded(path):
    """An ONNX file or a program as a function of clips, which gives outputs by name."""
    if path.suffix == ".pt2":
        return torch.export.load(path).module()
    onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is in the onnx extra")
    session = onnxruntime.InferenceSession(path)
    names = [output.name for output in session.get_outputs()]

    def run(**clips):
        outputs = session.run(None, {name: pixels.numpy() for name, pixels in clips.items()})
        return {name: torch.from_numpy(output) for name, output in zip(names, outputs, strict=True)}

    return run


def check(path, encoder, truth_of):
    run = loaded(path)
    for count in 1, 5:
        clips = clips_of(encoder, count)
        with torch.no_grad():
            truth = truth_of(**clips)
        ours = run(**clips)
        assert list(ours) == list(truth)
        for name in truth:
            torch.testing.assert_close(ours[name], truth[name], atol=1e-4, rtol=1e-4, msg=name)


def test_a_model_is_written_in_eval_mode_without_a_warning(tmp_path):
    pytest.importorskip("onnxscript", reason="onnxscript is in the onnx extra")
    with warnings.catch_warnings(record=True) as caught:
        avfuse.export(made(), tmp_path / "encoder.onnx")
    assert not [warning for warning in caught if "training mode" in str(warning.message)]


def exported(model, path):
    if path.suffix == ".onnx":
        pytest.importorskip("onnxscript", reason="onnxscript is in the onnx extra")
    with warnings.catch_warnings(action="ignore"):  # of torch's own code
        avfuse.export(model, path)
    return path


@pytest.mark.parametrize("suffix", [".onnx", ".pt2"])
@pytest.mark.parametrize("interactions, options", WAYS + BIASED + FRAMES, ids=str)
def test_tokens_of_every_way_to_fuse(interactions, options, suffix, tmp_path):
    encoder = made(interactions, **options)
    path = exported(encoder, tmp_path / f"encoder{suffix}")
    check(path, encoder, lambda **clips: dict(zip(TOKENS, encoder(**clips), strict=False)))


@pytest.mark.parametrize("suffix", [".onnx", ".pt2"])
def test_a_fused_encoder(suffix, tmp_path):
    encoder = made()
    path = exported(encoder.fused(), tmp_path / f"encoder{suffix}")
    check(path, encoder, lambda **clips: dict(zip(TOKENS, encoder(**clips), strict=False)))


@pytest.mark.parametrize("features", [("image", "audio", "fusion"), ("audio",)])
@pytest.mark.parametrize("suffix", [".onnx", ".pt2"])
def test_logits_by_image_by_audio_and_by_both(suffix, features, tmp_path):
    encoder = made()
    classifier = Classifier(encoder, 5, features=features, batch_norm=True).train()  # stays in training mode
    path = exported(classifier, tmp_path / f"classifier{suffix}")
    assert classifier.training and encoder.training
    classifier.eval()

    def truth(image, audio):
        ways = dict(by_image=(image, None), by_audio=(None, audio), by_both=(image, audio))
        if features == ("audio",):
            del ways["by_image"]
        return {f"logits_{way}": classifier(*inputs).logits for way, inputs in ways.items()}

    check(path, encoder, truth)


def test_what_is_needed_to_use_a_model_goes_along(tmp_path):
    classifier = Classifier(made(), 3, class_names=("dog", "cat", "é"))
    about = dict(inputs="", class_names="")
    torch.export.load(exported(classifier, tmp_path / "c.pt2"), extra_files=about)
    assert json.loads(about["class_names"]) == ["dog", "cat", "é"]
    assert avfuse.InputSettings(**json.loads(about["inputs"])) == classifier.encoder.inputs
    path = exported(classifier, tmp_path / "new folder" / "c.onnx")
    session = pytest.importorskip("onnxruntime").InferenceSession(path)
    assert session.get_modelmeta().custom_metadata_map == about
    assert [path.name for path in path.parent.iterdir()] == ["c.onnx"]
    assert [value.shape[0] for value in (*session.get_inputs(), *session.get_outputs())] == ["batch"] * 5


def test_a_program_runs_where_avfuse_is_not(tmp_path):
    encoder = made(frames=4, pair_bias="time")
    exported(encoder, tmp_path / "encoder.pt2")
    clips = clips_of(encoder, 2)
    torch.save(clips, tmp_path / "clips.pt")
    code = (
        "import sys; sys.modules['avfuse'] = None; import torch;"
        "clips = torch.load('clips.pt'); outputs = torch.export.load('encoder.pt2').module()(**clips);"
        "torch.save({name: x.detach() for name, x in outputs.items()}, 'outputs.pt')"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
    ours, (*truth, _) = torch.load(tmp_path / "outputs.pt"), encoder(**clips)
    for name, tokens in zip(TOKENS, truth, strict=True):
        torch.testing.assert_close(ours[name], tokens, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("wrapped", [False, True])
def test_tracing_is_refused(wrapped, tmp_path):
    encoder = made()
    model, clips = Classifier(encoder, 3) if wrapped else encoder, tuple(clips_of(encoder, 2).values())
    with pytest.raises(ValueError, match=r"avfuse\.export\(model, 'model\.onnx' or 'model\.pt2'\) does not"):
        torch.jit.trace(model, clips)
    with warnings.catch_warnings(action="ignore"):  # it is deprecated
        with pytest.raises(
            ValueError, match=r"torch\.onnx\.export\(dynamo=False\) would keep the batch size"
        ):
            torch.onnx.export(model, clips, tmp_path / "old.onnx", dynamo=False)
    torch.set_autocast_cache_enabled(
        True
    )  # which that exporter turns off, and on again only where it succeeds


def test_what_cannot_be_exported_is_refused(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="or a Classifier, got a AVMAE, which has one as its encoder"):
        avfuse.export(avfuse.AVMAE(made()), tmp_path / "a.onnx")
    with pytest.raises(ValueError, match="path .*a.pt2 cannot be written: it is a folder"):
        (tmp_path / "a.pt2").mkdir()
        avfuse.export(made(), tmp_path / "a.pt2")
    with pytest.raises(ValueError, match=r"path must end on \.onnx or \.pt2, got"):
        avfuse.export(made(), tmp_path / "a.pth")
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ValueError, match=r'path \.onnx takes onnxscript, pip install "avfuse\[onnx\]"'):
        avfuse.export(made(), tmp_path / "a.onnx")


def test_compiling_is_not_exporting():
    """In a graph of torch.compile the kernels and the chunks of pairs are those of eager mode."""

    class Asks(torch.nn.Module):
        def forward(self, x):
            return x + is_exporting()

    x = torch.zeros(1)
    assert not is_exporting() and torch.compile(Asks(), fullgraph=True, backend="eager")(x) == 0
    assert torch.export.export(Asks(), (x,)).module()(x) == 1


# --- without a file: see docs/deploy.md ---------------------------------------------------------------------


@pytest.mark.parametrize("interactions", ["dense", "token"])
def test_bfloat16_on_a_cpu(interactions):
    """Tokens are as far from float32 as 8 bits of mantissa and two layers make them."""
    encoder = avfuse.create_encoder("micro", interactions).eval()
    clips = clips_of(encoder, 2)
    with torch.no_grad():
        *truth, _ = encoder(**clips)
        with torch.autocast("cpu", torch.bfloat16):
            *cast, _ = encoder(**clips)
        encoder.to(torch.bfloat16)
        *ours, _ = encoder(**{name: pixels.to(torch.bfloat16) for name, pixels in clips.items()})
    for of_truth, of_cast, tokens in zip(truth, cast, ours, strict=True):
        assert tokens.dtype == torch.bfloat16
        for given in tokens.float(), of_cast.float():
            assert 0 < (given - of_truth).abs().max() < 16 * torch.finfo(torch.bfloat16).eps


@pytest.mark.parametrize("options, dynamic", [({}, None), (dict(frames=4, pair_bias="time"), True)], ids=str)
def test_torch_compile_of_an_encoder(options, dynamic):
    torch._dynamo.reset()
    encoder = made(**options)
    compiled = torch.compile(encoder, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    with torch.no_grad():
        for count in 2, 5:
            clips = clips_of(encoder, count)
            for ours, truth in zip(compiled(**clips)[:3], encoder(**clips)[:3], strict=True):
                torch.testing.assert_close(ours, truth)


def test_dynamic_int8():
    """Each linear layer rounds weights and inputs to 8 bits."""
    quantization = pytest.importorskip("torchao.quantization", reason="torchao is in the adapters extra")
    encoder = avfuse.create_encoder("micro").eval()
    clips = clips_of(encoder, 2)
    with torch.no_grad():
        *truth, _ = encoder(**clips)
        quantization.quantize_(encoder, quantization.Int8DynamicActivationInt8WeightConfig())
        assert type(encoder.image.blocks[0].attn.qkv.weight) is not torch.nn.Parameter
        *ours, _ = encoder(**clips)
    for of_truth, tokens in zip(truth, ours, strict=True):
        assert 0 < (tokens - of_truth).abs().max() < 0.1
