"""Where the time of an encoder goes: its kernels by time, eager, compiled and in a CUDA graph."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Literal

import measure
import throughput
import torch
from tables import spread, terminal
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from avfuse import create_encoder

CALLS = 3  # that are profiled
SHOWN = 40  # kernels of a row, the longest first
Way = Literal["eager", "compiled", "graph"]


@dataclass(frozen=True)
class Options(measure.Options):
    """Inference of each row of throughput.py in three ways: eager, under torch.compile, and in a CUDA graph,
    where no launch costs anything. Prints torch.profiler's tables, then one of the times in turns.
    """

    rows: tuple[throughput.RowName, ...] = ("none", "dense")
    ways: tuple[Way, ...] = ("eager", "compiled", "graph")
    """On a CPU there is no graph."""
    preset: Literal["tiny", "small", "base", "large"] = "base"
    batch: int = 64
    seconds: float = 15.0
    """How long all are timed; three rounds at least."""


@torch.inference_mode()
def main(options: Options) -> dict:
    options = options.on_device()
    options = replace(options, out=options.out or measure.RESULTS / f"kernel_times-{options.device}.json")
    record = measure.begin_record("kernel_times", asdict(options), options.note)
    device, dtype = options.device, measure.DTYPES[options.dtype]
    base, clocks, record["rows"] = create_encoder(options.preset, "none"), {}, {}
    for row in options.rows:
        encoder = throughput.make_model(throughput.ROWS[row], base, "inference").to(device, dtype)
        inputs = [tensor.to(dtype) for tensor in throughput.make_inputs(encoder, options.batch, device)]
        record["rows"][row] = {}
        for way in options.ways:
            if way == "graph" and device == "cpu":
                continue
            call = call_of(way, encoder, inputs)
            clocks[row, way] = measure.WallClock(call, device, turn=0.3)
            record["rows"][row][way] = kernels_of(call, device, f"{row}, {way}")
            measure.write_record(options.out, record)
    for (row, way), seconds in measure.time_rounds(clocks, seconds=options.seconds).items():
        record["rows"][row][way]["seconds"] = measure.quantiles(seconds)
    measure.write_record(options.out, record)
    print(f"\nbatch {options.batch}, {options.preset}, {options.dtype}")
    print(terminal([times(record["rows"])]))
    return record


def times(rows: dict) -> list[tuple]:
    table = [("a call", "milliseconds (quartiles)", "in kernels", "kernels")]
    for row, ways in rows.items():
        for way, found in ways.items():
            wall = spread(found["seconds"], ".2f", 1e3)
            table.append((f"{row}, {way}", wall, f"{found['milliseconds']:.2f}", f"{found['count']:.0f}"))
    return table


def call_of(way: Way, encoder: torch.nn.Module, inputs: list[torch.Tensor]) -> Callable:
    if way == "compiled":
        encoder = torch.compile(encoder, dynamic=False)
    if way != "graph":
        return lambda: encoder(*inputs)
    with torch.cuda.stream(torch.cuda.Stream()):
        for _ in range(3):  # compiles the kernels, and lets libraries take what memory they need
            encoder(*inputs)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        encoder(*inputs)
    return graph.replay


def kernels_of(call: Callable, device: str, title: str) -> dict:
    """What one call spends in kernels (on a CPU, in operators): all, their number, and the longest."""
    call()
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device == "cuda")
    with profile(activities=activities) as trace:
        for _ in range(CALLS):
            call()
        measure.synchronize(device)
    kind, time = ("CUDA", "self_device_time_total") if device == "cuda" else ("CPU", "self_cpu_time_total")
    events = trace.key_averages()
    print(f"\n{title}: {CALLS} calls")
    print(events.table(sort_by=time, row_limit=SHOWN, max_name_column_width=80), flush=True)
    found = [
        dict(name=event.key, calls=event.count / CALLS, microseconds=round(getattr(event, time) / CALLS, 2))
        for event in events
        if event.device_type == getattr(DeviceType, kind)
    ]
    found.sort(key=lambda kernel: -kernel["microseconds"])
    return dict(
        milliseconds=sum(kernel["microseconds"] for kernel in found) / 1e3,
        count=sum(kernel["calls"] for kernel in found),
        kernels=found[:SHOWN],
    )


if __name__ == "__main__":
    measure.run(main, Options)
