"""The kernels' quality without a GPU: machine code for five GPUs, and the bytes moved."""

import inspect
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("triton")
if torch.cuda.is_available():
    reason = "counts are taken in Triton's interpreter, on machines without a GPU"
    pytest.skip(reason, allow_module_level=True)

import benchmark_kernels as benchmark
import kernel_counts
from conftest import skip_without_interpreter
from kernel_counts import ChainBytes, Traffic, fused
from triton.runtime.interpreter import InterpretedFunction, TensorHandle, _get_np_dtype

from dynsize.kernels import ctc, residual

skip_without_interpreter()

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def test_machine_code_spills_nothing_and_fits():
    records = kernel_counts.machine_code_of_all()
    assert len(records) == len(kernel_counts.TARGETS) * 8
    assert kernel_counts.faults(records) == []


@pytest.mark.parametrize("fault", [dict(spilled=8), dict(shared=2**20), dict(barriers=1)])
def test_faults_of_machine_code_are_found(fault):
    right = dict(op="residual", target="sm80", spilled=0, shared=0, barriers=0)
    assert kernel_counts.faults([right, right | fault]) == [right | fault]


def counted(arguments: list) -> list[Traffic]:
    """Return what the programs of forward and backward move."""
    traffic = []
    for call in kernel_counts.passes(fused, arguments):
        with Traffic() as seen:
            call()
        traffic.append(seen)
    return traffic


def moved(traffic: Traffic, arguments: list) -> int:
    """Return the bytes moved but for weight and bias, which all programs read from the cache."""
    return traffic.total() - sum(traffic.total(tensor) for tensor in arguments[6:8])


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
    """A branch of 1, 2 or 3 of 3 rows, of which as many are normalised: at most 8% above.

    What is above are the shares of gradients, of programs of 8 frames: the fewest of any training.
    """
    gate = torch.ones(branch_rows, requires_grad=learned)
    arguments = kernel_counts.residual_inputs(3, gate, 48, 40, dtype)
    seen = counted(arguments)
    for traffic, least in zip(seen, kernel_counts.residual_bytes(arguments), strict=True):
        assert least <= moved(traffic, arguments) <= 1.08 * least
    with ChainBytes() as chain:
        kernel_counts.passes(kernel_counts.chain, arguments)[1]()
    assert sum(moved(traffic, arguments) for traffic in seen) <= 0.5 * chain.total


def test_fewest_bytes_are_those_counted_by_hand():
    """R = 3, R' = rows = 2, float32, gates that do not learn."""
    gate = torch.ones(2)
    arguments = kernel_counts.residual_inputs(3, gate, 48, 40, torch.float32)
    row = arguments[0][0].nbytes
    statistics = 2 * 40 * 2 * 4
    # x, branch, y, normed; y_grad, y, normed_grad, x_grad, branch_grad
    assert kernel_counts.residual_bytes(arguments) == (
        (3 + 2 + 3 + 2) * row + statistics,
        (3 + 2 + 2 + 3 + 2) * row + statistics,
    )


def test_nothing_of_the_branch_is_read_where_gates_are_zero():
    arguments = kernel_counts.residual_inputs(3, torch.zeros(2), 48, 40)
    branch = arguments[1]
    seen = counted(arguments)
    assert [traffic.total(branch) for traffic in seen] == [0, 0]
    for traffic, least in zip(seen, kernel_counts.residual_bytes(arguments), strict=True):
        assert moved(traffic, arguments) <= 1.08 * least


@pytest.mark.parametrize("name", ["x", "branch", "gate", "seed", "weight", "bias", "gradients"])
@pytest.mark.parametrize("layout", ["doubled", "transposed", "expanded"])
def test_strides_change_nothing(name, layout):
    """Results are bitwise the same for each input in another memory layout."""
    torch.manual_seed(0)
    x, branch, gate = torch.randn(4, 6, 9), torch.randn(2, 6, 9), torch.tensor([0.5, 2.0])
    weight, bias, seed = torch.randn(9), torch.randn(9), torch.tensor([3, 3])
    inputs = dict(x=x, branch=branch, gate=gate, seed=seed, weight=weight, bias=bias)
    gradients = [torch.randn(4, 6, 9), torch.randn(3, 6, 9)]

    def results(inputs: dict, gradients: list) -> list:
        leaves = {n: t.detach() for n, t in inputs.items()}
        learned = [t.requires_grad_() for t in leaves.values() if t.is_floating_point()]
        a = leaves
        first = (a["x"], a["branch"], a["gate"], 0.5, 0.2, a["seed"], a["weight"], a["bias"])
        outputs = fused(*first, 3, torch.float32)
        return [*outputs, *torch.autograd.grad(outputs, learned, gradients)]

    def laid_out(tensor: torch.Tensor) -> torch.Tensor:
        if layout == "transposed":
            return tensor.mT.contiguous().mT if tensor.dim() > 1 else tensor
        if layout == "expanded":
            return tensor[:1].expand(tensor.shape)
        return torch.stack([tensor, tensor], -1)[..., 0]

    changed = dict(inputs)
    if name == "gradients":
        gradients = [laid_out(gradient) for gradient in gradients]
    else:
        changed[name] = laid_out(inputs[name])
    ours = results(changed, gradients)
    right = results(
        {n: t.clone(memory_format=torch.contiguous_format) for n, t in changed.items()},
        [gradient.clone(memory_format=torch.contiguous_format) for gradient in gradients],
    )
    for result, same in zip(ours, right, strict=True):
        assert torch.equal(result, same) and result.abs().sum() > 0


def test_eps_of_zero_keeps_gradients_finite():
    """Neither the rows that are not normalised nor the columns past D divide by 0."""
    arguments = kernel_counts.residual_inputs(3, torch.ones(2, requires_grad=True), 9, 5)
    y, normed = torch.ops.dynsize.gated_residual_layer_norm(*arguments, 0.0)[:2]
    (y.sum() + normed.sum()).backward()
    for tensor in arguments:
        if isinstance(tensor, torch.Tensor) and tensor.requires_grad:
            assert tensor.grad.isfinite().all()


def test_programs_fill_the_multiprocessors():
    """About 16 programs for each multiprocessor, of `fewest` to 64 frames."""
    assert residual.frames_of_program(48, 250, 132, 1) == 5
    assert residual.frames_of_program(48, 250, 132, 8) == 8
    assert residual.frames_of_program(1, 250, 132, 1) == 1
    assert residual.frames_of_program(1000, 1000, 132, 8) == 63  # 16 programs of a row
    assert residual.frames_of_program(3, 0, 132, 8) == 1
    for frames in range(1, 200):
        chunk = residual.frames_of_program(7, frames, 4, 8)
        assert frames <= chunk * -(-frames // chunk) < frames + chunk


def test_the_op_can_be_traced():
    arguments = kernel_counts.residual_inputs(3, torch.ones(2, requires_grad=True), 9, 5)
    arguments[1] = arguments[1].detach().float().requires_grad_()
    op = torch.ops.dynsize.gated_residual_layer_norm.default
    torch.library.opcheck(op, (*arguments[:-1], torch.float32, 1e-5))


def test_benchmark_is_rehearsed_from_a_bare_checkout(tmp_path):
    """All parts and tables are there, without the packages that read audio and text."""
    script = Path(benchmark.__file__)
    bare = "import runpy, sys; sys.modules |= dict.fromkeys(sys.argv[2].split()); "
    bare += "script = sys.argv[1]; del sys.argv[1:]; runpy.run_path(script, run_name='__main__')"
    needless = "sentencepiece soundfile soxr tqdm"
    command = [sys.executable, "-c", bare, script, needless]
    environment = {n: v for n, v in os.environ.items() if n not in ("PYTHONPATH", "PYTHONSAFEPATH")}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    first, *parts = done.stdout.split("\n## ")
    assert first.startswith("A rehearsal on a CPU")
    rows = {}
    for part in parts:
        table = [line for line in part.splitlines() if line.startswith("|")]
        assert len({line.count(" | ") for line in table}) == 1
        rows[part.split("\n")[0]] = table[2:]
    counts = {name: len(table) for name, table in rows.items()}
    # Machine; ops; widths, labels, top-k; shapes forward and backward; modes and steps; updates.
    assert counts == dict(machine=7, compiled=3, errors=3, times=10, update=4, losses=2)
    assert all("| yes |" in line for line in rows["compiled"])
    for line in rows["losses"]:
        assert float(line.split("|")[-2]) < 1e-4
    assert not re.search(r"\d", "".join(line.split("|", 4)[4] for line in rows["times"]))


def test_benchmark_goes_on_where_a_part_fails(monkeypatch, capsys):
    """It tells the fault in one line, or that the time is over; what was printed stays."""

    def fails() -> None:
        benchmark.row("a", "table")
        raise ValueError("one\ntwo | three")

    parts = dict(first=fails, slow=lambda: time.sleep(60), last=lambda: print("the end"))
    monkeypatch.setattr(benchmark, "PARTS", parts | dict(skipped=fails))
    assert benchmark.main(["--skip", "skipped", "--minutes", "0.002"]) == 1
    told = capsys.readouterr().out
    assert "| a | table |\n\nThe part first failed: ValueError: one two / three\n" in told
    assert "The part slow failed: OutOfTime: more than 0.002 minutes\n" in told
    assert told.endswith("## last\n\nthe end\n")


@pytest.mark.parametrize("found", [(1e-5, 0.1), (float("nan"), 0.0), ValueError("why")])
def test_benchmark_fails_for_large_errors(found, monkeypatch, capsys):
    def largest_errors(*_) -> tuple[float, float]:
        if isinstance(found, Exception):
            raise found
        return found

    monkeypatch.setattr(benchmark, "largest_errors", largest_errors)
    monkeypatch.setattr(benchmark.SHAPES, "labels", (3,))
    with pytest.raises(AssertionError, match="CTC, U 3"):
        benchmark.errors()


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
    program = row * FAR // named["chunk"] + 3
    others = dict(shares_ptr=2 * program * named["WIDTH"], gate_grad_ptr=program, gate_ptr=row)
    numbers = dict(frames=FAR, rows=1024, branch_rows=1024)
    return program, numbers, row * FAR + 3 * named["chunk"], others


@pytest.mark.parametrize("op", ["residual", "ctc"])
def test_offsets_go_past_32_bits(op, monkeypatch):
    """All addresses of one program of a batch that no memory holds must be those of its frames."""
    launched, seen = [], []

    def launch(kernel, *arguments, grid, warmup, num_warps, **named) -> None:
        bound = inspect.signature(kernel.fn).bind(*arguments, **named)
        launched.append((kernel, bound.arguments))

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
    for kernel, named in launched:
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
