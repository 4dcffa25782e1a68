"""A loopback server that speaks the Schema Registry's protocol, for tests.

No real registry is to be had from the package registries that CI can reach.
Confluent's own client works with it, and what the tests read and write goes through that client too.
"""

from __future__ import annotations

import base64
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit


class Registry:
    """Subjects, versions and ids in memory."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, str]] = []
        self.schemas: list[dict[str, Any]] = []
        self.subjects: dict[str, list[int]] = {}
        self.compiled: dict[str, bytes] = {}
        """What a Protobuf schema's text is, compiled: this server has no compiler."""
        self.user: tuple[str, str] | None = None
        self.read_only = False
        self.failing: tuple[int, str] | None = None
        """A status and a body in place of every answer."""
        self.delay = 0.0
        self.url = ""
        self._lock = threading.Lock()

    def register(self, subject: str, text: str, kind: str = "AVRO", references: Any = ()) -> int:
        """The id of a schema, which is new or has it already."""
        wanted = {"schema": text, "schemaType": kind, "references": list(references)}
        with self._lock:
            if wanted not in self.schemas:
                self.schemas.append(wanted)
            number = self.schemas.index(wanted) + 1
            versions = self.subjects.setdefault(subject, [])
            if number not in versions:
                versions.append(number)
        return number

    def answer(self, method: str, target: str, body: dict[str, Any]) -> tuple[int, Any]:
        """Status and JSON for a request."""
        parts = urlsplit(target)
        path = [unquote(part) for part in parts.path.strip("/").split("/")]
        form = parse_qs(parts.query).get("format", [""])[0]
        match (method, *path):
            case ("GET", "schemas", "types"):
                return 200, ["AVRO", "JSON", "PROTOBUF"]
            case ("GET", "schemas", "ids", number):
                if not 0 < int(number) <= len(self.schemas):
                    return 404, {"error_code": 40403, "message": f"Schema {number} not found"}
                return 200, self._shown(int(number), form)
            case ("GET", "subjects", subject, "versions", version):
                found = self.subjects.get(subject)
                if not found:
                    return 404, {"error_code": 40401, "message": f"Subject '{subject}' not found."}
                at = len(found) if version in ("latest", "-1") else int(version)
                number = found[at - 1]
                return 200, {"subject": subject, "version": at, "id": number} | self._shown(number, form)
            case ("POST", "subjects", subject, *rest) if rest in ([], ["versions"]):
                wanted = {
                    "schema": body["schema"],
                    "schemaType": body.get("schemaType") or "AVRO",
                    "references": body.get("references") or [],
                }
                known = wanted in self.schemas and self.schemas.index(wanted) + 1 in self.subjects.get(
                    subject, []
                )
                if not known and not rest:
                    return 404, {"error_code": 40403, "message": "Schema not found"}
                if rest and self.read_only:
                    return 422, {"error_code": 42205, "message": f"Subject {subject} is in read-only mode"}
                number = self.register(subject, wanted["schema"], wanted["schemaType"], wanted["references"])
                version = self.subjects[subject].index(number) + 1
                return 200, {"subject": subject, "id": number, "version": version} | self._shown(number, "")
        return 404, {"error_code": 404, "message": "HTTP 404 Not Found"}

    def _shown(self, number: int, form: str) -> dict[str, Any]:
        shown = {name: value for name, value in self.schemas[number - 1].items() if value}
        if form == "serialized" and shown["schema"] in self.compiled:
            shown["schema"] = base64.b64encode(self.compiled[shown["schema"]]).decode()
        if shown["schemaType"] == "AVRO":
            del shown["schemaType"]  # as Confluent's does
        return shown


@contextmanager
def registry_server() -> Iterator[Registry]:
    """A registry on a free port of loopback."""
    registry = Registry()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _serve(self) -> None:
            raw = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            registry.asked.append((self.command, self.path))
            time.sleep(registry.delay)
            status, found = self._answer(raw)
            data = found.encode() if isinstance(found, str) else json.dumps(found).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/vnd.schemaregistry.v1+json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def _answer(self, raw: bytes) -> tuple[int, Any]:
            if registry.failing:
                return registry.failing
            if registry.user:
                wanted = base64.b64encode(":".join(registry.user).encode()).decode()
                if self.headers.get("Authorization") != f"Basic {wanted}":
                    return 401, {"error_code": 401, "message": "Unauthorized"}
            return registry.answer(self.command, self.path, json.loads(raw) if raw else {})

        do_GET = do_POST = _serve

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    registry.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield registry
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
