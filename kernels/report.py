"""What can be known of the kernels without a GPU: `python -m dynsize.kernels.report` prints it and writes kernels-report.json.

Registers, spills, shared memory and the occupancy that follows, from machine code for five GPUs. Bytes moved: the
distinct bytes that each program loads and stores as the kernel runs in Triton's interpreter, summed over the programs,
beside the fewest possible (each input once, each output once) and beside the chain of torch's ops.
"""

import csv
import functools
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
import triton
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.runtime.interpreter import interpreter_builder as builder
from triton.runtime.jit import JITFunction

from dynsize.kernels import fused

WIDTHS = (144, 256, 384, 512)
TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# GPU: Triton's target; shared bytes of a program, of a processor; its 32-bit registers for a warp's lane; its warps
TARGETS = {
    "sm80": (GPUTarget("cuda", 80, 32), 163 << 10, 164 << 10, 2048, 64),
    "sm90": (GPUTarget("cuda", 90, 32), 227 << 10, 228 << 10, 2048, 64),
    "sm100": (GPUTarget("cuda", 100, 32), 227 << 10, 228 << 10, 2048, 64),
    "gfx90a": (GPUTarget("hip", "gfx90a", 64), 64 << 10, 64 << 10, 2048, 32),
    "gfx942": (GPUTarget("hip", "gfx942", 64), 64 << 10, 64 << 10, 2048, 32),
}
OPS = {op: getattr(fused, op) for op in fused.__all__}
DIRECTIONS = "forward", "backward"
POINTER_AND_MASK = dict(
    create_masked_load=(0, 1), create_masked_store=(0, 2), create_atomic_rmw=(1, 3)
)


def inputs(op: str, width: int, dtype: torch.dtype, gate: Tensor, frames: int) -> list:
    """Arguments of `op` for R = len(gate) rows on the gate's device, all of which want gradients; dropout 0.1."""
    rows, wanted = len(gate), dict(device=gate.device, dtype=dtype, requires_grad=True)
    if op == "ctc_loss":
        log_probs = (
            torch.randn(rows, frames, width, device=gate.device).log_softmax(-1).requires_grad_()
        )
        lengths = torch.full((rows,), frames, device=gate.device)
        return [
            log_probs,
            lengths,
            torch.randint(1, width, (rows, frames // 5), device=gate.device),
            lengths // 5,
        ]
    x, branch, weight, bias = (
        torch.randn(*s, **wanted) for s in [(rows, frames, width)] * 2 + [(width,)] * 2
    )
    last = [gate, 0.5, 0.1, torch.arange(rows, device=gate.device)]
    if op == "linear_gated_residual":
        h, projection = (
            torch.randn(rows, frames, 4 * width, **wanted),
            torch.randn(width, 4 * width, **wanted),
        )
        return [x, h, projection, bias, *last]
    return [x, branch, *last, *((weight, bias, 1e-5) if "norm" in op else ())]


def chain(op: str, x: Tensor, *others) -> tuple[Tensor, ...]:
    """`op` as one would write it in torch, with torch's own dropout and CTC; gates by row."""
    if op == "ctc_loss":
        lengths, labels, label_lengths = others
        return (F.ctc_loss(x.transpose(0, 1), labels, lengths, label_lengths, reduction="none"),)
    if op == "linear_gated_residual":
        others = (F.linear(*others[:3]), *others[3:])
    branch, gate, scale, p, _, *norm = others
    y = torch.add(
        x, torch.native_dropout(branch, p, True)[0] * gate.to(x.dtype)[:, None, None], alpha=scale
    )
    return (y, F.layer_norm(y, y.shape[-1:], *norm)) if norm else (y,)


def least(op: str, arguments: list, gate: Tensor) -> tuple[float, float]:
    """Bytes that the forward and the backward pass must move: each input once, unless its row is closed and the gate
    not learned, and each output once. x's gradient is y's where there is no LayerNorm."""
    x, second, third, *_ = (t.nbytes for t in arguments if isinstance(t, Tensor))
    learned, opened = gate.requires_grad, gate.ne(0).float().mean().item()
    needed = max(learned, opened)
    if (
        op == "ctc_loss"
    ):  # forward: the gradient as well; backward: its product with that of the loss
        return 2 * x, 2 * x
    if op == "linear_gated_residual":  # second: h, third: the weight
        read = (opened > 0) * third, needed * (x + second) + (needed > 0) * third
        return 2 * x + opened * second + read[0], read[1] + second + third
    return (
        ((3 + opened) * x, (5 + learned) * x)
        if "norm" in op
        else ((2 + opened) * x, (1 + needed + learned) * x)
    )


def passes(function: Callable, arguments: list) -> tuple[Callable, Callable]:
    """The forward pass, and the backward pass of one that is run here."""
    outputs = function(*arguments)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    leaves = [t for t in arguments if isinstance(t, Tensor) and t.requires_grad]
    grads = [torch.randn_like(output) for output in outputs]
    return lambda: function(*arguments), lambda: torch.autograd.grad(
        outputs, leaves, grads, retain_graph=True
    )


def registers(target: str) -> list[dict]:
    """Compiles every kernel for the GPU `target`, as a launch there would, and reads the machine code's needs. Leaves
    this process unable to launch."""
    records, run, gpu = [], JITFunction.run, TARGETS[target][0]
    driver = dict(
        get_current_target=lambda: gpu,
        get_current_device=lambda: 0,
        get_current_stream=lambda device: 0,
    )
    triton.runtime.driver.set_active(SimpleNamespace(**driver))
    for width, dtype, op in itertools.product(WIDTHS, TYPES, OPS):
        codes = []
        JITFunction.run = lambda *a, codes=codes, warmup, **options: codes.append(
            run(*a, warmup=True, **options)
        )
        passes(OPS[op], inputs(op, width, TYPES[dtype], torch.ones(2, requires_grad=True), 5))[1]()
        named = dict(op=op, dtype=dtype, width=width, target=target)
        records += [named | resources(code, target) for code in codes]
    return records


def resources(code: CompiledKernel, target: str) -> dict:
    """Registers of a lane; spilled ones, and bytes of stack and local memory; shared bytes; the share of the
    processor's warps that fit at once."""
    gpu, _, most_shared, lanes, warps = TARGETS[target]
    names, text = (
        "vgpr_count private_segment_fixed_size vgpr_spill_count sgpr_spill_count",
        code.asm.get("amdgcn"),
    )
    if gpu.backend == "cuda":
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(code.asm["cubin"])
            file.flush()
            tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
            names, text = (
                "REG STACK LOCAL",
                subprocess.check_output([tool, "-res-usage", file.name], text=True),
            )
    used, *spilled = (int(re.search(rf"\b{name}:\s*(\d+)", text)[1]) for name in names.split())
    kernel, shared, group = code.metadata.name, code.metadata.shared, code.metadata.num_warps
    fitting = (
        min(warps, lanes // (-(-used // 8) * 8), most_shared * group // max(1, shared))
        // group
        * group
    )
    return dict(
        kernel=kernel,
        registers=used,
        spilled=sum(spilled),
        shared=shared,
        occupancy=round(fitting / warps, 2),
    )


class Traffic:
    """Inside of it, counts what the programs do as they are interpreted: the addresses that each loads and stores, and
    the products that all make."""

    def __init__(self) -> None:
        self.addresses: dict[
            tuple, list[np.ndarray]
        ] = {}  # (launch, program, method, bytes of a number) → addresses
        self.launch, self.products = 0, 0

    def __enter__(self) -> "Traffic":
        for name in (*POINTER_AND_MASK, "create_dot", "set_grid_dim"):
            setattr(builder, name, functools.partial(self.count, name))
        return self

    def __exit__(self, *_) -> None:
        for name in (*POINTER_AND_MASK, "create_dot", "set_grid_dim"):
            delattr(builder, name)

    def count(self, name: str, *arguments, **options):
        if name in POINTER_AND_MASK:
            pointer, mask = (arguments[i] for i in POINTER_AND_MASK[name])
            key = (
                self.launch,
                builder.grid_idx,
                name,
                pointer.get_element_ty().primitive_bitwidth // 8,
            )
            where, mask = np.broadcast_arrays(pointer.data, mask.data)
            self.addresses.setdefault(key, []).append(where[mask.astype(bool)])
        self.products += name == "create_dot"
        self.launch += name == "set_grid_dim"
        return getattr(type(builder), name)(builder, *arguments, **options)

    def total(self, tensor: Tensor | None = None) -> int:
        """Distinct bytes of each program, summed; of all tensors, or of one."""
        low, high = (
            (0, 2**64 - 1)
            if tensor is None
            else (tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes)
        )
        distinct = (
            (key[-1], np.unique(np.concatenate(parts))) for key, parts in self.addresses.items()
        )
        return sum(size * int(((low <= where) & (where < high)).sum()) for size, where in distinct)


class ChainBytes(TorchDispatchMode):
    """Adds up what torch's ops read and write: each op its inputs and outputs; views cost nothing."""

    total = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if not function.is_view and not function.name().startswith("aten::empty"):
            tensors = [
                t
                for t in torch.utils._pytree.tree_leaves((args, kwargs, result))
                if isinstance(t, Tensor)
            ]
            self.total += sum(min(t.nbytes, t.untyped_storage().nbytes()) for t in tensors)
        return result


def traffic() -> list[dict]:
    """Bytes moved by every op's kernels, all gates one and all gates zero; needs TRITON_INTERPRET=1."""
    records = []
    for op, dtype, value in itertools.product(OPS, TYPES, (1.0, 0.0)):
        width, frames = (
            (384, 250) if op.startswith("gated") else (144, 60)
        )  # products take long to interpret
        gate = torch.full(
            (3,), value, requires_grad=value == 1
        )  # learned ones have the branch read in any case
        arguments = inputs(op, width, TYPES[dtype], gate, frames)
        ours, torchs = passes(OPS[op], arguments), passes(functools.partial(chain, op), arguments)
        for direction, call, by_torch, fewest in zip(
            DIRECTIONS, ours, torchs, least(op, arguments, gate), strict=True
        ):
            with Traffic() as seen:
                call()
            with ChainBytes() as chained:
                by_torch()
            record = dict(
                op=op, direction=direction, dtype=dtype, shape=list(arguments[0].shape), gate=value
            )
            record |= dict(
                products=seen.products, bytes=seen.total(), least=int(fewest), torch=chained.total
            )
            records.append(record | {"over least": round(seen.total() / fewest, 4)})
    return records


def part(name: str) -> list[dict]:
    """`registers` of a target, or `traffic`, in a process of its own: Triton either interprets or compiles."""
    environment = os.environ | dict(TRITON_INTERPRET="1" if name == "traffic" else "0")
    return json.loads(
        subprocess.check_output(
            [sys.executable, "-m", "dynsize.kernels.report", name], env=environment
        )
    )


def main() -> None:
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        seen, *compiled = pool.map(part, ["traffic", *TARGETS])
    report = dict(
        triton=triton.__version__,
        traffic=seen,
        registers=[record for part in compiled for record in part],
    )
    Path("kernels-report.json").write_text(json.dumps(report, indent=1) + "\n")
    for records in (report["registers"], seen):
        writer = csv.DictWriter(sys.stdout, records[0], delimiter="\t")
        writer.writeheader()
        writer.writerows(records)


if __name__ == "__main__":
    if sys.argv[1:]:
        print(json.dumps(traffic() if sys.argv[1] == "traffic" else registers(sys.argv[1])))
    else:
        main()
