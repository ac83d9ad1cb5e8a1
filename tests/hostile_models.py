"""Models and weights in a folder that ask for everything, and how the functions that read them end.

Run by test_hostile_models.py: `python hostile_models.py FOLDER SHARE` makes one of SHARE calls.
"""

import json
import os
import shutil
import sys
import zipfile
from functools import partial
from pathlib import Path

import torch
from limited import outcomes
from models import make_encoder, make_vit
from safetensors.torch import load_file, save_file

from avfuse import (
    AVMAE,
    AVEncoder,
    InputSettings,
    from_deepavfusion,
    load_audio_weights,
    load_encoder,
    load_image_weights,
)
from avfuse.loading import load_model
from avfuse.tasks.classifier import Classifier
from avfuse.tasks.classify import ClassifyConfig
from avfuse.tasks.localize import Localizer
from avfuse.tasks.segment import Segmenter
from avfuse.tasks.separator import Separator
from avfuse.training.starts import first_encoder

VERY = 10**10
INPUTS = InputSettings(image_size=24, mel_bins=16, hop=1200)
GOLDEN = Path(__file__).parent / "golden"


# --- configs ------------------------------------------------------------------------------------------------

ENCODER = {  # path in the config of an encoder -> values
    "image.depth": (10**8, 9_000, VERY, -1, 0, 1e8, True, None, "4", [3]),
    "image.embed_dim": (2**24, 2**40, 10**30, 0, -32, 32.5, "32", {}),
    "image.num_heads": (0, 5, VERY, -2),
    "image.mlp_ratio": (1e7, 1e300, -1.0, "2", None),
    "image.img_size": ([10**6, 10**6], [10**12, 10**12], [0, 0], [24], 24, "24", [[24], 24]),
    "image.patch_size": ([10**6, 10**6], [0, 0], [8]),
    "image.in_chans": (VERY, 0),
    "image.reg_tokens": (VERY, -1),
    "image.norm_layer": ("x" * 10**6, [], None),
    "image.norm_eps": ("a", None),
    "image.drop_path_rate": ("a", [1] * 10**5),
    "image.surprise": (1,),
    "fusion_tokens": (VERY, 2**62, 2**80, 0, -1, 4.0, None),
    "fusion_layers": ("all the", [VERY], list(range(10**5)), {"a": 1}),
    "num_heads": (VERY, 0),
    "attn_ratio": (1e7, 1e300, -1, 1e-300, None),
    "mlp_ratio": (1e7, 1e300, None),
    "pair_bias": (True, "yes", VERY),
    "interactions": ("factorized", "joint-venture", [], {}),
    "inputs.window": (10**9, -1),
    "inputs.mel_bins": (VERY,),
    "inputs.audio_seconds": (1e300, -1),
    "inputs.image_std": ([0, 0, 0], [1] * 10**5),
    "inputs": (None, [], {}),
    "origins": ([1], "a", 3, {"image": "a"}, {"audio": {"weights": "a", "family": "b", "licence": 3}}),
    "image": (None, [], 3),
}
NOTHING = {"inputs.window": 10**9}  # that a model may ask for: it takes memory where clips are read only
AUTOENCODER = {
    "decoder_dim": (2**24, 2**40, 2**70, 0, -4, 6),
    "decoder_depth": (10**8, 9_000, VERY, 0, 1.5),
    "decoder_heads": (VERY, 0),
    "image_mask_ratio": (0, 1, 1e300, "a"),
    "encoder": (None, [], {}),
}
TASKS = {
    Classifier: {
        "classes": (VERY, 2**70, 0),
        "features": (["image"] * 10**5, "image", []),
        "class_names": ("a",),
    },
    Segmenter: {"dim": (2**24, 2**60, 0, -1), "outputs": (VERY, 0)},
    Localizer: {"dim": (VERY, 2**60, -1)},
    Separator: {"decoder_dim": (2**24, 2**60, 0), "encoder.inputs.window": (2**31, 48_000 * 2)},
}
TEXTS = {
    "nested lists": "[" * 10**7,
    "nested objects": '{"a":' * 2 * 10**6,
    "nested in a model": '{"library": "avfuse", "class": "AVEncoder", "model": '
    + "[" * 10**6
    + "]" * 10**6
    + "}",
    "a number of many digits": '{"library": "avfuse", "depth": ' + "9" * 10**6 + "}",
    "no UTF-8": b'{"library": "avf\xffuse"}',
    "UTF-16": '{"library": "avfuse"}'.encode("utf-16"),
    "a list": "[]",
    "nothing": "",
    "no model": '{"library": "avfuse", "class": "AVEncoder"}',
    "model is a list": '{"library": "avfuse", "class": "AVEncoder", "model": []}',
    "class is a list": '{"library": "avfuse", "class": [1], "model": {}}',
}


def put(config: dict, path: str, value: object) -> dict:
    config = json.loads(json.dumps(config))
    *above, last = path.split(".")
    place = config["model"]
    for name in above:
        place = place[name]
    place[last] = value
    if path == "image.depth":  # both transformers have the same
        place = config["model"]["audio"]
        place[last] = value
    return config


def config_calls(folder: Path) -> dict:
    encoder = make_encoder("dense", vit=dict(class_token=True), inputs=INPUTS).float()
    models = {
        AVEncoder: encoder,
        AVMAE: AVMAE(encoder, decoder_dim=16, decoder_depth=1, decoder_heads=2),
        Classifier: Classifier(encoder, 3),
        Segmenter: Segmenter(encoder, dim=8),
        Localizer: Localizer(encoder, dim=8),
        Separator: Separator(encoder, decoder_dim=8),
    }
    calls, changes = {}, {AVEncoder: ENCODER, AVMAE: AUTOENCODER} | TASKS
    for kind, model in models.items():
        whole = folder / kind.__name__
        model.save_pretrained(whole)
        config = json.loads((whole / "config.json").read_text())
        texts = {
            f"{path}={str(value)[:40]}": json.dumps(put(config, path, value))
            for path, values in changes[kind].items()
            for value in values
            if NOTHING.get(path) != value
        }
        for name, text in (texts | (TEXTS if kind is AVEncoder else {})).items():
            place = folder / f"{kind.__name__} {len(calls)}"
            (place / "model").mkdir(parents=True)
            written = place / "model" / "config.json"
            written.write_bytes(text) if isinstance(text, bytes) else written.write_text(text)
            os.link(whole / "model.safetensors", place / "model" / "model.safetensors")
            calls[f"{kind.__name__} {name}"] = partial(kind.from_pretrained, place / "model")
            if kind in (AVEncoder, AVMAE) or "encoder" in name:
                calls[f"load_encoder {kind.__name__} {name}"] = partial(load_encoder, place)
            else:
                calls[f"load_model {kind.__name__} {name}"] = partial(load_model, kind, place)
    return calls


# --- weights ------------------------------------------------------------------------------------------------


def released() -> dict[str, torch.Tensor]:
    golden = load_file(GOLDEN / "mae_factorized.safetensors")
    return {
        name.removeprefix("weights/"): w.clone() for name, w in golden.items() if name.startswith("weights/")
    }


def odd_tensors(like: torch.Tensor) -> dict[str, torch.Tensor]:
    one = torch.zeros(1)
    return {
        "expanded": one.expand(1, VERY, 32),
        "expanded a little": one.expand(like.shape),
        "expanded below": torch.zeros(1, 1, 32).expand(1, VERY, 32),
        "empty": torch.empty(1, VERY, 0),
        "empty in front": torch.empty(0, VERY, 32),
        "scalar": torch.zeros(()),
        "sparse": torch.sparse_coo_tensor(torch.zeros(3, 1, dtype=torch.long), one, (1, VERY, 32)),
        "sparse rows": torch.eye(3).to_sparse_csr(),
        "meta": torch.empty(1, VERY, 32, device="meta"),
        "meta of the right shape": torch.empty(like.shape, device="meta"),
        "quantized": torch.quantize_per_tensor(torch.ones(like.shape), 0.1, 0, torch.qint8),
        "complex": like.to(torch.complex64),
        "eight bits": like.to(torch.float8_e4m3fn),
        "whole numbers": like.to(torch.int64),
        "yes and no": like.bool(),
        "nested": torch.nested.as_nested_tensor([torch.ones(2), torch.ones(3)]),
        "NaN": torch.full_like(like, torch.nan),
        "infinite": torch.full_like(like, -torch.inf),
    }


def weights_files(folder: Path) -> dict[str, Path]:
    """Files that hold nothing to load."""
    whole, files = released(), {}

    def save(name: str, content: object) -> None:
        files[name] = folder / f"{len(files)}.pth"
        torch.save(content, files[name])

    def save_tensors(name: str, tensors: dict) -> None:
        files[name] = folder / f"{len(files)}.safetensors"
        save_file(tensors, files[name])

    for name in "encoder.fusion_tokens", "encoder.image.pos_embed", "encoder.image.blocks.0.norm1.bias":
        for kind, tensor in odd_tensors(whole[name]).items():
            save(f"{name} {kind}", {"state_dict": whole | {name: tensor}})
            if kind in ("empty", "empty in front", "eight bits", "whole numbers", "NaN", "infinite"):
                save_tensors(f"{name} {kind}, safetensors", whole | {name: tensor})
    scalar = torch.zeros(1)
    for blocks in (
        "encoder.image.blocks",
        "encoder.audio.blocks",
        "image_decoder_blocks",
        "encoder.fusion_blocks",
    ):
        for number in 300_000, "9" * 5000, "٣":
            save_tensors(f"{blocks}.{number}"[:60], whole | {f"{blocks}.{number}.norm1.weight": scalar})
        many = {f"{blocks}.{i}.a": scalar.clone() for i in range(10_000)}  # more take long to be read at all
        save_tensors(f"many {blocks}", whole | many)
        heads = {f"{blocks}.{i}.norm1.weight": torch.zeros(32) for i in range(2_000)}
        save_tensors(f"many norms of {blocks}", whole | heads)
    base = torch.zeros(2**20)
    shared = {f"encoder.image.blocks.{i}.norm1.weight": base[i:] for i in range(10_000)}
    save("a memory shared by many", whole | shared)
    save("no weights", {"model": {}})
    save("a list", [1, 2])
    cyclic = {"epoch": 1}
    cyclic["model"] = cyclic
    save("itself", cyclic)
    deep = []
    for _ in range(200):
        deep = [deep]
    save("nested", {"model": deep})
    files["compressed"] = folder / "compressed.pth"
    with zipfile.ZipFile(files["compressed"], "w", zipfile.ZIP_DEFLATED) as archive:
        with zipfile.ZipFile(files["encoder.fusion_tokens expanded"]) as plain:
            for member in plain.infolist():
                with archive.open(member.filename, "w") as part:
                    content = plain.read(member)
                    part.write(content)
                    for _ in range(800 * ("data/0" in member.filename)):
                        part.write(bytes(2**20))
    protocol = b"\x80\x02"
    for name, pickled in (
        ("a request for bytes", b"cbuiltins\nbytearray\n\x8a\x05\x00\xe4\x0b\x54\x02\x85R."),
        ("a request for a tensor", b"ctorch\nTensor\n\x8a\x05\x00\xe4\x0b\x54\x02\x85R."),
        ("a request for a storage", b"ctorch\nFloatStorage\n\x8a\x05\x00\xe4\x0b\x54\x02\x85R."),
        ("a call", b"cos\nsystem\nX\x04\x00\x00\x00true\x85R."),
        ("brackets", b"(" * 10**5 + b"."),
        ("tuples", b")" + b"\x85" * 10**5 + b"."),
    ):
        files[name] = folder / f"{name}.pth"
        magic = protocol + b"\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19." + protocol + b"M\xe9\x03." + protocol + b"}."
        files[name].write_bytes(magic + protocol + pickled)
    files["a tar"] = folder / "tar.pth"
    shutil.make_archive(str(folder / "tar"), "tar", GOLDEN / "b903e02" / "encoder")
    os.replace(folder / "tar.tar", files["a tar"])
    torch.jit.script(torch.nn.Linear(1, 1)).save(folder / "script.pth")
    files["a script"] = folder / "script.pth"
    files["noise"] = folder / "noise.safetensors"
    files["noise"].write_bytes(b"\xff" * 100)
    files["a header of many digits"] = folder / "header.safetensors"
    files["a header of many digits"].write_bytes((2**63).to_bytes(8, "little") + b"{}")
    header = b"[" * 10**6
    files["a nested header"] = folder / "nested.safetensors"
    files["a nested header"].write_bytes(len(header).to_bytes(8, "little") + header)
    for suffix in "pth", "safetensors":
        os.mkfifo(folder / f"pipe.{suffix}")
        for name, target in (
            ("a pipe", "pipe." + suffix),
            ("a link to a pipe", "pipe." + suffix),
            ("a link to zeros", "/dev/zero"),
            ("a link to noise", "/dev/urandom"),
            ("a link to a terminal", "/dev/tty"),
            ("a link to itself", f"a link to itself.{suffix}"),
            ("a link to nothing", "nothing"),
            ("a link to a folder", "."),
        ):
            files[f"{name}.{suffix}"] = folder / f"{name}.{suffix}"
            files[f"{name}.{suffix}"].symlink_to(target)
    return files | {
        "zeros": Path("/dev/zero"),
        "a name with a zero": Path("a\0b.pth"),
        "long": Path("a" * 5000),
    }


def weights_calls(folder: Path) -> dict:
    calls = {}
    vit = partial(make_vit, (3, 32, 32), patch_size=16, embed_dim=32, depth=2)
    audio = partial(make_vit, (1, 32, 32), patch_size=16, embed_dim=32, depth=2)
    for name, path in weights_files(folder).items():
        calls[f"from_deepavfusion {name}"] = partial(from_deepavfusion, path)
        calls[f"load_encoder {name}"] = partial(load_encoder, path)
        calls[f"--checkpoint {name}"] = lambda path=path: first_encoder(ClassifyConfig(checkpoint=str(path)))
        calls[f"image {name}"] = lambda path=path: load_image_weights(vit(), path, say=lambda _: None)
        calls[f"audio {name}"] = lambda path=path: load_audio_weights(audio(), path, say=lambda _: None)
    for kind in "pipe", "zeros", "folder":  # in the place of a file of a saved model
        for file in "config.json", "model.safetensors":
            place = folder / f"{kind} {file}"
            shutil.copytree(folder / "AVMAE", place)
            (place / file).unlink()
            if kind == "folder":
                (place / file).mkdir()
            else:
                (place / file).symlink_to("/dev/zero" if kind == "zeros" else folder / "pipe.pth")
            calls[f"AVMAE {kind} {file}"] = partial(AVMAE.from_pretrained, place)
            calls[f"load_encoder {kind} {file}"] = partial(load_encoder, place)
            calls[f"image {kind} {file}"] = lambda place=place: load_image_weights(vit(), place)
    return calls


if __name__ == "__main__":
    torch.set_num_threads(1)
    os.environ["HF_HUB_OFFLINE"] = "1"
    torch.set_warn_always(False)
    place, share = Path(sys.argv[1]), int(sys.argv[2])
    load_encoder(GOLDEN / "b903e02" / "encoder")  # what is imported late is no part of what is measured
    every = config_calls(place) | weights_calls(place)
    print(json.dumps(outcomes({name: every[name] for name in list(every)[::share]})))
