"""The GPU's rebuild gives the bits of the torch code: under Triton's interpreter, and on a GPU where there is one."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest
import torch

from emr_hf import bits

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]

COMPARE = """
import sys, torch
from emr_hf import bits, triton_kernels

device = sys.argv[1]
for base_dtype, tau_dtype, out_dtype in ([getattr(torch, name) for name in case.split(",")] for case in sys.argv[2:]):
    for size in (1, 8, 1023, 1024, 5003):
        base = torch.randn(size).to(base_dtype)
        base[::5] = -0.0
        tau = (torch.randn(size) * 0.01).to(tau_dtype)
        packed = bits.pack(torch.rand(size) > 0.4)
        minus_rescaler = torch.tensor(-1.3)
        expected = torch.empty(size, dtype=out_dtype)
        bits._rebuild_with_torch(base, tau, packed, minus_rescaler, expected)
        out = torch.full((size,), 7.0, dtype=out_dtype, device=device)
        triton_kernels.rebuild(*(t.to(device) for t in (base, tau, packed, minus_rescaler)), out)
        case = base_dtype, tau_dtype, out_dtype, size
        assert torch.equal(out.cpu().view(torch.uint8), expected.view(torch.uint8)), case
print("same")
"""


def compare(device, **environment):
    cases = [
        ",".join(str(d).removeprefix("torch.") for d in (b, t, o)) for b in DTYPES for t in DTYPES for o in DTYPES
    ]
    command = [sys.executable, "-c", COMPARE, device, *cases]
    result = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment})
    assert result.stdout.strip() == "same", result.stderr


def test_under_the_interpreter():
    compare("cpu", TRITON_INTERPRET="1")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_on_a_gpu():
    compare("cuda")
    base, tau = torch.randn(2, 5003, device="cuda")
    packed = bits.pack(torch.rand(5003) > 0.4)
    out = bits.rebuild(base, tau, packed, torch.tensor(1.3))
    expected = bits.rebuild(base.cpu(), tau.cpu(), packed, torch.tensor(1.3))
    assert torch.equal(out.cpu(), expected)
