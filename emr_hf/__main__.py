"""`python -m emr_hf` is the command `emr-hf`, so that launchers can start it."""

import sys

from .cli import main
from .distributed import end_at_once, end_with_launcher, launched_size


def run() -> int:
    """The command's exit status; one of several processes does not return from it."""
    end_with_launcher()
    if launched_size() == 1:
        return main()
    try:
        status = main()
    except SystemExit as error:  # a signal
        status = error.code if isinstance(error.code, int) else 1
    end_at_once(status)


if __name__ == "__main__":
    sys.exit(run())
