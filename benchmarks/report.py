"""Turns the files in results/ into the tables of README.md, benchmarks/README.md and benchmarks/study.md, and
the plots in docs/.

`python benchmarks/report.py` rewrites what stands between the markers; `--check` says whether it would.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import loading
import many_clips
import measure
import pair_attention
import plots
import scaling
import study
import throughput
from measure import RESULTS, ROOT
from tables import MISSING, filled, markdown, origin, piped

PLACES = {  # how the name of a file ends, and how its tables are introduced
    "cpu": "CPU",
    "cpu-compiled": "CPU, torch.compile",
    "cuda": "GPU",
    "cuda-compiled": "GPU, torch.compile",
}
# Downstream tasks: what, the clips to train on, the result, and what to compare it with. Names in braces are
# files of results/tasks, each the results.json of a run of the commands in docs/tasks.md.
TASKS = (
    (
        "shape of what sounds, linear probe",
        "256",
        "accuracy {shape-probe[accuracy]:.3f} ± {shape-probe[standard_error]:.3f}",
        "most frequent shape {shape-probe[chance]:.3f}",
    ),
    (
        "shape of what sounds, fine-tuned",
        "256",
        "accuracy {shape[accuracy]:.3f} ± {shape[standard_error]:.3f}",
        "most frequent shape {shape[chance]:.3f}",
    ),
    (
        "colour of what sounds, linear probe",
        "256",
        "accuracy {colour-probe[accuracy]:.3f} ± {colour-probe[standard_error]:.3f}: not learned",
        "most frequent colour {colour-probe[chance]:.3f}",
    ),
    (
        "retrieval by shape, recall at 1",
        "256",
        "image {retrieve[shape_recall@1_image]:.3f}, audio {retrieve[shape_recall@1_audio]:.3f}, "
        "fusion {retrieve[shape_recall@1_fusion]:.3f}",
        "chance {retrieve[shape_recall@1_chance]:.3f}",
    ),
    (
        "semantic segmentation",
        "256",
        "mIoU {segment-256[miou]:.3f}, F {segment-256[f_score]:.3f}",
        "",
    ),
    (
        "semantic segmentation",
        "2,048",
        "mIoU {segment-2048[miou]:.3f}, F {segment-2048[f_score]:.3f}",
        "image alone: mIoU {segment-2048-image[miou]:.3f}, F {segment-2048-image[f_score]:.3f}",
    ),
    (
        "localization",
        "256",
        "pointing {localize-256[pointing]:.3f}: not learned",
        "image alone {localize-256-image[pointing]:.3f}",
    ),
    (
        "localization",
        "2,048",
        "pointing {localize-2048[pointing]:.3f}",
        "image alone {localize-2048-image[pointing]:.3f}",
    ),
    (
        "separation of three-object clips",
        "256",
        "SDR {separate-256[sdr]:.1f} dB: not learned",
        "mixture {separate-256[mixture_sdr]:.1f}, NMF {separate-256[nmf_sdr]:.1f}, "
        "RPCA {separate-256[rpca_sdr]:.1f}, ideal mask {separate-256[oracle_sdr]:.1f} dB",
    ),
    (
        "separation of one-object clips",
        "4,096",
        "SDR {separate-solos[sdr]:.1f} dB (SIR {separate-solos[sir]:.1f}, SAR {separate-solos[sar]:.1f})",
        "mixture {separate-solos[mixture_sdr]:.1f}, NMF {separate-solos[nmf_sdr]:.1f}, "
        "RPCA {separate-solos[rpca_sdr]:.1f}, ideal mask {separate-solos[oracle_sdr]:.1f} dB",
    ),
)


@dataclass(frozen=True)
class Options:
    """Rewrite the tables in the README.md files and the study's page, and the plots in docs/, from the
    results.
    """

    check: bool = False
    """Change nothing; fail if tables or plots are not those of the results."""


def main(options: Options) -> None:
    results = read_results(RESULTS)
    new_texts = {path: text for path, text in texts(results).items() if path.read_text() != text}
    drawings = plots.plots(results)
    if "study-cpu" in results:
        drawings |= study.plots(results["study-cpu"])
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
        ROOT / "README.md": {
            "speed": speed(results),
            "tasks": tasks_table(RESULTS / "tasks"),
            "many-clips": sentence("Many clips", many_clips.summary, results.get("many_clips-cpu")),
        },
        ROOT / "benchmarks/README.md": {
            "budgets": budgets_table(results),
            "throughput": by_place(results, throughput),
            "pair-attention": by_place(results, pair_attention),
            "scaling": by_place(results, scaling),
            "loading": table_of_cpu(results, loading),
            "many-clips": table_of_cpu(results, many_clips),
        },
    }
    if "study-cpu" in results:
        for path, text in study.sections(results["study-cpu"]).items():
            sections.setdefault(path, {})["study"] = text
    return {path: filled(path.read_text(), parts) for path, parts in sections.items()}


def by_place(results: dict, benchmark) -> str:
    """The tables of a benchmark from every place where it ran, one after the other."""
    parts = []
    for place, title in PLACES.items():
        record = results.get(f"{benchmark.__name__}-{place}")
        if record is None and place.endswith("compiled"):  # an extra, not a gap
            continue
        parts += [f"{title}: {origin(record)}", *(benchmark.tables(record) if record else ())]
    return markdown(parts)


def table_of_cpu(results: dict, benchmark) -> str:
    record = results.get(f"{benchmark.__name__}-cpu")
    return markdown([*([benchmark.table(record)] if record else ()), origin(record)])


def sentence(title: str, summary, record: dict | None) -> str:
    return f"{summary(record)} {origin(record)}" if record else f"{title}: {MISSING}."


# --- README.md ----------------------------------------------------------------------------------------------


def speed(results: dict) -> str:
    records = {"CPU": results.get("throughput-cpu"), "GPU": results.get("throughput-cuda")}
    parts = [part for mode in throughput.MODES for part in throughput.summary(records, mode)]
    if records["CPU"]:
        parts.append("![Speed and memory of the ways to fuse](docs/throughput.png)")
    parts += [f"{place}: {origin(record)}" for place, record in records.items()]
    parts.append(sentence("Scaling", scaling.summary, results.get("scaling-cpu")))
    if "scaling-cpu" in results:
        parts.append("![Time and memory by number of tokens](docs/scaling.png)")
    if "scaling-cuda" in results:
        parts.append(sentence("Scaling", scaling.summary, results["scaling-cuda"]))
    parts.append(sentence("Loading", loading.summary, results.get("loading-cpu")))
    return markdown(parts)


def tasks_table(folder: Path) -> str:
    """What the downstream tasks reached, from the metrics in a folder of results."""
    metrics = {path.stem: json.loads(path.read_text())["metrics"] for path in sorted(folder.glob("*.json"))}
    rows = [tuple(cell.format(**metrics) for cell in row) for row in TASKS]
    return piped([("task", "clips to train on", "result", "to compare with"), *rows])


# --- budgets ------------------------------------------------------------------------------------------------


BUDGETS = (  # what, its limit, the file it is measured in, and its value there
    (
        "GFLOP per clip, ViT-B, no fusion",
        "at most 51.6",
        "throughput-cpu",
        lambda record: round(throughput.gflop(record, "none"), 1),
    ),
    (
        "GFLOP per clip, dense over no fusion",
        "at most 1.08",
        "throughput-cpu",
        lambda record: throughput.gflop(record, "dense") / throughput.gflop(record, "none"),
    ),
    (
        "GFLOP per clip, factorized",
        "at most 57",
        "throughput-cpu",
        lambda record: throughput.gflop(record, "factorized"),
    ),
    (
        "CPU, ViT-B, batch 1: time of dense over no fusion",
        "at most 1.12",
        "throughput-cpu",
        lambda record: 1 / throughput.speed(record, "inference", "dense"),
    ),
    (
        "The same, both under torch.compile",
        "at most 1.12",
        "throughput-cpu-compiled",
        lambda record: 1 / throughput.speed(record, "inference", "dense"),
    ),
    (
        "GPU: speed of dense over no fusion",
        "at least 0.92",
        "throughput-cuda",
        lambda record: throughput.speed(record, "inference", "dense"),
    ),
    (
        "GPU: memory of dense over no fusion",
        "at most 1.1",
        "throughput-cuda",
        lambda record: throughput.memory(record, "inference", "dense"),
    ),
    (
        "GPU: training step of dense over no fusion",
        "at least 0.85",
        "throughput-cuda",
        lambda record: throughput.speed(record, "training", "dense"),
    ),
    (
        "GPU: pair_attention forward + backward over two SDPA calls, 196 + 96",
        "at most 1",
        "pair_attention-cuda",
        pair_attention.over_sdpa,
    ),
    (
        "GPU: pair_attention forward + backward over its floor, 196 + 96",
        "at most 1.5",
        "pair_attention-cuda",
        pair_attention.over_floor,
    ),
    *(
        (
            f"{place}: dense block, {mode}: distance of its {quantity} slope to 1",
            "at most 0.15",
            f"scaling-{device}",
            partial(scaling.growth, mode=mode, quantity=quantity),
        )
        for device, place in (("cpu", "CPU"), ("cuda", "GPU"))
        for mode in scaling.MODES
        for quantity in ("time", "memory")
    ),
)


def budgets_table(results: dict) -> str:
    rows = [("budget", "limit", "measured", "")]
    for what, limit, file, measured in BUDGETS:
        rows.append((what, limit, *judged(limit, measured, results.get(file))))
    return piped(rows)


def judged(limit: str, measured: Callable, record: dict | None) -> tuple[str, str]:
    """The median that was measured, and whether it is within the limit."""
    if record is None:
        return MISSING, ""
    try:
        value = measured(record)
    except KeyError:
        return "not part of the run", ""
    words, number = limit.rsplit(" ", 1)
    met = value <= float(number) if words == "at most" else value >= float(number)
    return f"{value:.3g}", "met" if met else f"missed by {abs(value / float(number) - 1):.1%}"


if __name__ == "__main__":
    measure.run(main, Options)
