import sys
from pathlib import Path

import pytest

# pytest imports each test file on its own; `from line_task import LINE` needs the folder.
sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(autouse=True)
def one_line(monkeypatch):
    """The task of fitting a line is among those that recipes may name."""
    from line_task import LINE

    from mixhead.tasks.registry import TASKS

    monkeypatch.setitem(TASKS, "line", LINE)
