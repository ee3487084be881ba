"""What `MoHConfig` takes where nothing is said."""

import ast
from pathlib import Path

import pytest

import mixhead
from mixhead.routing import ROUTERS

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(("router", "weight"), [("linear", 0.0), ("query_norm", 0.01), ("two_stage", 0.01)])
def test_the_balance_loss_has_the_weight_of_the_tables(router, weight):
    assert router in ROUTERS
    assert mixhead.MoHConfig(router=router).balance_coefficient == weight
    assert mixhead.MoHConfig(router=router, balance_coefficient=0.3).balance_coefficient == 0.3
    assert mixhead.MoHConfig(router=router, balance_coefficient=0.0).balance_coefficient == 0.0


@pytest.mark.parametrize(
    "file", ["src/mixhead/tasks/language_modelling/demo.py", "benchmarks/language_model.py", "benchmarks/dinov2.py"]
)
def test_demonstration_and_benchmarks_measure_the_default(file):
    calls = [node for node in ast.walk(ast.parse((ROOT / file).read_text("utf-8"))) if isinstance(node, ast.Call)]
    configs = [call for call in calls if ast.unparse(call.func).endswith(("MoHConfig", "TuneConfig"))]
    assert configs
    assert not [call for call in configs if any(keyword.arg == "balance_coefficient" for keyword in call.keywords)]
