"""Run a workflow on a ComfyUI server: validate, upload, queue, follow, download.

The outcome is always read from the server's history, so a dropped connection loses nothing; the websocket only brings
progress and wakes the wait early. Without the optional package websocket-client the same run is followed by polling.
"""

import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, suppress
from pathlib import PurePosixPath
from typing import Any

from wan_core.files import parse_json
from wan_core.runtime import Cancelled

from .core_nodes import IMAGES, VIDEOS
from .folders import ANNOTATED, Folders, file_entries
from .runner import Event, NodeError, OnEvent, RunResult
from .schema import Issue, NodeSchema, ValidationError, validate
from .server import RefusedError, Server, ServerUnreachableError
from .workflow import NodeSpec, Workflow, needed_nodes

try:
    import websocket
except ImportError:
    websocket = None  # type: ignore[assignment]  # an optional package

MEDIA = IMAGES | VIDEOS | {".wav", ".mp3", ".flac", ".ogg", ".opus", ".m4a", ".aac", ".txt"}
"""Suffixes of files that are uploaded for a workflow; the input folder may hold others, too."""

POLL_SECONDS = 1.0
"""Pause between two requests of the history."""

CONNECT_SECONDS = 10.0
"""How long a busy server may take to open its stream of events."""

LATE_SECONDS = 0.2
"""How long to wait for the last messages of a run that has finished."""

PATIENCE_SECONDS = 60.0
"""How long a server may be unreachable during a run before the run is given up."""


class RunLostError(RuntimeError):
    """The server is there, but no longer has the run."""


def run_on_server(
    workflow: Workflow,
    server: Server,
    folders: Folders,
    *,
    schemas: Mapping[str, NodeSchema] | None = None,
    on_event: OnEvent = lambda _: None,
    check_cancelled: Callable[[], None] = lambda: None,
    patience: float | None = None,
) -> RunResult:
    """Run a workflow on a server and fetch the files it saved into the output folder, under their names there.

    Ranges and choices are checked by the server, which knows its nodes' own checks, before it queues anything.
    Pictures, clips, sounds and texts that load nodes name are uploaded when they are in the input folder or among the
    shipped assets, and typed paths (`Folders.typed`) from anywhere; the server stores equal files once. An interruption
    here stops the run there.

    Args:
        check_cancelled: called about once a second; what it raises ends the run.
        patience: seconds for which the server may be unreachable while it runs the workflow; None is a minute.

    Raises:
        ValidationError: the workflow cannot run there; nothing has run.
        NodeError: a node failed.
        Cancelled: the run was interrupted on the server.
        RunLostError: it was taken out of the server's queue, or the server was restarted.
        ServerUnreachableError: no server, or none any more.
    """
    known = None if schemas is None else [schemas]
    (result,) = run_all_on_server(
        [workflow], server, folders, schemas=known, on_event=on_event, check_cancelled=check_cancelled,
        patience=patience,
    )  # fmt: skip
    return result


def run_all_on_server(
    workflows: Sequence[Workflow],
    server: Server,
    folders: Folders,
    *,
    schemas: Sequence[Mapping[str, NodeSchema]] | None = None,
    on_event: OnEvent = lambda _: None,
    check_cancelled: Callable[[], None] = lambda: None,
    patience: float | None = None,
) -> Iterator[RunResult]:
    """Queue several workflows at once, and yield the result of each as soon as it has finished, in their order.

    All are checked before the first is queued. A run that fails takes those after it out of the queue.

    Raises:
        ValidationError, NodeError, Cancelled, RunLostError, ServerUnreachableError: as `run_on_server`.
    """
    schemas = [server.schemas(workflow) for workflow in workflows] if schemas is None else schemas
    pairs = zip([validate(*pair) for pair in zip(workflows, schemas, strict=True)], schemas, strict=True)
    ready = [_upload_inputs(workflow, server, folders, known, on_event) for workflow, known in pairs]
    client_id = uuid.uuid4().hex
    with closing(_Socket(server.socket_url(client_id))) as socket, _QueuedRuns(server) as queued:
        socket.connect()
        for workflow in ready:
            queued.ids.append(_submit(workflow, server, client_id))
        for workflow in ready:
            follow = _Follower(workflow, queued.ids[0], on_event)
            record = _wait(follow, server, socket, check_cancelled, PATIENCE_SECONDS if patience is None else patience)
            queued.ids.pop(0)
            _raise_failure(workflow, record)
            ui = record.get("outputs") or {}
            yield RunResult(ui, tuple(_download(ui, server, folders)))


class _QueuedRuns:
    """Runs that the server has not finished, in `ids`; those left at the end of the block are stopped."""

    def __init__(self, server: Server):
        self.server = server
        self.ids: list[str] = []

    def __enter__(self) -> "_QueuedRuns":
        return self

    def __exit__(self, *_: object) -> None:
        for prompt_id in reversed(self.ids):
            with suppress(ServerUnreachableError, RefusedError):
                self.server.stop(prompt_id)


def _upload_inputs(
    workflow: Workflow, server: Server, folders: Folders, schemas: Mapping[str, NodeSchema], on_event: OnEvent
) -> Workflow:
    outputs = [node.id for node in workflow.nodes.values() if schemas[node.class_type].is_output]
    missing = []
    for node_id in needed_nodes(workflow, outputs):
        node = workflow.nodes[node_id]
        for name, spec in schemas[node.class_type].inputs.items():
            value = node.inputs.get(name)
            if not spec.takes_file or not isinstance(value, str) or ANNOTATED.fullmatch(value):
                continue
            path = folders.find(value)
            if path and (path.suffix.lower() in MEDIA or value in folders.typed):
                parent = PurePosixPath(value).parent
                # A path outside of the input folder means nothing on the server: its file goes into the top folder.
                inside = not parent.is_absolute() and ".." not in parent.parts and (folders.input / value) == path
                stored = server.upload(path, str(parent) if inside and str(parent) != "." else "")
                on_event(Event("notice", text=f"{path} uploaded as {stored}"))
                workflow = workflow.with_inputs(node_id, {name: stored})
            elif value not in (spec.choices or ()):
                why = (
                    "is not a picture, clip, sound or text"
                    if path
                    else f"is neither in {folders.input} nor on the server"
                )
                details = f"{name}: '{value}' {why}"
                missing.append(Issue("value_not_in_list", "Value not in list", details, node))
    if missing:
        raise ValidationError(missing)
    return workflow


def _submit(workflow: Workflow, server: Server, client_id: str) -> str:
    try:
        answer = server.submit(workflow.to_api(), client_id)
    except RefusedError as error:
        raise ValidationError(_issues(workflow, error.body) or [Issue("refused", str(error), "")]) from error
    if issues := _issues(workflow, answer):
        # The host would run only the valid outputs; here a run needs all of them.
        server.stop(answer["prompt_id"])
        raise ValidationError(issues)
    return answer["prompt_id"]


def _issues(workflow: Workflow, body: Mapping[str, Any]) -> list[Issue]:
    issues = [
        Issue(error.get("type", ""), error.get("message", ""), error.get("details", ""), workflow.nodes.get(node_id))
        for node_id, entry in (body.get("node_errors") or {}).items()
        for error in _distinct(entry.get("errors", []))
    ]
    error = body.get("error")
    if issues or not error:
        return issues
    if isinstance(error, str):
        return [Issue("refused", error, "")]
    return [Issue(error.get("type", ""), error.get("message", ""), error.get("details", ""))]


def _distinct(errors: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Errors of one node without repetition: the host repeats the message of the node's own check once for every input,
    as "<input> - <text>".
    """
    found: dict[str, Mapping[str, Any]] = {}
    for error in errors:
        found.setdefault(error.get("details", "").partition(" - ")[2] or str(error), error)
    return list(found.values())


class _Socket:
    """The server's event stream, if it has one; opened again after the connection is lost."""

    def __init__(self, url: str):
        self.url = url
        self.connection: Any = None

    def connect(self) -> None:
        if websocket and self.connection is None:
            with suppress(OSError, websocket.WebSocketException):
                self.connection = websocket.create_connection(self.url, timeout=CONNECT_SECONDS)

    def receive(self, seconds: float) -> Iterator[dict[str, Any]]:
        """Messages that arrive within that time, then nothing; without a connection, only the wait."""
        end = time.monotonic() + seconds
        self.connect()
        while (left := end - time.monotonic()) > 0:
            if self.connection is None:
                time.sleep(left)
                return
            try:
                self.connection.settimeout(left)
                message = self.connection.recv()
            except websocket.WebSocketTimeoutException:
                return
            except (OSError, websocket.WebSocketException):
                self.close()
                continue
            # Binary messages are preview pictures.
            if isinstance(message, str) and message:
                yield parse_json(message, self.url)

    def close(self) -> None:
        if self.connection is not None:
            with suppress(OSError, websocket.WebSocketException):
                self.connection.close()
            self.connection = None


def _wait(
    follow: "_Follower", server: Server, socket: _Socket, check_cancelled: Callable[[], None], patience: float
) -> dict[str, Any]:
    """The history record of the run, once it has finished."""
    last_answer, is_over = time.monotonic(), False
    while True:
        check_cancelled()
        try:
            if record := server.history(follow.prompt_id):
                if not is_over:
                    follow.until_over(socket, LATE_SECONDS)
                return record
            follow.place(_runs_before(server, follow.prompt_id))
            last_answer = time.monotonic()
        except ServerUnreachableError:
            if time.monotonic() - last_answer > patience:
                raise
        is_over = follow.until_over(socket, POLL_SECONDS)


def _runs_before(server: Server, prompt_id: str) -> int:
    """How many runs the server finishes before it begins this one.

    Raises:
        RunLostError: the server does not know this run.
    """
    queue = server.queue()
    if prompt_id in queue["pending"]:
        return len(queue["running"]) + queue["pending"].index(prompt_id)
    # It may have finished between the two requests.
    if prompt_id in queue["running"] or server.history(prompt_id):
        return 0
    raise RunLostError("The server no longer knows this run: it was restarted, or the run was taken out of its queue.")


class _Follower:
    """Turns the server's messages about one run into events."""

    def __init__(self, workflow: Workflow, prompt_id: str, on_event: OnEvent):
        self.workflow, self.prompt_id, self.on_event = workflow, prompt_id, on_event
        self.started = self.before = 0

    def place(self, before: int) -> None:
        """Report how many runs come first, when that has changed."""
        if before and before != self.before:
            self.on_event(Event("queued", done=before))
        self.before = before

    def until_over(self, socket: _Socket, seconds: float) -> bool:
        """Report what arrives within that time; True as soon as a message says that the run is over."""
        return any(map(self.message, socket.receive(seconds)))

    def message(self, message: Mapping[str, Any]) -> bool:
        """Report one message; True when it says that the run is over."""
        kind, data = message.get("type"), message.get("data") or {}
        if data.get("prompt_id") != self.prompt_id:
            return False
        node = self.workflow.nodes.get(str(data.get("display_node") or data.get("node")))
        total = len(self.workflow.nodes)
        if kind == "execution_cached":
            for node_id in data.get("nodes", []):
                if node_id in self.workflow.nodes:
                    self.started += 1
                    self.on_event(Event("cached", self.workflow.nodes[node_id]))
        elif kind == "executing" and node:
            self.started += 1
            self.on_event(Event("start", node, self.started, total))
        elif kind == "progress":
            self.on_event(Event("progress", node, data.get("value", 0), data.get("max", 0)))
        return kind in ("execution_success", "execution_error", "execution_interrupted")


def _raise_failure(workflow: Workflow, record: Mapping[str, Any]) -> None:
    status = record.get("status") or {}
    for kind, data in status.get("messages", []):
        if kind == "execution_interrupted":
            raise Cancelled("The run was interrupted on the server.")
        if kind == "execution_error":
            node_id = str(data.get("node_id"))
            unknown = NodeSpec(node_id, str(data.get("node_type")), str(data.get("node_type")), {})
            error_type = str(data.get("exception_type", "Error")).rpartition(".")[2]
            message = str(data.get("exception_message", "")).strip()
            raise NodeError(workflow.nodes.get(node_id, unknown), error_type, message)
    if status.get("status_str") == "error":
        raise RuntimeError("The server reports that the run failed, without a reason; see its log.")


def _download(ui: Mapping[str, Mapping[str, Any]], server: Server, folders: Folders) -> Iterator[Any]:
    for entry in file_entries(ui):
        kind = entry.get("type", "output")
        if kind in ("output", "temp"):
            with folders.named_file(entry["filename"], entry.get("subfolder", ""), kind) as file:
                server.download(entry, file.partial)
            yield file.path
