"""Shards read from a web server, which fails, cuts short, or is hostile: all clips once, or a reason."""

import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
from collections import defaultdict
from functools import partial
from http.client import IncompleteRead
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from pathlib import Path
from urllib.error import HTTPError
from urllib.parse import unquote

import pytest
import torch
from trees import videos

from avfuse.data import manifest, remote
from avfuse.data.check import check
from avfuse.data.clips import ClipDataset, ClipLoader, Failure
from avfuse.data.find import find_data
from avfuse.data.shards import shard
from avfuse.data.workers import WorkerPool
from avfuse.files import address, read_rows, write_json
from avfuse.inputs import InputSettings
from avfuse.training.recipes import TrainConfig
from avfuse.training.run_folder import describe_data, has_trained_on_all
from avfuse.training.settings import check_folder, settings_of

SETTINGS = InputSettings(image_size=32, audio_seconds=1.0, mel_bins=32)
QUIET = dict(progress=False, workers=0)
TINY = (
    *("--epochs", "4", "--warmup-epochs", "1", "--batch-size", "4", "--decoder-dim", "32", "--workers", "1"),
    *("--decoder-depth", "1", "--decoder-heads", "2", "--fusion-layers", "1", "--measure-every", "0"),
    *("--checkpoint-every", "1"),
)


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    """Of 12 clips, four of which are to test on."""
    root, out = tmp_path_factory.mktemp("videos"), tmp_path_factory.mktemp("shards #1 ü")
    for n, source in enumerate(videos(tmp_path_factory.mktemp("shapes"), 12)):
        folder = root / ("test" if n % 3 == 0 else "train")
        folder.mkdir(exist_ok=True)
        source.rename(folder / f"{n}.mp4")
    check(root, **QUIET)
    shard(root, out, size=40_000, **QUIET)
    return out


class Handler(BaseHTTPRequestHandler):
    """Files of a folder, by ranges; `faults` says what becomes of which of the requests for a path."""

    def __init__(self, folder, faults, asked, *args):
        self.folder, self.faults, self.asked = folder, faults, asked
        super().__init__(*args)

    def log_message(self, *_):
        pass

    def do_GET(self):
        path = self.folder / unquote(self.path).lstrip("/")
        start, _, last = self.headers["Range"].removeprefix("bytes=").partition("-")
        content = path.read_bytes() if path.is_file() else b""
        whole, start = len(content), int(start)
        key = path.name, int(last or whole - 1)  # what is gone on with has another start
        fault = self.faults(path.name, len(self.asked[key]))
        self.asked[key].append(start)
        if isinstance(fault, int) or not content:
            return self.send_error(fault or 404)
        content = content[start : int(last) + 1 if last else None]
        self.send_response(206 if fault != "redirected" else 302)
        if fault == "redirected":
            self.send_header("Location", "file:///etc/passwd")
        if fault != "whole":
            total = 2**50 if fault == "huge" else whole
            self.send_header("Content-Range", f"bytes {start}-{start + len(content) - 1}/{total}")
        if fault != "endless":
            self.send_header("Content-Length", len(content))
        self.end_headers()
        if fault == "changed":
            content = content[::-1]
        self.wfile.write(content[: len(content) // 2] if fault == "cut" else content)
        while fault == "endless":
            self.wfile.write(bytes(2**16))

    def handle(self):
        try:
            super().handle()
        except ConnectionError:  # the reader of something endless has gone
            pass


@pytest.fixture
def serve(shards):
    """A server on the loopback, and from where on each range was asked for, by its file and end."""
    servers = []

    def start(faults=lambda name, times: None):
        asked = defaultdict(list)
        server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, shards, faults, asked))
        servers.append(server)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        return Path(f"http://127.0.0.1:{server.server_port}"), asked

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture
def patient(monkeypatch):
    monkeypatch.setattr(remote, "WAITS", (0.0,) * len(remote.WAITS))


def find(root):
    return find_data(root, lambda line: None, **QUIET)


def items(clips, workers=0):
    keys = [[(0, n)] for n in range(len(clips))]
    with ClipLoader(ClipDataset(clips, SETTINGS, train=True), workers=workers) as loader:
        return list(loader.batches(keys))


def unsteady(name: str, times: int):
    """Of the requests for the same bytes the first fails, in one way or another."""
    if times == 0:
        return {"0": 503, "1": "cut", "2": 429}.get(name[-5], "cut")


def hang(folder, clip):
    tempfile.tempdir = folder
    with clip.open() as reader:
        reader.frame(0.0)
        signal.pause()


@pytest.mark.skipif(not remote.DESCRIPTORS.is_dir(), reason="files have names here")
def test_a_worker_that_is_killed_leaves_no_copy_behind(serve, tmp_path):
    clip = find(serve()[0]).train[0]
    with WorkerPool(partial(hang, str(tmp_path)), 1, timeout=2.0, retries=0) as pool:
        (failure,) = pool.map([clip])
    assert failure.reason == "took longer than 2 s" and not list(tmp_path.iterdir())


@pytest.mark.parametrize("workers", [0, 2])
def test_no_clip_is_lost_or_doubled(shards, serve, workers):
    """By a server of which every range has to be asked for again."""
    url, asked = serve(unsteady)
    here, there = find(shards), find(url)
    assert describe_data(there.train) == describe_data(here.train)
    assert there.coverage == here.coverage == {"train": (8, 8), "test": (4, 4)}
    for ours, theirs in zip(items(here.train), items(there.train, workers), strict=True):
        assert not theirs["failures"]
        assert all(torch.equal(ours[name], theirs[name]) for name in ("image", "audio", "index"))
    read = [starts for (name, _), starts in asked.items() if name.startswith("train")]
    assert len(read) == 8 and all(len(starts) == 2 for starts in read)


def test_what_was_cut_short_is_gone_on_with(shards, serve, patient):
    url, asked = serve(lambda name, times: "cut" if times == 0 else None)
    content = (shards / manifest.FILE).read_bytes()
    assert remote.read(f"{address(url)}/{manifest.FILE}") == content
    assert asked == {(manifest.FILE, len(content) - 1): [0, len(content) // 2]}


@pytest.mark.parametrize("fault", [408, 425, 429, 500, 599, TimeoutError(), IncompleteRead(b"")], ids=repr)
def test_what_may_pass_is_tried_seven_times(patient, monkeypatch, fault):
    assert tries_of(monkeypatch, fault) == 7


@pytest.mark.parametrize("fault", [403, 404, 416, FileNotFoundError(), PermissionError()], ids=repr)
def test_what_will_not_pass_is_tried_once(patient, monkeypatch, fault):
    assert tries_of(monkeypatch, fault) == 1


def tries_of(monkeypatch, fault) -> int:
    asked = []

    def answer(request, timeout=None):
        asked.append((request.headers["Range"], timeout))
        raise HTTPError(request.full_url, fault, "", {}, None) if isinstance(fault, int) else fault

    monkeypatch.setattr(remote, "urlopen", answer)
    with pytest.raises(OSError):
        remote.read("https://host/file", 3, 9)
    assert set(asked) == {("bytes=3-8", remote.SILENCE)}
    return len(asked)


def test_names_are_quoted_for_web_servers_alone(monkeypatch):
    asked = []
    monkeypatch.setattr(remote, "read", lambda url: asked.append(url) or b"")
    for root in Path("https://host/data"), Path("memory://data"):
        remote.fetch_file(root / "a b#1 ü.tar", root)[0].close()
    assert asked == ["https://host/data/a%20b%231%20%C3%BC.tar", "memory://data/a b#1 ü.tar"]


def test_a_package_that_an_address_needs_is_told(monkeypatch):
    def read(url):
        raise ImportError("Install s3fs")

    monkeypatch.setattr(remote, "read", read)
    with pytest.raises(ValueError, match="s3://data/a.tar cannot be fetched: Install s3fs"):
        remote.fetch_file(Path("s3://data/a.tar"), Path("s3://data"))


@pytest.mark.parametrize(
    "told, message",
    [
        ("bytes 0-5/9", "does not send the range of bytes that it is asked for"),
        ("bytes 3-8/9999999999", "it would be 9,999,999,996 bytes, more than 2,147,483,648"),
    ],
)
def test_another_range_and_too_many_bytes_are_refused(monkeypatch, told, message):
    answer = type("Answer", (BytesIO,), dict(headers={"Content-Range": told}))(b"abcdef")
    monkeypatch.setattr(remote, "urlopen", lambda *_, **__: answer)
    with pytest.raises(ValueError, match=message):
        remote.read("http://host/file", 3)


@pytest.mark.parametrize(
    "fault, message",
    [
        (404, "404"),
        (500, r"500.*\(tried 7 times\)"),
        ("redirected", "file:///etc/passwd' is not allowed"),
        ("whole", "does not send the range of bytes"),
        ("endless", ""),
        ("changed", "another hash"),
    ],
)
def test_a_clip_that_cannot_be_had_is_named(serve, patient, fault, message):
    url, _ = serve(lambda name, times: fault if name.endswith(".tar") else None)
    clips = find(url).train
    item = ClipDataset(clips, SETTINGS, train=False)[0]
    if fault == "endless":  # no more is read than the clip is long
        assert not isinstance(item, Failure)
    else:
        assert isinstance(item, Failure) and item.path == clips[0].path
        assert re.search(message, item.reason)


@pytest.mark.parametrize("fault", [404, 500, "redirected", "whole", "huge", "changed"])
def test_a_manifest_that_cannot_be_had_is_named(serve, patient, fault):
    url, _ = serve(lambda name, times: fault)
    with pytest.raises(ValueError, match=r"127.0.0.1:\d+/avfuse-manifest.jsonl (cannot be fetched|is no)"):
        find(url)


def test_what_fsspec_reaches_is_read_too(shards, patient):
    fsspec = pytest.importorskip("fsspec")
    fsspec.filesystem("memory").put(str(shards), "/shards", recursive=True)
    ours, theirs = items(find(shards).train), items(find(Path("memory://shards")).train)
    assert all(torch.equal(a["image"], b["image"]) for a, b in zip(ours, theirs, strict=True))
    with pytest.raises(ValueError, match="memory://elsewhere/avfuse-manifest.jsonl cannot be fetched"):
        find(Path("memory://elsewhere"))
    with pytest.raises(ValueError, match="gopher://x/avfuse-manifest.jsonl cannot be fetched: Protocol not"):
        find(Path("gopher://x"))


def test_no_list_makes_an_address_of_a_path(shards, serve, tmp_path, monkeypatch):
    """Only who gives --data says where to ask."""
    url, asked = serve()
    (entry, *_) = manifest.read_entries(shards)
    path = f"{url}/{entry.path}"
    manifest.write(tmp_path, manifest.read_header(shards), [type(entry)(**vars(entry) | dict(path=path))])
    monkeypatch.chdir(tmp_path)
    item = ClipDataset(find(Path()).train, SETTINGS, train=False)[0]
    assert "no such file" in item.reason and not asked


def test_an_address_is_on_record_as_it_is(tmp_path):
    config = TrainConfig(data=Path("https://host/data"), test_share=0.0)
    assert config.run == Path("runs/data") and settings_of(config)["data"] == "https://host/data"
    check_folder(config.data)
    write_json(tmp_path / "run.json", dict(settings=settings_of(config)))
    for data in config.data, config.data / "music":
        assert has_trained_on_all(tmp_path, data)
    assert not has_trained_on_all(tmp_path, Path("https://host/other"))


@pytest.mark.slow
def test_training_on_them_and_going_on(shards, serve, tmp_path):
    """The same losses as from the folder, in a run that a server ends which has gone for too long."""

    def train(data, run):
        command = [sys.executable, "-m", "avfuse.train", "--data", data, "--run-dir", tmp_path / run, *TINY]
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=600, env=os.environ | dict(OMP_NUM_THREADS="1")
        )
        rows = read_rows(tmp_path / run / "metrics.jsonl")
        return done, {row["step"]: row["loss"] for row in rows if "loss" in row}

    done, truth = train(shards, "here")
    assert done.returncode == 0 and sorted(truth) == list(range(1, 9)), done.stderr
    url, asked = serve(lambda name, times: 404 if name.endswith("tar") and len(asked) > 8 else None)
    done, losses = train(address(url), "there")
    assert "clips could not be read, more than --max-unreadable" in done.stderr
    assert losses.items() < truth.items()
    url, _ = serve(unsteady)
    done, losses = train(address(url), "there")
    assert done.returncode == 0, done.stderr
    assert losses == truth
