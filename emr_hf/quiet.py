"""Other libraries kept from talking in between what a command prints."""

from __future__ import annotations

import logging


def quiet_libraries() -> None:
    """Let transformers and bitsandbytes report errors only, and transformers show no progress bars."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    quiet_bitsandbytes()


def quiet_bitsandbytes() -> None:
    """Let bitsandbytes report errors only; to be called before PEFT or transformers' `Trainer` is imported.

    These import it wherever it is installed, and on a processor with AVX512-BF16 it then says that it has failed to
    load a kernel: an optional one, from the Hub.
    """
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
