"""Times the ops on this machine's GPU beside torch, eager and compiled: `python -m dynsize.kernels.benchmark [CSV]`.

The paper's shapes: 16 utterances of 250 frames, three sizes stacked of which none, one or two don't have the layer;
bfloat16. A line has milliseconds (median, 20th and 80th percentile), the rate that follows (of the fewest bytes, or of
the open rows' products), the card's own rate in the same run (a copy, a product of large matrices), and the memory that
the pass needs at its peak beside what is there before. Torch's side is `report.chain`, with torch's own dropout.
"""

import csv
import functools
import itertools
import sys
from collections.abc import Callable, Iterator

import torch
import triton

from dynsize.kernels.report import DIRECTIONS, OPS, chain, inputs, least, passes

UTTERANCES, FRAMES, SIZES, WIDTHS, DEVICE = 16, 250, 3, (384, 512), "cuda"
UNITS = {"GB/s": 1e6, "TFLOP/s": 1e9}  # of what is done in a millisecond
HEADER = (
    "card driver torch triton op width closed runs pass median p20 p80 rate limit unit MB".split()
)


def timed(call: Callable) -> list[float]:
    """Milliseconds: median, 20th and 80th percentile."""
    return triton.testing.do_bench(call, quantiles=[0.5, 0.2, 0.8])


def peak(call: Callable) -> float:
    """The MB that `call` needs."""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    return (torch.cuda.max_memory_allocated() - before) / 1e6


def limits() -> dict[str, float]:
    """The card's rate of copying, read and written, and of bfloat16 products."""
    a, b = (torch.randn(8192, 8192, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    copied, multiplied = timed(lambda: a.copy_(b))[0], timed(lambda: a @ b)[0]
    return {
        "GB/s": 2 * a.nbytes / copied / UNITS["GB/s"],
        "TFLOP/s": 2 * 8192**3 / multiplied / UNITS["TFLOP/s"],
    }


def lines(op: str, width: int, closed: int, limit: dict[str, float]) -> Iterator[list]:
    """What HEADER names from `op` on, for each implementation and direction, with so many sizes closed."""
    gate = (torch.arange(SIZES, device=DEVICE) >= closed).float().repeat_interleave(UTTERANCES)
    plain = functools.partial(chain, op)
    torch.compiler.reset()  # it falls back to eager, silently, after eight shapes of one function
    for run, function in dict(triton=OPS[op], eager=plain, compiled=torch.compile(plain)).items():
        arguments = inputs(op, width, torch.bfloat16, gate, FRAMES)
        if op == "linear_gated_residual":  # backward, for h and for the weight
            whole, unit = 2 * arguments[1].numel() * width * gate.mean().item(), "TFLOP/s"
            amounts = whole, 2 * whole
        else:
            amounts, unit = least(op, arguments, gate), "GB/s"
        for direction, call, amount in zip(
            DIRECTIONS, passes(function, arguments), amounts, strict=True
        ):
            milliseconds = timed(call)
            rates = amount / milliseconds[0] / UNITS[unit], limit[unit]
            numbers = [f"{number:.4g}" for number in (*milliseconds, *rates)]
            yield [
                op,
                width,
                f"{closed}/{SIZES}",
                run,
                direction,
                *numbers,
                unit,
                f"{peak(call):.4g}",
            ]


def main(path: str = "kernels-benchmark.csv") -> None:
    driver, limit = getattr(torch._C, "_cuda_getDriverVersion", str)(), limits()
    card = [torch.cuda.get_device_name(), driver, torch.__version__, triton.__version__]
    with open(path, "w", newline="") as file:
        writers = csv.writer(file), csv.writer(sys.stdout, delimiter=" ")
        cases = itertools.product(OPS, WIDTHS, range(SIZES))
        measured = ([*card, *line] for case in cases for line in lines(*case, limit))
        for row in itertools.chain([HEADER], measured):
            for writer in writers:
                writer.writerow(row)


if __name__ == "__main__":
    if not torch.cuda.is_available():
        sys.exit(
            "dynsize.kernels.benchmark needs a GPU, and torch sees none here. kernels.report needs none"
        )
    main(*sys.argv[1:])
