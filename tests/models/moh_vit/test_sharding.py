"""The model cut into parts over two processes (FSDP2) gives the loss and the gradients of the whole one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import copy
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from mixhead.models.moh_vit import MoHTransNeXtConfig, MoHTransNeXtForImageClassification

torch.set_num_threads(1)
torch.manual_seed(0)
dist.init_process_group("gloo")
config = MoHTransNeXtConfig(
    image_size=32, hidden_sizes=(8, 16), num_heads=(2, 4), depths=(2, 2), mlp_ratios=(2, 2), pool_ratios=(2, 1),
    shared_heads=(1, 1), top_k=(1, 2),
)
whole = MoHTransNeXtForImageClassification(config).train()
parts = copy.deepcopy(whole)
mesh = init_device_mesh("cpu", (2,))
for stage in parts.vit.stages:
    for block in stage.blocks:
        fully_shard(block, mesh=mesh)
fully_shard(parts, mesh=mesh)
images, labels = torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 0, 1])
for model in (whole, parts):
    model(images, labels=labels).loss.backward()
for one, other in zip(whole.parameters(), parts.parameters(), strict=True):
    torch.testing.assert_close(one.grad, other.grad.full_tensor())
dist.destroy_process_group()
"""


@pytest.mark.slow
@pytest.mark.distributed
def test_a_sharded_model_has_the_gradients_of_the_whole(tmp_path: Path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr
