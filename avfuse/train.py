"""Pretrain an audio-visual masked autoencoder: `python -m avfuse.train`."""

import json
import math
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch.utils.data import DataLoader
from tqdm import tqdm

from .data import sounding_shapes
from .data.clips import ClipDataset, ClipSampler, Scan, collate, find_clips, scan_clips, worker_init
from .evaluate import INPUTS, held_out_loss, nearest_neighbour_probes, pooled_features
from .inputs import InputSettings
from .mae import AVMAE
from .pictures import draw_attention, draw_losses, draw_reconstructions
from .presets import create_encoder
from .run_folder import (
    MetricsFile,
    Quarantine,
    begin_run,
    check_run,
    epoch_of,
    latest_checkpoint,
    save_checkpoint,
)

DEMO = Path("data/sounding-shapes")


@dataclass
class TrainConfig:
    """Pretrain an audio-visual early-fusion transformer by masked autoencoding (DeepAVFusion, Sec. 3.2).

    Without arguments it builds the embedded data set, Sounding Shapes, under data/, pretrains the "tiny"
    model on it for a few minutes (no GPU needed), and writes everything to runs/demo. With --data it trains
    on the videos of any folder. Run the same command again to resume an interrupted run, or add --restart to
    begin anew.

    Several processes or GPUs: accelerate launch -m avfuse.train ...
    """

    data: Path | None = None
    """Folder of videos (searched recursively; train/ and test/ inside it are the splits). Default: Sounding
    Shapes, built once."""
    run: Path = Path("runs/demo")
    """Run folder: config, metrics, checkpoints, pictures, final model."""
    restart: bool = False
    """Delete what the run folder holds and begin anew."""

    model: Literal["tiny", "small", "base", "large"] = "tiny"
    """Size of both transformers; the paper's is base."""
    interactions: Literal["dense", "bilinear", "factorized", "token", "none"] = "dense"
    """How fusion tokens read image and audio tokens; dense is exact over all pairs."""
    fusion_layers: tuple[int, ...] = ()
    """0-based layers that fuse; default: all (early fusion)."""
    fusion_tokens: int = 16
    """Number of fusion tokens (the paper's)."""
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

    epochs: int = 60
    """Passes over the data; the paper's are 200 (VGGSound ablation)."""
    warmup_epochs: int = 6
    """Epochs of linear warm-up before the cosine decay; the paper's are 40 of 200."""
    batch_size: int = 64
    """Clips per step and process; a smaller data set shrinks it. The paper's effective batch is 512."""
    base_lr: float = 6e-3
    """Learning rate per 256 clips: lr = base_lr * batch / 256. The paper's is 1.5e-4; a tiny model on a small
    set wants a larger one."""
    weight_decay: float = 0.05
    """AdamW weight decay; biases and norms are left out (the paper's)."""
    clip_grad: float = 1.0
    """Largest gradient norm; 0 = no clipping."""
    precision: Literal["no", "fp16", "bf16"] = "no"
    """Mixed precision of Accelerate."""
    grad_checkpointing: bool = False
    """Recompute activations in the backward: less memory, more time."""

    missing: Literal["drop", "keep"] = "drop"
    """A clip without sound or without pictures: drop it (counted and named), or keep it with that modality
    absent.
    """
    workers: Annotated[int, tyro.conf.arg(aliases=["-j"])] = 2
    """Processes that read clips."""
    seed: int = 0
    """Seed of weights, masks, crops and order."""
    probe_clips: int = 256
    """Held-out clips for the loss and the nearest-neighbour probe, before and after."""


def main(config: TrainConfig) -> None:
    check_config(config)
    accelerator = Accelerator(
        mixed_precision=config.precision,
        log_with="tensorboard",
        project_dir=config.run,
        step_scheduler_with_optimizer=False,
    )
    say = accelerator.print
    set_seed(config.seed)

    settings = run_settings(config)
    check_run(config.run, settings, config.restart)

    # --- data ---
    with accelerator.main_process_first():
        train_scan, test_scan, test_name = find_data(config, say)
    train_clips, test_clips = train_scan.clips, test_scan.clips[: config.probe_clips]
    batch_size = min(config.batch_size, len(train_clips))
    if batch_size < config.batch_size:
        say(f"batch size {batch_size}: the data set is smaller than --batch-size {config.batch_size}")

    # --- model ---
    encoder = create_encoder(
        config.model,
        config.interactions,
        fusion_layers=config.fusion_layers or "all",
        fusion_tokens=config.fusion_tokens,
        attn_ratio=config.attn_ratio,
        mlp_ratio=config.mlp_ratio,
    )
    encoder.set_grad_checkpointing(config.grad_checkpointing)
    mae = AVMAE(
        encoder,
        decoder_dim=config.decoder_dim,
        decoder_depth=config.decoder_depth,
        decoder_heads=config.decoder_heads,
        image_mask_ratio=config.image_mask_ratio,
        audio_mask_ratio=config.audio_mask_ratio,
    )
    say(
        f"{config.model} model, {config.interactions}: {count_parameters(encoder)} in the encoder, "
        f"{count_parameters(mae)} with decoders, on {accelerator.device}"
    )

    # --- loaders, optimizer, schedule ---
    loader = make_loader(train_clips, mae, config, batch_size, train=True)
    test_loader = make_loader(test_clips, mae, config, batch_size, train=False)
    effective_batch = batch_size * accelerator.num_processes
    optimizer = torch.optim.AdamW(
        mae.parameter_groups(config.weight_decay),
        lr=config.base_lr * effective_batch / 256,
        betas=(0.9, 0.95),
    )
    model, optimizer, loader = accelerator.prepare(mae, optimizer, loader)
    steps_per_epoch = len(loader)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, WarmupCosine(config.warmup_epochs * steps_per_epoch, config.epochs * steps_per_epoch)
    )
    schedule = accelerator.prepare(schedule)

    # --- run folder: now that data and model are in order, begin, or resume what is there ---
    with accelerator.main_process_first():
        if accelerator.is_main_process:
            begin_run(config.run, settings, config.restart, accelerator.device)
    quarantine = Quarantine(config.run / "quarantine.jsonl")
    quarantine.add("scan", train_scan.unreadable + test_scan.unreadable)
    checkpoint, first_epoch = latest_checkpoint(config.run), 0
    if checkpoint is not None:
        accelerator.load_state(checkpoint)
        first_epoch = epoch_of(checkpoint)
        say(f"resuming after epoch {first_epoch} of {config.epochs}, from {checkpoint}")
    metrics = MetricsFile(
        config.run / "metrics.jsonl", accelerator.is_main_process, first_epoch * steps_per_epoch
    )
    accelerator.init_trackers("tensorboard")

    # --- before: what chance and an untrained model reach ---
    if first_epoch == 0 and accelerator.is_main_process:
        measure(0, "before", accelerator, mae, test_loader, test_name, quarantine, metrics)
    accelerator.wait_for_everyone()

    # --- train ---
    progress = tqdm(
        total=config.epochs * steps_per_epoch,
        initial=first_epoch * steps_per_epoch,
        desc="training",
        unit="step",
        disable=not accelerator.is_main_process,
    )
    step = first_epoch * steps_per_epoch
    for epoch in range(first_epoch, config.epochs):
        model.train()
        loader.set_epoch(
            epoch
        )  # which passes it to the sampler; by itself it would count from 0 after a resume
        for batch in quarantine.watch(loader, f"epoch {epoch}"):
            if "image" in batch:
                output = model(**{name: batch[name] for name in INPUTS})
                accelerator.backward(output.loss)
                if config.clip_grad:
                    accelerator.clip_grad_norm_(model.parameters(), config.clip_grad)
                optimizer.step()
                optimizer.zero_grad()
                row = dict(
                    loss=output.loss.item(),
                    image_loss=output.image_loss.item(),
                    audio_loss=output.audio_loss.item(),
                    lr=schedule.get_last_lr()[0],
                )
                metrics.write(step=step + 1, epoch=epoch, clips=len(batch["image"]), **row)
                accelerator.log(row, step=step + 1)
                progress.set_postfix(loss=f"{row['loss']:.3f}", refresh=False)
            schedule.step()
            step += 1
            progress.update()
        save_checkpoint(accelerator, config.run, epoch + 1)
    progress.close()

    # --- after: the same measures, pictures, the model ---
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        measure(step, "after", accelerator, mae, test_loader, test_name, quarantine, metrics)
        draw_pictures(config.run, mae, test_loader, accelerator.device)
        mae.save_pretrained(config.run / "model")
        say(quarantine.summary())
        say(f"done: pictures in {config.run}/pictures, model in {config.run}/model (AVMAE.from_pretrained)")
    accelerator.end_training()


# --- settings -----------------------------------------------------------------------------------------------


def run_settings(config: TrainConfig) -> dict:
    """What must be the same for a run to be resumed, ready for JSON."""
    data = None if config.data is None else str(config.data.resolve())
    settings = asdict(config) | dict(data=data)
    for name in ("run", "restart", "workers"):
        del settings[name]
    return json.loads(json.dumps(settings))


def check_config(config: TrainConfig) -> None:
    for name in ("epochs", "batch_size", "probe_clips"):
        if getattr(config, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be positive, got {getattr(config, name)}")
    for name in ("warmup_epochs", "workers", "clip_grad", "weight_decay", "base_lr"):
        if getattr(config, name) < 0:
            raise ValueError(f"--{name.replace('_', '-')} must not be negative, got {getattr(config, name)}")


# --- data ---------------------------------------------------------------------------------------------------


def find_data(config: TrainConfig, say) -> tuple[Scan, Scan, str]:
    """Clips to train on, clips to evaluate on, and what to call the latter."""
    root = config.data
    if root is None:
        root = sounding_shapes.generate(DEMO)
    if sounding_shapes.is_built(root):
        splits = [
            scan_clips(sounding_shapes.clips(root, split), missing=config.missing)
            for split in ("train", "test")
        ]
    elif (root / "train").is_dir() and (root / "test").is_dir():
        splits = [find_clips(root / split, missing=config.missing) for split in ("train", "test")]
    else:
        scan = find_clips(root, missing=config.missing)
        say(scan.summary())
        say("no train/ and test/ inside: what is measured before and after is the training clips themselves")
        return scan, scan, "training clips"
    for name, scan in zip(("train", "test"), splits, strict=True):
        say(f"{name}: {scan.summary()}")
    return *splits, "held-out clips"


def make_loader(clips, mae: AVMAE, config: TrainConfig, batch_size: int, *, train: bool) -> DataLoader:
    """A loader of clips, with the masks of each drawn from (seed, epoch, clip)."""
    inputs: InputSettings = mae.encoder.inputs
    dataset = ClipDataset(clips, inputs, train=train, seed=config.seed, extras=mae.mask_sampler())
    sampler = ClipSampler(dataset, train=train, seed=config.seed)
    return DataLoader(
        dataset,
        batch_size=batch_size,
        sampler=sampler,
        drop_last=train,
        num_workers=config.workers,
        persistent_workers=train and config.workers > 0,
        collate_fn=collate,
        worker_init_fn=worker_init,
        pin_memory=torch.cuda.is_available(),
    )


# --- schedule -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class WarmupCosine:
    """Share of the peak learning rate at a step: linear from 0, then half a cosine down to 0."""

    warmup: int
    total: int

    def __call__(self, step: int) -> float:
        if step < self.warmup:
            return (step + 1) / self.warmup
        return 0.5 * (1 + math.cos(math.pi * (step - self.warmup) / max(1, self.total - self.warmup)))


# --- reports ------------------------------------------------------------------------------------------------


def measure(step, when, accelerator, mae, loader, name, quarantine, metrics) -> None:
    """Prints and records the loss beside that of predicting zero, and the nearest-neighbour probe with its
    chance.
    """
    loss = held_out_loss(mae, quarantine.watch(loader, when), accelerator.device)
    features = pooled_features(mae.encoder, loader, accelerator.device)
    probes = nearest_neighbour_probes(features)
    lines = [
        f"{when} training, {loss.clips} {name}: loss {loss.total:.3f} (image {loss.image:.3f}, "
        f"audio {loss.audio:.3f}), {loss.ratio:.2f} of predicting zero ({loss.zero:.3f})"
    ]
    for label, by_feature in probes.items():
        cells = [f"{feature} {p.accuracy:.3f} ± {p.standard_error:.3f}" for feature, p in by_feature.items()]
        chance = by_feature["image"].chance
        lines.append(f"  nearest neighbour, {label}: {', '.join(cells)} (chance {chance:.3f})")
    tqdm.write("\n".join(lines))
    held_out = dict(
        held_out_image_loss=loss.image,
        held_out_audio_loss=loss.audio,
        held_out_image_zero=loss.image_zero,
        held_out_audio_zero=loss.audio_zero,
    )
    accuracies = {
        f"probe_{label}_{feature}": probe.accuracy
        for label, by_feature in probes.items()
        for feature, probe in by_feature.items()
    }
    details = {label: {f: probe._asdict() for f, probe in by.items()} for label, by in probes.items()}
    metrics.write(step=step, when=when, clips=name, **held_out, probes=details)
    accelerator.log(held_out | accuracies, step=step)


def draw_pictures(run: Path, mae: AVMAE, loader: DataLoader, device: torch.device) -> None:
    """Loss curves, reconstructions, and attention maps where there is fusion."""
    draw_losses(run / "metrics.jsonl", run / "pictures" / "losses.png")
    batch = next((batch for batch in loader if "image" in batch), None)
    if batch is None:
        return
    batch = {name: value.to(device) for name, value in batch.items() if torch.is_tensor(value)}
    draw_reconstructions(mae, batch, run / "pictures" / "reconstructions.png")
    if mae.encoder.fusion_layers:
        draw_attention(mae.encoder, batch, run / "pictures" / "attention.png")


def count_parameters(module: torch.nn.Module) -> str:
    return f"{sum(parameter.numel() for parameter in module.parameters()) / 1e6:.1f} M parameters"


if __name__ == "__main__":
    try:
        main(tyro.cli(TrainConfig, prog="python -m avfuse.train"))
    except (
        ValueError
    ) as error:  # a wrong setting or folder: the message says which, a traceback would hide it
        sys.exit(f"error: {error}")
