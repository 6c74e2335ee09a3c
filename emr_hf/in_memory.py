"""The merge of plain state dicts, for those who have no repo in mind."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from . import bits, election
from .election import Partial, Sums, TensorElection, TensorSums, shared_names, torch_threads
from .errors import OptionError, UnknownTaskError, naming
from .fitting import TensorFit, check_method
from .threads import run_all


@dataclass
class Merge:
    """A merge of plain state dicts.

    Attributes:
        tau: unified task vector, name -> float32 tensor of the parameter's shape.
        masks: task -> name -> bool tensor of the parameter's shape.
        rescalers: task -> lambda.
        private: task -> names of its tensors that were not merged (missing elsewhere, another shape, not floating).
        sums: task -> float64 sums over all merged elements.
        base: what the vector is added to, where that is not the base itself: with two levels, the nearer one.
    """

    tau: dict[str, Tensor] = field(default_factory=dict)
    masks: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    rescalers: dict[str, float] = field(default_factory=dict)
    private: dict[str, list[str]] = field(default_factory=dict)
    sums: dict[str, Sums] = field(default_factory=dict)
    base: dict[str, Tensor] = field(default_factory=dict)

    def rebuild(self, base: Mapping[str, Tensor], task: str) -> dict[str, Tensor]:
        """A task's merged tensors, by name, in the base's dtype: see `emr_hf.bits.rebuild`.

        Raises:
            UnknownTaskError: with the nearest names.
        """
        if task not in self.rescalers:
            raise UnknownTaskError(task, self.rescalers)
        rescaler = torch.tensor(self.rescalers[task], dtype=torch.float32)
        return {
            name: bits.rebuild(self.base.get(name, base[name]), tau, bits.pack(self.masks[task][name]), rescaler)
            for name, tau in self.tau.items()
        }


def merge_state_dicts(
    base: Mapping[str, Tensor],
    finetunes: Mapping[str, Mapping[str, Tensor]],
    rescale: str | None = None,
    method: str = "emr",
) -> Merge:
    """EMR-Merging of state dicts, in memory (paper, algorithm 1).

    Args:
        base: name -> tensor.
        finetunes: task -> name -> tensor.
        rescale, method (*optional*): as for [`merge`].

    Returns:
        a [`Merge`]. A floating-point tensor that the base and every finetune have in one shape is merged; any other
        is listed in `private`.

    Raises:
        OptionError: no finetunes, an unknown `rescale` or `method`, or nothing that all share.
        NonFiniteError: a NaN or Inf in a merged tensor.
    """
    if not finetunes:
        raise OptionError("nothing to merge: expected at least one finetune, got none")
    rescale = check_method(method, rescale)
    names = shared_names(base, finetunes)
    if not names:
        raise OptionError("nothing to merge: the base and the finetunes have no floating-point tensor in common")
    result = Merge(masks={task: {} for task in finetunes})
    work = _Work(base, finetunes, result, torch.get_num_threads())
    with torch_threads(1):  # blocks are too small to share, and waiting for a busy core costs many times the work
        if method == "emr":
            sums = [work.elect(name) for name in names]
        else:
            rescalers = torch.ones(len(finetunes))
            if method == "fit":
                first = zip(*(work.elect(name, keep=False) for name in names))
                rescalers = torch.tensor([election.rescaler(parts, "least_squares") for parts in first])
            sums = [work.fit(name, method, rescalers) for name in names]
    for (task, state_dict), parts in zip(finetunes.items(), zip(*sums)):
        result.rescalers[task] = election.rescaler(parts, rescale)
        result.sums[task] = Sums.total(parts)
        result.private[task] = [name for name in state_dict if name not in result.tau]
    return result


@dataclass
class _Work:
    """What is merged, and the merge to fill in, one tensor after the other."""

    base: Mapping[str, Tensor]
    finetunes: Mapping[str, Mapping[str, Tensor]]
    result: Merge
    threads: int

    def elect(self, name: str, keep: bool = True) -> list[Sums]:
        """The election of one tensor; returns each task's sums."""
        tau, packed = self._outputs(name)
        tensor = TensorElection(self.base[name], [weights[name] for weights in self.finetunes.values()])

        def one(block: slice) -> Partial:
            where = slice(block.start // 8, bits.packed_size(block.stop))
            return tensor.run(block, tau.view(-1)[block], [mask[where] for mask in packed])

        sums = self._run(name, one, tensor.blocks())
        if keep:
            self._keep(name, tau, packed)
        return sums

    def fit(self, name: str, method: str, rescalers: Tensor) -> list[Sums]:
        """The fit of one tensor; returns each task's sums."""
        tau, packed = self._outputs(name)
        start = torch.empty_like(self.base[name], memory_format=torch.contiguous_format)  # only levels move it
        inputs = [weights[name] for weights in self.finetunes.values()]
        tensor = TensorFit(self.base[name], inputs, method, "float32", rescalers)

        def one(block: slice) -> Partial:
            fitted = tensor.run(block)
            start.view(-1)[block], tau.view(-1)[block] = fitted.base, fitted.tau
            for mask, part in zip(packed, fitted.masks):
                mask[block.start // 8 : bits.packed_size(block.stop)] = part
            return fitted.partial

        sums = self._run(name, one, tensor.blocks())
        self._keep(name, tau, packed)
        if method == "levels":
            self.result.base[name] = start
        return sums

    def _outputs(self, name: str) -> tuple[Tensor, list[Tensor]]:
        numel = self.base[name].numel()
        packed = [torch.zeros(bits.packed_size(numel), dtype=torch.uint8) for _ in self.finetunes]
        return torch.zeros(self.base[name].shape), packed

    def _run(self, name: str, one: Callable[[slice], Partial], blocks: list[slice]) -> list[Sums]:
        with naming(name, self.base[name].shape, ["base", *self.finetunes]):
            parts = list(run_all((partial(one, block) for block in blocks), self.threads))
        return TensorSums.total(parts).tasks

    def _keep(self, name: str, tau: Tensor, packed: list[Tensor]) -> None:
        self.result.tau[name] = tau
        for task, mask in zip(self.finetunes, packed):
            self.result.masks[task][name] = bits.unpack(mask, tau.shape)
