from __future__ import annotations

import subprocess
import sys

import pytest

MODULES = (
    "depths",
    "importance",
    "decoder",
    "sublayers",
    "quality",
    "plan",
    "checkpoint",
    "fingerprint",
    "layer_means",
    "metrics",
    "quantization",
    "repair",
    "surgery",
    "text",
)


@pytest.mark.parametrize("module", MODULES)
def test_a_module_loads_nothing_heavy(module: str) -> None:
    code = (
        f"import sys, pruning.{module}\n"
        "heavy = {'vllm', 'grpc', 'server', 'torch', 'transformers', 'datasets'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (result.stdout.strip(), result.returncode) == ("[]", 0), result.stderr


def test_measuring_needs_neither_the_server_nor_its_libraries() -> None:
    code = (
        "import sys, torch, pruning.quality\n"
        "from pruning.importance import BlockInfluenceEstimator\n"
        "BlockInfluenceEstimator(1).update(0, torch.ones(2, 2), torch.ones(2, 2))\n"
        "x = torch.ones(2, 2)\n"
        "pruning.quality.token_statistics(x, x, torch.tensor([0, 1]))\n"
        "print(sorted({'vllm', 'grpc', 'server'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (result.stdout.strip(), result.returncode) == ("[]", 0), result.stderr
