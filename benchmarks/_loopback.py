"""A loopback server that answers chat completions after a fixed time, for as little CPU as possible.

``python benchmarks/_loopback.py SECONDS`` prints its port and serves until its stdin is closed.
`listening` is one in a thread of this process, which tells of each request. The answer is ``billing``; that
of a model named ``loopback-wrong`` is ``technical``.
"""

from __future__ import annotations

import asyncio
import json
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import cast

BODY = json.dumps(
    {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 1,
        "model": "loopback",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "billing"},
                "finish_reason": "stop",
            }
        ],
        "usage": {"prompt_tokens": 20, "completion_tokens": 1, "total_tokens": 21},
    }
).encode()
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s"
ANSWER = HEAD % (len(BODY), BODY)
OTHER = BODY.replace(b"billing", b"technical")
WRONG = HEAD % (len(OTHER), OTHER)


class _Protocol(asyncio.Protocol):
    def __init__(self, seconds: float, heard: Callable[[bytes], float] | None = None) -> None:
        self._seconds = seconds
        self._heard = heard
        self._seen = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        self._seen += data
        while True:
            head, end, rest = self._seen.partition(b"\r\n\r\n")
            if not end:
                return
            length = 0
            for line in head.lower().split(b"\r\n"):
                if line.startswith(b"content-length:"):
                    length = int(line[15:])
            if len(rest) < length:
                return
            self._seen = rest[length:]
            answer = WRONG if b'"loopback-wrong"' in rest[:length] else ANSWER
            seconds = self._seconds if self._heard is None else self._heard(rest[:length])
            if seconds:
                asyncio.get_running_loop().call_later(seconds, self._answer, answer)
            else:
                self._answer(answer)

    def _answer(self, answer: bytes) -> None:
        if not self._transport.is_closing():
            self._transport.write(answer)


async def _serve(seconds: float) -> None:
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: _Protocol(seconds), "127.0.0.1", 0, backlog=1024)
    print(server.sockets[0].getsockname()[1], flush=True)
    await loop.run_in_executor(None, sys.stdin.read)
    server.close()


@contextmanager
def loopback(seconds: float) -> Iterator[str]:
    """The base URL of a server in a process of its own."""
    process = subprocess.Popen(
        [sys.executable, str(Path(__file__)), str(seconds)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdin is not None
    try:
        yield f"http://127.0.0.1:{int(process.stdout.readline())}/v1"
    finally:
        process.stdin.close()
        process.wait(10)


@contextmanager
def listening(heard: Callable[[bytes], float]) -> Iterator[str]:
    """The base URL of a server in a thread, which asks ``heard`` of each body how many seconds to take."""
    import uvloop

    loop = uvloop.new_event_loop()
    bound = socket.create_server(("127.0.0.1", 0), backlog=1024)
    port = bound.getsockname()[1]
    loop.run_until_complete(loop.create_server(lambda: _Protocol(0.0, heard), sock=bound))
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)


if __name__ == "__main__":
    import uvloop

    uvloop.run(_serve(float(sys.argv[1])))
