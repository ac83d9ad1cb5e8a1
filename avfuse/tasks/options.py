"""What each task can be told. Nothing here brings torch, so that a command can say its options at once."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from ..choices import DataSet
from ..command import SAID, given, read
from ..rules import COUNT, NOT_NEGATIVE, RATE, Rule, check_rules
from ..training.settings import DEMO_RUN, FREE, ONCE, RUN_FILES, Formerly, TaskConfig

# A segmenter has learned what each sound looks like, which others need not learn again.
AFTER_SEGMENTING = TaskConfig.starts | dict(binding=(Path("runs/segment"), DEMO_RUN))


@dataclass(kw_only=True)
class ClassifyConfig(TaskConfig):
    """Classify clips by linear heads over the pooled image, audio and fusion tokens, their logits averaged.

    Without arguments it fine-tunes on Sounding Shapes, the embedded data set; with --probe only the heads are
    trained (other defaults). With --data it takes any folder whose sub-folders name the classes. --preset
    sets the defaults to those of DeepAVFusion on VGGSound; every option given beside it overrides them.

    Where a clip has one class the metric is accuracy, where it may have several, mAP, AUC and d'. Beside the
    average of all heads stands each head alone (NAME_head), whose tokens have met the other modality all the
    same, and the classifier when it only gets the picture or only the sound (NAME_input).
    """

    preset: Annotated[Literal["demo", "vggsound-finetune", "vggsound-probe"], FREE] = "demo"
    """Whose defaults: the demo's, or those of DeepAVFusion on VGGSound (paper Table 3)."""
    probe: bool = False
    """Linear probe: the encoder is frozen."""
    label: Annotated[str, SAID] = ""
    """Which label of the data set to learn: shape or colour (of what sounds) of Sounding Shapes, class of a
    plain folder. Default: the first."""
    class_list: Annotated[Path | None, SAID] = None
    """Text file with the names of the classes of a plain folder, one a line. Default: its sub-folders."""
    features: tuple[Literal["image", "audio", "fusion"], ...] = ("image", "audio", "fusion")
    """Tokens that have a head (released: all three)."""
    modalities: Literal["both", "image", "audio"] = "both"
    """What the model gets at all; one of them alone is the uni-modal control."""
    batch_norm: bool = False
    """Standardise the pooled features by a BatchNorm without parameters (released: in the linear probe). Its
    statistics are those of a micro-batch of one process, on which the losses then depend."""
    mixup: Annotated[float, NOT_NEGATIVE] = 0.8
    """Alpha of mixup, 0 = none (released: 1.0 in fine-tuning, none in the probe). Partners are of the same
    micro-batch of one process, on which the losses then depend; a clip by itself is not mixed."""
    smoothing: Annotated[float, RATE] = 0.1
    """Label smoothing (released: 0.1 in fine-tuning, none in the probe)."""
    drop_path: Annotated[float, RATE] = 0.1
    """Rate at which blocks are dropped in training: that of fusion blocks, to which those of image and audio
    rise along their depth (released: all at 0.2 in fine-tuning). Which ones depends on --micro-batch, too."""
    test_windows: Annotated[int, tyro.conf.arg(name="windows", aliases=["--test-windows"]), COUNT] = 1
    """Windows of each test clip, evenly from its start to its end; 1 = the middle (released: 10 over 10 s in
    fine-tuning, 1 in the probe)."""
    average: Annotated[Literal["logits", "probabilities"], Formerly("logits")] = "logits"
    """What is averaged over the windows: logits, as DeepAVFusion's released code does, or probabilities (of
    softmax, where a clip may have several classes of sigmoid), as CAV-MAE's."""
    export: Annotated[Path | None, SAID, ONCE] = None
    """File such as NAME.pkl for the logits of VGGSound's test clips by image alone, sound alone and both, as
    the package vggsounder reads them; needs avfuse[eval]."""

    epochs: int = 40
    """Passes over the clips (released: 100 fine-tuning, 60 probe; paper: 50)."""
    warmup_epochs: int = 4
    """Epochs of linear warm-up before the cosine decay (released: 20 fine-tuning, 10 probe)."""
    batch_size: int = 32
    """Clips per step (released: 512 fine-tuning, 1024 probe; paper: 128)."""
    base_lr: float = 8e-3
    """Learning rate per 256 clips: lr = base_lr * batch / 256 (released: AdamW 3e-4 fine-tuning, LARS 0.3
    probe; paper: Adam 1e-4 for its batch of 128, which is 2e-4 here). A tiny model on a small set wants a
    larger one."""
    weight_decay: float = 0.05
    """AdamW weight decay; biases and norms are left out (released: 0.05 fine-tuning, none in the probe)."""
    layer_decay: float = 0.75
    """Factor of the learning rate from each layer to the one below it (released: 0.75 fine-tuning)."""
    checkpoint_every: int = 80

    @property
    def kind(self):
        return "classify-probe" if self.probe else "classify"

    def __post_init__(self):
        super().__post_init__()
        check_rules(self)
        if self.preset != "demo" and (self.probe != self.preset.endswith("probe") or self.scene != "binding"):
            raise ValueError(
                f"--preset {self.preset} decides about --probe, and is of no --scene: leave them out"
            )
        if self.average != "logits" and self.test_windows == 1:
            raise ValueError(f"--average {self.average} has no effect on one window: give more --windows")
        decay = self.layer_decay not in (1.0, type(self).layer_decay) and f"--layer-decay {self.layer_decay}"
        drop = self.drop_path and f"--drop-path {self.drop_path}"
        if self.probe and (said := drop or decay or self.grad_checkpointing and "--grad-checkpointing"):
            raise ValueError(f"{said} has no effect on the frozen encoder of a probe")
        if self.batch_norm and 1 in (self.micro_batch, self.batch_size):
            raise ValueError(
                "--batch-norm needs more than one clip at once, and --micro-batch or --batch-size is 1"
            )
        if self.modalities != "both" and not {self.modalities, "fusion"} & {*self.features}:
            raise ValueError(f"--features {self.features} cannot be read from --modalities {self.modalities}")
        if self.export is not None:
            self.check_export()

    def check_export(self):
        if self.export.suffix != ".pkl" or self.export.is_dir():
            raise ValueError(f"--export must be a .pkl file, got {self.export}")
        reads_either = "fusion" in self.features or {"image", "audio"} <= {*self.features}
        if self.modalities != "both" or self.missing != "drop" or not reads_either:
            raise ValueError(
                "--export is by image alone, by sound alone and by both: leave --modalities, --missing and "
                "--features at their defaults"
            )


PROBE = dict(
    probe=True,
    batch_norm=True,
    mixup=0.0,
    smoothing=0.0,
    drop_path=0.0,
    base_lr=8e-3,
    weight_decay=0.0,
    layer_decay=1.0,
)
SYNCHRONY = dict(  # what is mixed or dropped hides which moments belong together
    scene="synchrony",
    label="colour",
    model="micro",
    mixup=0.0,
    smoothing=0.0,
    drop_path=0.0,
    layer_decay=1.0,
    base_lr=2.4e-2,
    epochs=16,
    warmup_epochs=2,
)


def linear_probe() -> ClassifyConfig:
    """Defaults of the linear probe."""
    return ClassifyConfig(**PROBE)


PRESETS = {
    # DeepAVFusion fine-tuned on VGGSound, by its released settings.
    #
    # Where they differ, the paper (App. A.1) says 50 epochs of Adam at 1e-4 with batch 128, and names neither
    # schedule, layer decay, drop path, mixup and smoothing nor windows: --epochs 50 --batch-size 128
    # --base-lr 2e-4. Its Table 3 reads image and audio features (--features image audio), released code those
    # of fusion tokens, too. Released are 100 epochs of AdamW at a base rate of 3e-4, batch 512 as 4 GPUs x 32
    # clips x 4, with all of these, and a last judgement on 10 windows over 10 s whose logits are averaged;
    # there their sound is louder or softer at random by up to 2 dB, here as it is. Released windows span the
    # middle 10 s, ours the whole clip, which are the same in VGGSound. Released code drops every block at
    # 0.2, fusion blocks, too; here image and audio blocks rise to that along their depth, and fusion blocks
    # of released weights are not dropped. It begins the heads at the log odds of the classes, and divides the
    # loss by their frequency, which under softmax is a factor that AdamW does not see; we do neither. Betas
    # (0.9, 0.95; released 0.999), precision and workers are our choice.
    "vggsound-finetune": dict(
        model="base",
        epochs=100,
        warmup_epochs=20,
        batch_size=512,
        micro_batch=32,
        base_lr=3e-4,
        weight_decay=0.05,
        layer_decay=0.75,
        drop_path=0.2,
        mixup=1.0,
        smoothing=0.1,
        test_windows=10,
        clip_grad=0.0,
        precision="bf16",
        workers=8,
        checkpoint_every=281,
    ),
    # Its linear probe on VGGSound: the paper's optimiser around the released classifier.
    #
    # Where they differ, the paper (App. A.1) says 50 epochs of Adam at 1e-4 with batch 128, which are taken
    # here, of image and audio features (--features image audio), where released code reads all three;
    # released are 60 epochs of LARS, which avfuse does not have, at a base rate of 0.3, batch 1024 as 4 GPUs
    # x 64 clips x 4, 10 of them warm-up. The warm-up here is as long for its share. BatchNorm without
    # parameters, one window in the middle, and no mixup, smoothing, drop path and decay are as released,
    # where the paper is silent. Released judges a random frame of that window, here it is the middle one.
    # Betas (0.9, 0.95), precision and workers are our choice.
    "vggsound-probe": PROBE
    | dict(
        model="base",
        epochs=50,
        warmup_epochs=8,
        batch_size=128,
        base_lr=2e-4,
        clip_grad=0.0,
        precision="bf16",
        workers=8,
        checkpoint_every=1124,
    ),
}


def parse(args: Sequence[str] | None = None, prog: str | None = None) -> ClassifyConfig:
    """The command line of classification; --preset, --probe and --scene synchrony set the defaults."""
    args = sys.argv[1:] if args is None else args
    chosen = given(args, scene="binding", preset="demo")
    options = (SYNCHRONY if chosen.scene == "synchrony" else {}) | (PROBE if "--probe" in args else {})
    name = chosen.preset if chosen.preset in PRESETS else "demo"  # of an unknown one tyro says what there is
    default = ClassifyConfig(**PRESETS.get(name, options) | dict(preset=name))
    default.run = None  # which depends on the other options
    return read(ClassifyConfig)(args=args, prog=prog, default=default)


@dataclass(kw_only=True)
class RetrieveConfig(TaskConfig):
    """Nearest neighbours among the test clips by image, audio, fusion tokens and their sum (paper Fig. 3).

    It trains nothing. Without arguments it takes the encoder of runs/demo, if `python -m avfuse.train` has
    left one there, and the embedded data set, Sounding Shapes. With --data it takes any folder. Where
    sub-folders name the classes, recall is measured; neighbours.jsonl names those of every clip in any case.
    """

    kind = "retrieve"

    run: Annotated[Path | None, tyro.conf.arg(name="run-dir", help_behavior_hint="")] = None
    """Folder for results.json, the picture and index.html; what it has of these is replaced. Default: under
    runs/, by the name of --data and of the task."""
    k: Annotated[tuple[int, ...] | None, SAID] = None
    """How many neighbours recall looks at. Default: 1, 5 and 10, as far as there are so many."""
    windows: Annotated[int, COUNT] = 1
    """Windows of each clip, evenly from its start to its end, over which pooled tokens are averaged; 1 = the
    middle (the paper's)."""
    precision: tyro.conf.Suppress[str] = "no"
    seen: Literal["drop", "keep"] = "drop"
    """A clip that the run behind the encoder was trained on: leave it out, or look at it, too, which makes
    recall better than it is."""
    batch_size: int = 32
    """Clips that are encoded at once; changes speed and memory, not the results."""
    max_unreadable: float = 1.0

    # There is nothing to train, and nothing to resume.
    test_share: tyro.conf.Suppress[float] = 0.0
    restart: tyro.conf.Suppress[bool] = False
    pair_bias: tyro.conf.Suppress[str] = ""
    epochs: Annotated[int, tyro.conf.Suppress, NOT_NEGATIVE] = 0
    min_steps: tyro.conf.Suppress[int] = 0
    warmup_epochs: tyro.conf.Suppress[int] = 0
    base_lr: tyro.conf.Suppress[float] = 0.0
    lr_scaling: tyro.conf.Suppress[str] = "linear"
    weight_decay: tyro.conf.Suppress[float] = 0.0
    layer_decay: tyro.conf.Suppress[float] = 1.0
    clip_grad: tyro.conf.Suppress[float] = 0.0
    ema: tyro.conf.Suppress[float] = 0.0
    micro_batch: tyro.conf.Suppress[int] = 0
    grad_checkpointing: tyro.conf.Suppress[bool] = False
    measure_every: tyro.conf.Suppress[int] = 0
    checkpoint_every: tyro.conf.Suppress[int] = 1
    keep_checkpoints: tyro.conf.Suppress[int] = 1

    def __post_init__(self):
        super().__post_init__()
        if any((self.run / name).exists() for name in ("checkpoints", "model")):
            raise ValueError(f"--run-dir {self.run} is that of a training run")
        self.restart = any((self.run / name).exists() for name in RUN_FILES)


@dataclass(kw_only=True)
class SeparateConfig(TaskConfig):
    """Separate what an image shows from a mixture of sounds (DeepAVFusion, Sec. 4 and App. A.3).

    Without arguments it mixes clips of the embedded data set, Sounding Shapes, and fine-tunes the encoder
    that segmentation has left in runs/segment, else that of runs/demo, else a fresh one. It leaves a run
    folder with pictures, sounds to listen to, results.json and an index.html.

    The embedded clips show one object each: where an image shows several, it does not always tell which of
    their sounds is meant.

    Published settings: 20 epochs of Adam at a learning rate of 1e-4, batch 128 (paper); AdamW at a base rate
    of 3e-4, batch 512, 300 epochs of which 40 warm up, layer decay 0.75 (released code).
    """

    kind, demos, starts = "separate", {"binding": "solos"}, AFTER_SEGMENTING

    epochs: int = 6
    """Passes over the data, each clip mixed with another one every time; the paper's are 20, the released
    code's 300."""
    warmup_epochs: int = 1
    """Epochs of linear warm-up before the cosine decay; the released code's are 40 of 300."""
    min_steps: int = 640
    batch_size: int = 16
    """Mixtures per step, over all processes; the paper's is 128, the released code's 512."""
    base_lr: float = 2.4e-2
    """Learning rate per 256 mixtures: lr = base_lr * batch / 256. The paper's lr is 1e-4 whatever the batch,
    the released code's base 3e-4; a tiny model on a small set wants a larger one."""
    checkpoint_every: int = 80
    decoder_dim: Annotated[int, COUNT] = 64
    """Channels of the audio U-Net where it is coarsest; 256 suits a base model."""
    mask: Literal["binary", "ratio"] = "binary"
    """What masks are trained towards: 1 where the source is the louder one (the paper's), or its share of the
    magnitudes."""
    pairs: int = 64
    """Test clips that are mixed with another and judged, or mixtures of MUSIC's anno/test_sep.csv."""

    def __post_init__(self):
        super().__post_init__()
        if self.pairs < 2:
            raise ValueError(f"--pairs must be 2 or more, got {self.pairs}")


@dataclass(kw_only=True)
class SceneConfig(TaskConfig):
    """Settings that localization and segmentation have in common."""

    demos = {"binding": "many"}

    data_set: DataSet = "auto"
    """Leave it at auto, which tells by the files: other sets have no annotated pictures."""
    train_split: Annotated[str, SAID] = ""
    """The split to train on: train, which is the default."""
    missing: Literal["drop", "keep"] = "drop"
    """Leave it at drop: each annotated picture needs its sound."""
    modalities: Literal["both", "image"] = "both"
    """What the model gets: "image" is the control, to which every sound is silence."""
    warmup_epochs: int = 1
    """Epochs of linear warm-up before the cosine decay; the paper names none."""
    batch_size: int = 8
    """Clips per step; the paper's are 128."""
    checkpoint_every: int = 320

    def __post_init__(self):
        super().__post_init__()
        check_rules(self)
        if self.missing != "drop":
            raise ValueError(f"--missing {self.missing}: each annotated picture needs its sound")
        if self.train_split not in ("", "train"):
            raise ValueError(f"--train-split must be train with annotated pictures, got {self.train_split!r}")
        if self.data_set not in ("auto", "sounding-shapes"):
            raise ValueError(f"--data-set {self.data_set} has no annotated pictures: leave it at auto")


@dataclass(kw_only=True)
class LocalizeConfig(SceneConfig):
    """Localize sound sources: a map of cosines between the sound and each place of the picture.

    Without arguments it trains on Sounding Shapes, the embedded data set, in which one of three objects
    sounds. With --data it takes Flickr-SoundNet (folders frames, audio, Annotations) or VGG-SS (frames,
    audio, vggss.json), of which flickr_test.csv or vggss_test.csv beside them says what is tested on.
    --modalities image trains the control, which never hears the sound: what is above it, the sound has told.

    `ciou` and `auc` follow the protocol of Flickr-SoundNet, see `consensus_iou`. It calls half of every
    picture sounding, which no box of Sounding Shapes comes near: there, look at `pointing`, the share of
    pictures whose highest point lies in a box, which a guess among the objects brings to a third (of
    synchrony, to a quarter).
    Those that begin with `attention` are of the map that needs no labels: where the fusion tokens look. Of
    several frames (--frames, on Sounding Shapes) there is a map for each, and the metrics are their means.

    Run `python -m avfuse.tasks.segment` first: from the encoder that it leaves in runs/segment the tiny model
    learns which of the objects sounds; from 256 clips it has learned just where objects are.
    """

    kind, starts = "localize", AFTER_SEGMENTING

    data: Annotated[Path | None, SAID] = None
    """Flickr-SoundNet, VGG-SS or Sounding Shapes. Default: the latter, built once."""
    test_share: Annotated[float, Rule("must be in (0, 1]", lambda value: 0 < value <= 1)] = 0.5
    """Share of the pictures of Flickr-SoundNet or VGG-SS to test on, where no list says which; the names
    decide. 1 takes --epochs 0."""
    protocol: Annotated[Literal["flickr-soundnet", "slavc"], Formerly("flickr-soundnet")] = "flickr-soundnet"
    """Definition of the metrics. slavc, that of the extended sets, adds pictures with the sound of another
    clip (flickr_test_plus_silent.csv, vggss_test_plus_silent.csv), AP and max-F1."""
    dim: Annotated[int, COUNT] = 128
    """Width of the space in which sound and places are compared."""

    epochs: Annotated[int, NOT_NEGATIVE] = 6
    """Passes over the clips; the paper's are 30. 0 = judge --checkpoint as it is, on all test pictures."""
    min_steps: int = 1024
    base_lr: float = 1.6e-2
    """Learning rate per 256 clips: lr = base_lr * batch / 256. The paper's is 1e-4 for its batch of 128,
    which is 2e-4 here; a tiny model on a small set wants a larger one."""

    def __post_init__(self):
        super().__post_init__()
        if self.test_share == 1 and self.epochs:
            raise ValueError("--test-share must be below 1, or nothing is trained on (--epochs 0)")


@dataclass(kw_only=True)
class SegmentConfig(SceneConfig):
    """Segment what sounds: its class at every pixel, or with --target binary just a mask of it.

    Without arguments it trains on Sounding Shapes, the embedded data set, in which one of three objects
    sounds, and the classes are their shapes. With --data it takes AVSBench (metadata.csv, label2idx.json):
    --target binary --subset S4 and --target semantic --subset AVSS are the paper's two tasks.

    --modalities image trains the control, which never hears the sound: what is above it, the sound has told.
    The demo's target is semantic, because classes teach a fresh model in minutes what each sound looks like;
    masks alone have not been seen to.

    Papers disagree about the metrics, so --protocol names them: see `avsbench_iou`, `f_curve`, `both_iou` and
    `class_scores` in avfuse/tasks/segment.py for the definitions.
    """

    kind, starts = "segment", dict.fromkeys(TaskConfig.starts, ())  # fresh weights, as was measured

    warmup_epochs: int = 6
    """Epochs of linear warm-up before the cosine decay; the paper names none. After 1, what begins
    with the encoder learned less (docs/tasks.md)."""

    data: Annotated[Path | None, SAID] = None
    """AVSBench or Sounding Shapes. Default: the latter, built once."""
    test_share: tyro.conf.Suppress[float] = 0.0  # AVSBench has a split of its own
    target: Literal["binary", "semantic"] = "semantic"
    """Sounding or not (S4, MS3), or its class (AVSS)."""
    protocol: Literal["avsbench", "deepavfusion"] = "avsbench"
    """Definition of the metrics: that of the data set, or the other one (binary only), of which the paper's
    89.94 probably is."""
    subset: Literal["S4", "MS3", "AVSS"] = "S4"
    """Part of AVSBench: single sources, several, or all (with --target semantic)."""
    dim: Annotated[int, COUNT] = 64
    """Width of the decoder after its first block; twice that before, half after the last."""

    epochs: int = 12
    """Passes over the clips; the paper's are 20, the released code's 100."""
    min_steps: int = 2048
    batch_size: int = 8
    """Clips per step; the paper's are 128, the released code's 512."""
    base_lr: float = 2.2e-2
    """Learning rate per 256 clips: lr = base_lr * batch / 256. The paper's is 1e-4 for its batch of 128, the
    released code's 2e-4 here; a tiny model on a small set wants a larger one."""
    layer_decay: float = 1.0
    """Factor of the learning rate from each layer to the one below it; the released code's is 0.75."""

    def __post_init__(self):
        super().__post_init__()
        if self.target == "semantic" and self.protocol != "avsbench":
            raise ValueError(f"--protocol {self.protocol} does not define --target semantic; avsbench does")
