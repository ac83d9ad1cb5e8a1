"""Pretrain an audio-visual masked autoencoder: `python -m avfuse.train`."""

import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from .data.clips import ClipDataset
from .data.find import Found
from .files import printable
from .mae import AVMAE
from .training.evaluate import INPUTS, describe_measures, flat, measures
from .training.loop import Run, Task, evaluation_batches, program, set_up, train
from .training.pictures import draw_attention, draw_losses, draw_reconstructions
from .training.recipes import TrainConfig, check_recipe, count_parameters, make_model, parse, plan
from .training.report import write_report
from .weights import load_audio_weights, load_image_weights


def main(config: TrainConfig) -> int:
    """Pretrains to the end, and returns 0; or until a signal asks to stop, and returns 128 + its number.

    Raises:
        ValueError: a setting or folder is wrong; nothing was written or deleted.
        RunError: the run could not go on; the message says why.
    """
    check_recipe(config)
    return train(set_up(config, Pretraining))


class Pretraining(Task):
    """Masked autoencoding (paper Sec. 3.2): rebuild the hidden patches of image and spectrogram."""

    def __init__(self, config: TrainConfig, found: Found):
        self.config, self.found = config, found
        self.model = make_model(config)
        load_branch("--image-weights", load_image_weights, self.model, config.image_weights)
        load_branch("--audio-weights", load_audio_weights, self.model, config.audio_weights)

    def describe(self) -> str:
        sizes = [f"{count_parameters(module) / 1e6:.1f} M" for module in (self.model.encoder, self.model)]
        return (
            f"{self.config.model} model, {self.config.interactions}: {sizes[0]} parameters in the encoder, "
            f"{sizes[1]} with decoders"
        )

    def dataset(self, clips, *, train):
        """Clips with masks, which are drawn from (seed, epoch, clip)."""
        settings, masks = self.model.encoder.inputs, self.model.mask_sampler()
        return ClipDataset(clips, settings, train=train, seed=self.config.seed, extras=masks)

    def inputs(self, batch):
        """What the model is called with. A blank is present in no modality and so without a loss."""
        everywhere = [name for name in ("image_present", "audio_present") if batch[name].all()]
        return {name: batch[name] for name in INPUTS if name not in everywhere}  # no mask: a faster path

    def counts(self, inputs):
        """Over how many patches each modality has a loss."""
        return {f"{name}_loss": count_hidden(inputs, name) for name in ("image", "audio")}

    def losses(self, model, inputs):
        output = model(**inputs)
        return dict(image_loss=output.image_loss, audio_loss=output.audio_loss)

    def parameter_groups(self, weight_decay):
        """The model's groups, with those of transformers that start from weights apart (`ramp`)."""
        encoder, config = self.model.encoder, self.config
        branches = (encoder.image, config.image_weights), (encoder.audio, config.audio_weights)
        pretrained = {id(p) for vit, weights in branches if weights is not None for p in vit.parameters()}
        groups = []
        for group in self.model.parameter_groups(weight_decay):
            for ramp in False, True:
                parameters = [p for p in group["params"] if (id(p) in pretrained) == ramp]
                if parameters:
                    groups.append(group | dict(params=parameters, ramp=ramp))
        return groups

    def measure(self, run, model, step, when):
        """Held-out loss, nearest-neighbour probe, pictures, report: by the main process, the others wait."""
        if not run.accelerator.is_main_process:
            return []
        device, folder, named = run.accelerator.device, run.config.run, run.found.test_name
        indices = range(min(len(run.found.test), run.config.probe_clips))
        batches = list(evaluation_batches(run, indices))
        failures = [failure for batch in batches for failure in batch["failures"]]
        batches = [batch for batch in batches if len(batch["index"])]
        if batches:
            row = measures(model, batches, device)
            model.facts = self.facts(run, step, row)
            tqdm.write(describe_measures(row, when, named))
            run.metrics.write(step=step, when=when, clips=named, **row)
            run.accelerator.log(flat(row), step=step)
        else:
            tqdm.write(f"{when} training: none of the {named} to measure on could be read")
        if when == "after":
            model.save_pretrained(folder / "model")
        draw(folder, model, batches, step, device)
        return failures

    def facts(self, run: Run, step: int, row: dict) -> dict:
        """What the model card tells of the run."""
        told = (
            "model",
            "interactions",
            "epochs",
            "batch_size",
            "base_lr",
            "weight_decay",
            "precision",
            "seed",
        )
        found, config = run.found, self.config
        return dict(
            recipe={name: getattr(config, name) for name in told} | dict(preset=config.preset, steps=step),
            data=dict(
                name=config.data.name if config.data else "Sounding Shapes",
                clips=len(found.train),
                coverage={
                    side: f"{there} of {expected}" for side, (there, expected) in found.coverage.items()
                },
            ),
            metrics=flat(row),
        )


def count_hidden(inputs: dict[str, Tensor], name: str) -> int:
    """Over how many patches of one modality a batch has a loss."""
    removed, present = inputs[f"{name}_removed"], inputs.get(f"{name}_present")
    return int(removed.sum() if present is None else removed[present].sum())


def load_branch(option: str, load: Callable, mae: AVMAE, path: Path | None) -> None:
    """Starts a transformer from the weights in a file, if one is given; one process says what of them."""
    if path is None:
        return
    try:
        load(mae, path, say=print if os.environ.get("RANK", "0") == "0" else lambda table: None)
    except (OSError, ValueError) as error:
        raise ValueError(f"{option} {path}: {error}") from error


def draw(folder: Path, mae: AVMAE, batches: list[dict], step: int, device: torch.device) -> None:
    """Loss curves, reconstructions, attention maps where there is fusion, and the report that shows them."""
    pictures = folder / "pictures"
    try:
        draw_losses(folder / "metrics.jsonl", pictures / "losses.png")
        for batch in batches[:1]:
            batch = {name: value.to(device) for name, value in batch.items() if torch.is_tensor(value)}
            draw_reconstructions(mae, batch, pictures / f"reconstructions-{step:06d}.png")
            if mae.encoder.fusion_layers:
                draw_attention(mae.encoder, batch, pictures / f"attention-{step:06d}.png")
        write_report(folder)
    except OSError as error:  # a full disk: no picture is worth a run
        tqdm.write(f"pictures could not be drawn: {error}")


def cli() -> int | str:
    """The command line: what to exit with."""
    config = parse()
    try:
        check_recipe(config)
        if config.plan:
            if os.environ.get("RANK", "0") == "0":
                print(plan(config, processes=int(os.environ.get("WORLD_SIZE", 1))))
            return 0
    except (ValueError, OSError) as error:
        return f"error: {printable(error)}"
    return program(config, Pretraining)


if __name__ == "__main__":
    sys.exit(cli())
