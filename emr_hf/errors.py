"""Every error that this package raises on bad input, in one hierarchy.

Each names the offender, what was expected and what came. Those that a caller of transformers or PEFT may meet are also
of the built-in class that such a caller catches there: `OSError` for what cannot be read or written, `ValueError` for
what does not fit, `KeyError` for a name that is not there.
"""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any


class EMRError(Exception):
    """Base class of this package's errors."""

    def __reduce__(self) -> tuple[Any, ...]:
        # Pickled by their state: some are made of other arguments than they keep.
        return _restored, (type(self), self.args, vars(self))


def _restored(kind: type[EMRError], args: tuple[object, ...], state: dict[str, object]) -> EMRError:
    error = kind.__new__(kind, *args)
    vars(error).update(state)
    return error


class OptionError(EMRError, ValueError):
    """An argument or a recipe's field has a value that cannot be used."""


class RecipeError(OptionError):
    """A recipe file cannot be read or its fields are wrong."""


class CheckpointError(EMRError, OSError):
    """An input checkpoint cannot be read: missing shard, truncated file, quantised weights, no weights at all."""


class MismatchError(EMRError, ValueError):
    """A finetune does not belong to the base: another architecture, vocabulary size, tying or set of tensors."""


class TensorError(EMRError, ValueError):
    """A tensor is not of the length, dtype or place that is about to be read or written."""


class NonFiniteError(EMRError, ValueError):
    """A NaN or Inf in a tensor.

    Attributes:
        source (`int`): -1 for the base, else the task's position.
        index (`int`): position in the flat tensor.
        value (`float`): what was found there.
    """

    def __init__(self, source: int, index: int, value: float, message: str | None = None):
        super().__init__(message or f"element {index} of input {source} is {value}: expected a finite number")
        self.source, self.index, self.value = source, index, value

    def located(self, tensor: str, shape: Sequence[int], owner: str) -> NonFiniteError:
        """The same error with the tensor, the position in it and the checkpoint named."""
        position, rest = [], self.index
        for size in reversed(shape):
            position.append(rest % size)
            rest //= size
        where = f"{tensor}[{', '.join(map(str, reversed(position)))}]" if shape else tensor
        message = f"{owner}: {where} is {self.value}: expected a finite number"
        return NonFiniteError(self.source, self.index, self.value, message)


@contextmanager
def naming(tensor: str, shape: Sequence[int], inputs: Sequence[str]) -> Iterator[None]:
    """Let an error in the arithmetic of a merge, such as a number, an overflow or a length, say where it is.

    Args:
        tensor, shape: what is merged.
        inputs: of which checkpoints, the base first.
    """
    try:
        yield
    except NonFiniteError as error:
        raise error.located(tensor, shape, inputs[error.source + 1]) from None
    except (OptionError, TensorError) as error:
        raise type(error)(f"{tensor}: {error}") from None


class RepoError(EMRError, OSError):
    """A merged repo cannot be read or written: it exists already, has another format version, or the disk is full."""


class OffloadedError(EMRError):
    """A task switch was asked of a model of which a part is offloaded; its weights cannot be rewritten in place."""


class ProcessError(EMRError):
    """One of the processes that a merge is shared out among has ended or failed, or they do not fit together."""


class SymmetryError(EMRError):
    """A model's symmetries cannot be found, or what was said to be one is none."""


class ActivationError(EMRError):
    """Activations cannot be compared: one is not a finite number, or there are none."""


class UnknownTaskError(EMRError, KeyError):
    """A task that the model does not hold."""

    def __init__(self, task: object, tasks: Iterable[str]):
        self.task, self.tasks = task, list(tasks)
        super().__init__(task)

    def __str__(self) -> str:
        known = ", ".join(self.tasks)
        return f"unknown task {short(self.task)}.{nearest(self.task, self.tasks)} This model holds: {known}"


def one_line(error: object, longest: int = 300) -> str:
    """Another library's message, made fit to stand inside one of ours."""
    text = _cut(" ".join(str(error).split()), longest)
    return text if text.isprintable() else "".join(c if c.isprintable() else "\ufffd" for c in text)


def _cut(text: str, longest: int) -> str:
    return text if len(text) <= longest else f"{text[:longest]} ..."


class _Short(reprlib.Repr):
    """Few items of few levels, so that no value costs more than a line, whatever it holds."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel = 3
        self.maxstring = self.maxother = 120

    def repr_bytes(self, value: bytes, level: int) -> str:
        return self.repr_str(value[: self.maxstring], level)  # type: ignore[arg-type]

    def repr_int(self, value: int, level: int) -> str:
        # Of a longer one `repr` is slow, or an error.
        return repr(value) if value.bit_length() < 400 else f"a whole number of {value.bit_length():,} bits"

    def repr_instance(self, value: object, level: int) -> str:
        try:
            return one_line(repr(value), self.maxother)
        except Exception:  # a broken `__repr__` must not hide what the message is about
            return f"<{type(value).__name__}>"


def short(value: object) -> str:
    """`repr` of a value that came from outside, on one line and of bounded length."""
    return _cut(_Short().repr(value), 300)


def nearest(name: object, names: Iterable[str]) -> str:
    """` Did you mean ...?`, or nothing where no name is near."""
    by_lower = {str(known).lower(): str(known) for known in names}
    # Of a value of another kind, or of a long one, the comparison would take its time for nothing.
    asked = name.lower() if isinstance(name, str) and len(name) <= 200 else ""
    near = [by_lower[match] for match in difflib.get_close_matches(asked, by_lower, n=3)]
    return f" Did you mean {' or '.join(map(repr, near))}?" if near else ""


def check_choice(name: str, value: object, choices: Collection[str]) -> None:
    """Raise OptionError unless the value of an option is one of those that there are."""
    if not isinstance(value, str) or value not in choices:
        raise OptionError(f"{name}={short(value)} is unknown: expected one of {', '.join(choices)}")
