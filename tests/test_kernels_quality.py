"""The kernels' quality without a GPU: machine code for five of them, and the bytes and products that programs make."""

import pytest
import torch

pytest.importorskip("triton")
if torch.cuda.is_available():
    pytest.skip("counts are taken in Triton's interpreter, on machines without a GPU", allow_module_level=True)

from concurrent.futures import ThreadPoolExecutor
from os import sched_getaffinity

from kernels import report


def test_machine_code_spills_nothing_and_fits():
    with ThreadPoolExecutor(len(sched_getaffinity(0))) as pool:
        records = [record for records in pool.map(report.part, report.TARGETS) for record in records]
    assert len(records) == len(report.TARGETS) * len(report.WIDTHS) * 2 * 8  # kernels
    for record in records:
        assert record["spilled"] == 0 and record["shared"] <= report.TARGETS[record["target"]][1], record
        assert record["occupancy"] > 0, record


def counts(op: str, gate: torch.Tensor, dtype: torch.dtype = torch.float32, width: int = 384, frames: int = 250):
    """What forward and backward do, and the op's arguments."""
    arguments = report.inputs(op, width, dtype, gate, frames)
    seen = []
    for call in report.passes(report.OPS[op], arguments):
        with report.Traffic() as traffic:
            call()
        seen.append(traffic)
    return *seen, arguments


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("op", ["gated_residual", "gated_residual_layer_norm"])
@pytest.mark.parametrize("learned", [True, False])
def test_bytes_moved(op, dtype, learned):
    forward, backward, arguments = counts(op, torch.ones(3, requires_grad=learned), dtype)
    size = arguments[0].nbytes
    least = (4, 5 + learned) if "norm" in op else (3, 2 + learned)
    assert forward.total() <= 1.05 * least[0] * size and backward.total() <= 1.05 * least[1] * size
    assert forward.total() >= least[0] * size and backward.total() >= least[1] * size  # the count misses nothing
    if "norm" in op:
        with report.ChainBytes() as torchs:
            report.passes(report.chain, arguments)[1]()
        assert forward.total() + backward.total() <= 0.5 * torchs.total


@pytest.mark.parametrize("op", ["gated_residual", "gated_residual_layer_norm"])
def test_nothing_of_the_branch_is_read_where_gates_are_zero(op):
    forward, backward, arguments = counts(op, torch.zeros(3))
    branch, size = arguments[1], arguments[0].nbytes
    assert forward.total(branch) == backward.total(branch) == 0
    assert forward.total() <= 1.05 * (3 if "norm" in op else 2) * size  # x, y and n
    assert backward.total() <= 1.05 * (5 if "norm" in op else 1) * size  # zeros for the branch, and all of LayerNorm's


def test_tiles_without_open_gates_make_no_products():
    frames, width, rows = 50, 32, 6  # 300 frames in tiles of 64
    gate = torch.tensor([1.0, 0.0, 0.0, 1.0, 0.0, 0.0])
    shape = dict(width=width, frames=frames)
    of_all, of_some, of_none = (counts("linear_gated_residual", g, **shape) for g in (gate * 0 + 1, gate, gate * 0))
    tiles = -(-rows * frames // report.linear_residual.tiles(width, torch.float32).frames)
    boundaries = int((gate[1:] != gate[:-1]).sum())
    assert 0 < of_some[0].products * tiles / of_all[0].products <= tiles / 3 + boundaries
    assert 0 < of_some[1].products < of_all[1].products
    assert of_none[0].products == of_none[1].products == 0
