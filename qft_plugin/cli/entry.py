"""Where `qft` starts: what it is built on may be missing."""

import sys

from qft_plugin.config_file import INSTALL


def main() -> None:
    """Run the command line, or say what to install for it."""
    try:
        from qft_plugin.cli.app import app
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] not in ("typer", "rich", "click"):
            raise
        sys.exit(f"Error: {error.name} should be installed for the command line. Found none. Run: {INSTALL}")
    app(prog_name="qft")
