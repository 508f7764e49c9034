"""Downloads with the real ModelScope client, from a server on this machine that speaks its endpoints."""

import hashlib
import json
import os
import socket
import subprocess
import sys
import threading
from fnmatch import fnmatch
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlparse

import pytest
import torch
from safetensors.torch import save

from wan_core.loading.download import (
    COMMON_FILES,
    CONVERTED,
    DownloadError,
    fetch,
    local_files,
    models_folder,
    redirect,
    skips_download,
)
from wan_core.loading.paths import resolve_model

modelscope_hub = pytest.importorskip("modelscope_hub")

PACK = Path(__file__).resolve().parents[2]
PROXIES = ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy")
REPO = "Wan-AI/Wan2.1-T2V-14B"
COMMIT = "0" * 40
SHARDS = [f"diffusion_pytorch_model-0000{k}-of-00003.safetensors" for k in (1, 2, 3)]
CONTENT = {name: save({f"t{i}": torch.full((40_000 + i,), float(i))}) for i, name in enumerate(SHARDS)} | {
    "Wan2.1_VAE.safetensors": save({"vae": torch.ones(3)}),
    "README.md": b"a model",
    "google/umt5-xxl/tokenizer.json": b"{}",
    "google/umt5-xxl/spiece.model": b"pieces",
}


class Hub(ThreadingHTTPServer):
    """The file list and the files of one repository; `asked` keeps what was requested."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files = dict(CONTENT)
        self.asked: list[tuple[str, str | None]] = []
        self.cut: dict[str, int] = {}
        self.refuse: set[str] = set()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"

    def downloads(self):
        return [name for name, _ in self.asked if name in self.files]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *args):
        pass

    def do_GET(self):
        url = urlparse(self.path)
        query = {key: values[0] for key, values in parse_qs(url.query).items()}
        if url.path == f"/api/v1/models/{REPO}/repo/files":
            self.server.asked.append(("list", None))
            root = query.get("Root", "")
            self.json({"Files": [
                {"Path": name, "Name": name.rpartition("/")[2], "Type": "blob", "Size": len(data),
                 "Sha256": hashlib.sha256(data).hexdigest()}
                for name, data in self.server.files.items() if name.startswith(root)
            ]})  # fmt: skip
        elif url.path == f"/api/v1/models/{REPO}/repo" and query.get("FilePath") in self.server.files:
            self.file(query["FilePath"])
        elif url.path == f"/api/v1/models/{REPO}":
            self.json({"Id": 1})
        elif url.path == f"/api/models/{REPO}/revision/main":
            listed = [{"rfilename": name} for name in self.server.files]
            self.answer(200, json.dumps({"id": REPO, "sha": COMMIT, "siblings": listed}).encode())
        elif url.path == f"/api/models/{REPO}/tree/{COMMIT}":
            files = [
                {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                for name, data in self.server.files.items()
            ]
            self.answer(200, json.dumps(files).encode())
        elif (name := url.path.removeprefix(f"/{REPO}/resolve/{COMMIT}/")) in self.server.files:
            self.server.asked.append((name, "Hugging Face"))
            data = self.server.files[name]
            self.answer(200, data, ETag=f'"{hashlib.sha256(data).hexdigest()}"', X_Repo_Commit=COMMIT)
        else:
            self.answer(404, json.dumps({"Code": 404, "Message": "record not found", "Success": False}).encode())

    do_HEAD = do_GET  # noqa: N815 - http.server's name

    def json(self, data):
        self.answer(200, json.dumps({"Code": 200, "Success": True, "Data": data}).encode())

    def answer(self, status, body, **headers):
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": len(body), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def file(self, name):
        asked_range = self.headers.get("Range")
        self.server.asked.append((name, asked_range))
        if name in self.server.refuse:
            self.answer(403, json.dumps({"Code": 403, "Message": "no access", "Success": False}).encode())
            return
        data, headers, status = self.server.files[name], {}, 200
        if asked_range:
            first, _, last = asked_range.removeprefix("bytes=").partition("-")
            start, stop = int(first), int(last) + 1 if last else len(data)
            headers["Content_Range"] = f"bytes {start}-{stop - 1}/{len(data)}"
            data, status = data[start:stop], 206
        cut = self.server.cut.pop(name, None)
        if cut is None:
            self.answer(status, data, **headers)
            return
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data[:cut])
        self.wfile.flush()
        self.connection.shutdown(socket.SHUT_RDWR)
        self.close_connection = True


@pytest.fixture
def hub(monkeypatch, tmp_path):
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    point_client_at(server.url, tmp_path)
    for name in ("DIFFSYNTH_MODEL_BASE_PATH", "DIFFSYNTH_SKIP_DOWNLOAD", *PROXIES):
        monkeypatch.delenv(name, raising=False)
    yield server
    modelscope_hub.set_default_config(None)
    server.shutdown()
    server.server_close()
    thread.join()


def point_client_at(url, folder):
    """What MODELSCOPE_ENDPOINT does, which the client reads only once in a process."""
    config = modelscope_hub.HubConfig(endpoint=url, cache_dir=folder / "cache", config_dir=folder / "config", token="")
    modelscope_hub.set_default_config(config)


@pytest.fixture
def hugging_face(hub, monkeypatch):
    """The real client of Hugging Face at the same server; it reads HF_ENDPOINT only when it is imported."""
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")
    return hub


@pytest.mark.parametrize("asked", ["argument", "environment"])
def test_files_come_from_hugging_face_where_that_is_asked_for(hugging_face, root, monkeypatch, asked):
    place(root, SHARDS[0])
    monkeypatch.setenv("DIFFSYNTH_DOWNLOAD_SOURCE", "HuggingFace" if asked == "environment" else "ModelScope")
    found = get(root, source="huggingface" if asked == "argument" else None)
    assert [path.read_bytes() for path in found] == [CONTENT[name] for name in SHARDS]
    assert {name for name, source in hugging_face.asked if source == "Hugging Face"} == set(SHARDS[1:])


def test_what_hugging_face_does_not_have_is_told_with_its_address(hugging_face, root):
    with pytest.raises(DownloadError, match=r"from Hugging Face.* https://huggingface\.co/nobody/nothing into"):
        fetch("nobody/nothing", "x.pth", root=root, skip_download=False, source="huggingface")


@pytest.fixture
def root(tmp_path):
    return tmp_path / "models"


def get(root, pattern="diffusion_pytorch_model*.safetensors", skip=False, **options):
    return fetch(REPO, pattern, root=root, skip_download=skip, **options)


def place(root, *names, data=None):
    for name in names:
        path = root / REPO / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(CONTENT[name] if data is None else data)


def test_only_what_matches_comes(hub, root):
    found = get(root)
    assert [path.name for path in found] == SHARDS and resolve_model(found) == tuple(found)
    assert all(path.read_bytes() == CONTENT[path.name] for path in found)
    assert sorted(hub.downloads()) == SHARDS
    assert {path.name for path in (root / REPO).rglob("*.*") if path.is_file()} == set(SHARDS)


def test_the_endpoint_of_the_environment(hub, root):
    code = (
        "from pathlib import Path; from wan_core.loading.download import fetch; "
        f"fetch({REPO!r}, '*VAE*', root=Path({str(root)!r}), skip_download=False)"
    )
    environment = {k: v for k, v in os.environ.items() if k not in PROXIES} | {"MODELSCOPE_ENDPOINT": hub.url}
    subprocess.run([sys.executable, "-c", code], cwd=PACK, env=environment, check=True, capture_output=True)
    assert hub.downloads() == ["Wan2.1_VAE.safetensors"]


def test_a_complete_copy_is_never_asked_for_again(hub, root):
    first = get(root)
    hub.asked.clear()
    assert get(root) == first and get(root, skip=True) == first and hub.asked == []


def test_only_missing_shards_come(hub, root):
    place(root, SHARDS[0], SHARDS[2])
    before = (root / REPO / SHARDS[0]).stat().st_mtime_ns
    assert len(get(root)) == 3 and hub.downloads() == [SHARDS[1]]
    assert (root / REPO / SHARDS[0]).stat().st_mtime_ns == before


@pytest.mark.parametrize("data", [CONTENT[SHARDS[1]][:-5], b"version https://git-lfs.github.com/spec/v1\n", b""])
def test_a_broken_local_file_is_replaced(hub, root, data):
    place(root, SHARDS[0], SHARDS[2])
    place(root, SHARDS[1], data=data)
    assert len(get(root)) == 3 and hub.downloads() == [SHARDS[1]]
    assert (root / REPO / SHARDS[1]).read_bytes() == CONTENT[SHARDS[1]]


def test_a_connection_that_breaks_is_resumed(hub, root):
    hub.cut[SHARDS[0]] = 70_000
    assert len(get(root)) == 3 and (root / REPO / SHARDS[0]).read_bytes() == CONTENT[SHARDS[0]]
    ranges = [asked for name, asked in hub.asked if name == SHARDS[0]]
    assert ranges[0] is None and ranges[1].startswith("bytes=") and ranges[1] != "bytes=0-"


class CancelledError(Exception):
    pass


def test_cancelling_stops_at_once_and_the_next_call_resumes(hub, root):
    hub.files = {"big.safetensors": save({"x": torch.arange(4_000_000)})}

    def stop(name, done, total):
        if done >= total // 2:
            raise CancelledError

    with pytest.raises(CancelledError):
        get(root, "big.safetensors", on_progress=stop)
    assert len(hub.downloads()) == 1 and local_files(root, REPO, "big.safetensors") == []
    found = get(root, "big.safetensors")
    assert found[0].read_bytes() == hub.files["big.safetensors"]
    assert int(hub.asked[-1][1].removeprefix("bytes=").rstrip("-")) > 0


def test_progress(hub, root):
    seen = {}
    get(root, on_progress=lambda name, done, total: seen.setdefault(name, []).append((done, total)))
    for name in SHARDS:
        size = len(CONTENT[name])
        assert seen[name][-1] == (size, size) and [d for d, _ in seen[name]] == sorted(d for d, _ in seen[name])


@pytest.mark.parametrize("pattern", ["google/umt5-xxl/", "google/*"])
def test_tokenizer_folder(hub, root, pattern):
    found = get(root, pattern)
    assert found == [root / REPO / "google" / "umt5-xxl"]
    assert sorted(path.name for path in found[0].iterdir()) == ["spiece.model", "tokenizer.json"]
    assert all(fnmatch(name, "google/*") for name in hub.downloads())
    hub.asked.clear()
    (found[0] / "tokenizer.json").unlink()
    assert get(root, pattern) == found and hub.asked == []
    (found[0] / "spiece.model").unlink()
    with pytest.raises(DownloadError, match=r"holds neither tokenizer\.json nor spiece\.model"):
        get(root, pattern, skip=True)
    assert get(root, pattern) == found and len(hub.downloads()) == 2


def says_what_to_do(error, root, pattern):
    text = str(error.value)
    assert all(part in text for part in (REPO, pattern, str(root / REPO), f"https://modelscope.cn/models/{REPO}"))


def test_skipping_downloads(hub, root, monkeypatch):
    with pytest.raises(DownloadError, match="switched off, and nothing matches") as error:
        get(root, skip=True)
    says_what_to_do(error, root, "diffusion_pytorch_model*.safetensors")
    place(root, SHARDS[0])
    with pytest.raises(DownloadError, match=f"{SHARDS[1]}, {SHARDS[2]} is missing"):
        get(root, skip=True)
    place(root, *SHARDS[1:])
    place(root, SHARDS[0], data=CONTENT[SHARDS[0]][:-1])
    monkeypatch.setenv("DIFFSYNTH_SKIP_DOWNLOAD", "True")
    with pytest.raises(DownloadError, match="is truncated"):
        get(root)
    assert hub.asked == []


def test_nothing_matches_there_either(hub, root):
    with pytest.raises(DownloadError, match="no file that matches 'nothing") as error:
        get(root, "nothing*.pth")
    says_what_to_do(error, root, "nothing*.pth")


def test_no_such_repository(hub, root):
    with pytest.raises(DownloadError, match=r"Could not download 'x\.pth' of nobody/nothing") as error:
        fetch("nobody/nothing", "x.pth", root=root, skip_download=False)
    assert str(root / "nobody" / "nothing") in str(error.value)


def test_refused_file(hub, root):
    hub.refuse = {SHARDS[1]}
    with pytest.raises(DownloadError, match=f"{SHARDS[1]}: ") as error:
        get(root)
    says_what_to_do(error, root, "diffusion_pytorch_model*.safetensors")


def test_no_server(hub, root, tmp_path, monkeypatch):
    monkeypatch.setattr("modelscope_hub._legacy_api.REPO_TREE_PAGE_RETRY_MAX_DELAY_SECONDS", 0)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        point_client_at(f"http://127.0.0.1:{free.getsockname()[1]}", tmp_path)
        with pytest.raises(DownloadError, match="Check the connection") as error:
            get(root)
    says_what_to_do(error, root, "diffusion_pytorch_model*.safetensors")


@pytest.mark.parametrize(("model_id", "pattern"), [
    ("Wan2.1-T2V", "*.pth"), ("../../etc/x", "*"), ("a/../b", "*"), (REPO, "../*.pth"), (REPO, "/etc/*"), (REPO, ""),
    (REPO, "n" * 300),
])  # fmt: skip
def test_ids_and_patterns_that_leave_the_folder(tmp_path, model_id, pattern):
    (tmp_path / REPO).mkdir(parents=True)
    with pytest.raises(ValueError, match=r"looks like|cannot be looked for"):
        fetch(model_id, pattern, root=tmp_path, skip_download=True)


@pytest.mark.parametrize(("pattern", "source"), [
    *COMMON_FILES.items(), ("google/umt5-xxl/", "Wan-AI/Wan2.1-T2V-1.3B"),
    ("diffusion_pytorch_model*.safetensors", REPO), ("model.safetensors", REPO),
])  # fmt: skip
def test_shared_files_come_from_one_repository(tmp_path, pattern, source):
    assert redirect(REPO, pattern, tmp_path) == (source, pattern)
    own = tmp_path / REPO / pattern.replace("*", "umt5-xxl")
    own.mkdir(parents=True)
    assert redirect(REPO, pattern, tmp_path) == (REPO, pattern)


@pytest.mark.parametrize("name", [name for name in COMMON_FILES if name.endswith(".pth")])
@pytest.mark.parametrize("asked", [REPO, "Wan-AI/Wan2.1-T2V-1.3B"])
def test_a_models_folder_of_diffsynth_2_is_found(tmp_path, name, asked):
    converted = tmp_path / CONVERTED / name.replace(".pth", ".safetensors")
    converted.parent.mkdir(parents=True)
    converted.touch()
    assert redirect(asked, name, tmp_path) == (CONVERTED, converted.name)
    published = tmp_path / COMMON_FILES[name] / name
    published.parent.mkdir(parents=True)
    published.touch()
    assert redirect(asked, name, tmp_path) == (COMMON_FILES[name], name)


def test_environment(monkeypatch, tmp_path):
    monkeypatch.delenv("DIFFSYNTH_MODEL_BASE_PATH", raising=False)
    monkeypatch.delenv("DIFFSYNTH_SKIP_DOWNLOAD", raising=False)
    assert str(models_folder()) == "models" and models_folder(tmp_path) == tmp_path
    assert not skips_download() and not skips_download(False) and skips_download(True)
    monkeypatch.setenv("DIFFSYNTH_MODEL_BASE_PATH", str(tmp_path / "mine"))
    monkeypatch.setenv("DIFFSYNTH_SKIP_DOWNLOAD", "true")
    assert models_folder() == models_folder(tmp_path) == tmp_path / "mine" and skips_download(False)
