"""A connection between two nodes: objects as lines of JSON, and a sign of life every two seconds."""

import contextlib
import json
import queue
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

PING_SECONDS = 2.0
LOST_SECONDS = 30.0  # without any line: the machine is gone, or the network between
LINE_BYTES = 2**24

Message = dict[str, Any]


class Wire:
    """One end of it; what is received is asked for, and what was sent is not waited for."""

    def __init__(self, connection: socket.socket, signs: Callable[[], Message] = dict) -> None:
        """`signs`: what goes with each sign of life."""
        self._connection, self._signs = connection, signs
        self._connection.settimeout(None)
        self._received: queue.SimpleQueue[Message | None] = queue.SimpleQueue()  # None: no more will come
        self._sending = threading.Lock()
        self._closed = threading.Event()
        self.heard_at = time.monotonic()
        self.last_signs: Message = {}
        for work in (self._read, self._beat):
            threading.Thread(target=work, name="wire", daemon=True).start()

    def send(self, **message: Any) -> None:
        """To whoever is there; that nobody is, shows when it is read from."""
        with self._sending, contextlib.suppress(OSError):
            self._connection.sendall(json.dumps(message).encode() + b"\n")

    def next(self, seconds: float = 0.0) -> Message | None:
        """What has come, or comes so soon."""
        try:
            return self._received.get(timeout=seconds) if seconds else self._received.get_nowait()
        except queue.Empty:
            return None

    @property
    def is_closed(self) -> bool:
        """Whether no more will come than has come already."""
        return self._closed.is_set()

    def lost(self, after_seconds: float = LOST_SECONDS) -> str | None:
        """Why nothing is to be expected any more, once all that has come was asked for."""
        if self._closed.is_set() and self._received.empty():
            return "its connection was closed"
        silent = time.monotonic() - self.heard_at
        return f"it has given no sign for {silent:.0f} s" if silent > after_seconds else None

    def close(self) -> None:
        self._closed.set()
        with contextlib.suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)
        self._connection.close()

    def _read(self) -> None:
        try:
            with contextlib.suppress(OSError), self._connection.makefile("rb") as lines:
                while line := lines.readline(LINE_BYTES):
                    message = _read(line)
                    if message is None:
                        return
                    self.heard_at = time.monotonic()
                    if "alive" in message:
                        self.last_signs = message["alive"]
                    else:
                        self._received.put(message)
        finally:
            self._closed.set()
            self._received.put(None)

    def _beat(self) -> None:
        while not self._closed.wait(PING_SECONDS):
            self.send(alive=self._signs())


def _read(line: bytes) -> Message | None:
    """None: this is no node that speaks."""
    try:
        message: Any = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return message if isinstance(message, dict) else None
