"""A hub on this machine, which serves a folder as a model repository to `huggingface_hub` 0.36."""

import hashlib
import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from types import TracebackType
from typing import Self
from urllib.parse import unquote, urlsplit


class HubServer:
    """A server of `folder` as `repository` at one commit, `revision`, on a free port, inside a `with` block.

    The repository `gated` lists the same files but serves none of them.
    """

    def __init__(self, folder: Path, repository: str, revision: str, *, gated: str) -> None:
        self.folder = folder
        self.repository = repository
        self.revision = revision
        self.gated = gated
        self.requests: list[str] = []
        """The method and path of each request, in order."""
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                _answer(hub, self)

            def do_HEAD(self) -> None:
                _answer(hub, self)

            def log_message(self, format: str, *arguments: object) -> None:
                """Print nothing: `requests` holds what was asked."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02})
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def files(self) -> list[str]:
        return sorted(path.relative_to(self.folder).as_posix() for path in self.folder.rglob("*") if path.is_file())

    def fetched_files(self) -> set[str]:
        """Return the files that were asked for with their content."""
        prefix = f"GET /{self.repository}/resolve/{self.revision}/"
        return {request.removeprefix(prefix) for request in self.requests if request.startswith(prefix)}


def _answer(hub: HubServer, handler: BaseHTTPRequestHandler) -> None:
    path = unquote(urlsplit(handler.path).path)
    hub.requests.append(f"{handler.command} {path}")
    api = path.removeprefix("/api/models")
    is_api = api != path
    repository = next((name for name in (hub.repository, hub.gated) if f"{api}/".startswith(f"/{name}/")), None)
    if repository is None:
        _send_error(handler, 404, "RepoNotFound")
        return
    action, revision, file = (*api.removeprefix(f"/{repository}").strip("/").split("/", 2), "", "", "")[:3]
    if revision not in (hub.revision, ""):
        _send_error(handler, 404, "RevisionNotFound")
    elif is_api and action in ("", "revision"):
        siblings = [{"rfilename": name} for name in hub.files()]
        _send_json(handler, {"id": repository, "sha": hub.revision, "siblings": siblings})
    elif is_api and action == "tree" and not file:
        tree = [{"type": "file", "path": name, "size": 0, "oid": "0" * 40} for name in hub.files()]
        _send_json(handler, tree)
    elif repository == hub.gated:
        _send_error(handler, 403, "GatedRepo")
    elif not is_api and action == "resolve" and file in hub.files():
        content = (hub.folder / file).read_bytes()
        _send(handler, content, {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Repo-Commit": hub.revision})
    else:
        _send_error(handler, 404, "EntryNotFound")


def _send_json(handler: BaseHTTPRequestHandler, value: object) -> None:
    _send(handler, json.dumps(value).encode(), {"Content-Type": "application/json"})


def _send_error(handler: BaseHTTPRequestHandler, status: int, code: str) -> None:
    _send(handler, b"", {"X-Error-Code": code}, status)


def _send(handler: BaseHTTPRequestHandler, content: bytes, headers: dict[str, str], status: int = 200) -> None:
    handler.send_response(status)
    for name, value in {**headers, "Content-Length": str(len(content))}.items():
        handler.send_header(name, value)
    handler.end_headers()
    if handler.command == "GET":
        handler.wfile.write(content)
