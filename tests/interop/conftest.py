import sys
from pathlib import Path

# pytest imports each test file on its own; `from small_llama import …` needs the folder.
sys.path.insert(0, str(Path(__file__).parent))
