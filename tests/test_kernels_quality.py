"""The kernels' quality without a GPU: machine code for five of them, and the bytes and products that programs make."""

import csv
import functools
import inspect

import numpy as np
import pytest
import torch

pytest.importorskip("triton")
if torch.cuda.is_available():
    pytest.skip(
        "counts are taken in Triton's interpreter, on machines without a GPU",
        allow_module_level=True,
    )

from concurrent.futures import ThreadPoolExecutor
from os import sched_getaffinity

from triton.runtime.interpreter import TensorHandle, _get_np_dtype

from dynsize.kernels import benchmark, ctc, linear_residual, report, residual


def test_machine_code_spills_nothing_and_fits():
    with ThreadPoolExecutor(len(sched_getaffinity(0))) as pool:
        records = [
            record for records in pool.map(report.part, report.TARGETS) for record in records
        ]
    assert len(records) == len(report.TARGETS) * len(report.WIDTHS) * 2 * 8  # kernels
    for record in records:
        assert record["spilled"] == 0 and record["shared"] <= report.TARGETS[record["target"]][1], (
            record
        )
        assert record["occupancy"] > 0, record


def counts(
    op: str,
    gate: torch.Tensor,
    dtype: torch.dtype = torch.float32,
    width: int = 384,
    frames: int = 250,
):
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
    assert (
        forward.total() >= least[0] * size and backward.total() >= least[1] * size
    )  # the count misses nothing
    if "norm" in op:
        with report.ChainBytes() as torchs:
            report.passes(functools.partial(report.chain, op), arguments)[1]()
        assert forward.total() + backward.total() <= 0.5 * torchs.total


@pytest.mark.parametrize("op", ["gated_residual", "gated_residual_layer_norm"])
def test_nothing_of_the_branch_is_read_where_gates_are_zero(op):
    forward, backward, arguments = counts(op, torch.zeros(3))
    branch, size = arguments[1], arguments[0].nbytes
    assert forward.total(branch) == backward.total(branch) == 0
    assert forward.total() <= 1.05 * (3 if "norm" in op else 2) * size  # x, y and n
    assert (
        backward.total() <= 1.05 * (5 if "norm" in op else 1) * size
    )  # zeros for the branch, and all of LayerNorm's


@pytest.mark.parametrize("gates", ["100100", "110000"])
def test_tiles_without_open_gates_make_no_products(gates):
    frames, width = 200, 16  # 1,200 frames in tiles of 64
    gate = torch.tensor([float(digit) for digit in gates])
    shape = dict(width=width, frames=frames)
    of_all, of_some, of_none = (
        counts("linear_gated_residual", g, **shape) for g in (gate * 0 + 1, gate, gate * 0)
    )
    tiles = -(-len(gates) * frames // linear_residual.tiles(width, torch.float32).frames)
    boundaries = int((gate[1:] != gate[:-1]).sum())
    for some, every in zip(of_some[:2], of_all[:2], strict=True):
        assert 0 < some.products * tiles / every.products <= tiles / 3 + boundaries
    assert of_none[0].products == of_none[1].products == 0
    arguments = of_none[2]
    for tensor in arguments[1:4]:  # h, weight; the bias only forward
        assert of_none[1].total(tensor) == 0 and (
            tensor is arguments[3] or of_none[0].total(tensor) == 0
        )


def test_a_learned_gate_has_every_product_for_itself():
    every, learned = (
        counts("linear_gated_residual", gate, width=32, frames=80)[1].products
        for gate in (torch.ones(3), torch.zeros(3, requires_grad=True))
    )
    assert (
        0 < learned < every
    )  # those for h, from which the gate's gradient comes; none for the weight


def test_benchmark_but_for_the_clock(monkeypatch, tmp_path, capsys):
    called = []
    monkeypatch.setattr(benchmark, "timed", lambda call: called.append(call()) or [2.0, 1.0, 4.0])
    monkeypatch.setattr(benchmark, "peak", lambda call: called.append(call()) or 1.5)
    monkeypatch.setattr(benchmark, "limits", lambda: {"GB/s": 1000.0, "TFLOP/s": 100.0})
    monkeypatch.setattr(torch, "compile", lambda function: function)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a card")
    for name, value in dict(DEVICE="cpu", UTTERANCES=1, FRAMES=10, WIDTHS=(32,)).items():
        monkeypatch.setattr(benchmark, name, value)
    benchmark.main(str(tmp_path / "times.csv"))
    rows = list(csv.DictReader((tmp_path / "times.csv").open()))
    assert len(rows) == 4 * 3 * 3 * 2 and len(called) == 2 * len(
        rows
    )  # ops, closed, runs, directions
    assert capsys.readouterr().out.count("\n") == len(rows) + 1
    assert all(
        row["card"] == "a card" and row["triton"] and row["torch"] and row["MB"] == "1.5"
        for row in rows
    )
    rates = {
        (row["op"], row["width"], row["closed"], row["pass"]): float(row["rate"]) for row in rows
    }
    x = 3 * 10 * 32 * 2  # bytes
    assert rates["gated_residual", "32", "1/3", "forward"] == pytest.approx(
        (2 + 2 / 3) * x / 2e-3 / 1e9, rel=1e-3
    )
    assert rates["gated_residual_layer_norm", "32", "2/3", "backward"] == pytest.approx(
        5 * x / 2e-3 / 1e9, rel=1e-3
    )
    flops = 2 * (3 * 10 / 3) * 32 * 128  # of the open rows
    assert rates["linear_gated_residual", "32", "2/3", "forward"] == pytest.approx(
        flops / 2e-3 / 1e12, rel=1e-3
    )
    assert rates["linear_gated_residual", "32", "2/3", "backward"] == pytest.approx(
        2 * flops / 2e-3 / 1e12, rel=1e-3
    )


FAR = 2**20  # frames or utterances
NUMBERS = ("lengths_ptr", "label_lengths_ptr", "loss_ptr")  # one for each utterance


def far_program(kernel, named: dict) -> tuple[int, dict, int, dict]:
    """A program in the midst of a huge batch, the scalars that make it one, its first frame of all R T, and where it
    finds what is not laid out by frames."""
    if (
        kernel is linear_residual.weight_grad_kernel
    ):  # two tiles along K; SPLITS so large that only one row is left
        row = 2**24
        others = dict(
            weight_grad_ptr=row * named["WIDTH"] * named["INNER"],
            bias_grad_ptr=row * named["WIDTH"],
        )
        return 2 * row + 1, dict(rows=row + 1), row * named["frames"], others | dict(gate_ptr=row)
    if kernel is ctc.kernel:
        others = dict(labels_ptr=FAR * named["most_labels"], **dict.fromkeys(NUMBERS, FAR))
        return FAR, dict(frames=4096), FAR * 4096, others
    if kernel in (residual.forward_kernel, residual.backward_kernel):
        row, program = 512, 512 * FAR // residual.CHUNK + 3
        others = dict(shares_ptr=2 * program * named["WIDTH"], gate_grad_ptr=program, gate_ptr=row)
        return program, dict(frames=FAR), row * FAR + 3 * residual.CHUNK, others
    across = 2 if kernel is linear_residual.hidden_grad_kernel else 1
    frame, last = 2**23 * named["FRAMES"], across - 1
    others = dict(gate_ptr=frame // FAR, gate_grad_ptr=last * 1024 * FAR + frame)
    return 2**23 * across + last, dict(rows=1024, frames=FAR), frame, others


@pytest.mark.parametrize("op", report.OPS)
def test_offsets_go_past_32_bits(op, monkeypatch):
    """One program of a batch that no memory holds: loads give ones, and all addresses must be those of its frames."""
    launched, seen = [], []

    def load(pointer, mask, *_):
        seen.append(pointer.data[mask.data.astype(bool)])
        kind = pointer.get_element_ty()
        return TensorHandle(np.ones(pointer.data.shape, _get_np_dtype(kind)), kind)

    for module in (residual, linear_residual, ctc):
        monkeypatch.setattr(
            module, "launch", lambda kernel, _, *a, **options: launched.append((kernel, a, options))
        )
    report.passes(
        report.OPS[op], report.inputs(op, 16, torch.float32, torch.ones(2, requires_grad=True), 64)
    )[1]()
    monkeypatch.setattr(report.builder, "create_masked_load", load, raising=False)
    for name, at in dict(create_masked_store=(0, 2), create_atomic_rmw=(1, 3)).items():
        store = lambda *a, at=at: seen.append(a[at[0]].data[a[at[1]].data.astype(bool)]) or a[at[0]]  # noqa: E731
        monkeypatch.setattr(report.builder, name, store, raising=False)
    for kernel, arguments, options in launched:
        named = inspect.signature(kernel.fn).bind(*arguments).arguments
        program, scalars, frame, others = far_program(kernel, named)
        set_program = lambda *_, program=program: setattr(
            report.builder, "grid_idx", (program, 0, 0)
        )  # noqa: E731
        monkeypatch.setattr(report.builder, "set_grid_idx", set_program, raising=False)
        seen.clear()
        kernel[(1,)](*(named | scalars).values(), **options)
        addresses = np.concatenate([addresses.ravel() for addresses in seen])
        right = np.zeros(addresses.shape, bool)
        for name, tensor in named.items():
            if isinstance(tensor, torch.Tensor):
                first = others.get(name, frame * tensor.shape[-1] if tensor.dim() == 3 else 0)
                offset = (
                    addresses.astype(np.int64) - tensor.data_ptr() - first * tensor.element_size()
                )
                found = (offset >= 0) & (offset < 2**20)
                assert found.any() or "bias" in name, (
                    name
                )  # which only the first program along K sees
                right |= found
        assert right.all()
