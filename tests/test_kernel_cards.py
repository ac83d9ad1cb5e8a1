"""Settings of the kernels that a card has of its own: read where they hold, and nowhere else."""

import itertools
import json

import pytest
import torch
import triton
from avfuse.kernels import biased_pair_attention, cards, pair_attention

CARD, OTHER = torch.device("cuda", 0), torch.device("cuda", 1)
NAMES = {CARD: "NVIDIA H100 80GB HBM3", OTHER: "NVIDIA A100-SXM4-80GB"}
OWN = dict(BLOCK_N=32, num_warps=2, num_stages=3, maxnreg=128)
FORWARD = "pair_attention forward bfloat16, 16 queries, width 16"
TABLE = dict(card=NAMES[CARD], triton=triton.__version__, settings={FORWARD: OWN})


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(cards, "FOLDER", tmp_path)
    monkeypatch.setattr(torch.cuda, "get_device_name", NAMES.get)
    known = cards.table_of, pair_attention._settings
    for function in known:
        function.cache_clear()
    yield tmp_path
    for function in known:
        function.cache_clear()


def sizes(F=16, K=16):
    return 1, 12, F, 4096, 4096, K, K


def test_a_table_holds_for_its_card_and_for_what_it_names(folder):
    (folder / "some.json").write_text(json.dumps(TABLE))
    default = pair_attention.settings(torch.bfloat16, *sizes())
    own = pair_attention.settings(torch.bfloat16, *sizes(), device=CARD)
    assert own == default | OWN and default["SPLITS"] == 16 == own["SPLITS"] and own != default
    for device in OTHER, torch.device("cpu"), torch.device("meta"), None:
        assert pair_attention.settings(torch.bfloat16, *sizes(), device=device) == default
    others = dict(dtype=torch.float16), dict(backward=True), dict(F=17), dict(K=17)
    for other in others:
        options = dict(backward=other.pop("backward", False))
        arguments = other.pop("dtype", torch.bfloat16), *sizes(**other)
        with_card = pair_attention.settings(*arguments, **options, device=CARD)
        assert with_card == pair_attention.settings(*arguments, **options)


def test_both_kernels_and_directions_have_their_own(folder):
    names = [
        cards.name_of(kernel, backward, torch.float32, 16, width)
        for kernel in ("pair_attention", "biased_pair_attention")
        for backward, width in itertools.product((False, True), (16, 64))
    ]
    numbers = itertools.product(*(cards.OWN[name][:2] for name in ("BLOCK_N", "num_warps", "num_stages")))
    own = {
        name: OWN | dict(zip(OWN, values, strict=False)) for name, values in zip(names, numbers, strict=True)
    }
    (folder / "some.json").write_text(json.dumps(TABLE | dict(settings=own)))
    found = []
    for module in pair_attention, biased_pair_attention:
        for backward, width in itertools.product((False, True), (16, 64)):
            arguments = torch.float32, 1, 12, 5, 70, 33, width, width
            found.append(module.settings(*arguments, backward=backward, device=CARD))
    assert [{name: options[name] for name in OWN} for options in found] == list(own.values())


WRONG = {
    "no table": "[]",
    "no JSON": '{"card": ',
    "nested": "[" * 100_000,
    "no text": b"\xff\xfe\x00",
    "other Triton": json.dumps(TABLE | dict(triton="2.0.0")),
    "other card": json.dumps(TABLE | dict(card="NVIDIA")),
    "without a card": json.dumps(dict(settings=TABLE["settings"])),
    "settings are a list": json.dumps(TABLE | dict(settings=[OWN])),
    **{
        str(own): json.dumps(TABLE | dict(settings={FORWARD: own}))
        for own in (
            None, {}, OWN | dict(SPLITS=2), OWN | dict(BLOCK_F=32), OWN | dict(BLOCK_N=48),
            OWN | dict(num_warps="2"), OWN | dict(num_stages=True), OWN | dict(num_warps=[2]),
            OWN | dict(maxnreg=None), OWN | dict(BLOCK_N=64, num_warps=4), dict(BLOCK_N=32),
        )
    },
}  # fmt: skip


@pytest.mark.parametrize("text", WRONG.values(), ids=WRONG)
def test_what_is_no_table_of_this_card_changes_nothing(folder, text):
    (folder / "b.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    (folder / "a.json").mkdir()  # cannot be read at all
    default = pair_attention.settings(torch.bfloat16, *sizes())
    assert pair_attention.settings(torch.bfloat16, *sizes(), device=CARD) == default


def test_the_defaults_are_among_what_a_card_may_have():
    for dtype, width, backward in itertools.product(
        (torch.bfloat16, torch.float32), (16, 32, 64, 128), (False, True)
    ):
        every = [
            pair_attention.settings(dtype, *sizes(F, width), backward=backward) for F in (1, 16, 17, 32, 33)
        ]
        every.append(biased_pair_attention.settings(dtype, *sizes(16, width), backward=backward))
        for options in every:
            assert cards.may_be_own({name: options[name] for name in cards.OWN}), options


def test_tables_of_the_repository_hold_what_a_card_may_have():
    for path in cards.FOLDER.glob("*.json"):
        table = json.loads(path.read_text())
        assert table["settings"] and all(map(cards.may_be_own, table["settings"].values())), path
        assert {"card", "triton", "commit", "date"} <= table.keys() and "changes" not in table["commit"]


@pytest.mark.parametrize("bias", [False, True])
def test_launches_ask_for_the_settings_of_their_device(monkeypatch, bias):
    module, devices = biased_pair_attention if bias else pair_attention, []
    settings = module.settings

    def asked(*arguments, device, **options):
        devices.append(device)
        return settings(*arguments, **options)

    monkeypatch.setattr(module, "settings", asked)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    query, *others = (torch.randn(1, 1, n, 16, device=device) for n in (2, 3, 3, 4, 4))
    extras = (torch.randn(1, 1, 3, 4, device=device), 0.25) if bias else (0.25,)
    output = module.forward(query, *others, None, None, *extras)
    module.backward(output, query, *others, None, None, *extras, *[True] * bias)
    assert devices == [query.device] * 2
