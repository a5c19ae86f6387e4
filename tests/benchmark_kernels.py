"""Prove the kernels on this machine's GPU in half an hour, and print the proof as Markdown.

    python tests/benchmark_kernels.py [--skip PART …] [--minutes M] [--updates N]

It runs from a bare checkout: of the packages that dynsize needs, torch with Triton and numpy are
enough. What a part prints stays where it fails or runs out of time; the next part then goes on,
and the exit code is 1. Without a GPU all parts are rehearsed in Triton's interpreter, at small
shapes and without torch.compile; times are then left out.
"""

# ruff: noqa: E402 (imports follow what they depend on)

import argparse
import functools
import importlib.util
import json
import os
import platform
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch._functorch.config
import torch.nn.functional as F
from torch import Tensor

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
if not GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported, so it comes first
for needless in ("sentencepiece", "soundfile", "soxr", "tqdm"):  # imported, but not used here
    try:
        importlib.import_module(needless)
    except (ImportError, OSError):
        stand_in = importlib.util.module_from_spec(ModuleSpec(needless, None))
        stand_in.tqdm = stand_in.SoundFile = object
        sys.modules[needless] = stand_in
sys.path[:0] = map(str, Path(__file__).resolve().parents[:2])

if not importlib.util.find_spec("triton"):
    sys.exit("benchmark_kernels.py: triton is missing: pip install triton")

import kernel_counts
import triton

from dynsize import kernels, processes, steps
from dynsize.algorithms import shuffled
from dynsize.batching import Batch
from dynsize.config import Config, preset
from dynsize.initial import optimizer_for
from dynsize.kernels import self_check
from dynsize.schedule import ends_span, learning_rate
from dynsize.simple_top_k import relaxed_top_k
from dynsize.supernet import Supernet

# What is computed: the paper's shapes and larger ones.
DTYPES = (torch.float32, torch.bfloat16) if GPU else (torch.float32,)
SHAPES = SimpleNamespace(
    widths=(144, 384, 512, 1000),  # D
    labels=(10, 63, 64, 130, 200, 1000),  # U, each in 5 U frames
    top_k=(48, 256),  # L
    timed_widths=(384, 512),
    timed_labels=(50, 200),
    utterances=16,  # B
    frames=1000,  # of features; the encoder has a quarter of them
    vocabulary=512,  # V
    network={},  # changes of the preset `librispeech`
    updates=200,
    shown=20,  # updates from one row of the losses to the next
)
if not GPU:  # the interpreter takes milliseconds for a step of a program
    network = dict(blocks=1, width=8, attention_heads=2, kernel=3, mel_bins=4, sizes=(1, 3, 4))
    network |= dict(front_end_channels=(2, 2, 2, 2), precision="float32")
    SHAPES = SimpleNamespace(
        widths=(16,), labels=(3,), top_k=(4,), timed_widths=(16,), timed_labels=(3,),
        utterances=1, frames=16, vocabulary=7, network=network, updates=2, shown=1,
    )  # fmt: skip
FAULTS: list[str] = []  # of the part that runs


class OutOfTime(BaseException):
    """A part's time is over. It is no Exception, so what catches those lets it pass."""


def row(*cells: object) -> None:
    """Print a row of a table."""
    print("|", " | ".join(str(cell).replace("|", "/") for cell in cells), "|", flush=True)


def header(*names: str) -> None:
    """Print the first two lines of a table."""
    row(*names)
    row(*["---"] * len(names))


def attempt(call: Callable, *arguments) -> object:
    """Return what a call returns. Where it fails, note it as a fault, and return it in one line."""
    try:
        return call(*arguments)
    except Exception as error:  # compilers raise errors of many kinds
        FAULTS.append(told(error))
        return FAULTS[-1]


def told(error: BaseException) -> str:
    """Return an error in one line."""
    words = " ".join(str(error).split())
    return f"{type(error).__name__}: {words[:300]}"


def computed_by(mode: str, config: Config) -> None:
    """Let torch or Triton compute from now on; chosen here, outside of what is compiled."""
    os.environ["DYNSIZE_KERNELS"] = mode
    kernels.CHOSEN.clear()
    processes.hardware(config, DEVICE)


# The ops as one would write them in torch, and by Triton.


def torchs_residual(
    x, branch, gate, scale, dropout_p, seed, weight, bias, rows, dtype, eps
) -> tuple[Tensor, Tensor]:
    """Return y and the normalised rows, with dropout by torch's own draws."""
    dropped = F.dropout(branch, dropout_p) * gate.to(branch.dtype)[:, None, None]
    y = torch.add(x[: len(branch)], dropped, alpha=scale)
    if len(branch) < len(x):
        y = torch.cat([y, x[len(branch) :]])
    return y, F.layer_norm(y[:rows], weight.shape, weight, bias, eps).to(dtype)


def ctc(log_probs, lengths, labels, label_lengths) -> tuple[Tensor]:
    """Return the losses, (N,)."""
    return torch.ops.dynsize.ctc_loss(log_probs, lengths, labels, label_lengths, True)[:1]


def torchs_ctc(log_probs, lengths, labels, label_lengths) -> tuple[Tensor]:
    """Return the same, with the gradient that is right below a log-softmax."""
    by_frame = log_probs.transpose(0, 1)
    return (F.ctc_loss(by_frame, labels, lengths, label_lengths, reduction="none"),)


def top_k(scores: Tensor, k: int) -> tuple[Tensor]:
    """Return the relaxed weights, (L,)."""
    return torch.ops.dynsize.relaxed_top_k(scores, k)[:1]


def torchs_top_k(scores: Tensor, k: int) -> tuple[Tensor]:
    """Return the same where torch computes."""
    return (relaxed_top_k(scores, k),)


# The parts.


def machine() -> None:
    """Print what computes here."""
    header("what", "here")
    row("card", processes.processor(DEVICE))
    row("capability", torch.cuda.get_device_capability() if GPU else "–")
    row("torch", f"{torch.__version__}, CUDA {torch.version.cuda}, HIP {torch.version.hip}")
    row("Triton", triton.__version__)
    row("numpy", np.__version__)
    row("Python", platform.python_version())
    print(f"\nA training says: {processes.hardware(config_of(), DEVICE)}", flush=True)


def errors() -> None:
    """Print the largest error of each op against float64, or why Triton does not run it."""
    header("op and shape", "runs", "error, or why not", "bar")
    checks = [("gated_residual_layer_norm", d, dtype) for d in SHAPES.widths for dtype in DTYPES]
    checks += [("relaxed_top_k", layers, torch.float32) for layers in SHAPES.top_k]
    checks += [("ctc_loss", 0, torch.float32)]
    for op, size, dtype in checks:
        error, reason = self_check.compare(op, DEVICE, dtype, size)
        bar = self_check.TOLERANCE[op][dtype]
        compared(f"{op}, {size or self_check.LABELS}, {dtype}", reason or error, bar)
    for labels in SHAPES.labels:
        compared(f"ctc_loss, U {labels}, T {5 * labels}", attempt(ctc_error, labels), 1e-3)


def ctc_error(labels: int) -> float:
    """Return the largest error of CTC with U labels in 5 U frames."""
    inputs = kernel_counts.ctc_inputs(3, labels, 5 * labels, SHAPES.vocabulary, DEVICE)

    def of_logits(loss: Callable) -> Callable:
        return lambda logits, *others: loss(logits.log_softmax(-1), *others)

    return self_check.largest_error(of_logits(ctc), of_logits(torchs_ctc), inputs)


def compared(shape: str, found: float | str, bar: float) -> None:
    """Print a row for an error, or for why there is none. Above the bar it is a fault, as NaN."""
    runs = isinstance(found, float)
    if not (runs and found <= bar):
        FAULTS.append(f"{shape}: {found}")
    row(shape, "yes" if runs else "no", f"{found:.0e}" if runs else found, f"{bar:.0e}")


def times() -> None:
    """Print the milliseconds of each op, and its least bytes over them as a share of a copy's."""
    computed_by("torch", config_of())
    size = 2**30 if GPU else 2**10
    source, target = torch.zeros(2, size, dtype=torch.uint8, device=DEVICE)
    bandwidth = 2 * size / milliseconds(lambda: target.copy_(source))
    speed = f"{bandwidth / 1e6:.0f} GB/s" if GPU else "–"
    print(f"In ms, and as a share of a copy of 1 GiB: {speed}, bytes read and bytes written.\n")
    header("op", "pass", "least MB", "Triton", "torch", "compiled torch")
    for name, ours, theirs, inputs, least in timed_cases():
        torch._dynamo.reset()
        torch._functorch.config.donated_buffer = False  # else there is one backward pass
        compiled = torch.compile(theirs, dynamic=False) if GPU else theirs
        found = [attempt(measured, form, inputs) for form in (ours, theirs, compiled)]
        for number, direction in enumerate(("forward", "backward")):
            cells = []
            for spent in found:
                cell = spent if isinstance(spent, str) else "–"
                if GPU and not isinstance(spent, str):
                    share = least[number] / spent[number] / bandwidth
                    cell = f"{spent[number]:.3f} ({share:.0%})"
                cells.append(cell)
            row(name, direction, f"{least[number] / 1e6:.1f}", *cells)


def timed_cases() -> Iterator[tuple]:
    """Yield name, Triton's and torch's form, arguments, and the least bytes forward and backward.

    Each input and output of a pass counts once. Of CTC's log-probabilities those of the blank and
    the labels count.
    """
    utterances, vocabulary = SHAPES.utterances, SHAPES.vocabulary
    for width in SHAPES.timed_widths:
        for kept in (1, 2, 3):
            gate = self_check.normal_on(DEVICE)(kept * utterances)
            shape = (SHAPES.frames // 4, width, DTYPES[-1], utterances)
            inputs = kernel_counts.residual_inputs(3 * utterances, gate, *shape)
            least = kernel_counts.residual_bytes(inputs)
            name = f"residual, D {width}, {kept} of 3 sizes"
            yield name, kernel_counts.fused, torchs_residual, inputs, least
    for labels in SHAPES.timed_labels:
        inputs = kernel_counts.ctc_inputs(3 * utterances, labels, 5 * labels, vocabulary, DEVICE)
        log_probs = inputs[0]
        read = 4 * log_probs[..., 0].numel() * (labels + 1)
        name = f"CTC, V {vocabulary}, U {labels}, T {5 * labels}"
        yield name, ctc, torchs_ctc, inputs, (read, log_probs.nbytes)
    for layers in SHAPES.top_k:
        scores = self_check.normal_on(DEVICE)(layers)
        moved = 2 * scores.nbytes
        name = f"top-k, L {layers}, k {layers // 2}"
        yield name, top_k, torchs_top_k, [scores, layers // 2], (moved, moved)


def measured(function: Callable, inputs: list) -> list[float]:
    """Return the milliseconds of the forward pass and of the backward pass."""
    return [milliseconds(call) for call in kernel_counts.passes(function, inputs)]


def milliseconds(call: Callable) -> float:
    """Return the median time of a call on a GPU; on a CPU call it once, and return 1."""
    if GPU:
        return triton.testing.do_bench(call, return_mode="median")
    call()
    return 1.0


# Whole updates.


def config_of(**changes) -> Config:
    """Return the settings of the network and its training."""
    return preset("librispeech", device=DEVICE.type, **(SHAPES.network | changes))


def batch_of(config: Config, utterances: int, frames: int, labels: int, seed: int = 0) -> Batch:
    """Return a random batch, always the same for a seed. `labels`: U, of labels 1 to 6."""
    draw = torch.Generator().manual_seed(seed)
    tensors = dict(
        features=torch.randn(utterances, frames, config.mel_bins, generator=draw),
        lengths=torch.linspace(0.8 * frames, frames, utterances).long(),
        labels=torch.randint(1, 7, (utterances, labels), generator=draw),
        label_lengths=torch.full((utterances,), labels),
        seeds=torch.arange(utterances) + 1000 * seed,
    )
    return Batch([], unreadable={}, **{name: value.to(DEVICE) for name, value in tensors.items()})


class Training:
    """A network with its optimizer, from one seed, of which each update is called by its number."""

    def __init__(self, config: Config, losses_of: Callable = steps.losses_of) -> None:
        torch.manual_seed(0)
        self.config = config
        ranking = shuffled(config.layers, 0)
        self.model = Supernet(config, SHAPES.vocabulary, ranking).to(DEVICE)
        self.optimizer = optimizer_for(self.model, config)
        self.losses_of = losses_of
        shape = (SHAPES.utterances, SHAPES.frames, max(2, SHAPES.frames // 20))
        self.batches = [batch_of(config, *shape, seed) for seed in range(4)]

    def update(self, number: int) -> Tensor:
        """Train one update, and return the loss of each network, (M,)."""
        update = steps.planned(self.model, number)
        batch = self.batches[number % 4]
        loss, by_network = self.losses_of(update, batch, batch.labels.numel(), self.model, None)
        (loss + steps.extra_loss(update, self.model)).backward()
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(number, self.config) * group["factor"]
        self.optimizer.step()
        self.optimizer.zero_grad()
        if update.step == 1 and ends_span(number, self.config):
            steps.rank_layers(self.model, number)
        return by_network


def update() -> None:
    """Print what an update of each step takes, computed by torch, by Triton, and compiled."""
    config = config_of()
    print(f"{config.blocks} blocks, D {config.width}, sizes {config.sizes}, {SHAPES.utterances}")
    print(f"utterances of up to {SHAPES.frames} feature frames. Busy: the time of kernels over")
    print("that of the update. Compiled: its losses, by torch.compile, as one graph.\n")
    header("computed by", "step", "ms", "launches", "GPU busy", "peak GB")
    for compiled in (False, True) if GPU else (False,):
        for mode in ("torch", "triton"):
            for step, number in ((1, 0), (2, config.updates - 1)):
                found = attempt(update_cost, mode, config, number, compiled)
                cells = [found, "–", "–", "–"] if isinstance(found, str) else found
                row(f"{mode}, compiled" if compiled else mode, step, *cells)


def update_cost(mode: str, config: Config, number: int, compiled: bool) -> list[str]:
    """Return an update's milliseconds, launches, the GPU's busy share, and its peak in GB."""
    computed_by(mode, config)
    losses_of = steps.losses_of
    if compiled:
        torch._dynamo.reset()
        losses_of = torch.compile(losses_of, fullgraph=True, dynamic=False)
    training = Training(config, losses_of)
    call = functools.partial(training.update, number)
    if not GPU:  # of an update the interpreter makes many events, and `losses` trains some
        profiled(training.optimizer.zero_grad)
        return ["–"] * 4
    for _ in range(3):
        call()
    torch.cuda.reset_peak_memory_stats()
    spent = []
    for _ in range(10):
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        torch.cuda.synchronize()
        spent.append(1000 * (time.perf_counter() - start))
    median, peak = statistics.median(spent), torch.cuda.max_memory_allocated() / 1e9
    launches, busy = profiled(call)
    return [f"{median:.1f}", str(launches), f"{busy / median:.0%}", f"{peak:.1f}"]


def profiled(call: Callable) -> tuple[int, float]:
    """Return how many kernels and copies a call launches, and the milliseconds that they take."""
    with torch.profiler.profile() as profile:
        call()
        if GPU:
            torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder, "trace.json")
        profile.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text(errors="replace"))["traceEvents"]
    kinds = ("kernel", "gpu_memcpy", "gpu_memset")
    spent = [event["dur"] for event in events if event.get("cat") in kinds]  # in µs
    return len(spent), sum(spent) / 1000


def losses() -> None:
    """Print the losses of the largest and the smallest network of two trainings of one seed."""
    right, ours = trained("torch"), trained("triton")
    header("update", "largest: torch", "Triton", "smallest: torch", "Triton", "difference")
    for number in range(len(right)):
        if number % SHAPES.shown == 0 or number == len(right) - 1:
            (a, b), (c, d) = right[number], ours[number]
            difference = max(abs(a - c) / a, abs(b - d) / b)
            row(number, f"{a:.4f}", f"{c:.4f}", f"{b:.4f}", f"{d:.4f}", f"{difference:.0e}")


def trained(mode: str) -> list[list[float]]:
    """Return each update's loss of the largest and of the smallest network, in steps 1 and 2."""
    config = config_of(updates=SHAPES.updates)
    computed_by(mode, config)
    training = Training(config)
    by_update = [training.update(number)[[0, -1]] for number in range(config.updates)]
    return torch.stack(by_update).tolist()


PARTS = dict(machine=machine, errors=errors, times=times, update=update, losses=losses)


def main(arguments: list[str] | None = None) -> int:
    """Print all parts but those that are skipped. Return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--skip", nargs="+", default=[], choices=PARTS, metavar="PART")
    parser.add_argument("--minutes", type=float, default=6.0, help="most for each part (6)")
    parser.add_argument("--updates", type=int, default=SHAPES.updates, help="of losses")
    flags = parser.parse_args(arguments)
    SHAPES.updates = flags.updates
    rehearsal = "A rehearsal on a CPU, in Triton's interpreter, at small shapes: no times."
    print(f"The kernels on one {processes.processor(DEVICE)}." if GPU else rehearsal, flush=True)

    def stop(*_) -> None:
        raise OutOfTime(f"more than {flags.minutes:g} minutes")

    signal.signal(signal.SIGALRM, stop)
    code = 0
    for name in PARTS:
        if name in flags.skip:
            continue
        print(f"\n## {name}\n", flush=True)
        FAULTS.clear()
        signal.setitimer(signal.ITIMER_REAL, 60 * flags.minutes)
        try:
            PARTS[name]()
        except (Exception, OutOfTime) as error:
            FAULTS.append(told(error))
        signal.setitimer(signal.ITIMER_REAL, 0)
        if FAULTS:
            print(f"\nThe part {name} failed: {'; '.join(FAULTS)}", flush=True)
            code = 1
    return code


if __name__ == "__main__":
    if not GPU:
        self_check.LABELS = (10,)  # 200 take the interpreter seconds
    sys.exit(main())
