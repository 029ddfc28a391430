"""What a command says: errors and warnings in a line each, and how it ends."""

import contextlib
import io
import logging
import os
import shutil
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NoReturn

import typer

from qft_plugin.errors import QFTError, QFTWarning
from qft_plugin.report.display import broken

FAILED: Final = 1
WRONG_USE: Final = 2
INTERRUPTED: Final = 130
"""As a shell counts it: 128 and the number of the signal."""


def wrong_use(message: str) -> NoReturn:
    """End a command whose arguments cannot be meant so."""
    typer.echo(f"Error: {message}", err=True)
    raise typer.Exit(WRONG_USE)


@contextlib.contextmanager
def said(*, debug: bool) -> Iterator[None]:
    """Say errors and warnings in a line each, and end with the exit code that they have.

    Args:
        debug: raise errors as they are, and show the warnings and the log of every library.
    """
    if debug:
        logging.basicConfig(level=logging.INFO)
    try:
        with warnings.catch_warnings():
            if not debug:
                warnings.simplefilter("ignore")
                warnings.filterwarnings("always", category=QFTWarning)
            warnings.showwarning = lambda message, *_, **__: typer.echo(f"Warning: {_one_line(str(message))}", err=True)
            yield
    except KeyboardInterrupt:
        typer.echo("Interrupted. No file was left half written.", err=True)
        raise typer.Exit(INTERRUPTED) from None
    except (typer.Exit, typer.Abort):
        raise
    except QFTError as error:
        if debug:
            raise
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(FAILED) from None
    except Exception as error:
        if debug:
            raise
        typer.echo(f"Error: {type(error).__name__}: {error}\nRun it with --debug to see where.", err=True)
        raise typer.Exit(FAILED) from None


def tell(text: str) -> None:
    """Say a result; long lines are broken between words where it is said to a terminal, and stay whole elsewhere."""
    typer.echo(broken(text, shutil.get_terminal_size().columns) if sys.stdout.isatty() else text)


def _one_line(text: str) -> str:
    return " ".join(text.split())


@contextlib.contextmanager
def hushed(quiet: bool) -> Iterator[None]:
    """Keep progress bars and messages of other libraries from the screen."""
    if not quiet:
        yield
        return
    level = logging.getLogger("nncf").level
    logging.getLogger("nncf").setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.getLogger("nncf").setLevel(level)


def check_writable(path: Path, *suffixes: str) -> None:
    """Check where a file is to be written, before any work; a wrong place ends the command.

    Args:
        path: of the file.
        suffixes: that it may have.
    """
    if path.suffix not in suffixes:
        wrong_use(f"{path} should end with {' or '.join(suffixes)}. Found {path.suffix!r}.")
    if path.is_dir() or not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        wrong_use(f"{path} should be a file in a folder that can be written to. Make the folder, or change the name.")
