"""Turns the files in results/ into the tables of README.md and benchmarks/README.md, and the plots in docs/.

`python benchmarks/report.py` rewrites what stands between the markers; `--check` says whether it would.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import tyro
from loading import STAGES
from measure import RESULTS, ROOT
from pair_attention import SHAPES
from plots import drawn_from, plots
from scaling import FIT_FROM, LABELS
from throughput import MODES, PAPER, ROWS, best_batch

MISSING = "not yet measured"
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
PLACES = {  # of throughput: how the name of the file ends, and what the table is called
    "cpu": "CPU",
    "cpu-compiled": "CPU, torch.compile",
    "cuda": "GPU",
    "cuda-compiled": "GPU, torch.compile",
}


@dataclass(frozen=True)
class Options:
    """Rewrite the tables in README.md and benchmarks/README.md, and the plots in docs/, from the results."""

    check: bool = False
    """Change nothing; fail if tables or plots are not those of the results."""


def main(options: Options) -> None:
    results = read_results(RESULTS)
    stale = [str(path.relative_to(ROOT)) for path, text in texts(results).items() if path.read_text() != text]
    stale += [
        str(path.relative_to(ROOT))
        for path, (digest, _) in plots(results).items()
        if drawn_from(path) != digest
    ]
    if options.check:
        if stale:
            raise ValueError(
                f"not made from the results: {', '.join(stale)}. Run python benchmarks/report.py"
            )
        return
    for path, text in texts(results).items():
        path.write_text(text)
    for path, (digest, draw) in plots(results).items():
        draw().savefig(path, dpi=150, metadata={"Source": digest})


def read_results(folder: Path) -> dict[str, dict]:
    """By name of the file, such as "throughput-cpu"."""
    return {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}


def texts(results: dict, root: Path = ROOT) -> dict[Path, str]:
    """What the two files should hold."""
    sections = {
        root / "README.md": {
            "speed": speed(results),
            "tasks": tasks_table(RESULTS / "tasks"),
            "many-clips": many_clips_line(results),
        },
        root / "benchmarks/README.md": {
            "budgets": budgets_table(results),
            "throughput": throughput_tables(results),
            "pair-attention": pair_attention_tables(results),
            "scaling": scaling_tables(results),
            "loading": loading_table(results),
            "many-clips": many_clips_table(results),
        },
    }
    return {path: filled(path.read_text(), parts) for path, parts in sections.items()}


def filled(text: str, sections: dict[str, str]) -> str:
    """The text with other content between `<!-- name -->` and `<!-- /name -->`.

    Raises:
        ValueError: a marker is missing.
    """
    for name, content in sections.items():
        start, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
        if text.count(start) != 1 or text.count(end) != 1:
            raise ValueError(f"there must be one {start.strip()} and one {end}")
        before, after = text.split(start)[0], text.split(end)[1]
        text = f"{before}{start}\n{content.strip()}\n\n{end}{after}"
    return text


def table(rows: list[tuple]) -> str:
    """Markdown; the first row is the header, and only the first column is aligned to the left."""
    lines = ["| " + " | ".join(map(str, row)) + " |" for row in rows]
    lines.insert(1, "| --- |" + " ---: |" * (len(rows[0]) - 1))
    return "\n".join(lines)


def origin(record: dict | None) -> str:
    """One line that says where numbers come from."""
    if record is None:
        return f"{MISSING[0].upper()}{MISSING[1:]}."
    machine, versions = record["machine"], record["versions"]
    threads = (
        f"{machine['threads']} thread{'s' if machine['threads'] > 1 else ''} on {machine['cores']} cores"
    )
    place = machine.get("gpu") or f"{machine['cpu']}, {threads}"
    note = "" if record["note"] in record["command"] else f"; {record['note']}"
    load = "" if "gpu" in machine else f", load {record['load_at_start']:.1f} to {record['load_at_end']:.1f}"
    return (
        f"`{record['command']}`: {place}; torch {versions['torch']}; commit {record['commit']}, "
        f"{record['date']}{load}{note}."
    )


def spread(quantiles: dict, form: str, factor: float = 1.0) -> str:
    """Median and quartiles."""
    median, low, high = (format(factor * quantiles[name], form) for name in ("median", "q25", "q75"))
    return f"{median} ({low}-{high})"


def times(value: float) -> str:
    return f"{value:.2f} x"


# --- README.md ----------------------------------------------------------------------------------------------


def speed(results: dict) -> str:
    cpu, gpu = results.get("throughput-cpu"), results.get("throughput-cuda")
    parts = []
    for mode, title in MODES.items():
        parts.append(f"**{title}**{setting(cpu, mode)}. Speed and memory against no fusion = 1, medians:")
        header = ("", "GFLOP per clip", "CPU clips/s", "CPU speed", "CPU memory", "GPU speed", "GPU memory")
        of_paper = ("paper speed", "paper memory") if mode == "inference" else ()
        rows = [(*header, *of_paper)]
        for name, row in ROWS.items():
            on_cpu, on_gpu = against_none(cpu, mode, name), against_none(gpu, mode, name)
            cells = (row.label, *on_cpu[:4], *on_gpu[2:4])
            rows.append(cells + (paper_cells(name) if of_paper else ()))
        parts.append(table(rows))
    if cpu:
        parts.append("![Speed and memory of the ways to fuse](docs/throughput.png)")
    parts.append(f"CPU: {origin(cpu)}\n\nGPU: {origin(gpu)}")
    parts.append(scaling_line(results.get("scaling-cpu")))
    if "scaling-cpu" in results:
        parts.append("![Time and memory by number of tokens](docs/scaling.png)")
    parts.append(loading_line(results.get("loading-cpu")))
    return "\n\n".join(parts)


def setting(record: dict | None, mode: str) -> str:
    if not record or mode not in record:
        return ""
    names = dict(tiny="ViT tiny", small="ViT-S", base="ViT-B", large="ViT-L")
    batches = ", ".join(record[mode]["rows"]["none"]["batches"])
    return f" (CPU: {names[record[mode]['preset']]}, batch {batches}, {record['settings']['dtype']})"


def against_none(record: dict | None, mode: str, name: str) -> tuple[str, str, str, str]:
    """GFLOP per clip, clips/s, and speed and memory over no fusion."""
    if record is None or mode not in record or name not in record[mode]["rows"]:
        return (MISSING,) * 4
    row, none = record[mode]["rows"][name], record[mode]["rows"]["none"]
    gflop = f"{row['gflop_per_clip']:.1f}"
    batch = best_batch(row)
    if batch is None:
        return gflop, why_not(row), "-", "-"
    result, without = row["batches"][batch], none["batches"][batch].get("memory_bytes")
    memory = times(result["memory_bytes"] / without) if without else "-"
    relative = result.get("speed_over_none")
    return (
        gflop,
        f"{result['clips_per_second']['median']:.3g}",
        times(relative["median"]) if relative else "-",
        memory,
    )


def why_not(row: dict) -> str:
    """Why a row has no speed."""
    if not row["agrees"]:
        return "disagrees with the reference"
    return next((result["failed"] for result in row["batches"].values() if "failed" in result), "-")


def paper_cells(name: str) -> tuple[str, str]:
    if name not in PAPER:
        return "", ""
    (speed, memory), (speed_none, memory_none) = PAPER[name], PAPER["none"]
    return times(speed / speed_none), times(memory / memory_none)


def scaling_line(record: dict | None) -> str:
    if record is None:
        return f"Scaling: {MISSING}."
    block, limit = record["forward"]["dense"], record["settings"]["memory_limit"]
    stopped = [row["stopped"].split(":")[0] for row in record["forward"].values() if "stopped" in row]
    ends = f" ({' and '.join(sorted(stopped))}, at a limit of {limit:g} GiB)" if stopped else ""
    return (
        f"One dense block alone, from {FIT_FROM} + {FIT_FROM} tokens up: time grows as the tokens to the "
        f"power {spread(block['time_slope'], '.2f')}, memory to the power {block['memory_slope']:.2f}; "
        f"with pairs stored both grow as the square, until memory ends{ends}. "
        f"{largest_common(record['forward'])}{origin(record)}"
    )


def largest_common(rows: dict) -> str:
    """Exact fusion beside stored pair tokens, at the largest number of tokens that both can do."""
    exact, stored = rows["dense"]["points"], rows.get("materialized", {}).get("points", {})
    common = [n for n, point in stored.items() if "seconds" in point and "seconds" in exact.get(n, {})]
    if not common:
        return ""
    tokens = max(common, key=int)
    (ms, mib), (stored_ms, stored_mib) = (point_cells(points[tokens]) for points in (exact, stored))
    return (
        f"At {tokens} + {tokens}, the most that stored pair tokens can do here, exact fusion takes {ms} ms "
        f"and {mib} MiB, and they take {stored_ms} ms and {stored_mib} MiB. "
    )


def loading_line(record: dict | None) -> str:
    if record is None:
        return f"Loading: {MISSING}."
    speeds = ", ".join(
        f"{stages['whole']['clips_per_second']['median']:.0f} clips/s of {size} x {size} pixels"
        for size, stages in record["sizes"].items()
    )
    return f"Reading, decoding and transforming, one core: {speeds}. {origin(record)}"


def tasks_table(folder: Path) -> str:
    """What the downstream tasks reached, from the metrics in a folder of results."""
    metrics = {path.stem: json.loads(path.read_text())["metrics"] for path in sorted(folder.glob("*.json"))}
    rows = [tuple(cell.format(**metrics) for cell in row) for row in TASKS]
    return table([("task", "clips to train on", "result", "to compare with"), *rows])


# --- benchmarks/README.md -----------------------------------------------------------------------------------


def budgets_table(results: dict) -> str:
    rows = [("budget", "limit", "measured", "")]
    for what, limit, smaller, value in budgets(results):
        sign = "at most" if smaller else "at least"
        if value is None:
            rows.append((what, f"{sign} {limit:g}", MISSING, ""))
            continue
        met = value <= limit if smaller else value >= limit
        verdict = "met" if met else f"missed by {abs(value / limit - 1):.1%}"
        rows.append((what, f"{sign} {limit:g}", f"{value:.3g}", verdict))
    return table(rows)


def budgets(results: dict) -> list[tuple[str, float, bool, float | None]]:
    """What is wanted, its limit, whether smaller is better, and the median that was measured."""

    def throughput(place, mode, name, quantity):
        try:
            rows = results[f"throughput-{place}"][mode]["rows"]
            if results[f"throughput-{place}"][mode]["preset"] != "base":
                return None
            if quantity == "gflop":
                return rows[name]["gflop_per_clip"]
            result = rows[name]["batches"][best_batch(rows[name])]
            if quantity == "speed":
                return result["speed_over_none"]["median"]
            return result["memory_bytes"] / rows["none"]["batches"][best_batch(rows[name])]["memory_bytes"]
        except KeyError:
            return None

    def attention(other):
        try:
            shape = results["pair_attention-cuda"]["shapes"]["paper"]
            ours = shape["rows"]["avfuse"]["seconds"]["both"]
            if other == "floor":
                return ours["GPU, cold"]["median"] / shape["floor_seconds"]["both"]
            return (
                ours["wall, warm"]["median"] / shape["rows"][other]["seconds"]["both"]["wall, warm"]["median"]
            )
        except KeyError:
            return None

    def growth(device, mode, quantity):
        try:
            slope = results[f"scaling-{device}"][mode]["dense"][f"{quantity}_slope"]
        except KeyError:
            return None
        return abs((slope["median"] if quantity == "time" else slope) - 1)

    cpu_speed = throughput("cpu", "inference", "dense", "speed")
    compiled_speed = throughput("cpu-compiled", "inference", "dense", "speed")
    dense, none = (throughput("cpu", "inference", name, "gflop") for name in ("dense", "none"))
    rows = [
        ("GFLOP per clip, ViT-B, no fusion", 51.6, True, none and round(none, 1)),
        ("GFLOP per clip, dense over no fusion", 1.08, True, dense and dense / none),
        ("GFLOP per clip, factorized", 57.0, True, throughput("cpu", "inference", "factorized", "gflop")),
        ("CPU, ViT-B, batch 1: time of dense over no fusion", 1.12, True, cpu_speed and 1 / cpu_speed),
        ("The same, both under torch.compile", 1.12, True, compiled_speed and 1 / compiled_speed),
        (
            "GPU: speed of dense over no fusion",
            0.92,
            False,
            throughput("cuda", "inference", "dense", "speed"),
        ),
        (
            "GPU: memory of dense over no fusion",
            1.10,
            True,
            throughput("cuda", "inference", "dense", "memory"),
        ),
        (
            "GPU: training step of dense over no fusion",
            0.85,
            False,
            throughput("cuda", "training", "dense", "speed"),
        ),
        (
            "GPU: pair_attention forward + backward over two SDPA calls, 196 + 96",
            1.0,
            True,
            attention("sdpa"),
        ),
        ("GPU: pair_attention forward + backward over its floor, 196 + 96", 1.5, True, attention("floor")),
    ]
    for device in ("cpu", "cuda"):
        for mode in ("forward", "training"):
            for quantity in ("time", "memory"):
                place = "CPU" if device == "cpu" else "GPU"
                what = f"{place}: dense block, {mode}: distance of its {quantity} slope to 1"
                rows.append((what, 0.15, True, growth(device, mode, quantity)))
    return rows


def throughput_tables(results: dict) -> str:
    parts = []
    for place, title in PLACES.items():
        record = results.get(f"throughput-{place}")
        if record is None and place.endswith("compiled"):  # an extra, not a gap
            continue
        parts.append(f"{title}: {origin(record)}")
        for mode in MODES if record else ():
            if mode not in record:
                continue
            rows = [
                (
                    mode,
                    "batch",
                    "clips/s (quartiles)",
                    "over none",
                    "memory MiB",
                    "GFLOP/clip",
                    "largest error",
                )
            ]
            for row in record[mode]["rows"].values():
                rows += [throughput_row(row, batch, result) for batch, result in row["batches"].items()]
            parts.append(f"{record[mode]['preset']}, {record['settings']['dtype']}:\n\n{table(rows)}")
    return "\n\n".join(parts)


def throughput_row(row: dict, batch: str, result: dict) -> tuple:
    gflop, error = f"{row['gflop_per_clip']:.1f}", f"{max(row['errors'].values()):.0e}"
    memory = f"{result['memory_bytes'] / 2**20:,.0f}" if "memory_bytes" in result else "-"
    if "clips_per_second" not in result:
        return row["label"], batch, why_not(row), "-", memory, gflop, error
    over = spread(result["speed_over_none"], ".2f") if "speed_over_none" in result else "-"
    return row["label"], batch, spread(result["clips_per_second"], ".3g"), over, memory, gflop, error


def pair_attention_tables(results: dict) -> str:
    parts = []
    for device in ("cpu", "cuda"):
        record = results.get(f"pair_attention-{device}")
        parts.append(f"{'CPU' if device == 'cpu' else 'GPU'}: {origin(record)}")
        if record is None:
            continue
        copy, matmul = record["ceilings"].values()
        settings = record["settings"]
        parts.append(
            f"Batch {settings['batch']}, {settings['dtype']}, {settings['heads']} heads, "
            f"{settings['fusion_tokens']} queries, K = {settings['key_width']}, V = "
            f"{settings['value_width']}; this machine copies {copy / 1e9:.1f} GB/s and multiplies "
            f"{matmul / 1e9:.0f} GFLOP/s. Microseconds:"
        )
        parts += [shape_table(shape, found) for shape, found in record["shapes"].items()]
    return "\n\n".join(parts)


def shape_table(shape: str, found: dict) -> str:
    timed = {name: row for name, row in found["rows"].items() if "seconds" in row}
    others = [
        f"{name}: {row.get('failed', 'disagrees')}."
        for name, row in found["rows"].items()
        if name not in timed
    ]
    clocks = list(
        dict.fromkeys(clock for row in timed.values() for of in row["seconds"].values() for clock in of)
    )
    I, A = SHAPES[shape]
    rows = [(f"{I} + {A}", "", *clocks, "of the floor")]
    for mode, floor in found["floor_seconds"].items():
        for name, row in timed.items():
            quantiles = row["seconds"][mode]
            coldest = quantiles.get("GPU, cold") or quantiles["wall, cold"]
            cells = [spread(quantiles[clock], ",.0f", 1e6) for clock in clocks]
            rows.append((name, mode, *cells, f"{coldest['median'] / floor:.1f} x"))
    return "\n\n".join([table(rows), *(["Without a time: " + " ".join(others)] if others else [])])


def scaling_tables(results: dict) -> str:
    parts = []
    for device in ("cpu", "cuda"):
        record = results.get(f"scaling-{device}")
        parts.append(f"{'CPU' if device == 'cpu' else 'GPU'}: {origin(record)}")
        for mode in ("forward", "training") if record else ():
            if mode not in record:
                continue
            rows = [(mode, *(cell for name in record[mode] for cell in (f"{LABELS[name]}, ms", "MiB")))]
            for tokens in record["settings"]["tokens"]:
                points = [row["points"].get(str(tokens)) for row in record[mode].values()]
                rows.append(
                    (f"{tokens} + {tokens}", *(cell for point in points for cell in point_cells(point)))
                )
            slopes = [cell for row in record[mode].values() for cell in slope_cells(row)]
            rows.append((f"slope from {FIT_FROM} up", *slopes))
            parts.append(table(rows))
            stopped = [
                f"{LABELS[n]} at {row['stopped']}" for n, row in record[mode].items() if "stopped" in row
            ]
            parts.append(f"Stopped: {'; '.join(stopped)}." if stopped else "")
    return "\n\n".join(part for part in parts if part)


def point_cells(point: dict | None) -> tuple[str, str]:
    if point is None:
        return "-", "-"
    memory = f"{point['memory_bytes'] / 2**20:,.1f}"
    return (spread(point["seconds"], ",.1f", 1e3) if "seconds" in point else point["failed"]), memory


def slope_cells(row: dict) -> tuple[str, str]:
    if "time_slope" not in row:
        return "-", "-"
    return spread(row["time_slope"], ".2f"), f"{row['memory_slope']:.2f}"


def loading_table(results: dict) -> str:
    record = results.get("loading-cpu")
    if record is None:
        return origin(record)
    rows = [("clips per second and core", *(f"{size} x {size}" for size in record["sizes"]))]
    for name, label in STAGES.items():
        of_sizes = [stages[name]["clips_per_second"] for stages in record["sizes"].values()]
        rows.append((label, *(spread(quantiles, ".0f") for quantiles in of_sizes)))
    return f"{table(rows)}\n\n{origin(record)}"


def many_clips_table(results: dict) -> str:
    record = results.get("many_clips-cpu")
    if record is None:
        return origin(record)
    rows = [("clips", "found after", "first batch after", "decoded", "main process", "reader")]
    for clips, result in record["rows"].items():
        start = f"{int(clips):,}", f"{result['seconds_to_find']} s", f"{result['seconds_to_first_batch']} s"
        for moment in result["memory"]:
            memory = (f"{moment[process]:.0f} MiB" for process in ("main", "reader"))
            rows.append((*start, f"{moment['decoded']:,}", *memory))
            start = "", "", ""
    return f"{table(rows)}\n\n{origin(record)}"


def many_clips_line(results: dict) -> str:
    record = results.get("many_clips-cpu")
    if record is None:
        return origin(record)
    clips, result = max(record["rows"].items(), key=lambda row: int(row[0]))
    first, last = result["memory"][0], result["memory"][-1]
    return (
        f"{int(clips):,} clips in a manifest are found in {result['seconds_to_find']:.0f} s, and the first "
        f"batch is there after {result['seconds_to_first_batch']:.0f} s; a reader has "
        f"{first['reader']:.0f} MiB of its own after {first['decoded']:,} decoded clips and "
        f"{last['reader']:.0f} MiB after {last['decoded']:,}. {origin(record)}"
    )


if __name__ == "__main__":
    try:
        main(tyro.cli(Options, prog="python benchmarks/report.py"))
    except ValueError as error:
        sys.exit(f"error: {error}")
