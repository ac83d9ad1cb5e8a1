"""Speed, memory and arithmetic of the ways to fuse, against no fusion: the paper's Table 5 here."""

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import measure
import torch
from materialized import PairKeyFusion, PairTokenFusion, folded, with_blocks
from tables import MISSING, spread, terminal, times
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from avfuse import AVMAE, AVEncoder, InputSettings, create_encoder
from avfuse.graphs import CudaGraphs, TrainingGraphs


class Row(NamedTuple):
    """One way to fuse: how the table calls it, and the encoder that does it."""

    label: str
    interactions: str
    pair_bias: bool | str = False
    attn_ratio: float = 0.25
    block: type | None = None  # in place of DenseFusion
    fused: bool = False  # encoder.fused(), for inference
    decoded: bool = False  # decoders carry the fusion tokens, though no block of fusion does; for training


ROWS = {
    "none": Row("no fusion", "none"),
    "none-tokens": Row("no fusion, tokens decoded", "none", decoded=True),
    "joint": Row("joint attention, no fusion tokens", "joint"),
    "cross": Row("cross-attention, no fusion tokens", "cross", attn_ratio=1.0),  # as wide as self-attention
    "cross-narrow": Row("cross-attention, a quarter as wide", "cross"),  # as wide as fusion blocks
    "token": Row("token", "token"),
    "materialized": Row("dense, pair tokens stored (Eq. 4-7)", "dense", block=PairTokenFusion),
    "pair-keys": Row("dense, pair keys stored", "dense", block=PairKeyFusion),
    "factorized": Row("factorized", "factorized"),
    "dense": Row("dense, exact (avfuse)", "dense"),
    "pair-bias": Row("dense with pair bias (avfuse)", "dense", pair_bias=True),
    "time-bias": Row("dense with a bias of time (avfuse)", "dense", pair_bias="time"),
    "none-fused": Row("no fusion, encoder.fused()", "none", fused=True),
    "dense-fused": Row("dense, encoder.fused() (avfuse)", "dense", fused=True),
}
BASELINES = {"none": "speed_over_none", "none-tokens": "speed_over_tokens"}
OF_VIDEO = ("none", "none-tokens", "joint", "token", "materialized", "pair-keys", "dense", "time-bias")
VIDEO = InputSettings(audio_seconds=10.0, hop=200)  # 400 audio tokens, and 196 for each frame
RowName = Literal[*ROWS]
Mode = Literal["inference", "training"]
MODES = {"inference": "Inference", "training": "Training step"}
# Table 5: video/s, GB
PAPER = {"none": (14.5, 10.3), "materialized": (4.3, 31.6), "factorized": (12.8, 13.1)}
PRESETS = {"tiny": "ViT tiny", "small": "ViT-S", "base": "ViT-B", "large": "ViT-L"}
ENDINGS = {"no": "", "cuda-graph": "-graph"}  # of the files of results; otherwise -compiled
CLIPS, COMPARED_FRAMES = 2, 2  # that outputs are compared on, at most
SMALL_DECODER = dict(decoder_dim=128, decoder_depth=2, decoder_heads=4)  # beside "tiny", as in avfuse.train
GRADIENTS = ("fusion_tokens", "image.patch_embed.proj.weight", "audio.patch_embed.proj.weight")


@dataclass(frozen=True)
class Options(measure.Options):
    """Clips per second, peak memory and GFLOP per clip of the ways to fuse, against no fusion (Table 5).

    Inference is the encoder on whole clips. A training step is the masked autoencoder's forward, backward and
    AdamW on random masks; its baseline is an audio-visual autoencoder that has no fusion tokens at all.
    "none-tokens" has them in its decoders: what is slower than that is the encoder's fusion.

    What happens, in this order: arithmetic is counted; memory is measured, each row in a fresh process; the
    outputs and gradients of each row are compared with a float64 model of the same weights that stores every
    pair, and a row that disagrees gets no speed; then all rows are timed in turns, round by round, so that a
    machine that slows down slows all of them. Relative speeds are medians over rounds. Of several batch sizes
    the first comes first for inference and training, then the second; after each the file is written, so that
    a run that is interrupted keeps what it has measured.

    With no arguments it takes less than five minutes on two CPU cores: float32, ViT-B at batch 1 for
    inference, ViT-S at batch 4 for training. On a GPU: bfloat16, ViT-B, and each row at its best batch size.
    """

    preset: Literal["tiny", "small", "base", "large"] | None = None
    """Size of both transformers. Default: base (the paper's); small for training on a CPU."""
    modes: tuple[Mode, ...] = ("inference", "training")
    """What to measure."""
    rows: tuple[RowName, ...] = ()
    """Which rows; "none" is always among them. Default: all; of video, those that say most there."""
    frames: int = 1
    """Of a clip. Several: 10 s of sound instead of 3, so 196 tokens a frame and 400 of sound."""
    batch: tuple[int, ...] = ()
    """Clips in a batch; of several, each row is shown at its fastest. Default: 1 and 4 (training) on a CPU,
    64 128 256 512 on a GPU."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Of the weights in inference, of autocast in training. Default: float32 on a CPU, bfloat16 on a GPU."""
    compile: Literal["no", "default", "reduce-overhead", "max-autotune", "cuda-graph"] = "no"
    """Run the models through torch.compile in this mode; or each as a recorded CUDA graph."""
    seconds: float = 45.0
    """How long each of inference and training is timed, at each batch size; three rounds at least."""
    memory_limit: float | None = None
    """GiB that a row may allocate. Default: what is free."""
    out: Path | None = None
    """File for the results. Default: benchmarks/results/throughput-DEVICE.json, with --compile
    throughput-DEVICE-compiled.json, with cuda-graph throughput-DEVICE-graph.json; of several frames
    throughput-DEVICE-video16.json, and of a --preset its name at the end."""


def main(options: Options) -> dict:
    options = resolve(options)
    record = measure.begin_record("throughput", recorded(options), options.note)
    if options.compile not in ENDINGS:
        # All rows and batch sizes share the code of one forward: past the limit they would run as they are.
        torch._dynamo.config.recompile_limit = 256
        torch._dynamo.config.fail_on_recompile_limit_hit = True
    models = {}
    for mode, batch in in_order(options):
        print(f"\n{mode}: {preset_of(options, mode)}, batch {batch}, {options.dtype}, {options.device}")
        if mode not in record:
            record[mode] = count_mode(options, mode)
        rows = record[mode]["rows"]
        measure_memory(options, mode, batch, rows)
        if mode not in models:
            models[mode] = compared_models(options, mode, rows)
        time_batch(options, mode, batch, rows, models[mode])
        written = measure.write_record(options.out, record)
        print("\n" + terminal([mode_table(written, mode), *summary({"Here": written}, mode)]))
    return record


def resolve(options: Options) -> Options:
    """The options with all defaults filled in that depend on the machine."""
    options = options.on_device()
    name = f"throughput-{options.device}" + ENDINGS.get(options.compile, "-compiled")
    name += f"-video{options.frames}" if options.frames > 1 else ""
    name += f"-{options.preset}" if options.preset else ""
    if options.compile == "cuda-graph" and options.device != "cuda":
        raise ValueError("--compile cuda-graph needs a CUDA device")
    if any(batch < 1 for batch in options.batch):
        raise ValueError(f"--batch must be positive, got {options.batch}")
    return replace(
        options,
        rows=tuple(name for name in ROWS if name in ("none", *(options.rows or rows_by(options.frames)))),
        memory_limit=options.memory_limit or 0.9 * measure.free_memory(options.device),
        out=options.out or measure.RESULTS / f"{name}.json",
    )


def in_order(options: Options) -> list[tuple[Mode, int]]:
    """What to measure, the first batch size of every mode before the second of any."""
    sizes = {mode: batches_of(options, mode) for mode in options.modes}
    most = max(map(len, sizes.values()), default=0)
    return [(mode, sizes[mode][n]) for n in range(most) for mode in sizes if n < len(sizes[mode])]


def recorded(options: Options) -> dict:
    """What of the options belongs into the results."""
    names = "device", "dtype", "compile", "rows", "frames", "seconds"
    settings = {name: getattr(options, name) for name in names}
    return settings | dict(memory_limit_gib=round(options.memory_limit, 1))


def rows_by(frames: int) -> tuple[RowName, ...]:
    """Those that are measured unless others are asked for."""
    return OF_VIDEO if frames > 1 else tuple(name for name in ROWS if name != "time-bias")


def preset_of(options: Options, mode: Mode) -> str:
    small = options.device == "cpu" and (mode == "training" or options.frames > 1)
    return options.preset or ("small" if small else "base")


def batches_of(options: Options, mode: Mode) -> tuple[int, ...]:
    on_cpu = (1,) if mode == "inference" or options.frames > 1 else (4,)
    on_gpu = (64, 128, 256, 512) if options.frames == 1 else (8, 16, 32)
    return options.batch or (on_cpu if options.device == "cpu" else on_gpu)


# --- models -------------------------------------------------------------------------------------------------


class PlainAutoencoder(AVMAE):
    """Two masked autoencoders side by side: no fusion tokens, in the decoders neither."""

    def decode(self, latent, image_keep, audio_keep):
        return super().decode(latent._replace(fusion=latent.fusion[:, :0]), image_keep, audio_keep)


def make_base(preset: str, frames: int) -> AVEncoder:
    """The transformers that all rows share, as an encoder without fusion."""
    return create_encoder(preset, "none", inputs=replace(VIDEO, image_frames=frames) if frames > 1 else None)


def make_encoder(row: Row, base: AVEncoder) -> AVEncoder:
    """The encoder of a row around the transformers of `base`, which it shares."""
    encoder = AVEncoder(
        base.image,
        base.audio,
        interactions=row.interactions,
        pair_bias=row.pair_bias,
        attn_ratio=row.attn_ratio,
        inputs=base.inputs,
    )
    return with_blocks(encoder, row.block) if row.block else encoder


def make_model(row: Row, base: AVEncoder, mode: Mode) -> AVEncoder | AVMAE:
    """What is measured: the encoder, or the masked autoencoder around it, with decoders of its own."""
    encoder = make_encoder(row, base)
    if mode == "inference":
        return encoder.fused() if row.fused else encoder.eval()
    plain = row.interactions in ("none", "joint", "cross") and not row.decoded
    kind = PlainAutoencoder if plain else AVMAE
    return kind(encoder, **(SMALL_DECODER if encoder.embed_dim < 384 else {})).train()


def make_inputs(encoder: AVEncoder, batch: int, device: str = "cpu") -> tuple[torch.Tensor, torch.Tensor]:
    return tuple(torch.randn(batch, *shape, device=device) for shape in encoder.input_shapes.values())


def encoder_of(model) -> AVEncoder:
    return getattr(model, "encoder", model)


def make_step(options: Options, mode: Mode, model, optimizer: torch.optim.Optimizer) -> Callable:
    """A call that encodes images and sounds, in the dtype of the weights, or takes one training step."""
    dtype, run = measure.DTYPES[options.dtype], compiled(model, options.compile, mode)

    def encode(image, audio):
        with torch.inference_mode():
            return run(image.to(dtype), audio.to(dtype))[:3]

    def train(image, audio):
        with torch.autocast(image.device.type, dtype, enabled=dtype.itemsize == 2):
            loss = run(image, audio).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return encode if mode == "inference" else train


def make_optimizer(parameters: Iterable) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-5, weight_decay=0.05, fused=True)


def compiled(model, how: str, mode: Mode):
    if how == "cuda-graph":
        training = mode == "training"
        graphs = TrainingGraphs(model) if training else CudaGraphs(getattr(model, "recorded_forward", model))
        return lambda image, audio, **masks: graphs(image=image, audio=audio, **masks)
    return model if how == "no" else torch.compile(model, mode=how, dynamic=False)


def of_mode(rows: Iterable[RowName], mode: Mode) -> tuple[RowName, ...]:
    """Those of the rows that are there in a mode: some are made for inference, or for training alone."""
    return tuple(
        name for name in rows if not (ROWS[name].decoded if mode == "inference" else ROWS[name].fused)
    )


def placed(model, options: Options, mode: Mode):
    """On the device; in inference in the dtype too, while training keeps float32 weights under autocast."""
    return model.to(options.device, measure.DTYPES[options.dtype] if mode == "inference" else None)


# --- arithmetic and memory ----------------------------------------------------------------------------------


def count_mode(options: Options, mode: Mode) -> dict:
    """The results of inference or training, so far with the arithmetic of each row."""
    preset, rows = preset_of(options, mode), {}
    for name in of_mode(options.rows, mode):
        gflop = gflop_per_clip(ROWS[name], preset, mode, options.frames)
        rows[name] = dict(label=ROWS[name].label, batches={}, gflop_per_clip=gflop)
    return dict(preset=preset, rows=rows)


def gflop_per_clip(row: Row, preset: str, mode: Mode, frames: int = 1) -> float:
    """Counted on the meta device, shapes without numbers, masks and backward included; without the optimizer,
    whose work is per step. A multiply-add is 2. Attention is counted as matrix products, whatever kernel
    runs it.
    """
    with torch.set_grad_enabled(mode == "training"), torch.device("meta"), sdpa_kernel(SDPBackend.MATH):
        model = make_model(row, make_base(preset, frames), mode)
        with FlopCounterMode(display=False) as counter:
            output = model(*make_inputs(encoder_of(model), 1, "meta"))
            if mode == "training":
                output.loss.backward()
    return round(counter.get_total_flops() / 1e9, 2)


def measure_memory(options: Options, mode: Mode, batch: int, rows: dict) -> None:
    """Adds the memory of each row at this batch size, or why it does not fit."""
    for name in (
        bar := tqdm(of_mode(options.rows, mode), desc="memory, in fresh processes", leave=False, disable=None)
    ):
        bar.set_postfix_str(name)
        try:
            used = measure.in_fresh_process(peak_memory, options, name, preset_of(options, mode), mode, batch)
            rows[name]["batches"][batch] = dict(memory_bytes=used)
        except MemoryError as error:
            rows[name]["batches"][batch] = dict(failed=str(error))


def peak_memory(options: Options, name: str, preset: str, mode: Mode, batch: int) -> int:
    """Bytes of the weights and of what two calls need on top; run in a fresh process."""
    measure.limit_memory(options.device, options.memory_limit)
    model = placed(make_model(ROWS[name], make_base(preset, options.frames), mode), options, mode)
    weights = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    clips = make_inputs(encoder_of(model), batch, options.device)
    step = make_step(options, mode, model, make_optimizer(model.parameters()))
    if options.device == "cpu":
        torch.ones(64, 64) @ torch.ones(64, 64)  # starts the threads

    def twice():
        step(*clips)
        step(*clips)

    return weights + measure.peak_memory(twice, options.device)


# --- whether a row computes what it should ------------------------------------------------------------------


def compared_models(options: Options, mode: Mode, rows: dict) -> dict:
    """The models of all rows, after each was compared with the float64 model that stores every pair; adds
    the errors to the rows. Plain PyTorch is that model in the dtype, on the same device.
    """
    models, stored = make_models(options, preset_of(options, mode), mode)
    dtype, none = measure.DTYPES[options.dtype], models["none"]
    image, audio = make_inputs(encoder_of(none), min(CLIPS, max(batches_of(options, mode))))
    removed = draw_masks(none, len(image)) if mode == "training" else {}
    if options.frames > 1:  # of more, float64 pairs would not fit
        image = image[:, :COMPARED_FRAMES]
        removed |= {name: mask[:, :COMPARED_FRAMES] for name, mask in removed.items() if mask.ndim == 3}
    clips = image.to(options.device), audio.to(options.device)
    known = {}  # the dense rows share a reference
    for name, model in models.items():
        kind = ROWS[name].interactions, ROWS[name].pair_bias, ROWS[name].attn_ratio, ROWS[name].decoded
        if kind not in known:
            reference = reference_of(model, ROWS[name], stored)
            plain = outputs(placed(copy.deepcopy(reference), options, mode), *clips, removed, dtype)
            reference.to(options.device, torch.float64)
            double = outputs(reference, *(clip.double() for clip in clips), removed, torch.float64)
            known[kind] = double, plain
        truth, plain = known[kind]
        ours = outputs(model, *clips, removed, dtype, compiled(model, options.compile, mode))
        rows[name] |= measure.agreement(ours, truth, [plain], dtype)
        measure.print_agreement(name, rows[name])
    return models


def make_models(options: Options, preset: str, mode: Mode) -> tuple[dict, dict]:
    """All rows on the device, around the same two transformers (and decoders); and the encoders that store
    every pair, without and with a pair bias, whose weights the dense rows have.
    """
    torch.manual_seed(0)
    base = make_base(preset, options.frames)
    models = {
        name: make_model(ROWS[name]._replace(fused=False), base, mode) for name in of_mode(options.rows, mode)
    }
    stored = {
        bias: sharpened(make_encoder(Row("", "dense", bias, block=PairTokenFusion), base))
        for bias in (False, True, "time")  # always all: so each has the same weights, whatever the rows
    }
    for name, model in models.items():
        if mode == "training":
            for decoder in ("image_decoder", "audio_decoder"):
                setattr(model, decoder, getattr(models["none"], decoder))
        encoder, row = encoder_of(model), ROWS[name]
        if row.interactions == "dense":
            state = stored[row.pair_bias].state_dict()
            encoder.load_state_dict(state if row.block is PairTokenFusion else folded(state))
        elif row.interactions == "none":
            encoder.load_state_dict(encoder_of(models["none"]).state_dict())
        else:
            sharpened(encoder)
        model = placed(model, options, mode)
        models[name] = model.fused() if row.fused else model
    return models, stored


@torch.no_grad()
def sharpened(encoder: AVEncoder) -> AVEncoder:
    """With logits that differ and biases that are not 0: else mistakes would not show."""
    for name, parameter in encoder.fusion_blocks.named_parameters():
        if name.endswith("query.weight"):
            parameter *= 4
        elif name.endswith(("bias", "time_bias.table")):
            parameter += 0.5 * torch.randn_like(parameter)
    return encoder


def reference_of(model, row: Row, stored: dict):
    """The same weights, with every pair stored. Rows that form no pairs are their own reference."""
    reference = copy.deepcopy(model)
    if row.interactions == "dense":
        encoder = copy.deepcopy(stored[row.pair_bias])
        if reference is not encoder_of(reference):
            reference.encoder = encoder
            return reference.train()
        return encoder.eval()
    if row.interactions == "factorized":
        with_blocks(reference, PairKeyFusion).load_state_dict(model.state_dict())
    return reference


def draw_masks(mae: AVMAE, clips: int) -> dict[str, torch.Tensor]:
    sampler, generator = mae.mask_sampler(), torch.Generator().manual_seed(0)
    masks = [sampler(generator) for _ in range(clips)]
    return {name: torch.stack([mask[name] for mask in masks]) for name in masks[0]}


def outputs(
    model, image, audio, removed: dict, dtype: torch.dtype, run: Callable | None = None
) -> dict[str, torch.Tensor]:
    """What is compared: image, audio and fusion tokens; or the loss and gradients far from it. `run` is what
    is called, if it is not the model.
    """
    run = model if run is None else run
    if not removed:
        with torch.inference_mode():
            tokens = run(image.to(dtype), audio.to(dtype))
        return {part: getattr(tokens, part).double().cpu() for part in ("image", "audio", "fusion")}
    removed = {name: mask.to(image.device) for name, mask in removed.items()}
    with torch.autocast(image.device.type, dtype, enabled=dtype.itemsize == 2):
        loss = run(image, audio, **removed).loss
    named = dict(encoder_of(model).named_parameters())
    chosen = {name: named[name] for name in GRADIENTS}
    grads = torch.autograd.grad(loss, list(chosen.values()), allow_unused=True)
    compared = {"loss": loss} | dict(zip(chosen, grads, strict=True))
    return {name: value.detach().double().cpu() for name, value in compared.items() if value is not None}


# --- speed --------------------------------------------------------------------------------------------------


def time_batch(options: Options, mode: Mode, batch: int, rows: dict, models: dict) -> None:
    """Adds clips per second at this batch size to the rows that agree and fit into memory."""
    clips = make_inputs(encoder_of(models["none"]), batch, options.device)
    parameters = {id(p): p for model in models.values() for p in model.parameters() if p.requires_grad}
    optimizer = make_optimizer(parameters.values())  # one for all: what has no gradient, it leaves alone
    turn = 0.3 if options.device == "cuda" else 0.0
    clocks = {}
    for name, model in models.items():
        result = rows[name]["batches"][batch]
        if "failed" in result or not rows[name]["agrees"]:
            continue
        step = make_step(options, mode, model, optimizer)
        try:
            with measure.memory_errors():
                step(*clips)
            clocks[name] = measure.WallClock(partial(step, *clips), options.device, turn=turn)
        except MemoryError as error:
            result["failed"] = str(error)
    seconds = measure.time_rounds(clocks, seconds=options.seconds, title=f"{mode} x {batch}")
    for name, ours in seconds.items():
        result = rows[name]["batches"][batch]
        result["clips_per_second"] = measure.quantiles([batch / second for second in ours])
        for baseline, speed in BASELINES.items():
            if baseline in seconds:
                result[speed] = measure.ratios(seconds[baseline], ours)


# --- tables -------------------------------------------------------------------------------------------------


def tables(record: dict) -> list:
    """What was measured, in full."""
    parts = []
    for mode in MODES:
        if mode in record:
            parts += [f"{record[mode]['preset']}, {record['settings']['dtype']}:", mode_table(record, mode)]
        elif record["settings"]["compile"] == "no":  # otherwise one mode may be all that is wanted
            parts.append(f"{mode}: {MISSING}.")
    return parts


def mode_table(record: dict, mode: Mode) -> list[tuple]:
    """A row for each way to fuse and each batch size."""
    baselines = [name for name in BASELINES if name in of_mode(record[mode]["rows"], mode)]
    columns = "batch", "clips/s (quartiles)", *(f"over {name}" for name in baselines)
    rows = [(mode, *columns, "memory MiB", "GFLOP/clip", "largest error")]
    for row in record[mode]["rows"].values():
        gflop, error = f"{row['gflop_per_clip']:.1f}", f"{max(row['errors'].values()):.0e}"
        for batch, result in row["batches"].items():
            speed, over = why_not(row, result), []
            if "clips_per_second" in result:
                large = result["clips_per_second"]["median"] >= 1000
                speed = spread(result["clips_per_second"], ",.0f" if large else ".3g")
            for baseline in baselines:
                ratios = result.get(BASELINES[baseline])
                over.append(spread(ratios, ".2f") if ratios else "-")
            memory = f"{result['memory_bytes'] / 2**20:,.0f}" if "memory_bytes" in result else "-"
            rows.append((row["label"], batch, speed, *over, memory, gflop, error))
    return rows


def summary(records: dict[str, dict | None], mode: Mode) -> list:
    """Speed and memory against no fusion in several places, and those of the paper."""
    settings = [
        f"{place}: {setting(record, mode)}" for place, record in records.items() if record and mode in record
    ]
    title = f"**{MODES[mode]}**" + (f" ({'; '.join(settings)})" if settings else "")
    first, *others = records
    header = ["", "GFLOP per clip", f"{first} clips/s"]
    header += [f"{place} {what}" for place in (first, *others) for what in ("speed", "memory")]
    if mode == "inference":
        header += ["paper speed", "paper memory"]
    rows = [tuple(header)]
    frames = max((record["settings"].get("frames", 1) for record in records.values() if record), default=1)
    for name in of_mode(rows_by(frames), mode):
        places = [against_none(record, mode, name) for record in records.values()]
        cells = [ROWS[name].label, *places[0][:2], *(cell for place in places for cell in place[2:])]
        if mode == "inference":
            of_paper = zip(PAPER.get(name, ()), PAPER["none"], strict=False)
            cells += [times(value / none) for value, none in of_paper] or ["", ""]
        rows.append(tuple(cells))
    return [f"{title}. Speed and memory against no fusion = 1, medians:", rows]


def setting(record: dict, mode: Mode) -> str:
    batches = ", ".join(record[mode]["rows"]["none"]["batches"])
    return f"{PRESETS[record[mode]['preset']]}, batch {batches}, {record['settings']['dtype']}"


def against_none(record: dict | None, mode: Mode, name: RowName) -> tuple[str, str, str, str]:
    """GFLOP per clip, clips/s, and speed and memory over no fusion; or why they are missing."""
    if record is None or mode not in record or name not in record[mode]["rows"]:
        return (MISSING,) * 4
    row, best = record[mode]["rows"][name], fastest(record[mode]["rows"], name)
    gflop = f"{row['gflop_per_clip']:.1f}"
    if best is None:
        return gflop, "-", why_not(row, *row["batches"].values()), "-"
    speed = times(best["speed_over_none"]["median"]) if best["speed_over_none"] else "no fusion has none"
    memory = times(best["memory"]) if best["memory"] else "no fusion does not fit"
    return gflop, f"{best['clips/s']['median']:.3g}", speed, memory


def fastest(rows: dict, name: RowName) -> dict | None:
    """Clips per second, and speed and memory over no fusion, at the batch size at which a row is fastest;
    None where it has no speed.
    """
    timed = {batch: result for batch, result in rows[name]["batches"].items() if "clips_per_second" in result}
    if not timed:
        return None
    batch, result = max(timed.items(), key=lambda item: item[1]["clips_per_second"]["median"])
    without = rows["none"]["batches"][batch].get("memory_bytes")
    memory = result["memory_bytes"] / without if without else None
    return {"clips/s": result["clips_per_second"], "memory": memory} | {
        speed: result.get(speed) for speed in BASELINES.values()
    }


def why_not(row: dict, *results: dict) -> str:
    """Why a row has no speed."""
    if not row["agrees"]:
        return f"no speed: it disagrees, {measure.largest_error(row['errors'])}"
    return next((result["failed"] for result in results if "failed" in result), "-")


def numbers(record: dict) -> dict[str, float]:
    """What budgets of ViT-B are about: arithmetic, memory, and speed over the baselines."""
    values = {}
    for mode in MODES:
        rows = record[mode]["rows"] if record.get(mode, {}).get("preset") == "base" else {}
        for name, row in rows.items():
            gflop, best = row["gflop_per_clip"], fastest(rows, name) or {}
            values[f"{mode} {name} GFLOP"] = round(gflop, 1)
            values[f"{mode} {name} GFLOP over none"] = gflop / rows["none"]["gflop_per_clip"]
            for baseline, speed in BASELINES.items():
                if best.get(speed):
                    values[f"{mode} {name} speed over {baseline}"] = best[speed]["median"]
                    values[f"{mode} {name} time over {baseline}"] = 1 / best[speed]["median"]
            if best.get("memory"):
                values[f"{mode} {name} memory"] = best["memory"]
    return values


if __name__ == "__main__":
    measure.run(main, Options)
