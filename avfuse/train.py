"""Pretrain an audio-visual masked autoencoder: `python -m avfuse.train`."""

from .command import begin
from .training.recipes import TrainConfig, check_cuda_graphs, parse
from .training.settings import checked

if __name__ == "__main__":
    begin("avfuse.train", checked(parse), "cli", explained=())

import math
import os
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from .data.clips import ClipDataset
from .data.find import Found
from .encoder import AVEncoder
from .files import printable
from .graphs import TrainingGraphs
from .mae import AVMAE
from .training.costs import count_parameters
from .training.features import pool, without_absent
from .training.judge import JudgedTask, first_clips, to_columns, to_rows
from .training.looks import Sources, looks, most_looking
from .training.loop import program, set_up, train
from .training.neighbours import interval, nearest_neighbour_probes
from .training.pictures import draw_attention, draw_reconstructions
from .training.plan import make_model, plan
from .training.report import held_out
from .training.run_folder import has_begun, read_run
from .training.settings import FRESH
from .training.task import Task
from .weights import load_audio_weights, load_image_weights

NO_BETTER = 0.99  # of the loss of predicting zero
NO_LABELS = (
    "labels: none, and pretraining needs none; avfuse classify and retrieve take sub-folders for classes"
)
PRESENT = ("image_present", "audio_present")
INPUTS = ("image", "audio", "image_removed", "audio_removed", *PRESENT)


def main(config: TrainConfig) -> int:
    """Pretrains to the end, and returns 0; or until a signal asks to stop, and returns 128 + its number.

    Raises:
        ValueError: a setting or folder is wrong; nothing was written or deleted.
        RunError: the run could not go on; the message says why.
    """
    return train(set_up(config, Pretraining))


class Pretraining(JudgedTask):
    """Masked autoencoding (paper Sec. 3.2): rebuild the hidden patches of image and spectrogram."""

    name = "pretraining"
    protocol = (
        "mean squared error over the hidden patches of the clips that have the modality, beside that of "
        "predicting zero; label of the nearest other clip by the cosine of mean-pooled tokens, sum = the "
        "three cosines added"
    )
    recipe = ("model", "interactions", *JudgedTask.recipe[1:], "preset")

    def __init__(self, config: TrainConfig, found: Found):
        super().__init__(config, found)
        self.model, self.graphs, self.layer = make_model(config), None, None
        self.has_unused_parameters = self.model.settings["decode_from"] == "fusion"
        if config.checkpoint != FRESH:
            self.recipe = ("checkpoint", *JudgedTask.recipe[1:], "preset")
        encoder = self.model.encoder
        inputs = encoder.given_inputs
        load_branch("--image-weights", load_image_weights, self.model, config.image_weights)
        load_branch("--audio-weights", load_audio_weights, self.model, config.audio_weights)
        if config.image_weights and not config.restart and has_begun(config.run):
            # The run goes on as it began, whatever is told beside the weights by now.
            encoder.given_inputs = read_run(config.run).get("inputs") or inputs
        has_looks = encoder.shows_attention and encoder.given_inputs is not None
        self.sources = Sources(found.test, encoder) if has_looks else None

    @staticmethod
    def find(config, say):
        check_cuda_graphs(config, processes=int(os.environ.get("WORLD_SIZE", 1)))
        if config.cuda_graphs and not torch.cuda.is_available():
            raise ValueError("--cuda-graphs needs a CUDA device, and there is none")
        found = first_clips(Task.find(config, say), config.probe_clips)
        if not found.classes:
            say(NO_LABELS)
        return found

    def describe(self) -> str:
        sizes = [f"{count_parameters(module) / 1e6:.1f} M" for module in (self.model.encoder, self.model)]
        config, encoder = self.config, self.model.encoder
        size = f"{config.model} model" if config.checkpoint == FRESH else f"model of {config.checkpoint}"
        interactions = encoder.settings["interactions"]
        if encoder.frames > 1:
            interactions += f", {encoder.frames} frames"
        return f"{size}, {interactions}: {sizes[0]} parameters in the encoder, {sizes[1]} with decoders"

    def dataset(self, clips, *, train):
        """Clips with masks, which are drawn from (seed, epoch, clip)."""
        settings, masks = self.model.encoder.inputs, self.model.mask_sampler()
        still = self.model.encoder.settings["pair_bias"] == "time"
        return ClipDataset(clips, settings, train=train, seed=self.config.seed, extras=masks, still=still)

    def inputs(self, batch):
        """What the model is called with. A blank is present in no modality and so without a loss."""
        if self.config.cuda_graphs and self.config.missing == "keep":  # each batch is of the same kind
            return {name: batch[name] for name in INPUTS}
        everywhere = [name for name in PRESENT if batch[name].all()]
        return {name: batch[name] for name in INPUTS if name not in everywhere}  # no mask: a faster path

    def counts(self, inputs):
        """Over how many patches each modality has a loss, and over how many clips the contrastive term."""
        counts = {f"{name}_loss": count_hidden(inputs, name) for name in ("image", "audio")}
        return counts | (dict(contrastive_loss=count_paired(inputs)) if self.config.contrastive else {})

    def losses(self, model, inputs):
        if self.config.cuda_graphs and torch.is_grad_enabled():
            self.graphs = model = self.graphs or TrainingGraphs(model)
        output = model(**inputs)
        losses = dict(image_loss=output.image_loss, audio_loss=output.audio_loss)
        return losses | (dict(contrastive_loss=output.contrastive_loss) if self.config.contrastive else {})

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

    def judge(self, model, inputs, batch):
        """Both losses of each clip, those of predicting zero, its pooled tokens and its labels."""
        output = model(**inputs)
        columns = {name: batch[name] for name in batch if name.startswith(("label_", *PRESENT))}
        for name in "image", "audio":
            pred, removed = getattr(output, f"{name}_pred"), inputs[f"{name}_removed"]
            for kind, guess in ("loss", pred), ("zero", torch.zeros_like(pred)):
                clips = zip(inputs[name].split(1), guess.split(1), removed.split(1), strict=True)
                columns[f"{name}_{kind}"] = torch.stack([model.loss(name, *clip, None) for clip in clips])
        present = {name: inputs.get(name) for name in PRESENT}
        pooled = pool(model.encoder(inputs["image"], inputs["audio"], **present))
        pooled = {name: mean.float() for name, mean in pooled.items()}
        columns |= without_absent(pooled, *(batch[name].to(output.loss.device) for name in PRESENT))
        if self.sources:
            columns |= self.looks(model.encoder, inputs, batch["index"])
        return to_rows(columns)

    def looks(self, encoder: AVEncoder, inputs: dict[str, Tensor], indices: Tensor) -> dict[str, Tensor]:
        """How much fusion tokens look at what sounds in these test clips."""
        shown = {name: inputs[name] for name in ("image", "audio", *PRESENT) if name in inputs}
        return looks(encoder, shown, self.sources.boxes(indices))

    def summarize(self, rows):
        """The held-out losses, each a mean over the clips that have the modality, if any has; the probes."""
        columns, metrics = to_columns(rows), dict(held_out_clips=len(rows))
        there = [name for name in ("image", "audio") if columns[f"{name}_present"].any()]
        for kind in "loss", "zero":
            for name in there:
                losses = columns[f"{name}_{kind}"][columns[f"{name}_present"]]
                metrics[f"held_out_{name}_{kind}"] = losses.double().mean().item()
        if "even" in columns:
            shares = [name for name in columns if name == "even" or name.startswith("look_")]
            means = {name: columns[name].double().nanmean().item() for name in shares}
            metrics |= {} if math.isnan(means["even"]) else dict(looks=means)
            self.layer = most_looking(**{name: columns[name] for name in shares})
        return metrics | dict(probes=nearest_neighbour_probes(columns))

    def tables(self, metrics):
        losses = [("held-out loss", "loss", "predicting zero", "share")]
        losses += [(name, *of) for name, of in held_out(metrics).items()]
        probes = []
        for label, by_feature in metrics["probes"].items():
            rows = [(f"nearest clip, {label}", "accuracy", "95 % interval")]
            rows += [(name, p["accuracy"], interval(*p["interval"])) for name, p in by_feature.items()]
            probes.append([*rows, ("random clip", by_feature["image"]["chance"], None)])
        if found := metrics.get("looks"):
            rows = [("look at what sounds", "share of attention")]
            rows += [
                (f"fusion tokens, layer {name.removeprefix('look_')}", share)
                for name, share in found.items()
                if name != "even"
            ]
            probes.append([*rows, ("its share of the picture", found["even"])])
        return [losses, *probes]

    def doubt(self, metrics):
        losses = held_out(metrics)
        losses.pop("both", None)
        useless = [
            f"{name} {loss:.3f}" for name, (loss, zero, _) in losses.items() if loss > NO_BETTER * zero > 0
        ]
        return f"no better than predicting zero: the loss of {' and '.join(useless)}" if useless else ""

    def numbers(self, metrics):
        numbers = {name: value for name, value in metrics.items() if name not in ("probes", "looks")}
        looks = {name: share for name, share in metrics.get("looks", {}).items() if name != "even"}
        numbers |= {f"{name}_at_source": share for name, share in looks.items()}
        for label, by_feature in metrics["probes"].items():
            numbers |= {f"probe_{label}_{feature}": p["accuracy"] for feature, p in by_feature.items()}
        return numbers

    def record(self, judged, metrics):
        return metrics

    def draw(self, folder, model, inputs, batch, step):
        """Reconstructions, and attention maps where there is fusion."""
        draw_reconstructions(model, inputs, folder / f"reconstructions-{step:06d}.png")
        if model.encoder.shows_attention:
            draw_attention(model.encoder, inputs, folder / f"attention-{step:06d}.png", layer=self.layer)


def count_hidden(inputs: dict[str, Tensor], name: str) -> int:
    """Over how many patches of one modality a batch has a loss."""
    removed, present = inputs[f"{name}_removed"], inputs.get(f"{name}_present")
    return int(removed.sum() if present is None else removed[present].sum())


def count_paired(inputs: dict[str, Tensor]) -> int:
    """How many clips of a batch have both modalities."""
    paired = torch.ones(len(inputs["image"]), dtype=torch.bool)
    for name in PRESENT:
        paired &= inputs.get(name, True)
    return int(paired.sum())


def load_branch(option: str, load: Callable, mae: AVMAE, path: Path | None) -> None:
    """Starts a transformer from the weights in a file, if one is given; one process says what of them."""
    if path is None:
        return
    try:
        load(mae, path, say=print if os.environ.get("RANK", "0") == "0" else lambda table: None)
    except (OSError, ValueError) as error:
        raise ValueError(f"{option} {path}: {error}") from error


def cli(config: TrainConfig) -> int | str:
    """The work of a command line: what to exit with."""
    if not config.plan:
        return program(config, Pretraining)
    try:
        if os.environ.get("RANK", "0") == "0":
            print(plan(config, processes=int(os.environ.get("WORLD_SIZE", 1))))
    except (ValueError, OSError) as error:
        return f"error: {printable(error)}"
    return 0
