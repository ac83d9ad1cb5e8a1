"""Settings that are a card's own: settings/*.json, written by benchmarks/kernel_sweep.py, one file per card.

A file holds for one card and one Triton, whose code was compared with float64 and timed. Every other card and
Triton takes the defaults in `settings` of the kernels, and so does whatever a file has no entry for.
"""

import functools
import json
from pathlib import Path

import torch
import triton

from .tiles import padded

FOLDER = Path(__file__).with_name("settings")
# All that may differ between cards. BLOCK_N and num_warps change the order in which a program adds, and so
# last bits on that card alone, as its tensor cores do; the others change nothing. The same on all cards are
# SPLITS and BLOCK_F, which divide the work into programs and their memory, and the precision of products.
OWN = {
    "BLOCK_N": (16, 32, 64, 128),
    "num_warps": (1, 2, 4, 8),
    "num_stages": (1, 2, 3),
    "maxnreg": (128, 255),
}


def may_be_own(options) -> bool:
    """Whether a card may have these settings: all of OWN, but not tiles of tokens that become wgmma on
    Hopper, which Triton 3.6 compiled to reads outside of shared memory (README.md).
    """
    return (
        isinstance(options, dict)
        and options.keys() == OWN.keys()
        and all(type(options[name]) is int and options[name] in values for name, values in OWN.items())
        and not (options["BLOCK_N"] >= 64 and options["num_warps"] >= 4)
    )


def own_settings(device, *which) -> dict:
    """Those of the device's card, of what `name_of` names; none without a device."""
    table = {} if device is None or device.type != "cuda" else table_of(device)
    return table.get(name_of(*which), {}) if table else {}


def name_of(kernel, backward, dtype, queries, width) -> str:
    """Such as "pair_attention forward bfloat16, 16 queries, width 16", the width that of a tile."""
    direction = "backward" if backward else "forward"
    return f"{kernel} {direction} {str(dtype)[6:]}, {queries} queries, width {padded(width)}"


@functools.cache
def table_of(device) -> dict:
    card, table = torch.cuda.get_device_name(device), {}
    for path in sorted(FOLDER.glob("*.json")):
        table |= read(path, card)
    return table


def read(path, card) -> dict:
    """Settings by name; none of a file that is for another card or Triton, or is no such table."""
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
        if (table["card"], table["triton"]) != (card, triton.__version__):
            return {}
        return {name: options for name, options in table["settings"].items() if may_be_own(options)}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}
