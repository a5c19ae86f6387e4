"""What can be known of the kernels without a GPU: `python -m kernels.report` prints it and writes kernels-report.json.

Registers, spills, shared memory and the occupancy that follows, from machine code for five GPUs. Bytes moved: the
distinct bytes that each program loads and stores as the kernel runs in Triton's interpreter, summed over the programs,
beside the fewest possible (each input once, each output once) and beside the chain of torch's ops.
"""

import inspect
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
from triton.runtime.interpreter import interpreter_builder
from triton.runtime.jit import JITFunction

from kernels import ctc, linear_residual, residual, residual_layer_norm

WIDTHS = (144, 256, 384, 512)
TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.int64: "i64"}
# GPU: Triton's target; shared bytes of a program, of a processor; its 32-bit registers for a warp's lane; its warps
TARGETS = {
    "sm80": (GPUTarget("cuda", 80, 32), 163 << 10, 164 << 10, 2048, 64),
    "sm90": (GPUTarget("cuda", 90, 32), 227 << 10, 228 << 10, 2048, 64),
    "sm100": (GPUTarget("cuda", 100, 32), 227 << 10, 228 << 10, 2048, 64),
    "gfx90a": (GPUTarget("hip", "gfx90a", 64), 64 << 10, 64 << 10, 2048, 32),
    "gfx942": (GPUTarget("hip", "gfx942", 64), 64 << 10, 64 << 10, 2048, 32),
}
Calls = dict[str, tuple[Callable, tuple]]


def calls(width: int, dtype: torch.dtype, gate: Tensor, frames: int, device: str = "cpu") -> Calls:
    """Every op and direction, as the function that launches it and its arguments, for R = len(gate)."""
    rows, p, factory = len(gate), 0.1, dict(device=device, dtype=dtype)
    x, branch, grad, y = (torch.randn(rows, frames, width, **factory) for _ in range(4))
    h, projection = torch.randn(rows, frames, 4 * width, **factory), torch.randn(width, 4 * width, **factory)
    weight, bias = (torch.randn(width, device=device) for _ in range(2))
    mean, rstd = (torch.randn(rows, frames, device=device) for _ in range(2))
    seed, log_probs = torch.arange(rows, device=device), torch.randn(rows, frames, width, device=device).log_softmax(-1)
    lengths, labels = torch.full((rows,), frames, device=device), torch.randint(1, width, (rows, 40), device=device)
    saved = (y, mean, rstd, weight, branch, gate, 0.5, p, seed, dtype)
    linear = (h, projection, bias, gate, 0.5, p, seed)
    return {
        "gated_residual forward": (residual.gated_residual, (x, branch, gate, 0.5, p, seed)),
        "gated_residual backward": (residual.gated_residual_backward, (grad, branch, gate, 0.5, p, seed, dtype)),
        "gated_residual_layer_norm forward": (
            residual_layer_norm.with_statistics,
            (x, branch, gate, 0.5, weight, bias, 1e-5, p, seed),
        ),
        "gated_residual_layer_norm backward": (
            residual_layer_norm.gated_residual_layer_norm_backward,
            (grad, x, *saved),
        ),
        "linear_gated_residual forward": (linear_residual.linear_gated_residual, (x, *linear)),
        "linear_gated_residual backward": (linear_residual.linear_gated_residual_backward, (grad, *linear, True)),
        "ctc_loss forward": (ctc.loss_and_gradient, (log_probs, lengths, labels, lengths // 8, True)),
    }


def registers(target: str) -> list[dict]:
    """Compiles what every call launches for the GPU `target`, and reads the machine code's needs."""
    records = []
    for width in WIDTHS:
        for dtype in (torch.float32, torch.bfloat16):
            for call, (function, arguments) in calls(width, dtype, torch.ones(2), 4).items():
                for launched in launches(function, arguments):
                    kernel = dict(call=call, kernel=launched[0].__name__, dtype=TYPES[dtype], width=width)
                    records.append(kernel | dict(target=target) | compiled(*launched, target))
    return records


def launches(function: Callable, arguments: tuple) -> list[tuple]:
    """The kernels that a call launches, each with its arguments and options; nothing runs."""
    recorded, run = [], JITFunction.run
    JITFunction.run = lambda kernel, *given, grid, warmup, **options: recorded.append((kernel, given, options))
    try:
        function(*arguments)
    finally:
        JITFunction.run = run
    return recorded


def compiled(kernel: JITFunction, arguments: tuple, options: dict, target: str) -> dict:
    """Registers of a lane, spilled bytes, shared bytes, and the share of the processor's warps that fit at once."""
    named = inspect.signature(kernel.fn).bind(*arguments).arguments
    constants = {n: v for p, (n, v) in zip(kernel.params, named.items(), strict=True) if p.is_constexpr or v is None}
    types = {name: type_of(value) if name not in constants else "constexpr" for name, value in named.items()}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(types) if types[name].startswith("*")}
    gpu, _, shared, lanes, warps = TARGETS[target]
    code = triton.compile(ASTSource(kernel, types, constants, aligned), target=gpu, options=options)
    used, spilled = cuda_resources(code.asm["cubin"]) if gpu.backend == "cuda" else amd_resources(code.asm["amdgcn"])
    most = min(warps, lanes // (-(-used // 8) * 8), shared * code.metadata.num_warps // max(1, code.metadata.shared))
    resident = most // code.metadata.num_warps * code.metadata.num_warps
    return dict(registers=used, spilled=spilled, shared=code.metadata.shared, occupancy=resident / warps)


def type_of(value: object) -> str:
    if isinstance(value, Tensor):
        return "*" + TYPES[value.dtype]
    return "fp32" if isinstance(value, float) else "i32"


def cuda_resources(cubin: bytes) -> tuple[int, int]:
    """Registers, and bytes of stack and local memory."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [tool, "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    used = {name: int(number) for name, number in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    return used["REG"], used["STACK"] + used["LOCAL"]


def amd_resources(assembly: str) -> tuple[int, int]:
    """Vector registers, and bytes of scratch memory with four for each spilled register."""
    fields = ("vgpr_count", "private_segment_fixed_size", "vgpr_spill_count", "sgpr_spill_count")
    used, scratch, vector, scalar = (int(re.search(rf"\.{name}:\s*(\d+)", assembly)[1]) for name in fields)
    return used, scratch + 4 * (vector + scalar)


class Traffic:
    """What the programs of the launches so far did: the bytes each loaded and stored, and the products they made."""

    def __init__(self) -> None:
        self.addresses: dict[tuple, list[np.ndarray]] = {}  # (launch, program, load or store, bytes each) → addresses
        self.launch, self.products = 0, 0

    def total(self, tensor: Tensor | None = None) -> int:
        """Bytes of all tensors, or of one."""
        low, high = (0, 2**64 - 1) if tensor is None else (tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes)
        self.addresses = {key: [np.unique(np.concatenate(parts))] for key, parts in self.addresses.items()}
        distinct = ((key[-1], parts[0]) for key, parts in self.addresses.items())
        return sum(size * int(((low <= where) & (where < high)).sum()) for size, where in distinct)


@contextmanager
def counted() -> Iterator[Traffic]:
    """Counts what the interpreter does inside."""
    traffic, builder = Traffic(), interpreter_builder
    names = ("create_masked_load", "create_masked_store", "create_atomic_rmw", "create_dot", "set_grid_dim")
    originals = {name: getattr(builder, name) for name in names}

    def note(kind: str, pointers, mask) -> None:
        size = pointers.get_element_ty().primitive_bitwidth // 8
        key = (traffic.launch, builder.grid_idx, kind, size)
        where, mask = np.broadcast_arrays(pointers.data, mask.data)
        traffic.addresses.setdefault(key, []).append(where[mask.astype(bool)])

    def wrapped(name: str, *arguments, **options):
        if name == "create_masked_load":
            note("load", *arguments[:2])
        elif name == "create_masked_store":
            note("store", arguments[0], arguments[2])
        elif name == "create_atomic_rmw":
            note("load", arguments[1], arguments[3])
            note("store", arguments[1], arguments[3])
        traffic.products += name == "create_dot"
        traffic.launch += name == "set_grid_dim"
        return originals[name](*arguments, **options)

    for name in names:
        setattr(builder, name, lambda *a, name=name, **k: wrapped(name, *a, **k))
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


def chain_bytes(width: int, dtype: torch.dtype, frames: int, norm: bool) -> int:
    """Bytes of torch's dropout, product with the gate, sum and, if `norm`, LayerNorm; forward and backward, 3 rows."""
    x, branch, grad = (torch.randn(3, frames, width, dtype=dtype) for _ in range(3))
    gate, weight, bias = (torch.ones(size, dtype=dtype) for size in (3, width, width))
    inputs = [tensor.requires_grad_() for tensor in ((x, branch, gate, weight, bias) if norm else (x, branch, gate))]
    with ChainBytes() as counter:
        dropped = torch.native_dropout(branch, 0.1, True)[0]
        y = torch.add(x, dropped * gate[:, None, None], alpha=0.5)
        outputs = (y, torch.nn.functional.layer_norm(y, (width,), weight, bias)) if norm else (y,)
        torch.autograd.grad(outputs, inputs, [grad] * len(outputs))
    return counter.total


def traffic() -> list[dict]:
    """Bytes moved by every call, all gates one and all gates zero; needs TRITON_INTERPRET=1."""
    records = []
    for dtype in (torch.float32, torch.bfloat16):
        for value in (1.0, 0.0):
            gate = torch.full((3,), value)
            paper, short = calls(384, dtype, gate, 250), calls(144, dtype, gate, 64)  # products take long to interpret
            for call in paper:
                function, arguments = (paper if call.startswith("gated") else short)[call]
                with counted() as seen:
                    results = function(*arguments)
                results = results if isinstance(results, tuple) else (results,)
                touched = [t for t in (*arguments, *results) if isinstance(t, Tensor) and seen.total(t)]
                record = dict(call=call, dtype=TYPES[dtype], shape=list(arguments[0].shape), gate=value)
                record |= dict(products=seen.products, bytes=seen.total(), fewest=sum(t.nbytes for t in touched))
                records.append(record | {"over fewest": record["bytes"] / record["fewest"]})
        for norm in (False, True):
            call, chain = f"torch's chain with{'' if norm else 'out'} LayerNorm", chain_bytes(384, dtype, 250, norm)
            records.append(dict(call=call, dtype=TYPES[dtype], shape=[3, 250, 384], gate=1.0, bytes=chain))
    return records


def part(name: str) -> list[dict]:
    """`registers` of a target, or `traffic`, in a process of its own: Triton either interprets or compiles."""
    environment = os.environ | dict(TRITON_INTERPRET="1" if name == "traffic" else "0")
    command = [sys.executable, "-m", "kernels.report", name]
    return json.loads(subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True).stdout)


def table(records: list[dict]) -> str:
    columns = dict.fromkeys(name for record in records for name in record)
    rows = [columns, *({n: f"{v:.3g}" if isinstance(v, float) else v for n, v in record.items()} for record in records)]
    return "\n".join("| " + " | ".join(str(row.get(name, "")) for name in columns) + " |" for row in [*rows])


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
