"""Whether something can be served at an address of this machine.

What belongs here: trying it. What does not: what to do where it cannot be (`home` for Dagster's UI,
`studio.serve` for the studio).
"""

from __future__ import annotations

import errno
import socket


def try_address(host: str, port: int) -> None:
    """Raises OSError where nothing can be served at an address, with `errno.EADDRINUSE` where
    something is."""
    if not 1 <= port <= 65535:  # the resolver takes the rest of a division by 65536
        raise OSError(errno.EINVAL, "a port is a number from 1 to 65535")
    [(family, kind, protocol, _, address), *_] = socket.getaddrinfo(
        host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )
    with socket.socket(family, kind, protocol) as tried:
        tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        tried.bind(address)
