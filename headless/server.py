"""The HTTP endpoints of a ComfyUI server, each as one call."""

import http.client
import json
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any

from wan_core.files import parse_json

from .schema import NodeSchema
from .workflow import Workflow

TIMEOUT = 60
"""Seconds to wait for an answer; a server that loads a model may be slow to give one."""


class ServerUnreachableError(ConnectionError):
    """Nothing that behaves like a ComfyUI server answers."""


class RefusedError(RuntimeError):
    """The server answered with an error status; its JSON body, where it sent one, is in `body`."""

    def __init__(self, message: str, body: Mapping[str, Any]):
        self.body = body
        super().__init__(message)


@dataclass(frozen=True)
class Server:
    """A ComfyUI server at `url`, such as http://127.0.0.1:8188. Every method may raise `ServerUnreachableError`."""

    url: str

    def __post_init__(self) -> None:
        parts = urllib.parse.urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.netloc:
            raise ValueError(f"--server {self.url!r} is not a server's address; write it as http://127.0.0.1:8188.")

    def socket_url(self, client_id: str) -> str:
        base = "ws" + self.url.rstrip("/").removeprefix("http")
        return f"{base}/{_with_query('ws', {'clientId': client_id})}"

    def schemas(self, workflow: Workflow) -> dict[str, NodeSchema]:
        """The schemas of the node classes that a workflow uses; a class that the server lacks is left out."""
        classes = dict.fromkeys(node.class_type for node in workflow.nodes.values())
        entries = {
            name: self._json("GET", f"object_info/{urllib.parse.quote(name, safe='')}").get(name) for name in classes
        }
        return {name: NodeSchema.of_server(name, entry) for name, entry in entries.items() if entry}

    def submit(self, prompt: Mapping[str, Any], client_id: str) -> dict[str, Any]:
        """Queue a workflow. The answer holds `prompt_id`, and `node_errors` for outputs that will not run.

        `extra_pnginfo` is empty; nodes add to it what is written into saved files.

        Raises:
            RefusedError: nothing of the workflow can run; `error` and `node_errors` stand in its body.
        """
        body = {"prompt": prompt, "client_id": client_id, "extra_data": {"extra_pnginfo": {}}}
        return self._json("POST", "prompt", body)

    def history(self, prompt_id: str) -> dict[str, Any] | None:
        """`outputs` and `status` of a finished run, None before it has finished."""
        return self._json("GET", f"history/{prompt_id}").get(prompt_id)

    def versions(self) -> dict[str, str]:
        """Of ComfyUI, Python and PyTorch there, and its first device."""
        answer = self._json("GET", "system_stats")
        system, devices = answer.get("system", {}), answer.get("devices") or [{}]
        names = {"comfyui": "comfyui_version", "python": "python_version", "torch": "pytorch_version"}
        found = {name: str(system.get(key, "unknown")) for name, key in names.items()}
        return {**found, "device": str(devices[0].get("name", "unknown"))}

    def queue(self) -> dict[str, list[str]]:
        """The ids of what is `running` and what is `pending`, in the order in which it will run."""
        answer = self._json("GET", "queue")
        in_order = {kind: sorted(answer.get(f"queue_{kind}", []), key=itemgetter(0)) for kind in ("running", "pending")}
        return {kind: [item[1] for item in items] for kind, items in in_order.items()}

    def stop(self, prompt_id: str) -> None:
        """Take a run out of the queue, or interrupt it when it is running; other runs are left alone."""
        self._send("POST", "queue", {"delete": [prompt_id]})
        # Older servers interrupt whatever is running, whichever id they are given.
        if prompt_id in self.queue()["running"]:
            self._send("POST", "interrupt", {"prompt_id": prompt_id})

    def upload(self, path: Path, subfolder: str = "") -> str:
        """Put a file into the server's input folder and return the name to use for it there.

        The server keeps one copy of equal files and gives another name to a different file of the same name.
        """
        boundary = uuid.uuid4().hex
        name = path.name.replace('"', "%22")
        parts = [
            f'--{boundary}\r\nContent-Disposition: form-data; name="subfolder"\r\n\r\n{subfolder}\r\n'.encode(),
            f'--{boundary}\r\nContent-Disposition: form-data; name="image"; filename="{name}"\r\n'.encode(),
            b"Content-Type: application/octet-stream\r\n\r\n" + path.read_bytes(),
            f"\r\n--{boundary}--\r\n".encode(),
        ]
        content_type = f"multipart/form-data; boundary={boundary}"
        answer = self._json("POST", "upload/image", b"".join(parts), content_type)
        return "/".join(part for part in (answer.get("subfolder"), answer["name"]) if part)

    def download(self, entry: Mapping[str, str], target: Path) -> None:
        """Fetch a file that a node reported."""
        fields = {name: entry.get(name, "") for name in ("filename", "subfolder", "type")}
        target.write_bytes(self._send("GET", _with_query("view", fields)))

    def _json(self, method: str, path: str, body: Any = None, content_type: str = "application/json") -> dict[str, Any]:
        text = self._send(method, path, body, content_type)
        try:
            answer = parse_json(text, self.url)
        except ValueError:
            answer = None
        if not isinstance(answer, dict):
            raise ServerUnreachableError(f"{self.url} answers, but not as a ComfyUI server does.")
        return answer

    def _send(self, method: str, path: str, body: Any = None, content_type: str = "application/json") -> bytes:
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        headers = {"Content-Type": content_type} if data is not None else {}
        request = urllib.request.Request(f"{self.url.rstrip('/')}/{path}", data, headers, method=method)
        try:
            with urllib.request.urlopen(request, timeout=TIMEOUT) as response:
                return response.read()
        except urllib.error.HTTPError as error:
            raise _error_of(error, path) from error
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", None) or error
            raise ServerUnreachableError(f"No ComfyUI server answers at {self.url}: {reason}.") from error


def _with_query(path: str, query: Mapping[str, str]) -> str:
    return f"{path}?{urllib.parse.urlencode(query)}"


def _error_of(error: urllib.error.HTTPError, path: str) -> Exception:
    if error.code == 413:
        return RefusedError("The file is larger than the server accepts; start it with a larger --max-upload-size.", {})
    if error.code >= 502:
        return ServerUnreachableError(f"The server at {error.url} is not available: {error.code} {error.reason}.")
    try:
        body = parse_json(error.read(), error.url)
    except ValueError:
        body = {}
    message = f"The server refused {path.partition('?')[0]}: {error.code} {error.reason}."
    return RefusedError(message, body if isinstance(body, dict) else {})
