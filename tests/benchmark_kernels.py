"""Time the ops on this machine's GPU beside torch, as a Markdown table.

    python tests/benchmark_kernels.py

The shapes are the paper's: 16 utterances of 250 frames, three sizes stacked, of which one, two or
three keep the layer, with a branch in bfloat16. Times are medians in milliseconds, forward and
backward. No test: it asserts nothing.
"""

import functools
import sys
from collections.abc import Callable

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from dynsize import kernels
from dynsize.ctc import ctc_loss
from dynsize.kernels import reference

DEVICE = "cuda"
UTTERANCES, FRAMES, SIZES = 16, 250, 3
WIDTHS = (384, 512)
VOCABULARIES = (80, 1000)


def torchs_ctc_loss(log_probs, lengths, labels, label_lengths) -> Tensor:
    """Return what `ctc_loss` returns, by torch's kernels."""
    by_frame = log_probs.transpose(0, 1)
    return F.ctc_loss(by_frame, labels, lengths, label_lengths, reduction="none")


def milliseconds(call: Callable) -> float:
    """Return the median time of `call`."""
    return triton.testing.do_bench(call, return_mode="median")


def show(name: str, functions: list[Callable], arguments: list) -> None:
    """Print the table's row for one shape."""
    leaves = [a for a in arguments if isinstance(a, Tensor) and a.requires_grad]
    cells = [name]
    for function in functions:
        outputs = function(*arguments)
        outputs = [outputs] if isinstance(outputs, Tensor) else outputs
        ones = [torch.ones_like(output) for output in outputs]
        forward = functools.partial(function, *arguments)
        backward = functools.partial(torch.autograd.grad, outputs, leaves, ones, retain_graph=True)
        cells.append(f"{milliseconds(forward):.3f} + {milliseconds(backward):.3f}")
    print("|", " | ".join(cells), "|", flush=True)


def main() -> None:
    """Print the whole table."""
    print(torch.cuda.get_device_name())
    print("| shape | Triton | torch |\n| --- | --- | --- |")
    random = functools.partial(torch.randn, device=DEVICE, requires_grad=True)
    rows = SIZES * UTTERANCES
    seed = torch.arange(UTTERANCES, device=DEVICE)
    functions = [kernels.gated_residual_layer_norm, reference.gated_residual_layer_norm]
    for width in WIDTHS:
        for kept in range(1, SIZES + 1):
            x = random(rows, FRAMES, width)
            branch = random(kept * UTTERANCES, FRAMES, width, dtype=torch.bfloat16)
            gate = torch.ones(len(branch), device=DEVICE)
            norm = [random(width), random(width), len(branch), torch.bfloat16, 1e-5]
            arguments = [x, branch, gate, 0.5, 0.1, seed, *norm]
            show(f"residual, D {width}, {kept} of {SIZES} sizes", functions, arguments)
    lengths = torch.full((rows,), FRAMES, device=DEVICE)
    for size in VOCABULARIES:
        log_probs = random(rows, FRAMES, size)
        labels = torch.randint(1, size, (rows, FRAMES // 5), device=DEVICE)
        arguments = [log_probs, lengths, labels, lengths // 5]
        show(f"CTC, V {size}", [ctc_loss, torchs_ctc_loss], arguments)


if __name__ == "__main__":
    if not torch.cuda.is_available():
        sys.exit("benchmark_kernels.py needs a GPU, and torch sees none here")
    main()
