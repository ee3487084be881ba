"""The golden cases are whole: what index.json lists is there, and can be read."""

import json
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent / "golden"
NAMES = sorted(json.loads((FOLDER / "index.json").read_text(encoding="utf-8")))


def test_index_and_files_agree():
    assert [f.stem for f in sorted(FOLDER.glob("*.safetensors"))] == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_case_loads(golden, name):
    case = golden(name)
    assert case.config
    assert case.state_dict
    assert not any(t.isnan().any() for t in case.tensors.values())  # -inf is allowed: a mask holds it
    # Each gradient belongs to a weight or an input of the same shape.
    for owner, gradient in case.gradients.items():
        value = case.state_dict[owner] if owner in case.state_dict else case[owner]
        assert gradient.shape == value.shape


def test_unknown_case_names_the_known_ones(golden):
    with pytest.raises(KeyError, match="moh_vit_model"):
        golden("moh_vti_model")
