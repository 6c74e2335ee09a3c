"""What `import emr_hf` costs, and that transformers and PEFT know of it whichever is imported first."""

from __future__ import annotations

import subprocess
import sys

import pytest


def run(code):
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout.split()


def test_the_command_line_helps_without_torch_or_transformers():
    code = "import sys, emr_hf.cli; print([name for name in ('torch', 'transformers', 'peft') if name in sys.modules])"
    assert run(code) == ["[]"]


KNOWN = """
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.pipelines import PIPELINE_REGISTRY
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
print("emr_merged" in CONFIG_MAPPING, emr_hf.EMRConfig in AutoModelForCausalLM._model_mapping,
      "emr-text-classification" in PIPELINE_REGISTRY.supported_tasks, "EMR" in PEFT_TYPE_TO_TUNER_MAPPING)
"""


@pytest.mark.parametrize(
    "first",
    [
        "import emr_hf",
        "import peft, transformers.pipelines, emr_hf",
        "import emr_hf.modeling",
        "import emr_hf.pipelines",
        "from emr_hf import *; import emr_hf",
    ],
)
def test_any_order_of_imports(first):
    assert run(f"{first}\n{KNOWN}") == ["True"] * 4


def test_public_names():
    code = """
import emr_hf
for name in emr_hf.__all__:
    assert getattr(emr_hf, name).__name__ == name, name
assert emr_hf.EMRMergedModelForCausalLM in emr_hf.EMRMergedModel.__subclasses__()
try:
    emr_hf.absent
except AttributeError as error:
    print("absent" in str(error), "merge" in dir(emr_hf))
"""
    assert run(code) == ["True", "True"]


MODULES = ("recipe", "repo", "sources", "configuration", "heads", "mixed", "merging", "adapters.export")
EACH = f"""
import importlib, os, torch, transformers
for name in {MODULES}:
    child = os.fork()
    if child == 0:
        importlib.import_module(f"emr_hf.{{name}}")
        os._exit(0)
    print(name, os.waitpid(child, 0)[1])
"""


def test_any_module_can_be_the_first():
    assert run(EACH) == [word for name in MODULES for word in (name, "0")]
