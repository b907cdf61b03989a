"""python -m influence_cli."""

from influence_cli.cli import main

if __name__ == "__main__":
    main()
