"""The kernels' quality without a GPU: machine code for five GPUs, and the bytes moved."""

import inspect
import json
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
from kernel_counts import Traffic, fused
from triton.runtime.interpreter import InterpretedFunction

from dynsize.kernels import ctc, residual

skip_without_interpreter()

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def test_machine_code_spills_nothing_and_fits():
    """For the two GPUs that give a program the least shared memory; `.ci/run` compiles for all."""
    targets = ["sm75", "gfx942"]
    command = [sys.executable, kernel_counts.__file__, *targets]  # it compiles, this one interprets
    environment = os.environ | dict(TRITON_INTERPRET="0", PYTHONPATH=os.pathsep.join(sys.path))
    records = json.loads(subprocess.check_output(command, env=environment))
    assert len(records) == len(targets) * 8
    assert kernel_counts.faults(records) == []


@pytest.mark.parametrize(
    "op, fault",
    [
        ("residual", dict(spilled=8)),
        ("residual", dict(shared=2**20)),
        ("residual", dict(barriers=1)),
        ("CTC", dict(layouts=2)),
    ],
)
def test_faults_of_machine_code_are_found(op, fault):
    right = dict(op=op, target="sm80", spilled=0, shared=0, barriers=0, layouts=1)
    assert kernel_counts.faults([right, right | fault]) == [right | fault]


@pytest.mark.parametrize(
    "gates, learned, dtype",
    [
        ([1], True, torch.bfloat16),
        ([1, 1], False, torch.bfloat16),
        ([1, 1, 1], True, torch.bfloat16),
        ([1, 1], True, torch.float32),
        ([0, 0], False, torch.bfloat16),
    ],
)
def test_bytes_moved_are_the_fewest(gates, learned, dtype):
    """A branch of 1, 2 or 3 of 3 rows, of which as many are normalised: at most 8% above.

    What is above are the shares of gradients, of programs of 8 frames: the fewest of any training.
    Where gates are 0 and do not learn, nothing of the branch is read.
    """
    gate = torch.tensor(gates, dtype=torch.float32, requires_grad=learned)
    arguments = kernel_counts.residual_inputs(3, gate, 40, 48, dtype)
    calls = kernel_counts.passes(fused, arguments)
    for call, least in zip(calls, kernel_counts.residual_bytes(arguments), strict=True):
        with Traffic() as traffic:
            call()
        # weight and bias are read by all programs from the cache
        moved = traffic.total() - sum(traffic.total(tensor) for tensor in arguments[6:8])
        assert least <= moved <= 1.08 * least


def test_eps_of_zero_keeps_gradients_finite():
    """Neither the rows that are not normalised nor the columns past D divide by 0."""
    *arguments, _ = kernel_counts.residual_inputs(3, torch.ones(2, requires_grad=True), 5, 9)
    y, normed = fused(*arguments, 0.0)
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


def test_the_op_can_be_traced():
    gate = torch.ones(2, requires_grad=True)
    arguments = kernel_counts.residual_inputs(3, gate, 5, 9, torch.float32)
    torch.library.opcheck(torch.ops.dynsize.gated_residual_layer_norm.default, tuple(arguments))


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
    # Machine; ops and shapes; shapes, forward and backward; modes and steps; updates.
    assert counts == dict(machine=6, errors=4, times=10, update=4, losses=2)
    assert all("| yes |" in line for line in rows["errors"])
    for line in rows["losses"]:
        assert float(line.split("|")[-2]) < 1e-4
    assert not re.search(r"\d", "".join(line.split("|", 4)[4] for line in rows["times"]))


def test_benchmark_goes_on_where_a_part_fails(monkeypatch, capsys):
    """It tells faults and large errors in one line, or that the time is over; the rest stays."""

    def fails() -> None:
        benchmark.row("a", "table")
        raise ValueError("one\ntwo | three")

    def wrong() -> None:
        for found in (1e-5, 0.1, float("nan"), "why"):
            benchmark.compared("U 3", found, 1e-3)

    parts = dict(first=fails, slow=lambda: time.sleep(60), wrong=wrong, skipped=fails)
    monkeypatch.setattr(benchmark, "PARTS", parts | dict(last=lambda: print("the end")))
    assert benchmark.main(["--skip", "skipped", "--minutes", "0.002"]) == 1
    told = capsys.readouterr().out
    assert "| a | table |\n\nThe part first failed: ValueError: one two | three\n" in told
    assert "The part slow failed: OutOfTime: more than 0.002 minutes\n" in told
    assert "The part wrong failed: U 3: 0.1; U 3: nan; U 3: why\n" in told
    assert told.endswith("## last\n\nthe end\n")


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
    launched = []

    def launch(kernel, *arguments, grid, warmup, num_warps, **named) -> None:
        bound = inspect.signature(kernel.fn).bind(*arguments, **named)
        launched.append((kernel, bound.arguments))

    function, arguments = fused, kernel_counts.residual_inputs(2, torch.ones(2), 64, 16)
    if op == "ctc":
        function = torch.ops.dynsize.ctc_loss
        arguments = [*kernel_counts.ctc_inputs(2, 3, 64, 16, torch.device("cpu")), True]
    else:
        arguments[2].requires_grad_()
    with monkeypatch.context() as patch:
        patch.setattr(InterpretedFunction, "run", launch)
        kernel_counts.passes(function, arguments)[1]()
    for kernel, named in launched:
        program, numbers, frame, others = far_program(kernel, named)
        with Traffic(only=program) as traffic:
            kernel[(1,)](*(named | numbers).values())
        parts = [part for moved in traffic.addresses.values() for part in moved]
        addresses = np.concatenate(parts).astype(np.int64)
        right = np.zeros(addresses.shape, bool)
        for name, tensor in named.items():
            if isinstance(tensor, torch.Tensor):
                first = others.get(name, frame * tensor.shape[-1] if tensor.dim() == 3 else 0)
                offset = addresses - tensor.data_ptr() - first * tensor.element_size()
                found = (offset >= 0) & (offset < 2**20)
                assert found.any(), name
                right |= found
        assert right.all()
