"""A socket that a server listens at."""

from __future__ import annotations

import socket

from duallora.errors import DualLoRAError


def listening(host: str, port: int) -> socket.socket:
    """A socket at an address of this machine; port 0 is a free one.

    Raises:
        DualLoRAError: the address is not this machine's, or taken.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        listener = socket.create_server((host, port), family=family, backlog=1024)
    except OSError as error:
        raise DualLoRAError(
            f"cannot listen at {host}, port {port} ({error.strerror or error}); take another --port, or 0 "
            "for a free one."
        ) from error
    # Connections inherit it; asyncio sets it only where a socket names its protocol, which this one does not.
    # Without it the body of an answer waits for the client to acknowledge the head: 40 ms.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener
