"""What can be known of the kernels without a GPU: `python -m kernels.report` prints it and writes kernels-report.json.

Registers, spills, shared memory and the occupancy that follows, from machine code for five GPUs. Bytes moved: the
distinct bytes that each program loads and stores as the kernel runs in Triton's interpreter, summed over the programs,
beside the fewest possible (each input once, each output once) and beside the chain of torch's ops.
"""

import functools
import inspect
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
import triton
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.interpreter import interpreter_builder as builder
from triton.runtime.jit import JITFunction

from kernels import ctc, linear_residual, residual

WIDTHS = (144, 256, 384, 512)
TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.int64: "i64"}
SCALARS = {int: "i32", float: "fp32", str: "", type(None): ""}
# GPU: Triton's target; shared bytes of a program, of a processor; its 32-bit registers for a warp's lane; its warps
TARGETS = {
    "sm80": (GPUTarget("cuda", 80, 32), 163 << 10, 164 << 10, 2048, 64),
    "sm90": (GPUTarget("cuda", 90, 32), 227 << 10, 228 << 10, 2048, 64),
    "sm100": (GPUTarget("cuda", 100, 32), 227 << 10, 228 << 10, 2048, 64),
    "gfx90a": (GPUTarget("hip", "gfx90a", 64), 64 << 10, 64 << 10, 2048, 32),
    "gfx942": (GPUTarget("hip", "gfx942", 64), 64 << 10, 64 << 10, 2048, 32),
}
OPS = dict(
    gated_residual=residual.gated_residual, gated_residual_layer_norm=residual.gated_residual_layer_norm,
    linear_gated_residual=linear_residual.linear_gated_residual, ctc_loss=ctc.ctc_loss,
)  # fmt: skip


def inputs(op: str, width: int, dtype: torch.dtype, gate: Tensor, frames: int) -> list:
    """Arguments of `op` for R = len(gate) rows on the gate's device, all of which want gradients; dropout 0.1."""
    rows, wanted = len(gate), dict(device=gate.device, dtype=dtype, requires_grad=True)
    if op == "ctc_loss":
        log_probs = torch.randn(rows, frames, width, device=gate.device).log_softmax(-1).requires_grad_()
        lengths = torch.full((rows,), frames, device=gate.device)
        return [log_probs, lengths, torch.ones(rows, frames // 5, device=gate.device, dtype=torch.int64), lengths // 5]
    x, branch, weight, bias = (torch.randn(*s, **wanted) for s in [(rows, frames, width)] * 2 + [(width,)] * 2)
    last = [gate, 0.5, 0.1, torch.arange(rows, device=gate.device)]
    if op == "linear_gated_residual":
        h, projection = torch.randn(rows, frames, 4 * width, **wanted), torch.randn(width, 4 * width, **wanted)
        return [x, h, projection, bias, *last]
    return [x, branch, *last, *((weight, bias, 1e-5) if "norm" in op else ())]


def least(op: str, arguments: list) -> tuple[float, float, str]:
    """What the forward and the backward pass must do, and its unit: bytes moved; products and sums of open rows."""
    x, gate = arguments[0], arguments[2]
    if op == "ctc_loss":  # forward: the gradient as well; backward: its product with that of the loss
        return 2 * x.nbytes, 2 * x.nbytes, "GB/s"
    learned, opened = gate.requires_grad, gate.ne(0).float().mean().item()
    if op == "linear_gated_residual":
        products = 2 * arguments[1].numel() * x.shape[-1] * arguments[4].ne(0).float().mean().item()
        return products, 2 * products, "TFLOP/s"
    forward, backward = (3 + opened, 5 + learned) if "norm" in op else (2 + opened, 1 + max(learned, opened) + learned)
    return forward * x.nbytes, backward * x.nbytes, "GB/s"


def passes(function: Callable, arguments: list) -> tuple[Callable, Callable]:
    """The forward pass, and the backward pass of one that is run here."""
    outputs = function(*arguments)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    leaves, grads = (
        [t for t in arguments if isinstance(t, Tensor) and t.requires_grad],
        [o.detach().clone() for o in outputs],
    )
    return lambda: function(*arguments), lambda: torch.autograd.grad(outputs, leaves, grads, retain_graph=True)


def registers(target: str) -> list[dict]:
    """Compiles every kernel for the GPU `target`, and reads the machine code's needs."""
    records = []
    for width, dtype, op in itertools.product(WIDTHS, (torch.float32, torch.bfloat16), OPS):
        arguments = inputs(op, width, dtype, torch.ones(2, requires_grad=True), 5)
        for launched in launches(op, arguments):
            kernel = dict(op=op, kernel=launched[0].__name__, dtype=TYPES[dtype], width=width, target=target)
            records.append(kernel | compiled(*launched, target))
    return records


def launches(op: str, arguments: list) -> list[tuple]:
    """The kernels that both directions launch, each with its arguments and options; nothing runs."""
    recorded, run = [], JITFunction.run
    JITFunction.run = lambda kernel, *given, grid, warmup, **options: recorded.append((kernel, given, options))
    try:
        passes(OPS[op], arguments)[1]()
    finally:
        JITFunction.run = run
    return recorded


def compiled(kernel: JITFunction, arguments: tuple, options: dict, target: str) -> dict:
    """Registers of a lane, spilled bytes, shared bytes, and the share of the processor's warps that fit at once."""
    named = inspect.signature(kernel.fn).bind(*arguments).arguments
    constants = {n: v for p, (n, v) in zip(kernel.params, named.items(), strict=True) if p.is_constexpr or v is None}
    types = {n: "*" + TYPES[v.dtype] if isinstance(v, Tensor) else SCALARS[type(v)] for n, v in named.items()}
    types |= dict.fromkeys(constants, "constexpr")
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(types) if types[name].startswith("*")}
    gpu, _, shared, lanes, warps = TARGETS[target]
    code = triton.compile(ASTSource(kernel, types, constants, aligned), target=gpu, options=options)
    used, spilled = cuda_resources(code.asm["cubin"]) if gpu.backend == "cuda" else amd_resources(code.asm["amdgcn"])
    most = min(warps, lanes // (-(-used // 8) * 8), shared * code.metadata.num_warps // max(1, code.metadata.shared))
    resident = most // code.metadata.num_warps * code.metadata.num_warps
    return dict(registers=used, spilled=spilled, shared=code.metadata.shared, occupancy=resident / warps)


def cuda_resources(cubin: bytes) -> tuple[int, int]:
    """Registers, and bytes of stack and local memory."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.check_output([tool, "--dump-resource-usage", file.name], text=True)
    used = {name: int(number) for name, number in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    return used["REG"], used["STACK"] + used["LOCAL"]


def amd_resources(assembly: str) -> tuple[int, int]:
    """Vector registers, and bytes of scratch memory with four for each spilled register."""
    fields = ("vgpr_count", "private_segment_fixed_size", "vgpr_spill_count", "sgpr_spill_count")
    used, scratch, vector, scalar = (int(re.search(rf"\.{name}:\s*(\d+)", assembly)[1]) for name in fields)
    return used, scratch + 4 * (vector + scalar)


class Traffic:
    """What the programs did so far: the addresses that each loaded and stored, and the products that all made."""

    def __init__(self) -> None:
        self.addresses: dict[tuple, list[np.ndarray]] = {}  # (launch, program, method, bytes of a number) → addresses
        self.launch, self.products = 0, 0

    def total(self, tensor: Tensor | None = None) -> int:
        """Distinct bytes of each program, summed; of all tensors, or of one."""
        low, high = (0, 2**64 - 1) if tensor is None else (tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes)
        distinct = ((key[-1], np.unique(np.concatenate(parts))) for key, parts in self.addresses.items())
        return sum(size * int(((low <= where) & (where < high)).sum()) for size, where in distinct)


POINTER_AND_MASK = dict(create_masked_load=(0, 1), create_masked_store=(0, 2), create_atomic_rmw=(1, 3))


@contextmanager
def counted() -> Iterator[Traffic]:
    """Counts what the interpreter does inside."""
    traffic = Traffic()

    def count(name: str, *arguments, **options):
        if name in POINTER_AND_MASK:
            pointer, mask = (arguments[i] for i in POINTER_AND_MASK[name])
            key = (traffic.launch, builder.grid_idx, name, pointer.get_element_ty().primitive_bitwidth // 8)
            where, mask = np.broadcast_arrays(pointer.data, mask.data)
            traffic.addresses.setdefault(key, []).append(where[mask.astype(bool)])
        traffic.products += name == "create_dot"
        traffic.launch += name == "set_grid_dim"
        return getattr(type(builder), name)(builder, *arguments, **options)

    names = (*POINTER_AND_MASK, "create_dot", "set_grid_dim")
    for name in names:
        setattr(builder, name, functools.partial(count, name))
    try:
        yield traffic
    finally:
        for name in names:
            delattr(builder, name)


class ChainBytes(TorchDispatchMode):
    """Adds up what torch's ops read and write: each op its inputs and outputs; views cost nothing."""

    total = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if not function.is_view and not function.name().startswith("aten::empty"):
            tensors = [t for t in torch.utils._pytree.tree_leaves((args, kwargs, result)) if isinstance(t, Tensor)]
            self.total += sum(min(t.nbytes, t.untyped_storage().nbytes()) for t in tensors)
        return result


def chain(x: Tensor, branch: Tensor, gate: Tensor, scale: float, p: float, seed: Tensor, *norm) -> tuple[Tensor, ...]:
    """Torch's ops for the first two of ours: dropout, product with the gate, sum and, where given, LayerNorm."""
    y = torch.add(x, torch.native_dropout(branch, p, True)[0] * gate.to(x.dtype)[:, None, None], alpha=scale)
    return (y, torch.nn.functional.layer_norm(y, y.shape[-1:], *norm)) if norm else (y,)


def traffic() -> list[dict]:
    """Bytes moved by every op, all gates one and all gates zero; needs TRITON_INTERPRET=1."""
    records = []
    for op, dtype, value in itertools.product(OPS, (torch.float32, torch.bfloat16), (1.0, 0.0)):
        width, frames = (384, 250) if op.startswith("gated") else (144, 60)  # products take long to interpret
        gate = torch.full((3,), value, requires_grad=value == 1)  # learned ones have the branch read in any case
        arguments = inputs(op, width, dtype, gate, frames)
        by_torch = passes(chain, arguments) if op.startswith("gated") else (None, None)
        both = zip(("forward", "backward"), passes(OPS[op], arguments), by_torch, least(op, arguments)[:2], strict=True)
        for direction, call, torchs_call, fewest in both:
            with counted() as seen:
                call()
            record = dict(op=op, direction=direction, dtype=TYPES[dtype], shape=list(arguments[0].shape), gate=value)
            record |= dict(products=seen.products, bytes=seen.total())
            if torchs_call:
                with ChainBytes() as counter:
                    torchs_call()
                record |= {"fewest": int(fewest), "over fewest": record["bytes"] / fewest, "torch": counter.total}
            records.append(record)
    return records


def part(name: str) -> list[dict]:
    """`registers` of a target, or `traffic`, in a process of its own: Triton either interprets or compiles."""
    environment = os.environ | dict(TRITON_INTERPRET="1" if name == "traffic" else "0")
    return json.loads(subprocess.check_output([sys.executable, "-m", "kernels.report", name], env=environment))


def table(records: list[dict]) -> str:
    columns = dict.fromkeys(name for record in records for name in record)
    rows = (
        [f"{v:.4g}" if isinstance(v := record.get(n, ""), float) else str(v) for n in columns] for record in records
    )
    return "\n".join("| " + " | ".join(row) + " |" for row in (columns, *rows))


def main() -> None:
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        seen, *compiled = pool.map(part, ["traffic", *TARGETS])
    report = dict(triton=triton.__version__, traffic=seen, registers=[record for part in compiled for record in part])
    Path("kernels-report.json").write_text(json.dumps(report, indent=1) + "\n")
    print(table(report["registers"]), table(seen), sep="\n\n")


if __name__ == "__main__":
    if sys.argv[1:]:
        print(json.dumps(traffic() if sys.argv[1] == "traffic" else registers(sys.argv[1])))
    else:
        main()
