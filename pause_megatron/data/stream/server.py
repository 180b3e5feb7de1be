"""One reader for all processes of a machine: it cuts the windows, the others ask it for theirs over a local socket.

The protocol: a process sends the number of a window (int64); the answer is a length (int64) and so many bytes, the
text's ids as int32; or -1, a length and an error message in UTF-8.
"""

from __future__ import annotations

import contextlib
import shutil
import socket
import struct
import tempfile
import threading
from pathlib import Path

import numpy as np

from pause_megatron.data.stream.windows import Place, TextWindows
from pause_megatron.data.text.documents import Tally
from pause_megatron.errors import DataError, PauseMegatronError

_NUMBER = struct.Struct("<q")
_ERROR = -1


class WindowServer:
    """Holds the stream, and gives windows to this process (`text`) and to others.

    Args:
        windows: the stream; nobody else may use it.
        processes: how many will ask, this one included. What all of them have had is forgotten.
        remember: how many windows back the places are kept that a checkpoint may need.
    """

    def __init__(self, windows: TextWindows, processes: int, remember: int) -> None:
        self._windows, self._remember = windows, remember
        self._lock = threading.Lock()
        self._asked = [0] * processes
        self._connections: list[socket.socket] = []
        self._folder = Path(tempfile.mkdtemp(prefix="pause-megatron-"))  # for this user only
        self.address = str(self._folder / "windows")
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.bind(self.address)
        self._socket.listen(processes)
        threading.Thread(target=self._accept, args=(processes,), name="stream-server", daemon=True).start()

    def text(self, sample: int) -> np.ndarray:
        """The text of a window for this process: int64 [T]."""
        return self._text(0, sample)

    @property
    def malformed(self) -> Tally:
        """What the reader has left out since it was opened."""
        return self._windows.malformed

    def place(self, sample: int) -> Place:
        """Where to read on for a run that goes on at this window."""
        with self._lock:
            return self._windows.place(sample)

    def close(self) -> None:
        """Take no more questions. Those who ask are told that the reader is gone."""
        for open_socket in (self._socket, *self._connections):
            with contextlib.suppress(OSError):
                open_socket.shutdown(socket.SHUT_RDWR)
            open_socket.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _text(self, process: int, sample: int) -> np.ndarray:
        with self._lock:
            text = self._windows.text(sample)
            self._asked[process] = sample
            # Those that have not asked yet stand at 0, so nothing that they need goes away.
            oldest = min(self._asked)
            self._windows.forget(oldest, oldest - self._remember)
            return text

    def _accept(self, processes: int) -> None:
        for process in range(1, processes):
            try:
                connection, _ = self._socket.accept()
            except OSError:  # closed
                return
            self._connections.append(connection)
            threading.Thread(target=self._serve, args=(process, connection), name="stream-server", daemon=True).start()

    def _serve(self, process: int, connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError, EOFError):
            while True:
                (sample,) = _NUMBER.unpack(_receive(connection, _NUMBER.size))
                try:
                    answer = self._text(process, sample).astype(np.int32).tobytes()
                except PauseMegatronError as error:
                    answer = str(error).encode()
                    connection.sendall(_NUMBER.pack(_ERROR))
                connection.sendall(_NUMBER.pack(len(answer)) + answer)


class WindowClient:
    """Asks the server of this machine."""

    def __init__(self, address: str) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.connect(address)

    def text(self, sample: int) -> np.ndarray:
        """The text of a window: int64 [T].

        Raises:
            DataError: what the server met, or that it is gone.
        """
        try:
            self._socket.sendall(_NUMBER.pack(sample))
            (size,) = _NUMBER.unpack(_receive(self._socket, _NUMBER.size))
            failed = size == _ERROR
            if failed:
                (size,) = _NUMBER.unpack(_receive(self._socket, _NUMBER.size))
            answer = _receive(self._socket, size)
        except (OSError, EOFError) as error:
            raise DataError(f"data.source: the process of this machine that reads it is gone ({error})") from None
        if failed:
            raise DataError(answer.decode())
        return np.frombuffer(answer, dtype=np.int32).astype(np.int64)

    def close(self) -> None:
        """Ask no more."""
        self._socket.close()


def _receive(connection: socket.socket, size: int) -> bytes:
    parts = bytearray()
    while len(parts) < size:
        piece = connection.recv(size - len(parts))
        if not piece:
            raise EOFError("the connection was closed")
        parts += piece
    return bytes(parts)
