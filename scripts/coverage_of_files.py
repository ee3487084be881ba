"""Which files of the package tests run less than 85% of: `coverage_of_files.py coverage.json`, as pytest-cov writes it.

Files whose lines run where nothing counts them are named here, with the reason.
"""

import json
import sys
from pathlib import Path

LEAST = 85.0
ELSEWHERE = {
    "__main__.py": "run as a program, by tests that start one",
    "ops/triton/kernels.py": "compiled for a GPU, or run by Triton's interpreter: `make test-triton`",
    "ops/triton/operators.py": "`make test-triton`",
    "ops/attention/triton.py": "`make test-triton`",
}


def main() -> None:
    files = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))["files"]
    shares = {path.partition("mixhead/")[2]: found["summary"]["percent_covered"] for path, found in files.items()}
    low = {path: share for path, share in sorted(shares.items(), key=lambda of: of[1]) if share < LEAST}
    for path, share in low.items():
        print(f"{share:5.1f}%  {path}  {ELSEWHERE.get(path, '')}")
    sys.exit(1 if low.keys() - ELSEWHERE.keys() else 0)


if __name__ == "__main__":
    main()
