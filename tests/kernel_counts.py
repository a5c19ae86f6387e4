"""What can be counted of the kernels without a GPU: machine code, and the bytes that programs move.

As a script, compiles the kernels for GPUs, those of TARGETS or the ones named, prints what their
machine code needs, as JSON, and fails where it spills, needs more than a GPU has, or waits where it
should not.
"""

import functools
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.runtime.interpreter import TensorHandle, _get_np_dtype
from triton.runtime.interpreter import interpreter_builder as builder
from triton.runtime.jit import JITFunction

from dynsize.kernels import ctc, residual, self_check, top_k  # noqa: F401 (they register ops)

# GPU: Triton's target, and the shared bytes that a program may have
TARGETS = {
    "sm75": (GPUTarget("cuda", 75, 32), 64 << 10),
    "sm80": (GPUTarget("cuda", 80, 32), 163 << 10),
    "sm90": (GPUTarget("cuda", 90, 32), 227 << 10),
    "sm120": (GPUTarget("cuda", 120, 32), 99 << 10),
    "gfx942": (GPUTarget("hip", "gfx942", 64), 64 << 10),
}
POINTER_AND_MASK = dict(
    create_masked_load=(0, 1), create_masked_store=(0, 2), create_atomic_rmw=(1, 3)
)


def residual_inputs(
    rows: int,
    gate: Tensor,
    frames: int,
    width: int,
    dtype: torch.dtype = torch.bfloat16,
    utterances: int = 1,
) -> list:
    """Return arguments of `gated_residual_layer_norm`, of which the tensors want gradients.

    `gate`: (R',). As many rows are normalised as the branch has.
    """
    random = self_check.normal_on(gate.device)
    x = random(rows, frames, width)
    branch = random(len(gate), frames, width, dtype=dtype)
    seed = torch.arange(utterances, device=gate.device)
    weight, bias = random(width), random(width)
    return [x, branch, gate, 0.5, 0.1, seed, weight, bias, len(gate), dtype, 1e-5]


def residual_bytes(arguments: list) -> tuple[int, int]:
    """Return the bytes that forward and backward must move: each input and output once.

    All rows of x are copied to y, and those of y's gradient to x's. y is read backward only in the
    normalised rows, and the branch only where the gate learns. A normalised frame has two
    statistics in float32.
    """
    x, branch, gate = arguments[:3]
    *_, rows, dtype, _ = arguments
    y = rows * x[0].nbytes
    normed = rows * x[0].numel() * dtype.itemsize
    opened = int((gate != 0).sum()) * branch[0].nbytes
    learned = branch.nbytes if gate.requires_grad else 0
    statistics = rows * x.shape[1] * 2 * 4
    forward = 2 * x.nbytes + opened + normed + statistics
    backward = 2 * x.nbytes + y + normed + statistics + branch.nbytes + learned
    return forward, backward


def ctc_inputs(
    utterances: int, labels: int, frames: int, vocabulary: int, device: torch.device
) -> list[Tensor]:
    """Return arguments of `ctc_loss`: the last utterance has one frame and one label less."""
    logits = self_check.normal_on(device)(utterances, frames, vocabulary)
    log_probs = logits.detach().log_softmax(-1).requires_grad_()
    number = torch.arange(utterances * labels, device=device)
    targets = number.view(utterances, labels) % (vocabulary - 1) + 1
    lengths = torch.full((utterances,), frames, device=device)
    count = torch.full((utterances,), labels, device=device)
    lengths[-1] -= 1
    count[-1] -= 1
    return [log_probs, lengths, targets, count]


def passes(function: Callable, arguments: list) -> tuple[Callable, Callable]:
    """Return calls of the forward pass and of the backward pass."""
    outputs = function(*arguments)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    leaves = [a for a in arguments if isinstance(a, Tensor) and a.requires_grad]
    grads = [torch.ones_like(output) for output in outputs]
    backward = functools.partial(torch.autograd.grad, outputs, leaves, grads, retain_graph=True)
    return functools.partial(function, *arguments), backward


def fused(*arguments) -> tuple[Tensor, Tensor]:
    """Return the residual op's y and normalised rows by Triton."""
    return torch.ops.dynsize.gated_residual_layer_norm(*arguments)[:2]


def cases() -> list[tuple]:
    """Return name, function and arguments of what is compiled."""
    gate = torch.ones(2, requires_grad=True)
    log_probs, *others = ctc_inputs(2, 200, 250, 80, gate.device)  # four warps
    found = [("CTC, U 200", torch.ops.dynsize.ctc_loss, [log_probs, *others, True])]
    alone = [log_probs.detach(), *others, False]
    found.append(("CTC, the loss alone", torch.ops.dynsize.ctc_loss, alone))
    scores = torch.full((48,), 0.5, requires_grad=True)
    found.append(("relaxed top-k, L 48", torch.ops.dynsize.relaxed_top_k, [scores, 16]))
    found.append(("residual, D 512", fused, residual_inputs(3, gate, 5, 512)))
    x, branch, _, scale, _, _, *norm = residual_inputs(3, gate, 5, 144, torch.float32)
    arguments = [x, branch, None, scale, 0.0, None, *norm]
    found.append(("residual without gates and dropout", fused, arguments))
    return found


def machine_code(targets: Iterable[str]) -> list[dict]:
    """Compile the kernels for these targets, as a launch there would, and read the code's needs.

    Leaves this process unable to launch.
    """
    records, run, codes = [], JITFunction.run, []

    def compiled(*arguments, warmup, **options) -> None:
        codes.append(run(*arguments, warmup=True, **options))

    JITFunction.run = compiled
    residual.INTERPRETED = 1  # compile what a GPU runs, from tensors on a CPU
    for device, target in enumerate(targets):
        gpu, _ = TARGETS[target]
        driver = dict(
            get_current_target=lambda gpu=gpu: gpu,
            get_current_device=lambda device=device: device,
            get_current_stream=lambda device: 0,
        )
        triton.runtime.driver.set_active(SimpleNamespace(**driver))
        for name, function, arguments in cases():
            codes.clear()
            _, backward = passes(function, arguments)
            if any(isinstance(a, Tensor) and a.requires_grad for a in arguments):
                backward()
            records += [dict(op=name, target=target) | resources(code, target) for code in codes]
    return records


def resources(code: CompiledKernel, target: str) -> dict:
    """Return a lane's registers, what is spilled, the shared bytes, and how many barriers there are
    and layouts of tensors: which thread holds which element."""
    gpu, _ = TARGETS[target]
    names = "vgpr_count private_segment_fixed_size vgpr_spill_count sgpr_spill_count"
    text = code.asm.get("amdgcn")
    barriers = r"\bs_barrier"
    if gpu.backend == "cuda":
        names = "REG STACK LOCAL"
        barriers = r"\bBAR\."
        text = of_cubin("cuobjdump", "-res-usage", code) + of_cubin("nvdisasm", "-c", code)
    layouts = re.findall(r", (#\w+)>", code.asm["ttgir"])
    used, *spilled = (int(re.search(rf"\b{name}:\s*(\d+)", text)[1]) for name in names.split())
    return dict(
        kernel=code.metadata.name,
        registers=used,
        spilled=sum(spilled),
        shared=code.metadata.shared,
        barriers=len(re.findall(barriers, text)),
        layouts=len(set(layouts)),
    )


def of_cubin(tool: str, option: str, code: CompiledKernel) -> str:
    """Return what one of NVIDIA's tools, which Triton brings, says of the machine code."""
    folder = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(code.asm["cubin"])
        file.flush()
        command = [folder / tool, option, file.name]
        return subprocess.check_output(command, text=True, stderr=subprocess.DEVNULL)


def faults(records: list[dict]) -> list[dict]:
    """Return the records of machine code that spills, needs too much, or breaks a promise.

    Up to D 512 the residual's programs are single warps, which need no barrier. In CTC each α is
    loaded by the thread that stored it, as all its tensors have one layout.
    """
    found = []
    for record in records:
        _, most_shared = TARGETS[record["target"]]
        waits = record["op"].startswith("residual") and record["barriers"]
        strays = record["op"].startswith("CTC") and record["layouts"] != 1
        if record["spilled"] or record["shared"] > most_shared or waits or strays:
            found.append(record)
    return found


class Traffic:
    """Counts, inside of its context, the addresses that each interpreted program moves.

    `only`: compute only the program of this number, which then moves nothing and loads ones.
    """

    def __init__(self, only: int | None = None) -> None:
        self.only = only
        self.addresses: dict[tuple, list[np.ndarray]] = {}  # (launch, program, method, bytes) → …
        self.launch = 0

    def __enter__(self) -> "Traffic":
        for name in (*POINTER_AND_MASK, "set_grid_dim", "set_grid_idx"):
            setattr(builder, name, functools.partial(self.count, name))
        return self

    def __exit__(self, *_) -> None:
        for name in (*POINTER_AND_MASK, "set_grid_dim", "set_grid_idx"):
            delattr(builder, name)

    def count(self, name: str, *arguments, **options):
        """Note what the interpreter's method `name` moves, and call it."""
        self.launch += name == "set_grid_dim"
        if name == "set_grid_idx" and self.only is not None:
            builder.grid_idx = (self.only, 0, 0)
            return None
        if name in POINTER_AND_MASK:
            pointer, mask = (arguments[i] for i in POINTER_AND_MASK[name])
            kind = pointer.get_element_ty()
            key = (self.launch, builder.grid_idx, name, kind.primitive_bitwidth // 8)
            where, mask = np.broadcast_arrays(pointer.data, mask.data)
            self.addresses.setdefault(key, []).append(where[mask.astype(bool)])
            if self.only is not None:
                return TensorHandle(np.ones(where.shape, _get_np_dtype(kind)), kind)
        return getattr(type(builder), name)(builder, *arguments, **options)

    def total(self, tensor: Tensor | None = None) -> int:
        """Return the distinct bytes of each program, summed; of all tensors, or of one."""
        low, high = 0, 2**64 - 1
        if tensor is not None:
            low, high = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
        total = 0
        for key, parts in self.addresses.items():
            where = np.unique(np.concatenate(parts))
            total += key[-1] * int(((low <= where) & (where < high)).sum())
        return total


if __name__ == "__main__":
    found = machine_code(sys.argv[1:] or TARGETS)
    print(json.dumps(found))
    if faults(found):
        sys.exit(f"Triton {triton.__version__}: {faults(found)}")
