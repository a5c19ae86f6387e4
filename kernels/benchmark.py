"""Time the ops on this machine's GPU beside torch, eager and compiled, as a Markdown table.

    python -m dynsize.kernels.benchmark

The shapes are the paper's: 16 utterances of 250 frames, three sizes stacked, of which one, two or
three keep the layer, with a branch in bfloat16. Times are medians in milliseconds, forward and
backward. `limit` is the time that copying takes for the bytes that each pass must move.
"""

import functools
import itertools
import sys
from collections.abc import Callable

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from dynsize import kernels

DEVICE = "cuda"
UTTERANCES, FRAMES, SIZES = 16, 250, 3
WIDTHS = (384, 512)
VOCABULARIES = (80, 1000)
COLUMNS = ("limit", "Triton", "torch", "compiled")


def residual_inputs(
    rows: int,
    gate: Tensor,
    width: int,
    frames: int,
    dtype: torch.dtype = torch.bfloat16,
) -> list:
    """Return arguments of `gated_residual_layer_norm`, of which the tensors want gradients.

    `gate`: (R',). As many rows are normalised as the branch has.
    """
    random = functools.partial(torch.randn, device=gate.device, requires_grad=True)
    x = random(rows, frames, width)
    branch = random(len(gate), frames, width, dtype=dtype)
    seed = torch.zeros(1, dtype=torch.int64, device=gate.device)
    weight, bias = random(width), random(width)
    return [x, branch, gate, 0.5, 0.1, seed, weight, bias, len(gate), dtype]


def chain(x, branch, gate, scale, dropout_p, _, weight, bias, rows, dtype) -> tuple:
    """Return what `gated_residual_layer_norm` returns, as one would write it in torch."""
    dropped = torch.native_dropout(branch, dropout_p, True)[0]
    added = dropped * gate.to(branch.dtype)[:, None, None]
    y = torch.add(x[: len(branch)], added, alpha=scale)
    if len(branch) < len(x):
        y = torch.cat([y, x[len(branch) :]])
    normed = F.layer_norm(y[:rows], weight.shape, weight, bias)
    return y, normed.to(dtype)


def residual_bytes(arguments: list) -> tuple[int, int]:
    """Return the bytes that forward and backward must move: each input and output once.

    y is read backward only in the normalised rows, and the branch only where the gate learns.
    """
    x, branch, gate = arguments[:3]
    rows, dtype = arguments[-2:]
    y = rows * x[0].nbytes
    normed = rows * x[0].numel() * dtype.itemsize
    opened = int((gate != 0).sum()) * branch[0].nbytes
    learned = branch.nbytes if gate.requires_grad else 0
    forward = 2 * x.nbytes + opened + normed
    backward = 2 * x.nbytes + y + normed + branch.nbytes + learned
    return forward, backward


def ctc_inputs(utterances: int, labels: int, frames: int, device: str) -> list:
    """Return arguments of `ctc_loss`, with one label for each five frames."""
    logits = torch.randn(utterances, frames, labels, device=device)
    lengths = torch.full((utterances,), frames, device=device)
    targets = torch.randint(1, labels, (utterances, frames // 5), device=device)
    log_probs = logits.log_softmax(-1).requires_grad_()
    return [log_probs, lengths, targets, lengths // 5]


def torchs_ctc_loss(log_probs, lengths, labels, label_lengths) -> Tensor:
    """Return what `ctc_loss` returns, by torch's kernels."""
    by_frame = log_probs.transpose(0, 1)
    return F.ctc_loss(by_frame, labels, lengths, label_lengths, reduction="none")


def passes(function: Callable, arguments: list) -> tuple[Callable, Callable]:
    """Return calls of the forward pass and of the backward pass."""
    outputs = function(*arguments)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    leaves = [a for a in arguments if isinstance(a, Tensor) and a.requires_grad]
    grads = [torch.ones_like(output) for output in outputs]
    backward = functools.partial(torch.autograd.grad, outputs, leaves, grads, retain_graph=True)
    return functools.partial(function, *arguments), backward


def milliseconds(call: Callable) -> float:
    """Return the median time of `call`."""
    return triton.testing.do_bench(call, return_mode="median")


def show(name: str, limits: tuple[float, float], functions: list, arguments: list) -> None:
    """Print the table's row for one shape."""
    torch.compiler.reset()  # after eight shapes of one function it would fall back to eager
    ours, theirs = functions
    times = [limits]
    for function in (ours, theirs, torch.compile(theirs)):
        forward, backward = passes(function, arguments)
        times.append((milliseconds(forward), milliseconds(backward)))
    cells = [f"{forward:.3f} + {backward:.3f}" for forward, backward in times]
    print(f"| {name} |", " | ".join(cells), "|", flush=True)


def main() -> None:
    """Print the whole table."""
    source = torch.empty(2**26, device=DEVICE)
    target = torch.empty_like(source)
    rate = 2 * source.nbytes / milliseconds(lambda: target.copy_(source))  # bytes a millisecond
    print(f"{torch.cuda.get_device_name()} copies {rate / 1e6:.0f} GB/s")
    print("| shape |", " | ".join(COLUMNS), "|")
    print("| --- |", " | ".join(["---"] * len(COLUMNS)), "|")
    shapes = itertools.product(WIDTHS, range(1, SIZES + 1))
    for width, kept in shapes:
        gate = torch.ones(kept * UTTERANCES, device=DEVICE)
        arguments = residual_inputs(SIZES * UTTERANCES, gate, width, FRAMES)
        limits = tuple(size / rate for size in residual_bytes(arguments))
        functions = [kernels.gated_residual_layer_norm, chain]
        show(f"residual, D {width}, {kept} of {SIZES} sizes", limits, functions, arguments)
    functions = [kernels.ctc_loss, torchs_ctc_loss]
    for labels in VOCABULARIES:
        arguments = ctc_inputs(SIZES * UTTERANCES, labels, FRAMES, DEVICE)
        limit = 2 * arguments[0].nbytes / rate  # the gradient is written, then multiplied
        show(f"CTC, V {labels}", (limit, limit), functions, arguments)


if __name__ == "__main__":
    if not torch.cuda.is_available():
        sys.exit("dynsize.kernels.benchmark needs a GPU, and torch sees none here")
    main()
