"""One loss over several processes is the loss of one process, gradients included."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from distributed_checks import MODULES
from ranks import checks, results

import affkd_kernels as affkd

pytestmark = pytest.mark.skipif(
    not dist.is_available() or not dist.is_gloo_available(), reason="torch has no gloo"
)


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("check", checks(MODULES))
def test_on_ranks(check: str, size: int) -> None:
    result = results(MODULES, size)
    assert "crash" not in result, result["crash"]
    assert check in result, "not reached: a check before it left the ranks out of step"
    assert not result[check], "\n".join(f"rank {r}:\n{e}" for r, e in result[check].items())


@pytest.mark.parametrize("group", [object(), "gloo", 0])
def test_what_is_no_group_is_refused(group: object) -> None:
    x = torch.ones(3, 2)
    for loss in (affkd.affinity_loss, affkd.rkd_angle_loss, affkd.reference.affinity_loss):
        with pytest.raises(TypeError, match="process_group must be a torch.distributed"):
            loss(x, x, process_group=group)


def test_importing_the_package_leaves_it_aside() -> None:
    import subprocess
    import sys

    code = "import sys, affkd_kernels; print('affkd_kernels.distributed' in sys.modules)"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert told.stdout.strip() == "False"
