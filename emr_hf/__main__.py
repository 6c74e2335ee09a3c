"""`python -m emr_hf` is the command `emr-hf`, so that launchers can start it."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
