#!/bin/bash
# Installs a wheel in a fresh environment and runs its kernels with no compiler in reach. test_wheel.sh PYTHON WHEEL
set -eu -o pipefail
python=$1
wheel=$(realpath "$2")
constraints=$(realpath "$(dirname "$0")/../constraints-cpu.txt")
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"$python" -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install -qq --disable-pip-version-check -c "$constraints" "$wheel"
cd "$folder"
env -i HOME="$folder" PATH="$folder/venv/bin" CXX=no-compiler "$folder/venv/bin/python" - <<'END'
import torch
from mixhead.ops import cpu, head_attention
from mixhead.ops.cpu.compiling import LIBRARIES
from mixhead.routing import Routing

for name in LIBRARIES:
    built, reason = cpu.available(name)
    assert built, reason
torch.manual_seed(0)
for queries in (1, 70, 197):
    q, k, v = (torch.randn(2, 4, tokens, 64, requires_grad=True) for tokens in (queries, 197, 197))
    selected = torch.rand(2, queries, 4) < 0.6
    routing = Routing(torch.rand(2, queries, 4) * selected, selected)
    results = []
    for impl in ("cpu", "reference"):
        out = head_attention(q, k, v, routing, causal=queries > 1, impl=impl)
        results.append((out, *torch.autograd.grad(out.square().sum(), (q, k, v))))
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
q = torch.ops.mixhead.attend_cpu_inference
try:
    q(*(torch.randn(2, 2, 3) for _ in range(4)), torch.ones(2, 2, 3, dtype=torch.bool), None, False, 1.0)
except RuntimeError as mistake:
    assert "4 dimensions" in str(mistake), mistake
print(f"The wheel's kernels for {cpu.best_level()} run without a compiler, and a mistake is told.")
END
