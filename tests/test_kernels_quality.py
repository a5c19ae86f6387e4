"""The kernels' quality without a GPU: machine code for five GPUs, and the bytes moved."""

import inspect

import numpy as np
import pytest
import torch

pytest.importorskip("triton")
if torch.cuda.is_available():
    reason = "counts are taken in Triton's interpreter, on machines without a GPU"
    pytest.skip(reason, allow_module_level=True)

import benchmark_kernels as benchmark
import kernel_counts
from kernel_counts import ChainBytes, Traffic, fused
from triton.runtime.interpreter import InterpretedFunction, TensorHandle, _get_np_dtype

from dynsize import kernels
from dynsize.kernels import ctc, residual

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def test_machine_code_spills_nothing_and_fits():
    records = kernel_counts.machine_code_of_all()
    assert len(records) == len(kernel_counts.TARGETS) * 8
    for record in records:
        most_shared = kernel_counts.TARGETS[record["target"]][1]
        assert record["spilled"] == 0 and record["shared"] <= most_shared, record
        assert record["occupancy"] >= 0.3, record


def counted(arguments: list) -> list[Traffic]:
    """Return what the programs of forward and backward move."""
    traffic = []
    for call in kernel_counts.passes(fused, arguments):
        with Traffic() as seen:
            call()
        traffic.append(seen)
    return traffic


@pytest.mark.parametrize(
    "branch_rows, learned, dtype",
    [
        (1, True, torch.bfloat16),
        (2, False, torch.bfloat16),
        (3, True, torch.bfloat16),
        (2, True, torch.float32),
    ],
)
def test_bytes_moved_are_the_fewest(branch_rows, learned, dtype):
    """A branch of 1, 2 or 3 of 3 rows, of which as many are normalised: at most 5% above."""
    gate = torch.ones(branch_rows, requires_grad=learned)
    arguments = kernel_counts.residual_inputs(3, gate, 48, 250, dtype)
    seen = counted(arguments)
    for traffic, least in zip(seen, kernel_counts.residual_bytes(arguments), strict=True):
        assert least <= traffic.total() <= 1.05 * least
    with ChainBytes() as chain:
        kernel_counts.passes(kernel_counts.chain, arguments)[1]()
    assert seen[0].total() + seen[1].total() <= 0.5 * chain.total


def test_fewest_bytes_are_those_counted_by_hand():
    """R = 3, R' = rows = 2, float32, gates that do not learn."""
    gate = torch.ones(2)
    arguments = kernel_counts.residual_inputs(3, gate, 48, 250, torch.float32)
    row = arguments[0][0].nbytes
    # x, branch, y, normed; y_grad, y, normed_grad, x_grad, branch_grad
    assert kernel_counts.residual_bytes(arguments) == (
        (3 + 2 + 3 + 2) * row,
        (3 + 2 + 2 + 3 + 2) * row,
    )


def test_nothing_of_the_branch_is_read_where_gates_are_zero():
    arguments = kernel_counts.residual_inputs(3, torch.zeros(2), 48, 250)
    branch = arguments[1]
    seen = counted(arguments)
    assert [traffic.total(branch) for traffic in seen] == [0, 0]
    for traffic, least in zip(seen, kernel_counts.residual_bytes(arguments), strict=True):
        assert traffic.total() <= 1.05 * least


def test_benchmark_but_for_the_clock(monkeypatch, capsys):
    monkeypatch.setenv("DYNSIZE_KERNELS", "torch")
    kernels.CHOSEN.clear()
    called = []
    monkeypatch.setattr(benchmark, "milliseconds", lambda call: called.append(call()) or 2.0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a card")
    small = dict(DEVICE="cpu", UTTERANCES=1, FRAMES=10, WIDTHS=(32,), VOCABULARIES=(7,))
    for name, value in small.items():
        monkeypatch.setattr(benchmark, name, value)
    benchmark.main()
    kernels.CHOSEN.clear()
    card, *table = capsys.readouterr().out.splitlines()
    assert card == "a card"
    assert len(table) == 2 + 3 + 1 and len(called) == 4 * 2 * 2  # rows; columns, directions
    assert all(line.count("|") == 4 for line in table)
    assert table[2] == "| residual, D 32, 1 of 3 sizes | 2.000 + 2.000 | 2.000 + 2.000 |"


FAR = 2**20  # frames or utterances
NUMBERS = ("lengths_ptr", "label_lengths_ptr", "loss_ptr")  # one for each utterance


def far_program(kernel, named: dict) -> tuple[int, dict, int, dict]:
    """Return a program in the midst of a huge batch and what must be right about it.

    Its number, the kernel's numbers that make the batch huge, the program's first frame of all R T,
    and the first element in tensors that are not laid out by frames.
    """
    if kernel is ctc.kernel:
        others = dict(labels_ptr=FAR * named["most_labels"], **dict.fromkeys(NUMBERS, FAR))
        return FAR, dict(frames=4096), FAR * 4096, others
    row = 512
    program = row * FAR // residual.PROGRAM + 3
    others = dict(shares_ptr=2 * program * named["WIDTH"], gate_grad_ptr=program, gate_ptr=row)
    numbers = dict(frames=FAR, rows=1024, branch_rows=1024)
    return program, numbers, row * FAR + 3 * residual.PROGRAM, others


@pytest.mark.parametrize("op", ["residual", "ctc"])
def test_offsets_go_past_32_bits(op, monkeypatch):
    """All addresses of one program of a batch that no memory holds must be those of its frames."""
    launched, seen = [], []

    def launch(kernel, *arguments, **_) -> None:
        launched.append((kernel, arguments))

    def load(pointer, mask, *_) -> TensorHandle:
        seen.append(pointer.data[mask.data.astype(bool)])
        kind = pointer.get_element_ty()
        return TensorHandle(np.ones(pointer.data.shape, _get_np_dtype(kind)), kind)

    gate = torch.ones(2, requires_grad=True)
    arguments = kernel_counts.residual_inputs(2, gate, 16, 64, torch.float32)
    function = fused
    if op == "ctc":
        function = torch.ops.dynsize.ctc_loss
        arguments = [*kernel_counts.ctc_inputs(2, 16, 64, "cpu"), True]
    with monkeypatch.context() as patch:
        patch.setattr(InterpretedFunction, "run", launch)
        kernel_counts.passes(function, arguments)[1]()
    builder = kernel_counts.builder
    monkeypatch.setattr(builder, "create_masked_load", load, raising=False)
    for name, at in dict(create_masked_store=(0, 2), create_atomic_rmw=(1, 3)).items():

        def store(*a, at=at):
            seen.append(a[at[0]].data[a[at[1]].data.astype(bool)])
            return a[at[0]]

        monkeypatch.setattr(builder, name, store, raising=False)
    for kernel, arguments in launched:
        named = inspect.signature(kernel.fn).bind(*arguments).arguments
        program, numbers, frame, others = far_program(kernel, named)

        def set_program(*_, program=program) -> None:
            builder.grid_idx = (program, 0, 0)

        monkeypatch.setattr(builder, "set_grid_idx", set_program, raising=False)
        seen.clear()
        kernel[(1,)](*(named | numbers).values())
        addresses = np.concatenate([where.ravel() for where in seen]).astype(np.int64)
        right = np.zeros(addresses.shape, bool)
        for name, tensor in named.items():
            if isinstance(tensor, torch.Tensor):
                first = others.get(name, frame * tensor.shape[-1] if tensor.dim() == 3 else 0)
                offset = addresses - tensor.data_ptr() - first * tensor.element_size()
                found = (offset >= 0) & (offset < 2**20)
                assert found.any(), name
                right |= found
        assert right.all()
