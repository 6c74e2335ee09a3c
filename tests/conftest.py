"""Fixtures that several test files share."""

from __future__ import annotations

import os
from types import SimpleNamespace

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may depend on a hub
# Torch's threads sleep while they wait for each other: on a busy machine spinning takes a hundred times as long.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest
import torch
from hypothesis import HealthCheck, settings

import emr_hf
from emr_hf import cli
from emr_hf.quiet import quiet_bitsandbytes
from tests import tiny

# An example may take as long as it takes: the machine may be slow, or full of other work.
settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")

quiet_bitsandbytes()


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def bert_inputs(tmp_path_factory):
    """Folders of a tiny BERT base and three finetunes with 2, 3 and 2 labels."""
    return tiny.write_inputs(tiny.BERT, tmp_path_factory.mktemp("bert"), tasks=("glue/sst2", "mnli.v1", "items"))


@pytest.fixture(scope="session")
def bert_repo(bert_inputs, tmp_path_factory):
    """A merged repo of `bert_inputs`. Read only."""
    out = tmp_path_factory.mktemp("repo") / "merged"
    emr_hf.merge(bert_inputs.base, bert_inputs.finetunes, out)
    return out


@pytest.fixture
def run(capsys):
    """Run a command line: its status, stdout and stderr."""

    def run(*arguments):
        capsys.readouterr()
        status = cli.main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return SimpleNamespace(status=status, out=captured.out, err=captured.err)

    return run
