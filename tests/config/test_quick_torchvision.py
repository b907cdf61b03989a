"""torchvision is imported without torch's compiler, which loads when it is used."""

from __future__ import annotations

import subprocess
import sys

CHECK = """
import sys
from influence_cli.config.quick_torchvision import import_torchvision
import_torchvision()
assert "torch._dynamo" not in sys.modules and "sympy" not in sys.modules
import torch
from torchvision.ops import RoIAlign
from torchvision.transforms import v2
image = torch.rand(1, 3, 8, 8)
assert v2.Resize((4, 4))(image).shape == (1, 3, 4, 4)
pooled = RoIAlign(2, 1.0, -1)(image, torch.tensor([[0.0, 0, 0, 4, 4]]))
assert pooled.shape == (1, 3, 2, 2)
import torch._dynamo.utils
assert torch._dynamo.utils.is_compile_supported.__module__ == "torch._dynamo.utils"
assert torch.compile(lambda x: x + 1, backend="eager")(torch.ones(2)).tolist() == [2, 2]
"""

ASKED = """
import sys
from influence_cli.config import quick_torchvision
quick_torchvision.importlib.import_module = lambda name: None
import torch, types
quick_torchvision.import_torchvision()
assert "torch._dynamo" not in sys.modules
"""

FORWARDS = """
import importlib, sys
import torch
from influence_cli.config.quick_torchvision import COMPILER, _StandIn
sys.modules[COMPILER[0]] = _StandIn(COMPILER[0])
import torch._dynamo
assert callable(sys.modules[COMPILER[0]].optimize)
assert not isinstance(sys.modules[COMPILER[0]], _StandIn)
"""


def run(script: str) -> None:
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_compiler_is_loaded_when_it_is_used() -> None:
    run(CHECK)


def test_stand_ins_are_removed_whatever_happens() -> None:
    run(ASKED)


def test_a_question_without_an_answer_loads_the_compiler() -> None:
    run(FORWARDS)
