import sys
from pathlib import Path

import pytest
from torch.nn.attention import flex_attention

# pytest imports each test file on its own; `from engines import engines` needs the folder.
sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(autouse=True)
def flex_without_the_compiler(monkeypatch):
    """FlexAttention on the CPU compiles its own reference for every shape, half a second each; here it runs as is."""
    monkeypatch.setattr(flex_attention, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
