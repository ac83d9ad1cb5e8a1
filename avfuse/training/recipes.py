"""What a pretraining run is: its settings, the paper's own runs as presets, and what a run will cost."""

import argparse
import os
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks

from ..data import sounding_shapes
from ..data.listing import SUFFIXES
from ..data.sets.folders import split_folders
from ..encoder import AVEncoder
from ..files import printable
from ..fusion import Interactions
from ..loading import load_encoder
from ..mae import AVMAE, count_removed
from ..presets import create_encoder
from ..vit import input_shape
from .costs import CARDS, LAUNCHES, SHARE, step_flops, step_seconds
from .length import with_enough_steps
from .settings import COUNT, FREE, ONCE, Formerly, LoopConfig, learning_rate, option, schedule_of
from .starts import FRESH, saved_settings

PROGRAM = "python -m avfuse.train"
OF_ENCODER = (  # settings that a checkpoint decides
    "model interactions fusion_layers fusion_tokens image_aggregation_tokens audio_aggregation_tokens "
    "attn_ratio mlp_ratio"
).split()
ADAMW_BYTES = 16  # per parameter in float32: weight, gradient, two moments


@dataclass(kw_only=True)
class TrainConfig(LoopConfig):
    """Pretrain an audio-visual early-fusion transformer by masked autoencoding (DeepAVFusion, Sec. 3.2).

    Without arguments it builds the embedded data set, Sounding Shapes, under data/, pretrains the "tiny"
    model on it for a few minutes (no GPU needed), and leaves a run folder with an index.html to look at. With
    --data it trains on the videos of any folder. --preset sets the defaults to those of one of the paper's
    runs; every option given beside it overrides them. --plan says what a run would cost, and starts nothing.

    The same command resumes a run that was interrupted, in the middle of an epoch if need be, with the same
    losses as if it had gone through; --restart begins anew. To a process that trains, SIGUSR1 says to save a
    checkpoint, SIGTERM and Ctrl-C to save one and stop.

    Several processes or GPUs: accelerate launch -m avfuse.train ..., or torchrun --standalone
    --nproc-per-node N -m avfuse.train .... The losses stay the same: --batch-size is that of all of them
    together.
    """

    preset: Annotated[Literal["demo", "vggsound-ablation", "vggsound-large", "audioset"], FREE] = "demo"
    """Whose defaults: the demo's or one of the paper's runs (Sec. 4.1)."""
    plan: Annotated[bool, ONCE] = False
    """Print batch, learning rate, steps, parameters, tokens, arithmetic, estimated memory, disk and time on
    several cards, with the clips that must be read per second, and stop."""

    checkpoint: Annotated[str, Formerly(FRESH)] = FRESH
    """Model to begin from, with all its weights, whatever settings and data are new: a run folder, a saved
    model, a name on the Hugging Face hub, or a released DeepAVFusion file. The encoder is as it is there, and
    so are the decoders, unless other ones are asked for; which weights are new is said."""
    model: Literal["tiny", "small", "base", "large"] = "tiny"
    """Size of both transformers; the paper's is base."""
    interactions: Interactions = "dense"
    """How fusion tokens read image and audio tokens; dense is exact over all pairs, factorized the paper's
    approximation, by which its own runs were made."""
    fusion_layers: tuple[int, ...] = ()
    """0-based layers that fuse; default: all (early fusion)."""
    fusion_tokens: int = 16
    """Number of fusion tokens (the paper's)."""
    image_aggregation_tokens: int = 8
    """Number of image aggregation tokens of factorized interactions (the paper's)."""
    audio_aggregation_tokens: int = 8
    """Number of audio aggregation tokens of factorized interactions (the paper's)."""
    attn_ratio: float = 0.25
    """Width of the fusion attention over the model width (the paper's; 1.0 for its AudioSet model)."""
    mlp_ratio: float = 1.0
    """Width of the fusion MLP over the model width (the paper's; 4.0 for its AudioSet model)."""
    decoder_dim: int = 128
    """Width of both decoders; the paper's is 512."""
    decoder_depth: int = 2
    """Layers of both decoders; the paper's are 8."""
    decoder_heads: int = 4
    """Heads of both decoders; the paper's are 16."""
    image_mask_ratio: float = 0.75
    """Share of the image patches that are hidden (the paper's)."""
    audio_mask_ratio: float = 0.8
    """Share of the audio patches that are hidden (the paper's)."""
    image_weights: Path | None = None
    """Weights that the image transformer starts from: a file with MAE's or timm's names."""
    audio_weights: Path | None = None
    """Weights that the audio transformer starts from, such as AudioMAE's. Transformers that start from
    weights have their learning rate raised from 0 by half a cosine over the first half of training (released
    code)."""

    epochs: int = 60
    """Passes over the data; the paper's are 200 (VGGSound ablation)."""
    warmup_epochs: int = 6
    """Epochs of linear warm-up before the cosine decay; the paper's are 40 of 200."""
    batch_size: int = 64
    """Clips per step, over all processes; a smaller data set shrinks it. The paper's is 512."""
    base_lr: float = 6e-3
    """Learning rate per 256 clips: lr = base_lr * batch / 256. The paper's is 1.5e-4; a tiny model on a small
    set wants a larger one."""
    probe_clips: Annotated[int, COUNT] = 256
    """Held-out clips for the loss and the nearest-neighbour probe."""
    measure_every: int = 80
    """Steps between measures and pictures on the way; before and after there always are. 0 = none."""

    @property
    def kind(self):
        return "" if self.data else self.preset

    def __post_init__(self):
        super().__post_init__()
        branches = [name for name in ("image_weights", "audio_weights") if getattr(self, name)]
        if branches and self.checkpoint != FRESH:
            raise ValueError(
                f"{option(branches[0])} would take the place of weights of --checkpoint: give one"
            )


# --- the paper's runs (Sec. 4.1; released code where the paper is silent) -----------------------------------


def demo() -> TrainConfig:
    """Sounding Shapes, a tiny model, a few minutes on two CPU cores."""
    return TrainConfig()


def vggsound_ablation() -> TrainConfig:
    """The paper's ablations: VGGSound (144k clips), ViT-B, 200 epochs, batch 512 as 2 GPUs x 64 clips x 4.

    Where paper and released code differ: AdamW with betas (0.9, 0.95) and no decay on biases and norms, as
    released (the paper says Adam); MLP ratio 1, as in the paper and the released command line (the released
    file of defaults says 4); 192 spectrogram frames, as released (the paper says 196); precision, workers and
    clipping are our choice. The paper starts from MAE and AudioMAE weights: give --image-weights and
    --audio-weights. Its own interactions are --interactions factorized; dense ones are exact and cost less.
    """
    return TrainConfig(
        preset="vggsound-ablation",
        model="base",
        decoder_dim=512,
        decoder_depth=8,
        decoder_heads=16,
        epochs=200,
        warmup_epochs=40,
        batch_size=512,
        micro_batch=64,
        base_lr=1.5e-4,
        clip_grad=0.0,
        precision="bf16",
        workers=8,
        probe_clips=2048,
        measure_every=281 * 20,
        checkpoint_every=281,
    )


def vggsound_large() -> TrainConfig:
    """The paper's large VGGSound run: 800 epochs, batch 1024 as 8 GPUs x 64 clips x 2."""
    return replace(
        vggsound_ablation(),
        run=None,
        preset="vggsound-large",
        epochs=800,
        batch_size=1024,
        measure_every=140 * 40,
        checkpoint_every=140,
    )


def audioset() -> TrainConfig:
    """The paper's AudioSet run: 1.73M clips, 200 epochs, batch 4096 as 8 GPUs x 64 clips x 8, with the wider
    fusion blocks (attention ratio 1, MLP ratio 4) that its released AudioSet model has.
    """
    return replace(
        vggsound_ablation(),
        run=None,
        preset="audioset",
        attn_ratio=1.0,
        mlp_ratio=4.0,
        batch_size=4096,
        measure_every=422 * 20,
        checkpoint_every=200,
    )


PRESETS = {
    "demo": demo,
    "vggsound-ablation": vggsound_ablation,
    "vggsound-large": vggsound_large,
    "audioset": audioset,
}
# Sizes of their training sets.
PUBLISHED_CLIPS = {"vggsound-ablation": 144_000, "vggsound-large": 144_000, "audioset": 1_730_000}


def parse(arguments: Sequence[str] | None = None) -> TrainConfig:
    """The command line: `--preset` sets the defaults, every other option overrides them."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--preset", default="demo")
    preset = first.parse_known_args(arguments)[0].preset
    default = PRESETS.get(preset, demo)()  # of an unknown one tyro will say what there is
    default.run = None  # which depends on the other options
    return tyro.cli(TrainConfig, prog=PROGRAM, args=arguments, default=default)


def make_model(config: TrainConfig) -> AVMAE:
    """The masked autoencoder that the settings describe; of a checkpoint it has the encoder."""
    decoders = {name: getattr(config, name) for name in ("decoder_dim", "decoder_depth", "decoder_heads")}
    if config.checkpoint == FRESH:
        encoder = make_encoder(config)
    else:
        encoder = load_encoder(config.checkpoint)
        check_encoder(config, encoder)
        saved = saved_settings(config.checkpoint).get("model", {})
        asked = {name for name, value in decoders.items() if value != getattr(TrainConfig, name)}
        decoders |= {name: saved[name] for name in decoders.keys() & saved.keys() if not asked}
    encoder.set_grad_checkpointing(config.grad_checkpointing)
    return AVMAE(
        encoder,
        **decoders,
        image_mask_ratio=config.image_mask_ratio,
        audio_mask_ratio=config.audio_mask_ratio,
    )


def check_encoder(config: TrainConfig, encoder: AVEncoder) -> None:
    """Raises ValueError if settings ask for another encoder than that of the checkpoint."""
    asked = [name for name in OF_ENCODER if getattr(config, name) != getattr(TrainConfig, name)]
    if not asked:
        return
    with torch.device("meta"):
        wanted = make_encoder(config)
    kinds = [
        (e.dims, e.depth, [e.settings[name] for name in OF_ENCODER if name in e.settings])
        for e in (wanted, encoder)
    ]
    if kinds[0] != kinds[1]:
        raise ValueError(
            f"--checkpoint {printable(config.checkpoint)} has another encoder than "
            f"{', '.join(f'{option(name)} {getattr(config, name)}' for name in asked)}: leave these out"
        )


def make_encoder(config: TrainConfig) -> AVEncoder:
    return create_encoder(
        config.model,
        config.interactions,
        fusion_layers=config.fusion_layers or "all",
        fusion_tokens=config.fusion_tokens,
        image_aggregation_tokens=config.image_aggregation_tokens,
        audio_aggregation_tokens=config.audio_aggregation_tokens,
        attn_ratio=config.attn_ratio,
        mlp_ratio=config.mlp_ratio,
    )


# --- what a run will cost -----------------------------------------------------------------------------------


def plan(config: TrainConfig, processes: int = 1) -> str:
    """What a run with these settings amounts to, for people. Opens no clip and allocates no weights."""
    with torch.device("meta") if config.checkpoint == FRESH else nullcontext():
        mae = make_model(config)
    clips, counted = count_clips(config)
    config = with_enough_steps(config, clips)
    schedule = schedule_of(config, clips, processes=processes)
    accumulated = len(schedule.micro_batches(range(clips), 0))
    lr, of_all = learning_rate(config, schedule.batch_size), count_parameters(mae)
    interactions = mae.encoder.settings["interactions"]
    size = config.model if config.checkpoint == FRESH else "the checkpoint's"
    usual = type(config).batch_size
    is_root = config.lr_scaling == "root" and schedule.batch_size < usual
    scaled = f"sqrt({schedule.batch_size} x {usual})" if is_root else schedule.batch_size
    kept = {
        name: (patches := getattr(mae.encoder, name).patch_embed.num_patches)
        and f"{patches} tokens, {patches - count_removed('ratio', patches, ratio)} seen"
        for name, ratio in (("image", config.image_mask_ratio), ("audio", config.audio_mask_ratio))
    }
    two, three = activation_bytes(mae, config.precision, 2), activation_bytes(mae, config.precision, 3)
    kept_bytes = ADAMW_BYTES + (4 if config.ema else 0)
    activations = two + (schedule.micro_batch - 2) * (three - two)  # weights cast to bf16 do not grow
    rows = {
        "run": f"{config.preset}: {size} model, {interactions} interactions, in {config.run}",
        "batch": f"{schedule.batch_size} clips = {processes} process{'es' * (processes != 1)} "
        f"x {accumulated} accumulated x {schedule.micro_batch}",
        "learning rate": f"{lr:.3g} = {config.base_lr:.3g} x {scaled} / 256, "
        f"{config.warmup_epochs} epochs of warm-up, then cosine",
        "steps": f"{schedule.steps:,} = {config.epochs} epochs x {schedule.steps_per_epoch}, "
        f"at {clips:,} clips ({counted})",
        "parameters": f"{count_parameters(mae.encoder) / 1e6:.1f} M in the encoder, "
        f"{of_all / 1e6:.1f} M with decoders",
        "tokens": f"image {kept['image']}; audio {kept['audio']}; {mae.encoder.num_state_tokens} fusion",
        "memory": f"about {(of_all * kept_bytes + activations) / 2**30:.1f} GiB for each process: "
        f"{of_all * kept_bytes / 2**30:.1f} weights, gradients and AdamW, {activations / 2**30:.1f} "
        f"activations of {schedule.micro_batch} clips (computed; buffers of libraries come on top)",
    }
    flops, share = step_flops(mae), -(-schedule.batch_size // processes)
    checkpoint = of_all * (ADAMW_BYTES - 4 + (4 if config.ema else 0))
    rows |= {
        "arithmetic": f"{flops / 1e9:.1f} GFLOP for each clip, forward and backward; "
        f"{schedule.steps * schedule.batch_size * flops:.3g} FLOP for the run",
        "disk": f"{(checkpoint * (config.keep_checkpoints + 1) + 4 * of_all) / 1e9:.1f} GB: "
        f"{config.keep_checkpoints} checkpoints of {checkpoint / 1e9:.2f}, one being written, the model",
    }
    for card in CARDS:
        seconds = step_seconds(mae, flops, card, config.precision, share, accumulated)
        hours, speed = schedule.steps * seconds / 3600, schedule.batch_size / seconds
        rows[card] = f"{hours * processes:,.2f} GPU hours ({hours:,.2f} h); to read: {speed:,.0f} clips/s"
    rows["by"] = (
        f"a simple model, without judging: a micro-batch takes {1e3 * LAUNCHES:g} ms a block to launch, or "
        f"its arithmetic at {SHARE[config.precision]:.0%} of the card's peak, as measured on H100 and H200"
    )
    return "\n".join(f"{name:>14}  {row}" for name, row in rows.items())


def count_clips(config: TrainConfig) -> tuple[int, str]:
    """How many clips there are to train on, and how that is known."""
    if config.data is None and config.preset in PUBLISHED_CLIPS:
        return PUBLISHED_CLIPS[config.preset], "as published"
    if config.data is None:
        return sounding_shapes.Settings().train, "the demo's"
    if not config.data.is_dir():
        raise ValueError(f"--data {config.data} is not a folder")
    splits = split_folders(config.data)
    files = (name for _, _, names in os.walk(splits["train"]) for name in names)
    count = sum(name.lower().endswith(SUFFIXES) for name in files)
    if "test" in splits or not config.test_share:
        return count, "files that may be videos"
    held = f"{config.test_share:g} of {count:,} files that may be videos are held out"
    return round(count * (1 - config.test_share)), held


def activation_bytes(mae: AVMAE, precision: str, clips: int) -> int:
    """Bytes that a forward of so many clips keeps for its backward, counted on fake tensors."""
    shapes = {name: tensor.shape for name, tensor in mae.state_dict().items()}
    kept: dict[int, int] = {}

    def count(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = storage.nbytes()
        return tensor

    with FakeTensorMode():
        state = {name: torch.empty(shape).requires_grad_() for name, shape in shapes.items()}
        weights = {weight.untyped_storage()._cdata for weight in state.values()}
        inputs = [torch.empty(clips, *input_shape(getattr(mae.encoder, name))) for name in ("image", "audio")]
        dtype = dict(no=None, fp16=torch.float16, bf16=torch.bfloat16)[precision]
        with (
            torch.autocast("cpu", dtype, enabled=dtype is not None),
            saved_tensors_hooks(count, lambda tensor: tensor),
        ):
            output = torch.func.functional_call(mae, state, tuple(inputs))
        del output  # alive until here, so that no storage's address was used twice
    return sum(kept.values())


def count_parameters(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
