"""The entry point of `sparse-dit` and of `python -m sparse_dit`."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line; one line says so where its libraries aren't installed."""
    try:
        from .cli import main as run
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("sparse_dit"):
            raise
        sys.exit(
            f"error: the command line needs {error.name}, which isn't installed: "
            "pip install 'sparse_dit[all]'"
        )
    run()


if __name__ == "__main__":
    main()
