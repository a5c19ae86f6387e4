"""Times the ops on this machine's GPU beside torch, eager and compiled: `python -m kernels.benchmark [CSV]`.

The paper's shapes: 16 utterances of 250 frames, three sizes stacked, none, a third or two thirds of the gates zero;
bfloat16. A line has milliseconds (median, 20th and 80th percentile), the rate that follows (of the fewest bytes, or of
the open rows' products), the card's own rate in the same run (a copy, a product of large matrices), and peak memory.
"""

import csv
import itertools
import sys
from collections.abc import Callable

import torch
import triton

from kernels import reference
from kernels.report import OPS, inputs, least, passes

UNITS = {"GB/s": 1e6, "TFLOP/s": 1e9}  # of what is done in a millisecond
HEADER = "card driver torch triton op width closed pass runs median p20 p80 rate limit unit MB".split()


def timed(function: Callable) -> list[float]:
    """Milliseconds: median, 20th and 80th percentile."""
    return triton.testing.do_bench(function, quantiles=[0.5, 0.2, 0.8])


def limits() -> dict[str, float]:
    """The card's rate of copying, read and written, and of bfloat16 products."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    copied, multiplied = timed(lambda: a.copy_(b))[0], timed(lambda: a @ b)[0]
    return {"GB/s": 2 * a.nbytes / copied / UNITS["GB/s"], "TFLOP/s": 2 * 8192**3 / multiplied / UNITS["TFLOP/s"]}


def main(path: str = "kernels-benchmark.csv") -> None:
    limit, driver = limits(), getattr(torch._C, "_cuda_getDriverVersion", str)()
    card = (torch.cuda.get_device_name(), driver, torch.__version__, triton.__version__)
    file = open(path, "w", newline="")  # noqa: SIM115
    writers = csv.writer(file), csv.writer(sys.stdout, delimiter=" ")
    rows = [HEADER]
    for op, width, closed in itertools.product(OPS, (384, 512), (0, 16, 32)):
        gate = (torch.randperm(48, device="cuda") >= closed).float()
        runs = dict(triton=OPS[op], eager=getattr(reference, op), compiled=torch.compile(getattr(reference, op)))
        for run, function in runs.items():
            arguments = inputs(op, width, torch.bfloat16, gate, 250)
            *amounts, unit = least(op, arguments)
            for direction, call, amount in zip(
                ("forward", "backward"), passes(function, arguments), amounts, strict=True
            ):
                torch.cuda.reset_peak_memory_stats()
                median, p20, p80 = timed(call)
                numbers = (median, p20, p80, amount / median / UNITS[unit], limit[unit])
                row = [*card, op, width, f"{closed}/48", direction, run, *(f"{n:.4g}" for n in numbers), unit]
                rows.append([*row, torch.cuda.max_memory_allocated() >> 20])
                for writer in writers:
                    writer.writerows(rows)
                rows = []


if __name__ == "__main__":
    if not torch.cuda.is_available():
        sys.exit("kernels.benchmark needs a GPU, and torch sees none here. kernels.report needs none")
    main(*sys.argv[1:])
