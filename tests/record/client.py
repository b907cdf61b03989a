"""Stand for the command ``influence`` in a shell line: hand everything to the warm process, and end as it says."""

import json
import os
import socket
import sys


def main() -> None:
    """Connect to the socket of the first argument; the others are the command's words."""
    request = {"words": sys.argv[2:], "environment": dict(os.environ), "folder": os.getcwd()}  # noqa: PTH109 (pathlib would take longer to import than all this)
    body = json.dumps(request).encode()
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(sys.argv[1])
    socket.send_fds(connection, [len(body).to_bytes(8, "big")], [0, 1, 2])
    connection.sendall(body)
    # A reader that goes away has to be seen by the command, not hidden by this process.
    for stream in (0, 1, 2):
        os.close(stream)
    code = connection.recv(1)
    os._exit(code[0] if code else 1)


if __name__ == "__main__":
    main()
