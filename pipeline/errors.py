"""What a user did wrong, told in one line."""

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager


class UserError(ValueError):
    """Bad input. The message is one line: which field, file or row, what is wrong, what to do."""


@contextmanager
def report_errors() -> Iterator[None]:
    """The frame of every command: what `pipeline` logs is shown on stderr, and what stops it is one line there.

    A `UserError` or an operating-system error ends with exit code 2, an interruption by the user with 130. Where
    nobody reads the output any more (`| head`), the command ends in silence.
    """
    logging.basicConfig(format="%(message)s")
    logging.getLogger("pipeline").setLevel(logging.INFO)
    try:
        yield
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from error
    except BrokenPipeError as error:
        # Python flushes what is left to be written as it ends, and would complain once more.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(2) from error
    except OSError as error:
        place = f"{error.filename}: " if error.filename else ""
        print(f"error: {place}{error.strerror or error}", file=sys.stderr)
        raise SystemExit(2) from error
    except KeyboardInterrupt as error:
        print("interrupted", file=sys.stderr)
        raise SystemExit(130) from error
