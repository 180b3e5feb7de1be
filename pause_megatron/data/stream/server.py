"""One reader for all ranks of a host: its window source, served to the other local ranks over a Unix socket.

Protocol: a client sends the number of a window (int64). The answer is a length (int64) and that many bytes, the text
ids as int32. An error is -1, a length and a message in UTF-8.
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

from pause_megatron.data.stream.windows import StreamPosition, TextWindows
from pause_megatron.data.text.documents import Tally
from pause_megatron.errors import DataError, PauseMegatronError

_NUMBER = struct.Struct("<q")
_ERROR = -1


class WindowServer:
    """The window source of the rank that reads the stream. It also answers the other ranks of its host.

    Text that every local rank has received is dropped.

    Args:
        windows: The windows of the stream; nothing else may read them.
        local_ranks: Ranks on this host, this one included.
        history: Number of windows for which stream positions are retained, because a checkpoint may need them.
    """

    def __init__(self, windows: TextWindows, local_ranks: int, history: int) -> None:
        self._windows, self._history = windows, history
        self._lock = threading.Lock()
        self._latest = [0] * local_ranks  # last window of each local rank
        self._connections: list[socket.socket] = []
        self._folder = Path(tempfile.mkdtemp(prefix="pause-megatron-"))  # readable by this user only
        self.address = str(self._folder / "windows")
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.bind(self.address)
        self._socket.listen(local_ranks)
        threading.Thread(target=self._accept, args=(local_ranks,), name="stream-server", daemon=True).start()

    def text(self, sample: int) -> np.ndarray:
        """Return the text of a window for this rank, int64 [T]."""
        return self._text(0, sample)

    @property
    def malformed(self) -> Tally:
        """Counts of the records that the reader has skipped since it was opened."""
        return self._windows.malformed

    def position(self, sample: int) -> StreamPosition:
        """Return the position from which a run resumes with a window."""
        with self._lock:
            return self._windows.position(sample)

    def close(self) -> None:
        """Close all connections. Requests of other ranks then fail."""
        for open_socket in (self._socket, *self._connections):
            with contextlib.suppress(OSError):
                open_socket.shutdown(socket.SHUT_RDWR)
            open_socket.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _text(self, local_rank: int, sample: int) -> np.ndarray:
        with self._lock:
            text = self._windows.text(sample)
            self._latest[local_rank] = sample
            # A rank without a request yet counts as window 0, so that nothing that it needs is dropped.
            oldest = min(self._latest)
            self._windows.forget(oldest, oldest - self._history)
            return text

    def _accept(self, local_ranks: int) -> None:
        for local_rank in range(1, local_ranks):
            try:
                connection, _ = self._socket.accept()
            except OSError:  # closed
                return
            self._connections.append(connection)
            arguments = (local_rank, connection)
            threading.Thread(target=self._serve, args=arguments, name="stream-server", daemon=True).start()

    def _serve(self, local_rank: int, connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError, EOFError):
            while True:
                (sample,) = _NUMBER.unpack(_receive(connection, _NUMBER.size))
                try:
                    answer = self._text(local_rank, sample).astype(np.int32).tobytes()
                except PauseMegatronError as error:
                    answer = str(error).encode()
                    connection.sendall(_NUMBER.pack(_ERROR))
                connection.sendall(_NUMBER.pack(len(answer)) + answer)


class WindowClient:
    """The window source of a rank whose host has a WindowServer.

    Args:
        address: Path of the server's Unix socket.
    """

    def __init__(self, address: str) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.connect(address)

    def text(self, sample: int) -> np.ndarray:
        """Request the text of a window.

        Args:
            sample: Number of the window.

        Returns:
            Text ids, int64 [T].

        Raises:
            DataError: The reader failed, or its process has ended.
        """
        try:
            self._socket.sendall(_NUMBER.pack(sample))
            (size,) = _NUMBER.unpack(_receive(self._socket, _NUMBER.size))
            failed = size == _ERROR
            if failed:
                (size,) = _NUMBER.unpack(_receive(self._socket, _NUMBER.size))
            answer = _receive(self._socket, size)
        except (OSError, EOFError) as error:
            raise DataError(
                f"data.source: expected window {sample} from the rank that reads the stream on this host, got a closed "
                f"connection ({error})"
            ) from None
        if failed:
            raise DataError(answer.decode())
        return np.frombuffer(answer, dtype=np.int32).astype(np.int64)

    def close(self) -> None:
        """Close the connection."""
        self._socket.close()


def _receive(connection: socket.socket, size: int) -> bytes:
    received = bytearray()
    while len(received) < size:
        part = connection.recv(size - len(received))
        if not part:
            raise EOFError("end of file")
        received += part
    return bytes(received)
