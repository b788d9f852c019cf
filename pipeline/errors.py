"""Errors of the user, reported in one line."""

import io
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager


class UserError(ValueError):
    """Bad input. The message is one line: which field, file or row, what is wrong, what to do."""


@contextmanager
def report_errors() -> Iterator[None]:
    """Run a command: show what `pipeline` logs on stderr, and report the error that stops it there in one line.

    A `UserError` or an operating-system error ends the process with exit code 2, an interruption by the user with 130.
    If the reader of the output has gone (`| head`), the command ends silently. What the terminal's encoding lacks is
    printed as an escape.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    logging.basicConfig(format="%(message)s")
    logging.getLogger("pipeline").setLevel(logging.INFO)
    try:
        yield
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from error
    except BrokenPipeError as error:
        # Python flushes the rest of the output at exit, and would report the error again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(2) from error
    except OSError as error:
        place = f"{error.filename}: " if error.filename else ""
        print(f"error: {place}{error.strerror or error}", file=sys.stderr)
        raise SystemExit(2) from error
    except KeyboardInterrupt as error:
        print("interrupted", file=sys.stderr)
        raise SystemExit(130) from error
