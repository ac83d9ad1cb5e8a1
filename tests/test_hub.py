"""A model goes to the hub and comes back: push_to_hub and from_pretrained against a small hub of the test."""

import base64
import hashlib
import json
import os
import re
import subprocess
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

COMMIT = "1" * 40
PUSH = """
import avfuse, torch
torch.manual_seed(0)
model = avfuse.tasks.classifier.Classifier(avfuse.create_encoder("micro"), 2, class_names=["dog", "cat"])
model.push_to_hub("someone/shapes", token="hf_stub")
model.save_pretrained("kept")
"""
PULL = """
import avfuse, torch
kept, named = avfuse.load("kept"), avfuse.tasks.classifier.Classifier.from_pretrained("someone/shapes")
for pulled in named, avfuse.load("someone/shapes"):
    assert type(pulled) is type(kept) and pulled.class_names == ("dog", "cat") and not pulled.training
    for name, weight in kept.state_dict().items():
        assert torch.equal(pulled.state_dict()[name], weight), name
assert type(avfuse.load_encoder("someone/shapes")) is avfuse.AVEncoder
try:
    avfuse.load("someone/nothing")
except ValueError as error:
    assert "someone/nothing" in str(error), error
else:
    raise AssertionError("a model that is not there was loaded")
"""


class Hub(BaseHTTPRequestHandler):
    """The calls of huggingface_hub that one upload and its downloads make; all files in one commit."""

    files: dict[str, bytes]

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.path == "/api/repos/create":
            self.answer(dict(url=f"{self.server.url}/someone/shapes", name="someone/shapes"))
        elif self.path == "/api/validate-yaml":
            self.answer(dict(errors=[], warnings=[]))
        elif "/preupload/" in self.path:
            files = [
                dict(path=file["path"], uploadMode="regular", shouldIgnore=False)
                for file in json.loads(body)["files"]
            ]
            self.answer(dict(files=files))
        elif "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            self.answer(dict(commitUrl=f"{self.server.url}/someone/shapes/commit/{COMMIT}", commitOid=COMMIT))
        else:
            self.missing()

    def do_GET(self):
        name = re.fullmatch(r"/someone/shapes/resolve/[^/]+/(.+)", self.path)
        if name and name[1] in self.files:
            content = self.files[name[1]]
            etag = hashlib.sha256(content).hexdigest()
            self.answer(content, {"X-Repo-Commit": COMMIT, "ETag": f'"{etag}"'})
        elif self.path.startswith("/api/models/someone/shapes"):
            siblings = [dict(rfilename=name) for name in self.files]
            self.answer(dict(id="someone/shapes", sha=COMMIT, siblings=siblings))
        else:
            self.missing()

    do_HEAD = do_GET

    def missing(self):
        kind = "EntryNotFound" if self.path.startswith("/someone/shapes/") else "RepoNotFound"
        self.answer(dict(error=self.path), {"X-Error-Code": kind}, 404)

    def answer(self, content: dict | bytes, headers: dict[str, str] | None = None, status: int = 200):
        content = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for header, value in ({"Content-Length": str(len(content))} | (headers or {})).items():
            self.send_header(header, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *_):
        pass


@pytest.fixture
def hub():
    Hub.files = {}
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        server.url = f"http://127.0.0.1:{server.server_port}"
        Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def test_a_model_goes_to_the_hub_and_comes_back(hub, tmp_path):
    environment = os.environ | dict(
        HF_ENDPOINT=hub.url,
        HF_HOME=str(tmp_path / "home"),
        HF_HUB_OFFLINE="0",
        HF_HUB_DISABLE_TELEMETRY="1",
        NO_PROXY="127.0.0.1",
        PYTHONPATH=str(Path(__file__).parents[1]),
    )
    for code in PUSH, PULL:
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
    for name in "config.json", "model.safetensors", "README.md":
        assert Hub.files[name] == (tmp_path / "kept" / name).read_bytes()
