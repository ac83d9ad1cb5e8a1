"""Turns the files in results/ into the tables of README.md, docs/, benchmarks/README.md and
the pages of the study, and the plots in docs/.

`python benchmarks/report.py` rewrites what stands between the markers; `--check` says whether it would.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import emergence
import few_labels
import grid
import loading
import many_clips
import measure
import pair_attention
import plots
import scaling
import study
import synchrony
import throughput
import traffic
from measure import RESULTS, ROOT
from tables import MISSING, filled, markdown, origin

PAGES = tuple(benchmark.PAGE for benchmark in (study, synchrony, few_labels, emergence, grid))
PLACES = {  # how the name of a file ends, and how its tables are introduced
    "cpu": "CPU",
    "cpu-compiled": "CPU, torch.compile",
    "cpu-base": "CPU, ViT-B",
    "cuda": "GPU",
    "cuda-compiled": "GPU, torch.compile",
    "cuda-graph": "GPU, each row a CUDA graph",
}
# Downstream tasks: what, the clips to train on, the file of results/tasks, what of its metrics is shown, and
# what it is compared with. A file is the results.json of a run of the commands in docs/tasks.md; `image` is
# the file of the same name that ends in -image.
ACCURACY = "accuracy {accuracy:.3f} ± {standard_error:.3f}"
RECALL = (
    "image {shape_recall@1_image:.3f}, audio {shape_recall@1_audio:.3f}, fusion {shape_recall@1_fusion:.3f}"
)
MIOU, MIOU_OF_IMAGE = "mIoU {miou:.3f}, F {f_score:.3f}", "mIoU {image[miou]:.3f}, F {image[f_score]:.3f}"
SEPARATED = "SDR {sdr:.1f} dB (SIR {sir:.1f}, SAR {sar:.1f})"
SEPARATIONS = (
    "mixture {mixture_sdr:.1f}, NMF {nmf_sdr:.1f}, RPCA {rpca_sdr:.1f}, ideal mask {oracle_sdr:.1f} dB"
)
COMMONEST = "most frequent shape {chance:.3f}"
IMAGE_ALONE = "image alone {image[pointing]:.3f}"
TASKS = (
    ("shape of what sounds, linear probe", "256", "shape-probe", ACCURACY, COMMONEST),
    ("shape of what sounds, fine-tuned", "256", "shape", ACCURACY, COMMONEST),
    (
        "shape of what sounds, from fresh weights",
        "256",
        "shape-fresh",
        ACCURACY,
        f"{COMMONEST}, image alone {{accuracy_image_input:.3f}}",
    ),
    (
        "colour in scenes of synchrony, 8 frames",
        "2,048",
        "colour-synchrony",
        ACCURACY,
        "chance of the pictures 0.250, of the sound 0.167",
    ),
    ("the same, with bilinear pairs", "2,048", "colour-synchrony-bilinear", ACCURACY, "the same"),
    ("colour in scenes of synchrony, one frame", "2,048", "colour-synchrony-one", ACCURACY, "the same"),
    (
        "nearest clip by shape and colour, after --preset demo-long",
        "2,048",
        "demo-long",
        "fusion {probes[shape and colour][fusion][accuracy]:.3f}",
        "image {probes[shape and colour][image][accuracy]:.3f}, "
        "audio {probes[shape and colour][audio][accuracy]:.3f}, "
        "random {probes[shape and colour][image][chance]:.3f}",
    ),
    ("retrieval by shape, recall at 1", "256", "retrieve", RECALL, "chance {shape_recall@1_chance:.3f}"),
    ("semantic segmentation", "2,048", "segment-2048", MIOU, f"image alone: {MIOU_OF_IMAGE}"),
    ("localization", "2,048", "localize-2048", "pointing {pointing:.3f}", IMAGE_ALONE),
    (
        "localization over time in scenes of synchrony, 8 frames",
        "2,048",
        "localize-synchrony",
        "pointing {pointing:.3f}",
        f"{IMAGE_ALONE}, a guess among the objects 0.250",
    ),
    ("separation of one-object clips", "2,048", "separate", SEPARATED, SEPARATIONS),
    ("separation of one-object clips", "4,096", "separate-solos", SEPARATED, SEPARATIONS),
)
COUNTED = f"Counted, batch {traffic.BATCH}: "
OP = "GPU: pair_attention forward + backward"
GRAPHED, FUSED = "over no fusion, each a CUDA graph", "inference dense-fused"
# What, its limit, and which of the numbers of a benchmark in a place it is about.
BUDGETS = {
    (throughput, "cpu"): (
        ("GFLOP per clip, ViT-B, no fusion", "at most 51.6", "inference none GFLOP"),
        ("GFLOP per clip, dense over no fusion", "at most 1.08", "inference dense GFLOP over none"),
        ("GFLOP per clip, factorized", "at most 57", "inference factorized GFLOP"),
        (
            "CPU, ViT-B, batch 1: time of dense over no fusion",
            "at most 1.12",
            "inference dense time over none",
        ),
    ),
    (throughput, "cpu-compiled"): (
        ("The same, both under torch.compile", "at most 1.12", "inference dense time over none"),
    ),
    (throughput, "cpu-base"): (
        (
            "CPU, ViT-B, batch 4: time of dense over no fusion",
            "at most 1.1",
            "inference dense time over none",
        ),
        (
            "The same, dense as encoder.fused()",
            "at most 1.1",
            f"{FUSED} time over none",
        ),
        (
            "CPU, ViT-B, batch 4: time of a training step of dense over the same without fusion blocks",
            "at most 1.1",
            f"training dense time over {traffic.TOKENS}",
        ),
    ),
    (throughput, "cuda"): (
        ("GPU: speed of dense over no fusion", "at least 0.92", "inference dense speed over none"),
        ("GPU: memory of dense over no fusion", "at most 1.1", "inference dense memory"),
        ("GPU: training step of dense over no fusion", "at least 0.85", "training dense speed over none"),
    ),
    (throughput, "cuda-graph"): (
        (f"GPU: speed of dense {GRAPHED}", "at least 0.92", "inference dense speed over none"),
        ("GPU: the same, dense as encoder.fused()", "at least 0.92", f"{FUSED} speed over none"),
        (f"GPU: training step of dense {GRAPHED}", "at least 0.85", "training dense speed over none"),
    ),
    (traffic, "meta"): (
        (f"{COUNTED}bytes of dense, fused(), over no fusion", "at most 1.12", f"{FUSED} bytes over none"),
        (f"{COUNTED}its launches over no fusion", "at most 1.6", f"{FUSED} launches over none"),
        (f"{COUNTED}its speed over no fusion", "at least 0.88", f"{FUSED} speed over none"),
        (
            f"{COUNTED}the same, the fusion branch launched on a side stream",
            "at least 0.92",
            f"{FUSED} side stream over none",
        ),
        (
            f"{COUNTED}bytes of a training step of dense over the same without fusion blocks",
            "at most 1.08",
            f"training dense bytes over {traffic.TOKENS}",
        ),
        (f"{COUNTED}its launches", "at most 1.4", f"training dense launches over {traffic.TOKENS}"),
        (f"{COUNTED}its speed", "at least 0.88", f"training dense speed over {traffic.TOKENS}"),
    ),
    (pair_attention, "cuda"): (
        (f"{OP} over two SDPA calls, 196 + 96, GPU time", "at most 1", "paper GPU, warm over SDPA"),
        (f"{OP} over two SDPA calls, 196 + 96, launches included", "at most 1", "paper wall, warm over SDPA"),
        (f"{OP} over its floor, 196 + 96", "at most 1.5", "paper over the floor"),
        (f"{OP} over its floor, 4096 + 4096", "at most 1.5", "long over the floor"),
    ),
} | {
    (scaling, device): tuple(
        (
            f"{place}: dense block, {what}: distance of its {slope} slope to 1",
            "at most 0.15",
            f"{what} {slope}",
        )
        for what in scaling.MODES
        for slope in ("time", "memory")
    )
    for device, place in (("cpu", "CPU"), ("cuda", "GPU"))
}


@dataclass(frozen=True)
class Options:
    """Rewrite the tables in README.md, docs/ and benchmarks/, and the plots, from the results."""

    check: bool = False
    """Change nothing; fail if tables or plots are not those of the results."""


def main(options: Options) -> None:
    results = read_results(RESULTS)
    new_texts = {path: text for path, text in texts(results).items() if path.read_text() != text}
    drawings = plots.plots(results)
    for page in PAGES:
        if page.result.stem in results:
            drawings |= page.plots(results[page.result.stem])
    new_plots = {path: plot for path, plot in drawings.items() if plots.drawn_from(path) != plot[0]}
    if options.check and (new_texts or new_plots):
        stale = ", ".join(str(path.relative_to(ROOT)) for path in (*new_texts, *new_plots))
        raise ValueError(f"not made from the results: {stale}. Run python benchmarks/report.py")
    for path, text in new_texts.items():
        path.write_text(text)
    plots.save(new_plots)


def read_results(folder: Path) -> dict[str, dict]:
    """By name of the file, such as "throughput-cpu"."""
    return {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}


def texts(results: dict) -> dict[Path, str]:
    """What the files should hold."""
    sections = {
        ROOT / "README.md": {"speed": speed(results)},
        ROOT / "docs/tasks.md": {"tasks": tasks_table(RESULTS / "tasks")},
        ROOT / "docs/dense.md": {"scaling": sentence(results, scaling)},
        ROOT / "docs/video.md": {"video": video(results)},
        ROOT / "docs/data.md": {
            "loading": sentence(results, loading),
            "many-clips": sentence(results, many_clips),
        },
        ROOT / "benchmarks/README.md": {
            "budgets": budgets_table(results),
            "throughput": by_place(results, throughput),
            "traffic": counted(results),
            "pair-attention": by_place(results, pair_attention),
            "scaling": by_place(results, scaling),
            "loading": of_cpu(results, loading),
            "many-clips": of_cpu(results, many_clips),
        },
    }
    for page in PAGES:
        if page.result.stem in results:
            sections[page.path] = page.sections(results[page.result.stem])
    return {path: filled(path.read_text(), parts) for path, parts in sections.items()}


def by_place(results: dict, benchmark) -> str:
    """The tables of a benchmark from every place where it ran, one after the other."""
    parts = []
    for place, title in PLACES.items():
        record = record_of(results, benchmark, place)
        if record is None and place.endswith(("compiled", "base")):  # an extra, not a gap
            continue
        parts += [f"{title}: {origin(record)}", *(benchmark.tables(record) if record else ())]
    return markdown(parts)


def of_cpu(results: dict, benchmark) -> str:
    record = record_of(results, benchmark, "cpu")
    return markdown([*([benchmark.table(record)] if record else ()), origin(record)])


def counted(results: dict) -> str:
    record, measured = record_of(results, traffic, "meta"), record_of(results, throughput, "cuda")
    return markdown(traffic.tables(record, measured)) if record else origin(record)


def video(results: dict) -> str:
    """What clips of several frames cost: counted, measured, and how it grows."""
    parts = []
    for frames in 8, 16:
        record = results.get(f"traffic-meta-video{frames}")
        parts += [f"**{frames} frames, counted:**", *(traffic.tables(record) if record else [origin(None)])]
    for place, title in (("cpu", "CPU"), ("cuda", "GPU")):
        for frames in 8, 16:
            record = results.get(f"throughput-{place}-video{frames}")
            parts.append(f"**{frames} frames, measured on a {title}**: {origin(record)}")
            parts += throughput.tables(record) if record else []
        record = results.get(f"scaling-{place}-frames")
        parts.append(f"**One block alone as frames grow, {title}**: {origin(record)}")
        parts += scaling.tables(record) if record else []
    return markdown(parts)


def record_of(results: dict, benchmark, place: str) -> dict | None:
    return results.get(f"{benchmark.__name__}-{place}")


def sentence(results: dict, benchmark) -> str:
    record = record_of(results, benchmark, "cpu")
    return f"{benchmark.summary(record)} {origin(record)}" if record else origin(record)


# --- README.md ----------------------------------------------------------------------------------------------


def speed(results: dict) -> str:
    files = {"CPU": "throughput-cpu", "GPU": "throughput-cuda", "CUDA graphs": "throughput-cuda-graph"}
    records = {place: results.get(file) for place, file in files.items()}
    parts = throughput.summary(records, "inference")
    return markdown([*parts, *(f"{place}: {origin(record)}" for place, record in records.items())])


def tasks_table(folder: Path) -> str:
    """What the downstream tasks reached, from the metrics in a folder of results."""
    metrics = {path.stem: json.loads(path.read_text())["metrics"] for path in sorted(folder.glob("*.json"))}
    rows = [("task", "clips to train on", "result", "to compare with")]
    for task, clips, file, *texts in TASKS:
        values = metrics[file] | dict(image=metrics.get(f"{file}-image"))
        rows.append((task, clips, *(text.format(**values) for text in texts)))
    return markdown([rows])


def budgets_table(results: dict) -> str:
    """What was measured, a median, and whether it is within the limit; or why there is nothing."""
    rows = [("budget", "limit", "measured", "")]
    for (benchmark, place), budgets in BUDGETS.items():
        record = record_of(results, benchmark, place)
        numbers = benchmark.numbers(record) if record else {}
        for what, limit, name in budgets:
            measured, verdict = MISSING if record is None else "not part of the run", ""
            if name in numbers:
                measured, verdict = f"{numbers[name]:.3g}", judged(numbers[name], limit)
            rows.append((what, limit, measured, verdict))
    return markdown([rows])


def judged(value: float, limit: str) -> str:
    words, number = limit.rsplit(" ", 1)
    met = value <= float(number) if words == "at most" else value >= float(number)
    return "met" if met else f"missed by {abs(value / float(number) - 1):.1%}"


if __name__ == "__main__":
    measure.run(main, Options)
