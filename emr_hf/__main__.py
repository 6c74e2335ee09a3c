"""`python -m emr_hf` is the command `emr-hf`, so that launchers can start it."""

import sys

from .cli import main
from .distributed import end_with_launcher

if __name__ == "__main__":
    end_with_launcher()
    sys.exit(main())
