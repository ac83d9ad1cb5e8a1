"""Made the files beside it, with the code of commit b903e02, whose modules it imports: see README.md."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from avfuse.data.splits import find_data
from safetensors.torch import save_file

from avfuse import AVMAE, InputSettings, create_encoder, presets
from avfuse.data import sounding_shapes
from avfuse.data.clips import ClipDataset
from avfuse.pretrained import load_encoder, load_model
from avfuse.tasks.classifier import load_classifier
from avfuse.tasks.localize import Localizer
from avfuse.tasks.segment import Segmenter
from avfuse.tasks.separator import Separator

INPUTS = InputSettings(image_size=32, mel_bins=16, audio_seconds=1.0, hop=250)  # 4 + 4 tokens
presets.SIZES["tiny"] = (8, 2, 2, INPUTS)  # width, layers, heads: what else is small comes by options

SHORT = "--data shapes --batch-size 2 --workers 0".split()
PRETRAIN = "--run-dir pretrain --epochs 3 --warmup-epochs 1 --checkpoint-every 2 --keep-checkpoints 3".split()
PRETRAIN += (
    "--measure-every 0 --decoder-dim 8 --decoder-depth 1 --decoder-heads 2 --audio-mask-ratio 0.75".split()
)
TASK = "--checkpoint pretrain --epochs 1 --warmup-epochs 0".split()
TASKS = {
    "classify": [],
    "segment": ["--dim", "8"],
    "localize": ["--dim", "8"],
    "separate": ["--decoder-dim", "16", "--pairs", "2"],
}
KEPT = ("config.json", "metrics.jsonl", "results.json", "model", "checkpoints")


def main():
    torch.manual_seed(0)
    clips()
    models()
    run("avfuse.train", *SHORT, *PRETRAIN)
    for task, options in TASKS.items():
        run(f"avfuse.tasks.{task}", *SHORT, *TASK, "--run-dir", task, *options)
        tidy(Path(task))
        shutil.rmtree(Path(task) / "checkpoints")
    run("avfuse.features", "clips", "features.safetensors", "--checkpoint", "pretrain", "--workers", "0")
    expect()
    interrupt(Path("pretrain"))
    for path in sorted(Path("shapes").rglob("*.stem0.flac"))[1:]:  # one is enough
        path.unlink()


def run(module, *arguments):
    """One command, with the small sizes of this file."""
    code = f"import runpy, make; runpy.run_module({module!r}, run_name='__main__')"
    subprocess.run([sys.executable, "-c", code, *arguments], check=True)


def clips():
    sounding_shapes.generate(
        "shapes", train=4, test=2, seconds=1.0, fps=4, size=32, sample_rate=8000, workers=1, progress=False
    )
    for split in "train", "test":
        Path("clips", split).mkdir(parents=True)
        for path in sorted(Path("shapes", split).glob("*.mp4"))[:1]:
            shutil.copy(path, Path("clips", split))
    run("avfuse.data", "check", "clips", "--workers", "1")
    run("avfuse.data", "shard", "clips", "shards", "--workers", "1")


def models():
    create_encoder("tiny", "factorized", fusion_tokens=3).save_pretrained("encoder")
    encoder = create_encoder("tiny", "dense", fusion_tokens=3, pair_bias=True)
    with torch.no_grad():
        for name, parameter in encoder.named_parameters():
            if name.endswith("pair_bias"):
                parameter.normal_()
    AVMAE(encoder, decoder_dim=8, decoder_depth=1, decoder_heads=2, audio_mask_ratio=0.75).save_pretrained(
        "autoencoder"
    )


@torch.no_grad()
def expect():
    """Outputs of fixed inputs, losses, and what was read."""
    image, audio = torch.randn(2, 3, 32, 32), torch.randn(2, 1, 16, 64)
    mae = AVMAE.from_pretrained("autoencoder")
    masks = [mae.mask_sampler()(torch.Generator().manual_seed(clip)) for clip in range(2)]
    masks = {name: torch.stack([mask[name] for mask in masks]) for name in masks[0]}
    tensors = dict(image=image, audio=audio, **masks)
    for name in "encoder", "autoencoder", "pretrain":
        tokens = load_encoder(name)(image, audio)
        tensors |= {f"{name}.{part}": getattr(tokens, part) for part in ("image", "audio", "fusion")}
    output = mae(image, audio, **masks)
    tensors |= {f"autoencoder.{part}": getattr(output, part) for part in ("image_pred", "audio_pred", "loss")}
    tensors["classify.logits"] = load_classifier("classify")(image, audio).logits
    tensors["segment.logits"] = load_model(Segmenter, "segment")(image, audio)
    tensors["localize.map"] = load_model(Localizer, "localize")(image, audio)
    tensors["separate.logits"] = load_model(Separator, "separate")(image[:, None], audio)
    read = {name: find_data(Path(name), print, workers=0) for name in ("clips", "shards", "shapes")}
    item = ClipDataset(read["clips"].train, INPUTS, train=False)[0]
    tensors |= {"clips.image": item["image"], "clips.audio": item["audio"]}
    entry = sounding_shapes.read_manifest("shapes", "test")[0]
    tensors |= {"shapes.masks": torch.from_numpy(sounding_shapes.load_masks("shapes", entry)[0])}
    tensors |= {"shapes.stem": torch.from_numpy(sounding_shapes.load_stems("shapes", entry))}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, "expected.safetensors")
    rows = [json.loads(line) for line in Path("pretrain/metrics.jsonl").read_text().splitlines()]
    expected = dict(
        losses={row["step"]: row["loss"] for row in rows if "loss" in row},
        after=next(row for row in rows if row.get("when") == "after"),
        metrics={task: json.loads(Path(task, "results.json").read_text())["metrics"] for task in TASKS},
        clips={
            name: [[clip.path.as_posix(), clip.labels] for clip in (*found.train, *found.test)]
            for name, found in read.items()
        },
    )
    Path("expected.json").write_text(json.dumps(expected, indent=1) + "\n")


def interrupt(run: Path):
    """The run as it was after step 2."""
    tidy(run)
    for step in 4, 6:
        shutil.rmtree(run / f"checkpoints/step-{step:08d}")


def tidy(run: Path):
    for path in run.iterdir():
        if path.name not in KEPT:
            shutil.rmtree(path) if path.is_dir() else path.unlink()


if __name__ == "__main__":
    main()
