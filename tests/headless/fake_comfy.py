"""The endpoints of a ComfyUI server that a headless client uses, on the standard library, with scripted outcomes."""

import base64
import email
import hashlib
import json
import threading
import urllib.parse
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

PROMPT_ID = "11111111-2222-3333-4444-555555555555"
SOCKET_GUID = "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
"""The constant of RFC 6455."""


class FakeComfy:
    """What the server knows and will answer; tests set the attributes and read back `posted`."""

    def __init__(self, nodes: dict[str, type]):
        self.nodes = nodes
        self.url = ""
        self.files: dict[tuple[str, str, str], bytes] = {}
        self.uploads: dict[str, bytes] = {}
        self.posted: list[tuple[str, object]] = []
        self.prompt_answer: tuple[int, dict] = (200, {"prompt_id": PROMPT_ID, "number": 0, "node_errors": {}})
        self.outputs: dict = {}
        self.messages: list = []
        self.polls_until_done = 1
        self.known = True
        self.drop_polls = range(0)
        self.socket_messages: list[dict] = []
        self.upload_status = 200
        self.polls = 0
        self.sockets = 0
        self.ahead: list[str] = []

    def info(self, name: str) -> dict:
        if name not in self.nodes:
            return {}
        node = self.nodes[name]
        output = list(node.RETURN_TYPES)
        return {
            name: {"input": node.INPUT_TYPES(), "output": output, "output_node": getattr(node, "OUTPUT_NODE", False)}
        }

    def history(self, prompt_id: str = PROMPT_ID) -> dict:
        self.polls += 1
        if not self.known or self.polls < self.polls_until_done:
            return {}
        failed = any(kind in ("execution_error", "execution_interrupted") for kind, _ in self.messages)
        status = {"status_str": "error" if failed else "success", "completed": not failed, "messages": self.messages}
        return {prompt_id: {"outputs": self.outputs, "status": status}}

    def queue(self) -> dict:
        """Runs of others in front of the one that there is, listed as a heap is: not in order."""
        waiting = [[number, name, {}, {}, []] for number, name in enumerate(self.ahead)]
        mine = [[len(waiting), PROMPT_ID, {}, {}, []]] * self.known
        return {"queue_running": waiting[:1] or mine, "queue_pending": [*mine, *waiting[1:]] if waiting else []}

    def answer_prompt(self) -> tuple[int, dict]:
        """The first run has the id that tests know, each further one a number after it."""
        status, answer = self.prompt_answer
        count = sum(path == "prompt" for path, _ in self.posted)
        return status, {**answer, "prompt_id": f"{PROMPT_ID}-{count}"} if count > 1 else answer


@contextmanager
def served(fake: FakeComfy):
    """Serve `fake` on a free port of this machine; its `url` is set."""
    handler = type("Handler", (_Handler,), {"fake": fake})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.daemon_threads = True
        fake.url = f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        yield fake
        server.shutdown()


class _Handler(BaseHTTPRequestHandler):
    fake: FakeComfy

    def log_message(self, *_):
        pass

    def do_GET(self):
        url = urllib.parse.urlsplit(self.path)
        query = dict(urllib.parse.parse_qsl(url.query, keep_blank_values=True))
        head, _, rest = url.path.strip("/").partition("/")
        if head == "history" and self.fake.polls + 1 in self.fake.drop_polls:
            self.fake.polls += 1
            self.close_connection = True
        elif head == "ws":
            self._socket()
        elif head == "view":
            self._answer(200, self.fake.files[query["filename"], query["subfolder"], query["type"]])
        else:
            answers = {
                "object_info": lambda: self.fake.info(urllib.parse.unquote(rest)),
                "history": lambda: self.fake.history(rest),
                "queue": self.fake.queue,
                "system_stats": lambda: {"system": {"comfyui_version": "0.0"}, "devices": [{"name": "none"}]},
            }
            self._answer(200, json.dumps(answers[head]()).encode())

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path = self.path.strip("/")
        if path == "upload/image":
            self._upload(body)
            return
        self.fake.posted.append((path, json.loads(body)))
        status, answer = self.fake.answer_prompt() if path == "prompt" else (200, {})
        self._answer(status, json.dumps(answer).encode())

    def _upload(self, body: bytes):
        message = email.message_from_bytes(f"Content-Type: {self.headers['Content-Type']}\r\n\r\n".encode() + body)
        parts = {part.get_param("name", header="content-disposition"): part for part in message.get_payload()}
        name, subfolder = parts["image"].get_filename(), parts["subfolder"].get_payload().strip()
        self.fake.uploads[f"{subfolder}/{name}"] = parts["image"].get_payload(decode=True)
        answer = {"name": f"server {name}", "subfolder": subfolder, "type": "input"}
        self._answer(self.fake.upload_status, json.dumps(answer).encode())

    def _answer(self, status: int, body: bytes):
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _socket(self):
        if "Sec-WebSocket-Key" not in self.headers:
            self._answer(400, b"")
            return
        self.fake.sockets += 1
        digest = hashlib.sha1((self.headers["Sec-WebSocket-Key"] + SOCKET_GUID).encode()).digest()
        self.send_response(101)
        self.send_header("Upgrade", "websocket")
        self.send_header("Connection", "Upgrade")
        self.send_header("Sec-WebSocket-Accept", base64.b64encode(digest).decode())
        self.end_headers()
        self.wfile.write(b"\x82\x02\x00\x01")
        for message in self.fake.socket_messages:
            text = json.dumps(message).encode()
            assert len(text) < 65536
            size = bytes([len(text)]) if len(text) < 126 else b"\x7e" + len(text).to_bytes(2, "big")
            self.wfile.write(b"\x81" + size + text)
        self.wfile.flush()
        self.close_connection = True
