"""The switch between tasks: the places in a model that follow the task, and the bank they are rebuilt from."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel

from . import bits
from .bank import EMRBank
from .configuration import EMRConfig
from .errors import CheckpointError, RepoError
from .lowbit import Codes
from .mapped_files import InputFile, WatchedMemory, guarded_reads
from .ready import ReadyTasks, Weights
from .recipe import BASE
from .sites import Site, install, site_of
from .threads import run_all

# Below so many elements in all a second thread costs more than it saves; and what one of them does at a time.
_SHARED_OUT, _PIECE = 1 << 22, 1 << 20


class Switch:
    """Where in a model the tensors of a merge are, and how they become a task's.

    Args:
        model: the model that becomes the tasks.
        config: the merge's.

    Attributes:
        sites: merged parameter -> its owner: PEFT may rename the path to a module, not the module.
        private_sites: name of a private tensor -> its owners, several if it is tied: it may change its shape, and so
            its Parameter.
        bank: the merge's tensors, empty at first; who owns the switch registers it as a module.
        mapped: leave the base where the model's loader put it, which may be a mapped file, and give the model weights
            of its own; else the base is copied.
        ready: the tasks whose weights are kept, if any are beside the active one's.
        files: what base, vector and masks are mapped from, if they are.
    """

    ready: ReadyTasks | None = None
    files: Sequence[WatchedMemory] = ()

    def __init__(self, model: PreTrainedModel, config: EMRConfig, mapped: bool = False):
        self.model, self.config = model, config
        self.sites: dict[str, Site] = {name: self.site_of(name) for name in config.merged_parameters or []}
        names = sorted({name for entry in config.tasks.values() for name in entry["private"]})
        aliases = model.all_tied_weights_keys
        same = {name: [name, *(alias for alias in aliases if aliases[alias] == name)] for name in names}
        self.private_sites = {name: [self.site_of(n) for n in owners] for name, owners in same.items()}
        self.private_names = [n for owners in same.values() for n in owners]
        shapes = {name: self.shape_of(name) for name in self.sites}
        private = {entry["key"]: _private_spec(entry["private"]) for entry in config.tasks.values()}
        self.bank = EMRBank(shapes, config.tau_dtype, private)
        self.mapped = mapped
        self._elements = sum(shape.numel() for shape in shapes.values())
        self._at_base: set[str] = set()  # parameters that hold the base's values
        self._unmapped: set[str] = set()  # parameters that have memory of their own where the base is mapped
        self._empty: dict[tuple[str, str], bool] = {}  # (parameter, task's key) -> whether the mask is empty

    # Mapped files

    def open_files(self, paths: Iterable[str]) -> None:
        """Take note of the files that the model is about to be mapped from."""
        label = str(self.config.name_or_path)
        with self._as_repo():
            self.files = [InputFile(Path(path), label) for path in paths]

    def watch(self) -> None:
        """Guard the tensors where they are now."""
        memory = WatchedMemory(str(self.config.name_or_path))
        for tensor in (*self.model.parameters(), *self.model.buffers(), *self.bank.buffers()):
            memory.watch(tensor)
        self.files = [*(file for file in self.files if isinstance(file, InputFile)), memory]

    def check_files(self) -> None:
        """Raise RepoError if what the model is mapped from has been changed."""
        with self._as_repo():
            for file in self.files:
                file.check()

    @contextmanager
    def _as_repo(self) -> Iterator[None]:
        try:
            yield
        except CheckpointError as error:
            raise RepoError(str(error)) from None

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Read what may be mapped.

        Raises:
            RepoError: a file was changed, and what has been read is of no use.
        """
        if not self.files:
            yield
            return
        with guarded_reads([]):
            try:
                yield
                self.check_files()
            except Exception:
                self._at_base.clear()
                self.take_masks()
                self.check_files()
                raise

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "files": ()}  # a copy has its tensors in memory

    def site_of(self, name: str) -> Site:
        """Where a tensor is."""
        return site_of(self.model, name)

    def shape_of(self, name: str) -> torch.Size:
        """Shape of a merged parameter."""
        module, attr = self.sites[name]
        return getattr(module, attr).shape

    def offloaded(self, task: str | None = None) -> list[str]:
        """Names of the tensors that are away, so that no switch to a task can rewrite them or read them."""
        away = [name for name, (module, attr) in self.sites.items() if getattr(module, attr).is_meta]
        needed = self.bank.needed(None if task is None else self.config.entry(task)["key"])
        return away + [name for name, buffer in needed if buffer.is_meta]

    @torch.inference_mode(False)  # a Parameter made in inference mode could never be switched or trained again
    @torch.no_grad()
    def become(self, task: str) -> None:
        """Rebuild a task's weights in place, and install its private tensors, labels and generation settings."""
        entry = self.config.entry(task)
        if self.ready is None:
            self._run(job for name in self.sites for job in self.rebuild(name, entry["key"]))
        else:
            self._use(entry["key"])
        for name, owners in self.private_sites.items():
            install(owners, self.bank.private_of(entry["key"], name))
        self.config.apply_task(task)
        self.follow_labels(self.config.num_labels)
        self.use_generation_config(task)

    def use_generation_config(self, task: str) -> None:
        """Tasks have generation settings of their own only where these differ."""
        settings = self.config.entry(task).get("generation_config")
        if settings is not None:
            found = GenerationConfig.from_dict(settings)
            # As it was published, which transformers lets be saved again; of what is changed here it is stricter.
            found._original_object_hash = hash(found)
            self.model.generation_config = found

    def rebuild(self, name: str, key: str) -> list[Callable[[], object]]:
        """What has to be done to one parameter for a task. What the model holds before the first time is the base."""
        module, attr = self.sites[name]
        parameter = getattr(module, attr)
        self._keep_base(name, parameter)
        if not self._is_empty(name, key):
            self._at_base.discard(name)
            return self._jobs(name, key, parameter)
        if name in self._at_base:
            return []
        self._at_base.add(name)
        return [partial(parameter.detach().copy_, self.bank.base.get(name))]

    def _keep_base(self, name: str, parameter: Tensor) -> None:
        base, values = self.bank.base, parameter.detach()
        if not base.has(name):
            parameter.requires_grad_(False)  # these weights are rebuilt, training them would be lost
            base.put(name, values.to(self.bank.place or values.device, copy=not self.mapped), persistent=False)
            if not self.mapped:
                self._at_base.add(name)
        if self.mapped and name not in self._unmapped:  # by itself, as an interruption may come in between
            parameter.data = torch.empty_like(values)
            self._unmapped.add(name)

    def _is_empty(self, name: str, key: str) -> bool:
        """Whether a task does not change a parameter at all, as where no finetune moved it."""
        if (name, key) not in self._empty:
            self._empty[name, key] = bits.is_empty(self.bank.mask_of(key, name))
        return self._empty[name, key]

    def _jobs(self, name: str, key: str, out: Tensor) -> list[Callable[[], object]]:
        """The rebuild of one parameter into `out`, in pieces that threads can share out."""
        bank = self.bank
        base, tau, packed, rescaler = (
            bank.base.get(name),
            bank.vector(name),
            bank.mask_of(key, name),
            bank.rescaler.get(key),
        )
        if self._threads() == 1 or out.device.type != "cpu" or not out.is_contiguous() or out.numel() < 2 * _PIECE:
            return [partial(bits.rebuild, base, tau, packed, rescaler, out)]
        flat_base, flat_out = base.detach().reshape(-1), out.detach().reshape(-1)
        flat_tau = tau if isinstance(tau, Codes) else tau.detach().reshape(-1)
        jobs: list[Callable[[], object]] = []
        for start in range(0, out.numel(), _PIECE):
            piece = slice(start, min(start + _PIECE, out.numel()))
            jobs.append(partial(bits.rebuild_part, flat_base, flat_tau, packed, rescaler, flat_out, piece))
        return jobs

    def _threads(self) -> int:
        return torch.get_num_threads() if self._elements >= _SHARED_OUT else 1

    def _run(self, jobs: Iterable[Callable[[], object]]) -> None:
        try:
            for _ in run_all(jobs, self._threads()):
                pass
        except BaseException:
            self._at_base.clear()  # of some it was said before it was done
            raise

    # Several tasks' weights at a time

    def keep_ready(self, count: int, active: str | None) -> None:
        """Hold the weights of so many tasks, the active one's among them."""
        self.forget()
        if count > 1:
            self.ready = ReadyTasks(self._make, count)
            if active is not None:
                self.ready.put(self.config.entry(active)["key"], self._live())

    def forget(self) -> None:
        """Hold only the active task's weights, where the model has them now."""
        if self.ready is not None:
            self.ready.clear()
            self.ready = None

    @torch.inference_mode(False)
    @torch.no_grad()
    def _make(self, key: str, weights: Weights | None) -> Weights:
        """A task's weights, or the base's, in given tensors or in new ones."""
        if weights is None:
            weights = {name: torch.empty_like(value) for name, value in self._live().items()}
        with self.reading():
            if key == BASE:
                for name, out in weights.items():
                    out.copy_(self.bank.base.get(name))
            else:
                self._run(job for name, out in weights.items() for job in self._jobs(name, key, out))
        return weights

    def _live(self) -> Weights:
        return {name: getattr(module, attr).data for name, (module, attr) in self.sites.items()}

    def _use(self, key: str) -> None:
        """Give the model weights that are ready."""
        assert self.ready is not None
        weights = self.ready.get(key)
        for name, (module, attr) in self.sites.items():
            getattr(module, attr).data = weights[name]
        self._at_base.clear()

    def follow_labels(self, count: int | None) -> None:
        """Modules that keep the number of labels themselves."""
        for module in self.model.modules():
            if "num_labels" in vars(module):
                vars(module)["num_labels"] = count

    @torch.no_grad()
    def restore_base(self) -> None:
        """Give the merged parameters the base's values back."""
        if self.ready is not None:
            self.ready.clear()
        for name, (module, attr) in self.sites.items():
            if self.bank.base.has(name) and hasattr(module, attr):  # PEFT may have deleted a vector
                getattr(module, attr).copy_(self.bank.base.get(name))
                self._at_base.add(name)

    @torch.no_grad()
    def take_base(self) -> None:
        """What the merged parameters hold now is the base."""
        for name, (module, attr) in self.sites.items():
            self.bank.base.get(name).copy_(getattr(module, attr).detach())
            self._at_base.add(name)
        self.take_masks()

    def take_masks(self) -> None:
        """The masks may be others than before."""
        self._empty.clear()

    @torch.inference_mode(False)
    @torch.no_grad()
    def become_base(self) -> None:
        """The base's merged weights; private tensors, labels and generation settings are the default task's."""
        if self.ready is None:
            self.restore_base()
        else:
            self._use(BASE)
        entry = self.config.entry(self.config.default_task)
        for name, owners in self.private_sites.items():
            install(owners, self.bank.private_of(entry["key"], name))
        self.config.apply_task(self.config.default_task)
        self.follow_labels(self.config.num_labels)
        self.use_generation_config(self.config.default_task)


def _private_spec(private: dict[str, Any]) -> dict[str, tuple[torch.Size, torch.dtype]]:
    return {name: (torch.Size(shape), getattr(torch, dtype)) for name, (shape, dtype) in private.items()}


def owners_of(switch: Switch, model: nn.Module) -> dict[str, str]:
    """Name in `model` of every place of a merged parameter, tied ones too -> the parameter's name in the merge."""
    merged = {id(getattr(module, attr)): name for name, (module, attr) in switch.sites.items()}
    named = model.named_parameters(remove_duplicate=False)
    return {name: merged[id(parameter)] for name, parameter in named if id(parameter) in merged}
