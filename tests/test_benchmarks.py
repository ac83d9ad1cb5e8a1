"""The benchmarks run end to end at a tiny size, refuse what is wrong, and the tables are those of the
results.
"""

import functools
import json
import os
import re
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, fields, replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import emergence  # noqa: E402
import few_labels  # noqa: E402
import grid  # noqa: E402
import kernel_times  # noqa: E402
import loading  # noqa: E402
import many_clips  # noqa: E402
import measure  # noqa: E402
import pages  # noqa: E402
import pair_attention  # noqa: E402
import plots  # noqa: E402
import report  # noqa: E402
import scaling  # noqa: E402
import study  # noqa: E402
import synchrony  # noqa: E402
import throughput  # noqa: E402
from materialized import PairKeyFusion, PairTokenFusion, folded  # noqa: E402
from tables import MISSING, markdown  # noqa: E402

from avfuse import DenseFusion, create_encoder, graphs  # noqa: E402
from avfuse.encoder import EncoderOutput  # noqa: E402

PAGES = "study", "synchrony", "few_labels", "emergence"  # which have a plot, too
TINY = throughput.Options(
    preset="tiny", modes=("inference",), rows=("none", "dense"), seconds=0.0, device="cpu", dtype="float32"
)


@pytest.fixture
def out(tmp_path, monkeypatch):
    monkeypatch.setattr(
        sys, "argv", ["benchmarks/some.py", "--out", "somewhere/secret.json", "--seconds", "0"]
    )
    return tmp_path / "results.json"


def record_of(out) -> dict:
    """The record as written, which must tell where it comes from, and no names or paths of this machine."""
    text = out.read_text()
    record = json.loads(text)
    assert record["command"] == "python benchmarks/some.py --seconds 0"
    assert (
        record["commit"]
        and record["machine"]["cores"] >= 1
        and torch.__version__.startswith(record["versions"]["torch"])
    )
    assert str(Path.home()) not in text and str(ROOT) not in text and "secret" not in text
    return record


# --- materialized pairs -------------------------------------------------------------------------------------


@pytest.mark.parametrize("pair_bias", [None, (5, 3)])
def test_stored_pairs_equal_exact_dense_fusion(pair_bias):
    """The rows called materialized do compute dense interactions: forward and gradients of the tokens."""
    stored = PairTokenFusion(16, 2, attn_ratio=0.5, pair_bias=pair_bias).double()
    with torch.no_grad():
        for parameter in stored.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    tokens = [torch.randn(2, n, 16, dtype=torch.float64, requires_grad=True) for n in (4, 5, 3)]
    truth = stored(*tokens)
    true_grads = torch.autograd.grad(truth.square().sum(), tokens)
    for kind in (PairKeyFusion, DenseFusion):
        block = kind(16, 2, attn_ratio=0.5, pair_bias=pair_bias).double()
        block.load_state_dict(folded(stored.state_dict()))
        output = block(*tokens)
        assert measure.relative_error(output, truth) < 1e-12
        for grad, true_grad in zip(
            torch.autograd.grad(output.square().sum(), tokens), true_grads, strict=True
        ):
            assert measure.relative_error(grad, true_grad) < 1e-12


# --- measuring ----------------------------------------------------------------------------------------------


def test_flops_are_those_of_the_paper_size():
    """Against a count by hand of the two transformers: 12 layers of width 768 on 196 and 96 tokens."""
    layers = 12 * sum(n * 12 * 768**2 + 2 * n * n * 768 for n in (196, 96))
    embeddings = 768 * (196 * 3 + 96) * 256
    assert throughput.gflop_per_clip(throughput.ROWS["none"], "base", "inference") == pytest.approx(
        2 * (layers + embeddings) / 1e9, rel=1e-3
    )


def allocate(mib: int, limit_gib: float) -> int:
    measure.limit_memory("cpu", limit_gib)

    def multiply():
        numbers = torch.ones(mib, 2**18)  # float32
        numbers @ numbers[0]

    return measure.peak_memory(multiply, "cpu")


def test_peak_memory_and_its_limit():
    used = {mib: measure.in_fresh_process(allocate, mib, 1.0) / 2**20 for mib in (64, 128)}
    assert used[128] - used[64] == pytest.approx(64, abs=2)
    assert used[64] == pytest.approx(64, abs=12)  # products of torch 2.15 work in 8 MiB of their own
    with pytest.raises(MemoryError, match="one more tensor of 2.0 GiB did not fit"):
        measure.in_fresh_process(allocate, 2048, 1.0)


class FakeGpu:
    """Two clocks in milliseconds: the host pays for each launch, the GPU works through its queue. It stands
    in for torch.cuda.
    """

    LAUNCH, CYCLES = 1.0, 1e6  # of the host for a launch; of the GPU in a millisecond

    def __init__(self):
        self.host = self.gpu = self.stall = 0.0
        fake = self

        class Event:
            def __init__(self, enable_timing):
                pass

            def record(self):
                self.at = fake.gpu = max(fake.gpu, fake.host)

            def query(self):
                return self.at <= fake.host

            def elapsed_time(self, end):
                return end.at - self.at

        self.Event = Event

    def _sleep(self, cycles):
        self.gpu = max(self.gpu, self.host) + cycles / self.CYCLES

    def synchronize(self):
        self.host = max(self.gpu, self.host)

    def call(self):
        """Three kernels of 0.1 ms each; now and then something else holds up the host."""
        for _ in range(3):
            self.host += self.LAUNCH + self.stall
            self.gpu = max(self.gpu, self.host) + 0.1
            self.stall = 0.0


def test_gpu_time_is_without_the_gaps_between_launches(monkeypatch):
    gpu = FakeGpu()
    monkeypatch.setattr(torch, "cuda", gpu)
    monkeypatch.setattr(measure.time, "perf_counter", lambda: gpu.host / 1e3)
    clock = measure.GpuClock(gpu.call, repeats=3)
    assert clock() == pytest.approx(0.3e-3)
    assert clock.wait == 2 * 3 * 2e6  # twice 3 ms, in cycles of 0.5 ns

    gpu.stall = 100.0  # longer than the wait: this number is not taken
    assert clock.sample() == pytest.approx(0.3e-3)
    gpu.LAUNCH = 1e3
    with pytest.raises(RuntimeError, match="the host cannot launch a call"):
        clock.sample()


def test_the_commit_is_that_of_the_environment_or_of_git(tmp_path, monkeypatch):
    monkeypatch.setenv("AVFUSE_COMMIT", "0123456789ab")
    assert measure.commit() == "0123456789ab"
    monkeypatch.delenv("AVFUSE_COMMIT")
    if shutil.which("git") and (ROOT / ".git").exists():
        assert re.fullmatch("[0-9a-f]{12}( with changes)?", measure.commit())
    monkeypatch.setattr(measure, "ROOT", tmp_path)
    assert measure.commit() == "unknown"


def test_rounds_give_every_clock_its_turn_and_ratios_are_of_one_round():
    told = {"slow": iter([4.0, 8.0, 2.0]), "fast": iter([2.0, 4.0, 1.0])}  # the machine drifts
    clocks = {name: lambda values=values: next(values) for name, values in told.items()}
    times = measure.time_rounds(clocks, seconds=0.0, rounds=(3, 5))
    assert times == {"slow": [4.0, 8.0, 2.0], "fast": [2.0, 4.0, 1.0]}
    ratios = measure.ratios(times["slow"], times["fast"])
    assert ratios["min"] == ratios["median"] == ratios["max"] == 2.0 and ratios["n"] == 3


# --- end to end ---------------------------------------------------------------------------------------------


def test_throughput(out, capsys):
    throughput.main(replace(TINY, rows=tuple(throughput.ROWS), out=out))
    rows = record_of(out)["inference"]["rows"]
    assert list(rows) == [name for name in throughput.ROWS if name != "none-tokens"]
    check_rows(rows)
    printed = capsys.readouterr().out
    assert "dense, exact (avfuse)" in printed and "0.30 x" in printed


def test_throughput_of_training(out):
    throughput.main(
        replace(TINY, rows=("none-tokens", "materialized", "dense"), modes=("training",), batch=(2,), out=out)
    )
    rows = record_of(out)["training"]["rows"]
    check_rows(rows)
    gflop = {name: row["gflop_per_clip"] for name, row in rows.items()}
    assert gflop["none"] < gflop["none-tokens"] < gflop["dense"]
    for name, row in rows.items():  # each against either baseline, round by round
        (result,) = row["batches"].values()
        assert result["speed_over_tokens"]["n"] == result["speed_over_none"]["n"]
        if name in throughput.BASELINES:
            assert result[throughput.BASELINES[name]]["min"] == result[throughput.BASELINES[name]]["max"] == 1


def check_rows(rows: dict) -> None:
    for row in rows.values():
        assert row["agrees"], row
        (result,) = row["batches"].values()
        assert result["clips_per_second"]["n"] == result["speed_over_none"]["n"] >= 3
        assert result["memory_bytes"] > 20 * 2**20  # two transformers of 1.9 million weights, and more
    assert (
        rows["materialized"]["gflop_per_clip"]
        > rows["dense"]["gflop_per_clip"]
        > rows["none"]["gflop_per_clip"]
    )


def test_a_recorded_training_step_is_compared_with_the_model(monkeypatch):
    """Where there is no GPU, a stand-in takes the place of the recording."""
    recorded = []

    class Recorded:
        def __init__(self, module, inputs):
            self.module, self.weights = module, graphs.Weights(module)
            recorded.append(inputs)

        def __call__(self, inputs):
            return self.module(**inputs)

    monkeypatch.setattr(graphs, "TrainingRecording", Recorded)
    model = throughput.make_model(throughput.ROWS["dense"], throughput.make_base("tiny", 1), "training")
    clips, masks = throughput.make_inputs(model.encoder, 2), throughput.draw_masks(model, 2)
    truth = throughput.outputs(model, *clips, masks, torch.float32)
    run = throughput.compiled(model, "cuda-graph", "training")
    ours = throughput.outputs(model, *clips, masks, torch.float32, run)
    assert [inputs.keys() for inputs in recorded] == [{"image", "audio", *masks}]
    assert len(ours) > 3 and all(torch.equal(ours[name], true) for name, true in truth.items())


def test_a_compiled_model_is_compared_with_the_model(monkeypatch):
    """By a backend that needs no compiler of C++."""
    modes, compile = [], torch.compile

    def through_eager(model, *, mode, dynamic):
        modes.append((mode, dynamic))
        return compile(model, backend="aot_eager", dynamic=dynamic)

    monkeypatch.setattr(torch, "compile", through_eager)
    model = throughput.make_model(throughput.ROWS["dense"], throughput.make_base("tiny", 1), "inference")
    clips = throughput.make_inputs(model, 2)
    truth = throughput.outputs(model, *clips, None, torch.float32)
    run = throughput.compiled(model, "default", "inference")
    ours = throughput.outputs(model, *clips, None, torch.float32, run)
    assert modes == [("default", False)] and ours.keys() == truth.keys()
    for name, true in truth.items():
        torch.testing.assert_close(ours[name], true)


def test_bars_stand_beside_their_names():
    """Inference has rows that training has not."""
    record = json.loads((ROOT / "benchmarks/results/throughput-cpu.json").read_text())
    figure = plots.draw_throughput(record)
    for mode, axis in zip(("inference", "training"), figure.axes[::2], strict=True):
        rows = record[mode]["rows"].values()
        names = [label.get_text() for label in axis.get_yticklabels()]
        assert names == [row["label"] for row in rows][::-1] and list(axis.get_yticks()) == [
            *range(len(names))
        ]


def test_bars_are_drawn_of_what_there_is():
    """Without a speed of no fusion there is none over it, nor memory where it did not fit."""
    record = json.loads((ROOT / "benchmarks/results/throughput-cpu.json").read_text())
    rows = record["inference"]["rows"]
    bars = len(plots.draw_throughput(record).axes[0].patches)
    rows["none"]["batches"] = {batch: dict(failed="out of memory") for batch in rows["none"]["batches"]}
    del rows["dense"]["batches"]["1"]["speed_over_none"]
    speed, memory, *_ = plots.draw_throughput(record).axes
    assert len(speed.patches) == bars - 2 and not memory.patches
    assert len(speed.get_yticklabels()) == bars - 1  # that of no fusion is gone, dense has a name
    for row in rows.values():
        row["batches"].get("1", {}).pop("speed_over_none", None)
    assert not plots.draw_throughput(record).axes[0].patches


def test_a_limit_of_memory_can_be_given_where_there_is_one():
    """An option that is taken and never read would be a lie."""
    modules = throughput, scaling, pair_attention, kernel_times
    named = [{field.name for field in fields(module.Options)} for module in modules]
    assert ["memory_limit" in names for names in named] == [True, True, True, False]


def test_an_interrupted_write_leaves_the_file_of_before(tmp_path, monkeypatch):
    path = tmp_path / "new/results.json"
    assert measure.write_json(path, dict(a=(1, 2))) == dict(a=[1, 2])
    text = path.read_text()

    def half(path, text):
        path.write_bytes(text[: len(text) // 2].encode())
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_text", half)
    with pytest.raises(KeyboardInterrupt):
        measure.write_json(path, dict(a=3))
    assert path.read_text() == text


def test_throughput_keeps_what_it_measured_before_it_was_interrupted(out, monkeypatch):
    options = replace(TINY, rows=("none",), modes=("inference", "training"), batch=(1, 2), out=out)
    order = [("inference", 1), ("training", 1), ("inference", 2), ("training", 2)]
    assert throughput.in_order(options) == order
    time_batch = throughput.time_batch

    def interrupted(options, mode, batch, rows, models):
        if (mode, batch) == order[2]:
            raise KeyboardInterrupt
        time_batch(options, mode, batch, rows, models)

    monkeypatch.setattr(throughput, "time_batch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        throughput.main(options)
    record = record_of(out)
    for mode in ("inference", "training"):
        (result,) = record[mode]["rows"]["none"]["batches"].values()
        assert result["clips_per_second"]["n"] >= 3
    assert MISSING not in markdown(throughput.tables(record))


def test_throughput_refuses_a_row_that_disagrees_or_does_not_fit(out, monkeypatch, capsys):
    monkeypatch.setattr(
        "avfuse.fusion.attend_pairs", lambda query, image, *_, **__: query + image.value.mean(2, keepdim=True)
    )
    throughput.main(replace(TINY, out=out))
    row = record_of(out)["inference"]["rows"]["dense"]
    assert not row["agrees"] and "clips_per_second" not in row["batches"]["1"]
    assert "no speed: it disagrees" in capsys.readouterr().out

    throughput.main(replace(TINY, rows=("none",), batch=(4000,), memory_limit=0.5, out=out))
    failed = record_of(out)["inference"]["rows"]["none"]["batches"]["4000"]["failed"]
    assert re.fullmatch(r"out of memory: one more tensor of [\d.]+ GiB did not fit", failed)


def test_pair_attention(out, capsys):
    rows = ("avfuse", "reference", "sdpa")
    options = pair_attention.Options(
        rows=rows, shapes=("pretraining",), batch=1, heads=2, seconds=0.0, device="cpu"
    )
    options = replace(options, variants=("plain", "bias", "frames", "masks"))
    pair_attention.main(replace(options, dtype="float32", memory_limit=64.0, out=out))
    shapes = record_of(out)["shapes"]
    assert list(shapes) == ["pretraining", *(f"pretraining, {kind}" for kind in ("bias", "frames", "masks"))]
    (cannot, _) = (shapes[f"pretraining, {kind}"]["rows"].pop("sdpa") for kind in ("bias", "frames"))
    assert cannot == dict(failed="a pair bias joins the two softmaxes, which two calls cannot do")
    for shape in shapes.values():
        for row in shape["rows"].values():
            assert row["agrees"] and set(row["seconds"]) == {"forward", "backward", "both"}
            assert set(row["seconds"]["forward"]) == {"wall, warm", "wall, cold"}
    assert "pair_bias" in shapes["pretraining, bias"]["rows"]["avfuse"]["errors"]
    shape = shapes["pretraining"]
    assert shape["bytes"]["forward"] == 4 * 2 * (16 * 16 + 68 * 32 + 16 * 16)
    assert shape["flop"]["both"] == 2 * 2 * 16 * 68 * (32 + 80)
    printed = capsys.readouterr().out
    assert "of the floor" in printed and "sdpa: a pair bias joins" in printed


def test_floors_of_pair_attention_by_hand():
    options = pair_attention.Options(batch=3, heads=2, fusion_tokens=5, key_width=6, value_width=7)
    options = replace(options, dtype="bfloat16")
    bytes_of, flop_of = (
        partial(count, options, "pretraining")
        for count in (pair_attention.count_bytes, pair_attention.count_flop)
    )
    table = 2 * 49 * 19  # entries of a bias (H, I, A), each read twice and written once
    for mode, times in ("forward", 1), ("backward", 2), ("both", 3):
        assert bytes_of("bias", mode) - bytes_of("plain", mode) == 4 * table * times
    assert bytes_of("masks", "both") - bytes_of("plain", "both") == 2 * 3 * (49 + 19)
    # Two products with exp(bias) forward; those, two more, and one that is twice as wide backward
    product = 2 * 3 * 5 * table
    assert flop_of("bias", "forward") - flop_of("plain", "forward") == 2 * product
    assert flop_of("bias", "backward") - flop_of("plain", "backward") == 6 * product
    assert flop_of("masks", "both") == flop_of("plain", "both")
    for count in bytes_of, flop_of:  # 7 frames of 7 tokens
        more, of_frames = (count(variant, "both") - count("plain", "both") for variant in ("bias", "frames"))
        assert 7 * of_frames == more


def test_scaling(out, capsys):
    options = scaling.Options(
        tokens=(64, 512, 1024), seconds=0.0, device="cpu", dim=64, heads=2, dtype="float32"
    )
    scaling.main(replace(options, modes=("forward",), memory_limit=0.25, out=out))
    rows = record_of(out)["forward"]
    assert not any("failed" in point for row in rows.values() for point in row["points"].values())
    assert set(rows["dense"]["points"]) == {"64", "512", "1024"} and rows["dense"]["time_slope"]["n"] >= 3
    assert set(rows["materialized"]["points"]) == {"64", "512"}
    assert "1024 + 1024 tokens: out of memory" in rows["materialized"]["stopped"]
    assert "slope" in capsys.readouterr().out


def test_scaling_by_frames(out):
    options = scaling.Options(
        by="frames", tokens=(1, 2), seconds=0.0, device="cpu", dim=32, heads=2, dtype="float32"
    )
    scaling.main(replace(options, modes=("training",), memory_limit=1.0, out=out))
    rows = record_of(out)["training"]
    assert list(rows) == list(scaling.ROWS)
    assert not any("failed" in point for row in rows.values() for point in row["points"].values())


@pytest.mark.parametrize("row", [row for row in scaling.ROWS if row != "dense-time"])
def test_scaling_sees_a_token_that_is_left_out(monkeypatch, row):
    options = scaling.Options(batch=1, dim=64, heads=2, dtype="float32", device="cpu")
    blocks = scaling.make_blocks(options)
    assert scaling.disagreement(options, blocks, row, tokens=512) is None
    kind = scaling.ROWS[row]

    class Forgetful(kind):
        def forward(self, fusion, image, audio):
            rounded = image.dtype == torch.float32
            return super().forward(fusion, image[:, 1:] if rounded else image, audio)

    blocks[row].__class__ = Forgetful
    assert "disagrees by" in scaling.disagreement(options, blocks, row, tokens=512)


def test_many_clips(out):
    options = many_clips.Options(rows=(40,), decoded=(1, 33), out=out)
    (result,) = many_clips.main(options)["rows"].values()
    assert [moment["decoded"] for moment in result["memory"]] == [32, 40]
    assert result["seconds_to_find"] <= result["seconds_to_first_batch"]
    mib = many_clips.own_memory(os.getpid()) / many_clips.MIB
    assert all(1 < moment["reader"] < moment["main"] < 10 * mib for moment in result["memory"])
    record_of(out)


def test_loading(out):
    loading.main(loading.Options(sizes=(32,), clips=2, seconds=0.0, out=out))
    stages = record_of(out)["sizes"]["32"]
    assert set(stages) == set(loading.STAGES)
    speeds = {name: stage["clips_per_second"]["max"] for name, stage in stages.items()}
    assert 0 < speeds["whole"]


# --- results and tables -------------------------------------------------------------------------------------


def test_tables_and_plots_are_those_of_the_results():
    report.main(report.Options(check=True))


def test_results_say_where_they_come_from():
    for path in report.RESULTS.glob("*.json"):
        if path.stem.startswith(
            "traffic-meta"
        ):  # the same everywhere: test_traffic.py holds it against the code
            continue
        record = json.loads(path.read_text())
        settings = record["settings"]
        ending = throughput.ENDINGS.get(settings.get("compile", "no"), "-compiled")
        ending += f"-video{settings['frames']}" if settings.get("frames", 1) > 1 else ""
        ending += "-frames" if settings.get("by") == "frames" else ""
        ending += "-base" if "--preset base" in record["command"] else ""
        assert path.stem == f"{record['benchmark']}-{settings['device']}{ending}"
        assert {"command", "date", "commit", "machine", "versions", "note"} <= record.keys()
        assert "changes" not in record["commit"], f"{path.name}: measured on files never committed"
        assert not re.search(r"[\"' =](/|~/)\w", path.read_text()), f"{path.name} holds a path"


def test_results_of_tasks_say_what_they_are_of():
    for path in (report.RESULTS / "tasks").glob("*.json"):
        result = json.loads(path.read_text())
        told = {
            "task",
            "protocol",
            "split",
            "coverage",
            "seed",
            "checkpoint",
            "weights_sha256",
            "date",
            "torch",
        }
        assert told | {"metrics"} <= result.keys() and len(result["weights_sha256"]) == 64, path
        assert result["coverage"]["judged"] == result["coverage"]["expected"], path
        assert not re.search(r"[\"' =](/|~/)\w", path.read_text()), f"{path.name} holds a path"
    named = {file for _, _, file, *_ in report.TASKS}
    named |= {f"{file}-image" for _, _, file, *texts in report.TASKS if "{image[" in str(texts)}
    assert named == {path.stem for path in (report.RESULTS / "tasks").glob("*.json")}


def test_report_notices_other_numbers():
    results = report.read_results(report.RESULTS)
    before = report.texts(results)
    results["loading-cpu"]["sizes"]["128"]["whole"]["clips_per_second"]["median"] *= 2
    after = report.texts(results)
    changed = {path for path in before if before[path] != after[path]}
    assert changed == {ROOT / "benchmarks/README.md", ROOT / "docs/data.md"}
    others = ["README.md", "benchmarks/README.md"]
    others += [f"docs/{name}.md" for name in ("dense", "data", "tasks", "video")]
    of_their_own = {page.path for page in report.PAGES if page.result.exists()}
    assert {ROOT / f"benchmarks/{page}.md" for page in PAGES} <= of_their_own
    assert set(before) == {*(ROOT / page for page in others), *of_their_own}
    assert plots.plots(results)[ROOT / "docs/scaling.png"][0] == plots.drawn_from(ROOT / "docs/scaling.png")
    with pytest.raises(ValueError, match="one <!-- speed -->"):
        report.filled("no markers", {"speed": ""})


def test_tables_of_a_gpu_stand_beside_those_of_the_cpu_and_explain_what_is_missing():
    results = report.read_results(report.RESULTS)
    without = {name: record for name, record in results.items() if not name.endswith("-cuda")}
    assert report.texts(without)[ROOT / "benchmarks/README.md"].count("GPU: Not yet measured.") == 3
    for name in ("throughput", "pair_attention", "scaling"):
        record = json.loads(json.dumps(results[f"{name}-cpu"]))
        record["machine"]["gpu"] = "some GPU"
        results[f"{name}-cuda"] = record
    record = results["throughput-cuda"]
    del record["training"], record["inference"]["rows"]["token"]
    for row, batch in (("materialized", dict(failed="out of memory")), ("dense", dict(memory_bytes=1))):
        record["inference"]["rows"][row]["batches"] = {"64": batch}
    record["inference"]["rows"]["dense"]["agrees"] = False
    texts = report.texts(results)
    lines = texts[ROOT / "README.md"].splitlines()
    (stored, token, dense, none) = (
        next(line for line in lines if line.startswith(f"| {label} |")).split(" | ")[5:7]
        for label in ("dense, pair tokens stored (Eq. 4-7)", "token", "dense, exact (avfuse)", "no fusion")
    )
    assert stored == ["out of memory", "-"] and token == [MISSING] * 2 and none == ["1.00 x"] * 2
    assert dense[0].startswith("no speed: it disagrees, largest error")
    tables = texts[ROOT / "benchmarks/README.md"]
    assert tables.count(": some GPU; torch") == 3 and f"\ntraining: {MISSING}.\n" in tables
    assert "| GPU: training step of dense over no fusion | at least 0.85 | not part of the run |  |" in tables
    assert tables.count("| 4096 + 4096 |") == 2 * 3


def test_report_judges_budgets():
    record = {"preset": "base", "rows": {}}
    for name, speed in ("none", 1.0), ("dense", 0.5), ("factorized", 0.9):
        result = dict(clips_per_second=dict(median=speed), speed_over_none=dict(median=speed), memory_bytes=1)
        record["rows"][name] = dict(gflop_per_clip=50.0, batches={"1": result})
    compiled = json.loads(json.dumps(record))
    compiled["rows"]["dense"]["batches"]["1"]["speed_over_none"]["median"] = 0.9
    found = report.budgets_table(
        {"throughput-cpu": {"inference": record}, "throughput-cpu-compiled": {"inference": compiled}}
    )
    assert "| The same, both under torch.compile | at most 1.12 | 1.11 | met |" in found
    assert "batch 1: time of dense over no fusion | at most 1.12 | 2 | missed by 78.6% |" in found
    assert "| GPU: speed of dense over no fusion | at least 0.92 | not yet measured |  |" in found


def test_options_that_make_no_sense():
    with pytest.raises(ValueError, match="--batch must be positive"):
        throughput.resolve(throughput.Options(batch=(0,)))
    assert create_encoder("tiny").embed_dim < 384  # what SMALL_DECODER goes by


# --- the study ----------------------------------------------------------------------------------------------


@pytest.fixture
def few_scenes(monkeypatch):
    """Eight drawn scenes to train on and four to judge on, and next to no steps."""
    options = study.Options(steps=2, pretraining_steps=1, batch_size=4, train=8, test=4, workers=1)
    monkeypatch.setattr(study.Scenes, "splits", drawn_splits)
    return options


@functools.cache
def drawn_splits(scenes):
    drawn = [
        scenes.one((split, n)) for split, count in ((0, scenes.train), (1, scenes.test)) for n in range(count)
    ]
    tensors = [torch.from_numpy(np.stack(part)) for part in zip(*drawn, strict=True)]
    return [
        {name: tensor[part] for name, tensor in zip(study.STORED, tensors, strict=True)}
        for part in (slice(scenes.train), slice(scenes.train, None))
    ]


@pytest.mark.parametrize("cell", [(row, "pretrained", 1) for row in study.ROWS if row not in study.ALONE])
def test_a_cell_of_the_study_depends_on_its_seed_alone(few_scenes, cell):
    first, second = (study.train_cell(few_scenes, cell) for _ in range(2))
    assert first["curve"] == second["curve"] and first["curve"][-1][0] == 2
    assert first["colour"] * 4 in range(5) and first["shape"] * 4 in range(5)


@pytest.mark.parametrize("row", synchrony.ROWS)
@pytest.mark.parametrize("frames", [1, 3])
def test_a_cell_of_its_second_page_does_too(monkeypatch, row, frames):
    monkeypatch.setattr(study.Scenes, "splits", drawn_splits)
    options = synchrony.Options(steps=2, batch_size=4, train=8, test=4)
    first, second = (synchrony.train_cell(options, (row, frames, 2, 1)) for _ in range(2))
    assert first == second and first["curve"][-1][0] == 2 and first["frames"] == frames


@pytest.mark.parametrize("start", study.STARTS)
@pytest.mark.parametrize("row", few_labels.ROWS)
def test_a_cell_with_few_labels_does_too_and_sees_no_other_label(monkeypatch, row, start):
    options = few_labels.Options(steps=2, pretraining_steps=1, batch_size=4, train=8, test=4, labelled=(6,))
    cells = []
    for hidden in (False, True):  # labels of the scenes that have none are not looked at

        def splits(self, hidden=hidden):
            train, test = drawn_splits(self)
            for label in few_labels.LABELS:
                train[label][:6] = torch.tensor([0, 1, 2, 0, 1, 2])
                train[label][6:] = -100 if hidden else 3
            return train, test

        monkeypatch.setattr(study.Scenes, "splits", splits)
        cells.append(few_labels.train_cell(options, (row, start, 1)))
    assert cells[0] == cells[1]
    names = [(one["way"], one["labelled"], one["label"]) for one in cells[0]["accuracies"]]
    assert sorted(names) == [(way, 6, label) for way in few_labels.WAYS for label in ("colour", "shape")]
    assert all(one["accuracy"] * 4 in range(5) for one in cells[0]["accuracies"])


@pytest.mark.parametrize("row", emergence.ROWS)
def test_a_cell_of_emergence_does_too_and_sees_no_label(monkeypatch, row):
    options = emergence.Options(steps=2, batch_size=4, train=8, test=6)
    cells = []
    for hidden in (False, True):  # of the scenes to pretrain on

        def splits(self, hidden=hidden):
            train, test = drawn_splits(self)
            for label in ("shape", "colour", "shown"):
                train[label][:] = 0 if hidden else train[label]
            return train, test

        monkeypatch.setattr(study.Scenes, "splits", splits)
        cells.append(emergence.train_cell(options, (row, 1)))
    assert cells[0] == cells[1]
    assert [at["step"] for at in cells[0]["curve"]] == [0, 1, 2]
    for at in cells[0]["curve"]:
        for label in emergence.LABELS:
            assert all(at[label][name] * 6 in range(7) for name in study.FEATURES)


def test_emergence_tells_whether_fusion_tokens_lead_by_hand():
    """Both is right where shape and colour are; the better of image and audio is that of the mean."""
    unit = torch.eye(4)
    scenes = dict(
        image=torch.zeros(4, 3, 2, 2),
        audio=torch.zeros(4, 1, 2, 2),
        shown=torch.zeros(4, 36, dtype=torch.bool),
    )
    scenes |= dict(shape=torch.tensor([0, 0, 1, 1]), colour=torch.tensor([2, 2, 3, 4]))

    class Encoder(torch.nn.Module):
        def forward(self, image, audio):
            near = {  # fusion: 0 and 1, 2 and 3; image: 0 and 2, 1 and 3; audio: all alike but for 3
                "fusion": unit[[0, 0, 1, 1]],
                "image": unit[[0, 1, 0, 1]],
                "audio": unit[[0, 1, 1, 1]],
            }
            tokens = {name: near[name][:, None] + 0.01 * unit[:, None] for name in near}
            return EncoderOutput(**tokens)

    found = emergence.accuracies(Encoder(), scenes)
    assert found["shape"]["fusion"] == 1.0 and found["shape"]["image"] == 0.0
    assert found["colour"]["fusion"] == 0.5 and found["both"]["fusion"] == 0.5
    assert found["both"]["chance"] == pytest.approx(2 / 12)
    cells = [
        dict(row="fusion", seed=seed, curve=[dict(step=1, **{label: at for label in emergence.LABELS})])
        for seed, at in enumerate(
            (
                dict(image=0.1, audio=0.4, fusion=0.5, chance=0.1),
                dict(image=0.5, audio=0.4, fusion=0.8, chance=0.1),
            )
        )
    ]
    (_, (_, *verdicts)) = emergence.claims_table(dict(cells=cells))
    assert verdicts == ["+0.250 ± 0.150: within the spread"] * 3


def test_cells_that_are_there_are_not_trained_again(tmp_path, monkeypatch):
    """Settings of several values too are those that a file gives back."""
    options, cell = few_labels.Options(), ("dense", "scratch", 0)
    free = "rows", "starts", "seeds", "workers", "report"
    settings = {name: value for name, value in asdict(options).items() if name not in free}
    record = dict(settings=settings | dict(device="cpu"), cells=[dict(zip(study.KEYS, cell, strict=True))])
    (tmp_path / "few_labels-cpu.json").write_text(json.dumps(record))
    monkeypatch.setattr(pages, "RESULTS", tmp_path)
    few_labels.PAGE.train(replace(options, seeds=(0,), workers=7), [cell], train_cell=None)
    with pytest.raises(ValueError, match="holds cells of other settings"):
        few_labels.PAGE.train(replace(options, lr=1e-3), [cell], train_cell=None)


@pytest.mark.parametrize("benchmark", [study, synchrony, few_labels, emergence, grid])
def test_options_that_choose_cells_are_no_settings(benchmark):
    """All others are in the results, in this order: the folder of the grid's runs is named after them."""
    settings = json.loads((report.RESULTS / f"{benchmark.PAGE.name}-cpu.json").read_text())["settings"]
    fixed = benchmark.PAGE.fixed(benchmark.Options())
    assert [*fixed, "device"] == [name for name in settings if name not in ("dim", "depth")]
    assert set(fixed).isdisjoint(("rows", "starts", "frames", "fusion_tokens", "seeds", "workers", "report"))


def test_few_labels_tells_gains_by_hand():
    cells = [
        dict(
            row="dense",
            start=start,
            seed=seed,
            accuracies=[dict(way="probe", labelled=256, label="shape", accuracy=a)],
        )
        for start, accuracies in (("scratch", (0.1, 0.1)), ("pretrained", (0.4, 0.6)))
        for seed, a in enumerate(accuracies)
    ]
    record = dict(cells=cells, settings=dict(labelled=[256]))
    (line,) = few_labels.table(record, "shape")[1:]
    # The variance of 0.4 and 0.6 is 0.02; sqrt(0.02 / 2) = 0.1; with one degree of freedom, t = 12.7
    assert line[1:] == (
        "256",
        "0.100 ± 0.000 (n=2)",
        "0.500 ± 0.141 (n=2)",
        "+0.400 ± 0.100: within the spread",
    )
    assert few_labels.table(record, "colour")[1:] == []


def test_the_study_tells_means_differences_and_verdicts_by_hand():
    accuracies = dict(dense=(0.5, 0.7, 0.9), token=(0.1, 0.1, 0.1), bilinear=(0.7, 0.7), factorized=(0.6,))
    cells = [
        dict(row=row, start="scratch", seed=seed, colour=colour)
        for row, colours in accuracies.items()
        for seed, colour in enumerate(colours)
    ]
    lines = markdown([study.accuracy_table(dict(cells=cells))]).splitlines()
    assert "| dense, early (all layers) | 0.700 ± 0.200 (n=3) |  |  |" in lines
    claims = {}
    for claim, scratch, _ in study.claims_table(dict(cells=cells)):
        claims[claim] = scratch
    # The variance of 0.5, 0.7 and 0.9 is 0.04; sqrt(0.04 / 3) = 0.115; times 4.30, t of 2 degrees, 0.497
    assert claims["dense over token"] == "+0.600 ± 0.115: yes"
    assert claims["bilinear over additive pairs"] == "+0.000 ± 0.115: within the spread"
    assert claims["dense over factorized"] == "+0.100 (one seed)"
    assert study.difference([0.1, 0.1], [0.4, 0.4]) == "-0.300 ± 0.000: no, the reverse"
    # Of 0.1 and 0.1, 0.0033 and 2 + 2 degrees: t = 2.78, where twice the error would be beyond
    assert study.difference([0.0, 0.1, 0.2], [0.2, 0.3, 0.4]) == "-0.200 ± 0.082: within the spread"


@pytest.mark.parametrize("name", PAGES)
def test_pages_and_their_plots_are_those_of_their_results(name):
    record = json.loads((ROOT / f"benchmarks/results/{name}-cpu.json").read_text())
    (page,) = (page for page in report.PAGES if page.name == name)
    text, title = (ROOT / f"benchmarks/{name}.md").read_text(), name.replace("_", "-")
    assert text == report.filled(text, {title: markdown(page.parts(record))})
    assert plots.drawn_from(ROOT / f"docs/{title}.png") == plots.digest(record)


# --- the grid -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", grid.ROWS)
def test_every_row_of_the_grid_is_the_encoder_that_it_names(name):
    row, encoder = grid.ROWS[name], grid.encoder_of(grid.ROWS[name])
    layers = dict(all=(0, 1, 2, 3), none=()).get(row.layers, row.layers)
    assert encoder.fusion_layers == layers and encoder.num_fusion_tokens == row.fusion_tokens
    assert encoder.num_state_tokens == row.fusion_tokens + 2 * row.aggregation_tokens * (
        row.interactions == "factorized"
    )
    assert not row.contrastive or 0 not in layers


def test_the_grid_tells_what_is_not_run_and_judges_by_hand():
    reached = dict(all=(0.6, 0.8), none=(0.1, 0.1), half=(0.7,))
    cells = [
        dict(row=row, seed=seed, linear=value, sdr=10 * value, miou=value / 2, chance=0.2, mixture_sdr=0.1)
        for row, values in reached.items()
        for seed, value in enumerate(values)
    ]
    (_, *rows), (_, *claims) = (table(dict(cells=cells)) for table in (grid.results_table, grid.claims_table))
    rows, claims = ({name: values for name, *values in table} for table in (rows, claims))
    assert rows[grid.ROWS["all"].label][0] == "0.700 ± 0.141 (n=2)"
    assert rows[grid.ROWS["scratch"].label] == ["not yet measured"] * 3
    # The variance of 0.6 and 0.8 is 0.02; sqrt(0.02 / 2) = 0.1
    told = "+0.600 ± 0.100: within the spread", "+6.000 ± 1.000: within the spread"
    assert claims["fusion in all layers over none"][:2] == [*told]
    assert claims["all layers over the upper half"][0] == "+0.000 (one seed)"
    assert claims["upper half over the last layer"] == ["not yet measured"] * 3


def test_the_page_of_the_grid_is_that_of_its_results():
    if grid.PAGE.result.exists():
        text = grid.PAGE.path.read_text()
        assert text == report.filled(text, grid.PAGE.sections(json.loads(grid.PAGE.result.read_text())))


@pytest.mark.parametrize("here", ["cpu", "cuda"])
@pytest.mark.parametrize("there", [("cpu",), ("cuda",), ("cpu", "cuda")])
def test_a_page_shows_the_cells_of_a_gpu_if_there_are_any(tmp_path, monkeypatch, capsys, here, there):
    """Whatever machine writes it, also while this adds cells to a file of its own."""
    monkeypatch.setattr(pages, "RESULTS", tmp_path)
    monkeypatch.setattr(pages, "ROOT", tmp_path)
    monkeypatch.setattr(pages, "processes", ThreadPoolExecutor)
    text = tmp_path / "benchmarks/some.md"
    text.parent.mkdir()
    text.write_text("<!-- some -->\n<!-- /some -->\n")
    for device in there:
        record = dict(settings=dict(device=device), cells=[dict(seed=0)])
        (tmp_path / f"some-{device}.json").write_text(json.dumps(record))
    page = pages.Page("some", ("seed",), lambda record: [[(record["settings"]["device"],)]], device=here)
    assert page.result.name == f"some-{there[-1]}.json"
    page.show()
    assert capsys.readouterr().out.startswith(there[-1]) and f"| {there[-1]} |" in text.read_text()
    if here == "cpu":
        page.train(pages.CellOptions(), [(0,), (1,)], lambda options, cell: dict(seed=cell[0]))
        assert len(json.loads((tmp_path / "some-cpu.json").read_text())["cells"]) == 2
        assert f"| {there[-1]} |" in text.read_text()
