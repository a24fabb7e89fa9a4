"""Messages of a process to the one that started it, which never waits for the rest of one."""

from __future__ import annotations

import socket
import struct

_LENGTH = struct.Struct("!Q")
_CHUNK = 1 << 20


class Mailbox:
    """The receiver's side.

    A sender may be killed in the midst of a message, while a process that it forked keeps its end
    open: then neither the rest nor an end would come. So what is there is taken, and no more.

    Args:
        end: one end of a socket pair; `post` writes to the other one.
    """

    def __init__(self, end: socket.socket) -> None:
        self._end = end
        self._end.setblocking(False)
        self._received = bytearray()
        self.is_closed = False
        """Whether nothing more will come."""

    def fileno(self) -> int:
        """Returns the descriptor to wait on."""
        return self._end.fileno()

    @property
    def holds_part(self) -> bool:
        """Whether the beginning of a message is there, and not its end."""
        return bool(self._received)

    def take(self) -> list[bytes]:
        """Returns the messages that have arrived in full since the last call."""
        self._receive()
        messages = []
        while len(self._received) >= _LENGTH.size:
            end = _LENGTH.size + _LENGTH.unpack_from(self._received)[0]
            if len(self._received) < end:
                break
            messages.append(bytes(self._received[_LENGTH.size : end]))
            del self._received[:end]
        return messages

    def _receive(self) -> None:
        while not self.is_closed:
            try:
                chunk = self._end.recv(_CHUNK)
            except BlockingIOError:
                return
            except OSError:  # reset by a sender that was killed
                chunk = b""
            self._received += chunk
            self.is_closed = not chunk


def post(end: socket.socket, message: bytes) -> None:
    """Sends a message; returns when it is on its way.

    Args:
        end: the sender's end of the socket pair.
        message: bytes of any number.

    Raises:
        OSError: if the receiver is gone.
    """
    end.sendall(_LENGTH.pack(len(message)))
    end.sendall(message)
