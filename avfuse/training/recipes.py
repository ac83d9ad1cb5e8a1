"""What a pretraining run is: its settings, and the paper's own runs as presets."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from ..choices import DecodeFrom, Interactions, Size
from ..command import SAID, given, read
from ..rules import COUNT, NOT_NEGATIVE, option
from .settings import FREE, FRESH, ONCE, Formerly, LoopConfig


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

    preset: Annotated[
        Literal["demo", "demo-long", "vggsound-ablation", "vggsound-large", "audioset", "video"], FREE
    ] = "demo"
    """Whose defaults: the demo's; those of a longer demo, with clips of one object and --decode-from fusion;
    one of the paper's runs (Sec. 4.1); or video's: 16 frames over 10 s, with a bias of time."""
    plan: Annotated[bool, ONCE] = False
    """Print batch, learning rate, steps, parameters, tokens, arithmetic, estimated memory, disk and time on
    several cards, with the clips that must be read per second, and stop."""

    checkpoint: Annotated[str, Formerly(FRESH)] = FRESH
    """Model to begin from, with all its weights, whatever settings and data are new: a run folder, a saved
    model, a name on the Hugging Face hub, or a released DeepAVFusion file. The encoder is as it is there, and
    so are the decoders, unless other ones are asked for; which weights are new is said."""
    model: Size = "tiny"
    """Size of both transformers; the paper's is base."""
    interactions: Interactions = "dense"
    """How fusion tokens read image and audio tokens; dense is exact over all pairs, factorized the paper's
    approximation, by which its own runs were made."""
    fusion_layers: Annotated[tuple[int, ...], SAID] = ()
    """0-based layers that fuse. Default: all (early fusion)."""
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
    audio_seconds: Annotated[float, NOT_NEGATIVE, Formerly(0.0)] = 0.0
    """Seconds of sound of a clip, whole 16-step patches of its spectrogram. 0 = 3 (the paper's)."""
    image_mask_ratio: float = 0.75
    """Share of the image patches that are hidden (the paper's), in every frame as many."""
    tubes: Annotated[bool, Formerly(False)] = False
    """Hide the same places in all frames of a clip, as VideoMAE does (Tong et al. 2022)."""
    audio_mask_ratio: float = 0.8
    """Share of the audio patches that are hidden (the paper's)."""
    decode_from: Annotated[DecodeFrom, Formerly("patches")] = "patches"
    """What decoders see: fusion tokens and the patches that are kept (the paper's), or fusion tokens alone,
    through which what is seen and heard then has to pass (benchmarks/emergence.md)."""
    cuda_graphs: Annotated[bool, FREE] = False
    """Record the launches of a step once, and play them back: the same losses, several times as fast where a
    GPU waits for its host (docs/training.md). One GPU; not with --contrastive or --grad-checkpointing."""
    contrastive: Annotated[float, NOT_NEGATIVE, Formerly(0.0)] = 0.0
    """Weight of CAV-MAE's contrastive term, 0.01 there, beside the two losses: which image goes with which
    sound, among the clips of a step, by tokens before the first of --fusion-layers. These must begin above 0:
    fused tokens give the answer away."""
    image_weights: Annotated[Path | None, SAID] = None
    """Weights that the image transformer starts from: a file with MAE's or timm's names. Default:
    fresh ones."""
    audio_weights: Annotated[Path | None, SAID] = None
    """Weights that the audio transformer starts from, such as AudioMAE's. Default: fresh ones.
    Transformers that start from weights have their learning rate raised from 0 by half a cosine over the
    first half of training (released code)."""

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

    @property
    def kind(self):
        return "" if self.data else self.preset

    @property
    def demo(self):
        return "solos" if self.preset == "demo-long" else super().demo

    def __post_init__(self):
        super().__post_init__()
        if self.preset == "demo-long" and self.scene != "binding":
            raise ValueError(f"--preset demo-long has clips of its own: leave out --scene {self.scene}")
        branches = [name for name in ("image_weights", "audio_weights") if getattr(self, name)]
        if branches and self.checkpoint != FRESH:
            given = option(TrainConfig, branches[0])
            raise ValueError(f"{given} would take the place of weights of --checkpoint: give one")
        if self.contrastive and self.micro_batch:
            raise ValueError(
                f"--contrastive {self.contrastive:g} compares the clips of a step with one another, and "
                f"micro-batches do not hold them together: give --micro-batch 0, not {self.micro_batch}"
            )


def check_cuda_graphs(config: TrainConfig, processes: int) -> None:
    """Raises ValueError naming what a step cannot be recorded with."""
    if not config.cuda_graphs:
        return
    for name in "contrastive", "grad_checkpointing":
        if getattr(config, name):
            raise ValueError(f"--cuda-graphs cannot record a step with {option(TrainConfig, name)}")
    if processes > 1:
        raise ValueError("--cuda-graphs is for one process: with several it has not been tested")


# --- presets ------------------------------------------------------------------------------------------------

# Scenes of synchrony: a model small enough to read 8 frames on two CPU cores.
SYNCHRONY = dict(
    scene="synchrony",
    model="micro",
    frames=8,
    pair_bias="time",
    fusion_tokens=4,
    attn_ratio=1.0,
    decoder_dim=64,
    decoder_depth=1,
    decoder_heads=2,
    epochs=8,
    warmup_epochs=1,
)
# The paper's ablations: VGGSound (144k clips), ViT-B, 200 epochs, batch 512 as 2 GPUs x 64 clips x 4.
#
# Where paper and released code differ: AdamW with betas (0.9, 0.95) and no decay on biases and norms, as
# released (the paper says Adam); MLP ratio 1, as in the paper and the released command line (the released
# file of defaults says 4); 192 spectrogram frames, as released (the paper says 196); precision, workers,
# clipping, and norms of fusion blocks with the 1e-6 of the transformers (released ones have 1e-5) are our
# choice. The paper starts from MAE and AudioMAE weights: give --image-weights and
# --audio-weights. Its own interactions are --interactions factorized; dense ones are exact and cost less.
ABLATION = dict(
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
PRESETS = {
    # Sounding Shapes, a tiny model, a few minutes on two CPU cores.
    "demo": {},
    # Clips of one object, and decoders that see fusion tokens alone: about an hour (docs/training.md).
    "demo-long": dict(decode_from="fusion", epochs=80, measure_every=320),
    "vggsound-ablation": ABLATION,
    # The paper's large VGGSound run: 800 epochs, batch 1024 as 8 GPUs x 64 clips x 2.
    "vggsound-large": ABLATION
    | dict(epochs=800, batch_size=1024, measure_every=140 * 40, checkpoint_every=140),
    # The paper's AudioSet run: 1.73M clips, 200 epochs, batch 4096 as 8 GPUs x 64 clips x 8, with the wider
    # fusion blocks (attention ratio 1, MLP ratio 4) that its released AudioSet model has.
    "audioset": ABLATION
    | dict(attn_ratio=1.0, mlp_ratio=4.0, batch_size=4096, measure_every=422 * 20, checkpoint_every=200),
    # Ours, not the paper's, which stops at one frame: ViT-B on VGGSound, 16 frames over its 10 s, a bias of
    # time.
    "video": ABLATION | dict(frames=16, audio_seconds=10.0, pair_bias="time", micro_batch=32),
}


def parse(args: Sequence[str] | None = None, prog: str | None = None) -> TrainConfig:
    """The command line: `--preset`, or `--scene` of the demo, sets the defaults, all others override them."""
    args = sys.argv[1:] if args is None else args
    chosen = given(args, preset="demo", scene="binding")
    preset = chosen.preset if chosen.preset in PRESETS else "demo"  # tyro will say which there are
    is_synchrony = (chosen.preset, chosen.scene) == ("demo", "synchrony")
    default = TrainConfig(preset=preset, **(SYNCHRONY if is_synchrony else PRESETS[preset]))
    default.run = None  # which depends on the other options
    return read(TrainConfig)(args=args, prog=prog, default=default)
