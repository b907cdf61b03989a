"""Serves the desk on the loopback address until Ctrl-C."""

from __future__ import annotations

import contextlib
import errno
import secrets
import socket
from collections.abc import Callable

import uvicorn

from influence_cli.errors import InfluenceError
from influence_cli.review.app import Served, make_app

HOST = "127.0.0.1"
# Where the search for a free port begins, and how many are tried.
PORT, TRIED = 8750, 100


def listen(port: int) -> tuple[socket.socket, int]:
    """Open a port of the loopback address: this one, or the next that is free.

    Args:
        port: the first to try.

    Returns:
        The open socket and its port.

    Raises:
        InfluenceError: none of a hundred is free, or the port is not allowed.
    """
    for number in range(port, min(port + TRIED, 65_536)):
        opened = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        # A server that has just ended leaves its connections for a minute; a port that is listened on stays refused.
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            opened.bind((HOST, number))
            opened.listen(128)
        except OSError as error:
            opened.close()
            if error.errno == errno.EADDRINUSE:
                continue
            raise InfluenceError(
                f"port {number} cannot be opened: {error.strerror or error}", "choose another: --port 8750"
            ) from error
        return opened, number
    raise InfluenceError(f"no port from {port} on is free ({TRIED} tried)", "choose another: --port N")


def serve(served: Served, port: int, ready: Callable[[str, int], None]) -> None:
    """Answer requests until Ctrl-C.

    Args:
        served: what there is to serve.
        port: the first to try.
        ready: is told the address with its token, and the port, once the port is open.
    """
    opened, number = listen(port)
    with opened:
        server, address = make_server(served, number)
        ready(address, number)
        with contextlib.suppress(KeyboardInterrupt):  # raised again by the server once it has closed
            server.run(sockets=[opened])


def make_server(served: Served, port: int) -> tuple[uvicorn.Server, str]:
    """Make the server of a port, and its address with a fresh token."""
    token = secrets.token_urlsafe(18)
    app = make_app(served, token, (f"{HOST}:{port}", f"localhost:{port}"))
    config = uvicorn.Config(
        app,
        log_level="critical",
        access_log=False,
        lifespan="off",
        ws="none",
        http="h11",
        loop="asyncio",
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=2,
    )
    return uvicorn.Server(config), f"http://{HOST}:{port}/{token}/"
