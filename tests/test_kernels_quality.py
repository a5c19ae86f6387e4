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
    assert len(records) == len(report.TARGETS) * len(report.WIDTHS) * 2 * 8
    for record in records:
        assert record["spilled"] == 0 and record["shared"] <= report.TARGETS[record["target"]][1], record
        assert record["occupancy"] > 0, record


def counts(call: str, gate: torch.Tensor, dtype: torch.dtype = torch.float32, frames: int = 250, width: int = 384):
    function, arguments = report.calls(width, dtype, gate, frames)[call]
    with report.counted() as seen:
        results = function(*arguments)
    return seen, arguments, results if isinstance(results, tuple) else (results,)


def bytes_of(*tensors: object) -> int:
    return sum(tensor.nbytes for tensor in tensors if isinstance(tensor, torch.Tensor))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("op", ["gated_residual", "gated_residual_layer_norm"])
def test_bytes_moved(op, dtype):
    moved = 0
    for direction in ("forward", "backward"):
        seen, arguments, results = counts(f"{op} {direction}", torch.ones(3), dtype)
        assert seen.total() <= 1.05 * bytes_of(*arguments, *results), direction
        moved += seen.total()
    norm = "norm" in op
    if norm:
        assert moved <= 0.5 * report.chain_bytes(384, dtype, 250, norm)


@pytest.mark.parametrize("op", ["gated_residual", "gated_residual_layer_norm"])
def test_nothing_of_the_branch_is_read_where_gates_are_zero(op):
    seen, arguments, results = counts(f"{op} forward", torch.zeros(3))
    x, branch, gate, *others = arguments
    assert seen.total(branch) == 0
    assert seen.total() <= 1.05 * bytes_of(x, gate, *others, *results)
    function, arguments = report.calls(384, torch.float32, torch.zeros(3), 250)[f"{op} backward"]
    arguments = [None if argument is branch_of(arguments) else argument for argument in arguments]  # no gate gradient
    with report.counted() as seen:
        results = function(*arguments)
    assert seen.total(arguments[0]) == (0 if op == "gated_residual" else arguments[0].nbytes)
    assert seen.total() <= 1.05 * bytes_of(*(arguments if "norm" in op else arguments[1:]), *results)


def branch_of(arguments: tuple) -> torch.Tensor:
    """The branch among a backward pass's arguments: the tensor before the gate."""
    gate = next(i for i, argument in enumerate(arguments) if isinstance(argument, torch.Tensor) and argument.dim() == 1
                and len(argument) == 3)  # fmt: skip
    return arguments[gate - 1]


def test_tiles_without_open_gates_make_no_products():
    frames, width, rows = 50, 32, 6  # 300 frames in tiles of 64
    gate = torch.tensor([1.0, 0.0, 0.0, 1.0, 0.0, 0.0])
    of_all, _, _ = counts("linear_gated_residual forward", torch.ones(rows), frames=frames, width=width)
    of_some, _, _ = counts("linear_gated_residual forward", gate, frames=frames, width=width)
    tile = report.linear_residual.tiles(width, torch.float32).frames
    tiles = -(-rows * frames // tile)
    boundaries = int((gate[1:] != gate[:-1]).sum())
    assert of_some.products * tiles / of_all.products <= tiles / 3 + boundaries
    none, _, _ = counts("linear_gated_residual forward", torch.zeros(rows), frames=frames, width=width)
    assert none.products == 0
    backward = []
    for value in (gate, torch.zeros(rows)):
        function, arguments = report.calls(width, torch.float32, value, frames)["linear_gated_residual backward"]
        with report.counted() as seen:
            function(*arguments[:-1], False)  # the gate needs no gradient
        backward.append(seen.products)
    assert backward[0] > 0 and backward[1] == 0
