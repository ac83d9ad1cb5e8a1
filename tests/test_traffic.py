"""What benchmarks/traffic.py counts: against sums by hand, against autograd, and for rows of its table."""

import json
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import counting  # noqa: E402
import measure  # noqa: E402
import report  # noqa: E402
import throughput  # noqa: E402
import traffic  # noqa: E402

from avfuse import AVMAE, create_encoder, pair_attention  # noqa: E402
from avfuse.ops.residual_norm import residual_norm  # noqa: E402

RESULT = measure.RESULTS / "traffic-meta.json"
AT_64 = traffic.Options(batch=(64,))
# What dense fusion takes over no fusion at batch 64, ViT-B, bfloat16: at most, and of speed at least. Bounds
# are just beyond what is true today; whoever brings the costs down tightens them.
BOUNDS = {
    ("inference", "none"): dict(bytes=1.21, launches=1.87, speed=0.85, side_stream=0.89),
    ("training", traffic.TOKENS): dict(bytes=1.06, launches=1.33, speed=0.89),
}


def count(call) -> list[tuple[str, int, int]]:
    """Name, bytes and FLOPs of the operators that a call of shape-only tensors on the imagined GPU runs."""
    with counting.imagined_gpu():
        return [(ran.name, ran.bytes, ran.flop) for ran in counting.operators_of(call)]


def tokens(*shape, dtype=torch.bfloat16, **options):
    return torch.empty(*shape, dtype=dtype, device="cuda", **options)


# --- by hand ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_norm_a_product_and_a_sum_by_hand(mode):
    """x + linear(norm x) of 3 x 5 tokens, 8 wide, in bfloat16."""

    @mode()
    def block():
        x, weight, bias = tokens(3, 5, 8), tokens(8, 8), tokens(8)
        x.transpose(1, 2).transpose(1, 2).unflatten(-1, (2, 4)).flatten(2)  # views take nothing
        return F.dropout(x, 0.1, training=False) + F.linear(F.layer_norm(x, (8,), bias, bias), weight, bias)

    numbers, size, statistics = 3 * 5 * 8, 2, 2 * 4 * 3 * 5  # mean and deviation of a token in float32
    assert count(block) == [
        ("native_layer_norm", size * (2 * numbers + 2 * 8) + statistics, 0),
        ("addmm", size * (2 * numbers + 8 * 8 + 8), 2 * 3 * 5 * 8 * 8),
        ("add", size * 3 * numbers, 0),
    ]


def test_what_moves_no_bytes_and_what_moves_fewer():
    def call():
        x = tokens(4, 6, dtype=torch.float32)
        x[:, :3] + x[:1].expand(4, 6)[:, 3:]  # a slice, and a row that is there once
        x.t().contiguous()
        x.copy_(x.clone())
        torch.mul(x, 2.0, out=torch.empty_like(x))
        x.add_(1.0)

    number = 4
    assert [(name, size) for name, size, _ in count(call)] == [
        ("add", number * (12 + 3 + 12)),
        ("clone", number * 48),
        ("clone", number * 48),
        ("copy_", number * 48),  # does not read what it overwrites
        ("mul", number * 48),
        ("add_", number * 48),
    ]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_attention_is_one_operator(dtype):
    def call(mask=None):
        query, key = (tokens(2, 3, n, 16, dtype=dtype, requires_grad=True) for n in (5, 7))
        counting.backward(F.scaled_dot_product_attention(query, key, key, attn_mask=mask).sum())

    for masked in (False, True):
        ran = count(lambda masked=masked: call(tokens(5, 7, dtype=dtype) if masked else None))
        attention = [(name, flop) for name, _, flop in ran if "attention" in name]
        kind = "flash" if dtype == torch.bfloat16 and not masked else "efficient"
        product = 2 * 2 * 3 * 5 * 7 * 16
        assert attention == [
            (f"_scaled_dot_product_{kind}_attention", 2 * product),
            (f"_scaled_dot_product_{kind}_attention_backward", 5 * product),
        ]
        assert not any("softmax" in name or "bmm" in name for name, *_ in ran)


def test_pair_attention_is_one_operator():
    def call():
        sides = (tokens(2, 3, n, 16, requires_grad=True) for n in (5, 7, 7, 9, 9))
        counting.backward(pair_attention(*sides).square().sum())

    numbers = 2 * 3 * 16 * (5 + 7 + 7 + 9 + 9)
    output, product = 2 * 3 * 16 * 5, 2 * 2 * 3 * 5 * (7 + 9) * 16
    assert [row for row in count(call) if "attention" in row[0]] == [
        ("pair_attention", 2 * (numbers + output), 2 * product),
        ("pair_attention_backward", 2 * (2 * numbers + output), 5 * product),
    ]


def test_a_sum_and_its_norm_are_one_operator():
    """2 clips of 3 context tokens and 5 own, 8 wide: sums in float32, what products give and take in 16 bits.
    Of 16 tokens two programs add up gradients of the weights, and the operator behind them adds theirs.
    """

    def call():
        own, context, row = (tokens(*shape, dtype=torch.float32, requires_grad=True) for shape in SHAPES)
        update = tokens(*SHAPES[0], requires_grad=True)
        with torch.autocast("cuda", torch.bfloat16):
            total, norm = residual_norm(own, update, context, row, row, eps=1e-6)
        counting.backward(total.square().sum() + norm.float().square().sum())

    SHAPES, KINDS = ((2, 5, 8), (2, 3, 8), (8,)), ("residual_norm", "sum")
    own, context, row = 2 * 5 * 8, 2 * 3 * 8, 8
    forward = own * (4 + 2 + 4) + context * 4 + (own + context) * 2 + 2 * row * 4
    read = (own + context) * (4 + 2) + own * 4 + row * 4  # tokens and norms' gradients, those of sums, weight
    written, left = own * (4 + 2) + context * 4, 2 * 2 * row * 4
    *_, backward, sums = ran = [(name, size) for name, size, _ in count(call) if name.startswith(KINDS)]
    assert ran[0] == ("residual_norm", forward)
    assert backward == ("residual_norm_backward", read + written + left)
    assert sums == ("sum", left + 2 * row * 4)


def test_a_bias_of_frames_is_counted_by_its_blocks():
    """16 frames of 196 tokens and 400 tokens of sound: I + A tokens and S * A scalars for each query."""
    F, I, S, A, K, query = 16, 16 * 196, 16, 400, 16, 2 * 2 * 3 * 16  # a multiply-add is 2

    def call():
        sides = (tokens(2, 3, n, K, requires_grad=True) for n in (F, I, I, A, A))
        bias = tokens(3, S, A, dtype=torch.float32, requires_grad=True)
        counting.backward(pair_attention(*sides, pair_bias=bias).square().sum())

    numbers, output, table = 2 * 3 * K * (F + 2 * I + 2 * A), 2 * 3 * K * F, 4 * 3 * S * A
    assert [row for row in count(call) if "attention" in row[0]] == [
        ("pair_attention", 2 * (numbers + output) + table, query * (2 * K * (I + A) + 2 * S * A)),
        (
            "pair_attention_backward",
            2 * (2 * numbers + output) + 2 * table,
            query * (5 * K * (I + A) + 6 * S * A),
        ),
    ]


def test_autocast_is_that_of_cuda():
    """Products in bfloat16, norms in float32, a weight cast once however often it is used."""

    def call():
        x, weight = (tokens(8, 8, dtype=torch.float32, requires_grad=True) for _ in range(2))
        with torch.autocast("cuda", torch.bfloat16):
            F.layer_norm(x @ weight @ weight, (8,))

    names = ["_to_copy", "_to_copy", "mm", "mm", "_to_copy", "native_layer_norm"]
    assert [name for name, *_ in count(call)] == names


def test_seconds_by_hand():
    options = traffic.Options(bandwidth=1e3, flops=1e4, flops_float32=1e2, launch=0.5)
    ran = counting.Operator("mm", "", bytes=2000, flop=10_000, half=True, aside=False)
    for operator, seconds in (
        (ran, 2.5),
        (ran._replace(flop=30_000), 3.5),
        (ran._replace(flop=30_000, name="pair_attention"), 6.5),
        (ran._replace(half=False), 100.5),
    ):
        assert traffic.seconds_of(options, operator) == seconds


# --- against others -----------------------------------------------------------------------------------------


def test_backward_runs_what_autograd_runs():
    """On the meta device, where autograd's engine needs no GPU; with gradients that meet, broadcasts, an
    autograd.Function and an output nobody uses.
    """

    class Twice(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, factor):
            return x * factor

        @staticmethod
        def backward(ctx, grad):
            return grad * 2.0, None

    def loss():
        torch.manual_seed(0)
        x, row, layer = (
            torch.randn(4, 6, requires_grad=True),
            torch.randn(6, requires_grad=True),
            nn.Linear(6, 6),
        )
        left, _ = Twice.apply(layer(layer(x) + row) * x, 2.0).chunk(2)
        return (left.to(torch.bfloat16).softmax(-1) * row[None, :1]).float().square().mean()

    with torch.device("meta"):
        ours, theirs = loss(), loss()
        ours = counting.operators_of(partial(counting.backward, ours))
        theirs = counting.operators_of(theirs.backward)
    kinds = (sorted((ran.name, ran.shapes, ran.bytes) for ran in all_of) for all_of in (ours, theirs))
    assert len(ours) > 10 and next(kinds) == next(kinds)


def test_flops_are_those_of_throughput():
    options = traffic.Options(preset="tiny", batch=(2,))
    for name in "token", "materialized", "factorized", "pair-bias":
        row = throughput.ROWS[name]
        counted = traffic.count_row(options, name, "inference")["batches"][2]["flop"]
        assert counted / 2e9 == pytest.approx(
            throughput.gflop_per_clip(row, "tiny", "inference"), abs=0.006
        ), name


def test_the_second_baseline_decodes_the_fusion_tokens():
    """Per decoder block of width d and hidden width 4 d, 16 tokens more; nothing else differs."""
    flops = [
        traffic.count_row(traffic.Options(preset="tiny", batch=(1,)), name, "training")["batches"][1]["flop"]
        for name in ("none", traffic.TOKENS)
    ]
    with torch.device("meta"):
        mae = AVMAE(create_encoder("tiny", "none"), **throughput.SMALL_DECODER)
    decoders = mae.image_decoder, mae.audio_decoder
    products = linear = 0
    for decoder in decoders:
        d, n = decoder.mask_token.shape[-1], decoder.pos_embed.shape[1]
        linear += 16 * (len(decoder.blocks) * 12 * d * d + decoder.embed.weight.numel())
        products += len(decoder.blocks) * ((n + 16) ** 2 - n**2) * d
    assert flops[1] - flops[0] == 2 * (3 * linear + 7 * products)


# --- the rows of its table ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def at_64():
    rows = {"inference": ("none", "dense"), "training": ("none", traffic.TOKENS, "dense")}
    counted = {mode: {name: traffic.count_row(AT_64, name, mode) for name in rows[mode]} for mode in rows}
    return json.loads(json.dumps(counted))


@pytest.mark.parametrize(("mode", "baseline"), BOUNDS)
def test_what_dense_fusion_takes_over_no_fusion(at_64, mode, baseline):
    ratios = traffic.against(at_64[mode], "dense", "64", baseline)
    for what, bound in BOUNDS[mode, baseline].items():
        value = ratios[what.replace("_", " ")]
        assert value <= bound if what in ("bytes", "launches") else value >= bound, (what, value)


def test_the_results_are_those_of_the_code(at_64):
    """They are the same on every machine: only a change of the code or of torch changes them."""
    record = json.loads(RESULT.read_text())
    for mode, rows in at_64.items():
        for name, row in rows.items():
            again = "python benchmarks/traffic.py && python benchmarks/report.py"
            assert record[mode][name]["batches"]["64"] == row["batches"]["64"], f"{mode} {name}: run {again}"


def test_tables_stand_beside_what_was_measured():
    record, measured = (
        json.loads((measure.RESULTS / f"{name}.json").read_text())
        for name in ("traffic-meta", "throughput-cuda")
    )
    _, inference, training = traffic.tables(record, measured)
    of_dense = next(row for row in inference if row[:2] == ("dense, exact (avfuse)", "128"))
    result = measured["inference"]["rows"]["dense"]["batches"]["128"]
    assert of_dense[-1] == f"{result['speed_over_none']['median']:.2f} x"
    assert of_dense[-2] == f"{128e3 / result['clips_per_second']['median']:.2f}"
    assert training[0][-3] == f"over {traffic.TOKENS}"
    record["settings"]["dtype"] = "float32"  # of which nothing was measured
    assert {row[-1] for row in traffic.tables(record, measured)[1][1:]} == {"-"}
    assert report.counted({}) == "Not yet measured."


def test_the_command(tmp_path, capsys):
    options = replace(traffic.Options(), preset="tiny", batch=(2,), rows=("none", "dense"))
    every = replace(options, rows=("none", "dense", "dense-fused", "none-tokens"))
    record = traffic.main(replace(every, out=tmp_path / "new/traffic.json"))
    assert record["inference"].keys() == {"none", "dense", "dense-fused"}
    assert record["training"].keys() == {"none", "dense", "none-tokens"}
    assert "dense, exact (avfuse)" in capsys.readouterr().out
    options = replace(options, modes=("inference",))
    none, dense = (record["inference"][name]["batches"]["2"] for name in options.rows)
    traffic.main(replace(options, by="operator"))
    everything = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("all "))
    launches, mb, *_ = everything.replace(",", "").split()[1:]
    assert int(launches) == dense["launches"] - none["launches"]
    assert float(mb) == pytest.approx((dense["bytes"] - none["bytes"]) / 1e6, abs=0.06)
    for wrong in dict(batch=(0,)), dict(by="operator", rows=("none", "token", "dense")):
        with pytest.raises(ValueError, match="--batch must be|one row or the difference of two"):
            traffic.main(replace(options, **wrong))
