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

REFUSE = """
import sys, torch
from emr_hf import triton_kernels
from emr_hf.errors import TensorError

device, size = sys.argv[1], 320
names = ("base", "tau", "packed", "minus_rescaler", "out")
given = dict(zip(names, (torch.zeros(size), torch.zeros(size), torch.zeros(40, dtype=torch.uint8),
                         torch.tensor(-1.0), torch.zeros(size))))
given = {name: tensor.to(device) for name, tensor in given.items()}
triton_kernels.rebuild(**given)
for name, tensor in given.items():
    flat = tensor.reshape(-1)
    bad = [flat[:-1], torch.cat([flat, flat]), tensor.to(torch.int32), tensor.to("meta")]
    if flat.numel() > 1:
        bad += [flat[:1], flat[:1].expand(flat.numel()), torch.stack([flat, flat], 1)[:, 0]]
    for index, one in enumerate(bad):
        try:
            triton_kernels.rebuild(**{**given, name: one})
        except TensorError as error:
            assert "expected" in str(error), error
        else:
            raise AssertionError((name, index))
print("same")
"""


def run(script, device, *arguments, **environment):
    command = [sys.executable, "-c", script, device, *arguments]
    result = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment})
    assert result.stdout.strip() == "same", result.stderr


def compare(device, **environment):
    cases = [
        ",".join(str(d).removeprefix("torch.") for d in (b, t, o)) for b in DTYPES for t in DTYPES for o in DTYPES
    ]
    run(COMPARE, device, *cases, **environment)


def test_under_the_interpreter():
    compare("cpu", TRITON_INTERPRET="1")


def test_the_kernel_is_given_no_tensor_of_another_length():
    run(REFUSE, "cpu", TRITON_INTERPRET="1")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_on_a_gpu():
    compare("cuda")
    run(REFUSE, "cuda")
    base, tau = torch.randn(2, 5003, device="cuda")
    packed = bits.pack(torch.rand(5003) > 0.4)
    out = bits.rebuild(base, tau, packed, torch.tensor(1.3))
    expected = bits.rebuild(base.cpu(), tau.cpu(), packed, torch.tensor(1.3))
    assert torch.equal(out.cpu(), expected)
    with_gaps = torch.stack([base, tau], 1)[:, 0], base[:1].expand(5003)
    for given in with_gaps:
        out = bits.rebuild(given, tau, packed, torch.tensor(1.3))
        assert torch.equal(out.cpu(), bits.rebuild(given.cpu(), tau.cpu(), packed, torch.tensor(1.3)))
