"""The command `influence`, and python -m influence_cli."""

import os
import sys


def main() -> None:
    """Run the command line. Ctrl-C ends it in the same way while its modules are being loaded."""
    try:
        from influence_cli.cli import main as run
    except KeyboardInterrupt:
        if os.environ.get("RANK", "0") == "0":  # of several processes one tells
            sys.stderr.write("interrupted before the command started\n")
        raise SystemExit(130) from None
    run()


if __name__ == "__main__":
    main()
