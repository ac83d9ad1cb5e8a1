"""Files that ask for models of any size, or hold something else than weights, are refused by a ValueError
before they take 2 s of the processor or 500 MB; each in a process of its own, see hostile_models.py.
"""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from models import make_encoder

from avfuse import AVMAE, AVEncoder
from avfuse.weight_files import read_pth

TESTS = Path(__file__).parent
ADVICE = ("weights_only", "safe_globals", "trust", "allowlist")  # torch's, to read a file unsafely


@pytest.mark.parametrize("share", [7, pytest.param(1, marks=pytest.mark.slow)])
def test_what_asks_for_everything_is_refused_at_once(tmp_path, share):
    program = [sys.executable, "-W", "ignore", str(TESTS / "hostile_models.py"), str(tmp_path), str(share)]
    paths = os.pathsep.join(map(str, (TESTS.parent, TESTS)))
    environment = os.environ | {"PYTHONPATH": paths}
    result = subprocess.run(program, env=environment, capture_output=True, text=True, timeout=900)
    assert result.returncode == 0, result.stderr[-3000:]
    ends = json.loads(result.stdout)
    assert len(ends) > 800 // share
    assert {name: end for name, end in ends.items() if not end.startswith("ValueError: ")} == {}
    assert not [end for end in ends.values() if not end.replace("\n", "").isprintable()]
    assert not [end for end in ends.values() if any(advice in end for advice in ADVICE)]


class Malicious:
    def __reduce__(self):
        return os.system, ("touch 'it ran'",)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_blocked_pickle_is_named_in_our_own_words(tmp_path, monkeypatch, zipped):
    monkeypatch.chdir(tmp_path)
    torch.save({"a": Malicious()}, "a.pth", _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError) as refused:
        read_pth("a.pth")
    reason = "it holds posix.system, which is no tensor and might run code"
    assert str(refused.value) == f"weights a.pth is no file of weights alone ({reason})"
    assert not Path("it ran").exists()


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_that_asks_for_memory_is_refused_before_it_gets_any(tmp_path, monkeypatch, zipped):
    asking = b"\x80\x02cbuiltins\nbytearray\n\x8a\x05\x00\xe4\x0b\x54\x02\x85R."  # for 10 GB
    (tmp_path / "a.pth").write_bytes(asking)
    if zipped:
        with zipfile.ZipFile(tmp_path / "a.pth", "w") as archive:
            archive.writestr("a/data.pkl", asking)
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("it was read"))
    with pytest.raises(ValueError, match="it holds builtins.bytearray"):
        read_pth(tmp_path / "a.pth")


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_weights_that_are_not_finite_are_named(tmp_path, value):
    mae = AVMAE(make_encoder().float(), decoder_dim=16, decoder_depth=1, decoder_heads=2)
    with torch.no_grad():
        mae.encoder.image.blocks[1].norm1.bias[3] = value
    mae.save_pretrained(tmp_path / "mae")
    mae.encoder.save_pretrained(tmp_path / "encoder")
    for kind, name in (AVMAE, "mae"), (AVEncoder, "encoder"):
        with pytest.raises(ValueError, match=r"not finite: (encoder\.)?image\.blocks\.1\.norm1\.bias$"):
            kind.from_pretrained(tmp_path / name)


def test_an_archive_is_known_as_torch_knows_it(tmp_path):
    """By its first bytes; and a pickle in it is one whatever the case of its suffix."""
    huge = b"\x80\x02cbuiltins\nbytearray\nJ\x00\x00\x00\x7f\x85R."
    archive, legacy = tmp_path / "a.pth", tmp_path / "b.pth"
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("a/data.PKL", huge)
        file.writestr("a/version", "3")
        file.writestr("a/byteorder", "little")
    with zipfile.ZipFile(tmp_path / "empty.zip", "w"):
        pass
    legacy.write_bytes(huge + (tmp_path / "empty.zip").read_bytes())
    for path in (archive, legacy):
        with pytest.raises(ValueError, match="builtins.bytearray"):
            read_pth(path)


def test_of_members_of_one_name_each_is_looked_at(tmp_path):
    huge, path = b"\x80\x02cbuiltins\nbytearray\nJ\x00\x00\x10\x00\x85R.", tmp_path / "a.pth"
    torch.save({"weight": torch.ones(2)}, tmp_path / "good.pth")
    with zipfile.ZipFile(tmp_path / "good.pth") as good, zipfile.ZipFile(path, "w") as file:
        for _ in range(2):
            file.writestr("good/data.pkl", huge)
        for member in good.infolist():
            file.writestr(member.filename, good.read(member))
    with pytest.raises(ValueError, match="builtins.bytearray"):
        read_pth(path)
