"""Prove the kernels on this machine's GPU in half an hour, and print the proof as Markdown.

    python tests/benchmark_kernels.py [--skip PART …] [--minutes M] [--updates N]

It runs from a bare checkout: of the packages that dynsize needs, torch with Triton and numpy are
enough. What a part prints stays where it fails or runs out of time; the next part then goes on,
and the exit code is 1. Without a GPU all parts are rehearsed in Triton's interpreter, at small
shapes and without torch.compile; times are then left out.
"""

# ruff: noqa: E402 (imports follow what they depend on)

import argparse
import contextlib
import functools
import importlib.util
import json
import os
import platform
import signal
import statistics
import subprocess
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
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dynsize import kernels, processes, steps
from dynsize.algorithms import shuffled
from dynsize.batching import Batch
from dynsize.config import Config, preset
from dynsize.initial import optimizer_for
from dynsize.kernels import reference, self_check
from dynsize.schedule import ends_span, learning_rate
from dynsize.simple_top_k import relaxed_top_k
from dynsize.supernet import Supernet

# What is computed: the paper's shapes and larger ones.
SHAPES = SimpleNamespace(
    dtypes=(torch.float32, torch.bfloat16),
    widths=(144, 384, 512, 1000),  # D
    labels=(10, 63, 64, 130, 200, 1000),  # U, each in 5 U frames
    top_k=((48, 16), (48, 47), (256, 128)),  # L, k
    timed_widths=(384, 512),
    timed_labels=(50, 200),
    utterances=16,  # B
    feature_frames=1000,  # the encoder has a quarter of them
    vocabulary=512,  # V
    network=dict(),  # changes of the preset `librispeech`
    updates=200,
    shown=20,  # updates from one row of the losses to the next
)
if not GPU:  # the interpreter takes milliseconds for a step of a program, and has no bfloat16
    network = dict(blocks=1, width=8, attention_heads=2, kernel=3, mel_bins=4, sizes=(1, 3, 4))
    network |= dict(front_end_channels=(2, 2, 2, 2), precision="float32")
    SHAPES = SimpleNamespace(
        **dict(dtypes=(torch.float32,), widths=(16,), labels=(3,), top_k=((4, 2),)),
        **dict(timed_widths=(16,), timed_labels=(3,), utterances=2, feature_frames=16),
        **dict(vocabulary=7, network=network, updates=2, shown=1),
    )


class OutOfTime(BaseException):
    """A part's time is over. It is no Exception, so what catches those lets it pass."""


@contextlib.contextmanager
def at_most(minutes: float) -> Iterator[None]:
    """Raise OutOfTime where what is inside takes longer."""

    def stop(*_) -> None:
        raise OutOfTime(f"more than {minutes:g} minutes")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, 60 * minutes)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@contextlib.contextmanager
def computed_by(mode: str) -> Iterator[None]:
    """Let DYNSIZE_KERNELS have this value inside."""
    before = os.environ.get("DYNSIZE_KERNELS", "auto")
    os.environ["DYNSIZE_KERNELS"] = mode
    kernels.CHOSEN.clear()
    try:
        yield
    finally:
        os.environ["DYNSIZE_KERNELS"] = before
        kernels.CHOSEN.clear()


def row(*cells: object) -> None:
    """Print a row of a table."""
    print("|", " | ".join(str(cell) for cell in cells), "|", flush=True)


def header(*names: str) -> None:
    """Print the first two lines of a table."""
    row(*names)
    row(*["---"] * len(names))


def attempt(call: Callable, *arguments) -> object:
    """Return what a call returns, or the exception that it raises."""
    try:
        return call(*arguments)
    except Exception as error:  # compilers raise errors of many kinds
        return error


def told(error: BaseException) -> str:
    """Return an error in one line that fits into a table."""
    words = " ".join(str(error).replace("|", "/").split())
    return f"{type(error).__name__}: {words[:300]}"


def shown(number: float | None, form: str) -> str:
    """Return a number, or a dash where it was not measured."""
    return "–" if number is None else format(number, form)


def load_ops() -> None:
    """Register the ops with torch. Raises ImportError where there is no Triton."""
    for room in ("residual", "ctc", "top_k"):
        importlib.import_module(f"dynsize.kernels.{room}")


# The ops: by Triton, and as one would write them in torch.


def residual(*arguments) -> tuple[Tensor, Tensor]:
    """Return y and the normalised rows."""
    return torch.ops.dynsize.gated_residual_layer_norm(*arguments)[:2]


def torchs_residual(
    x, branch, gate, scale, dropout_p, seed, weight, bias, rows, dtype, eps
) -> tuple[Tensor, Tensor]:
    """Return the same but for the dropout, which torch draws in its own way."""
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
    """Return the same where DYNSIZE_KERNELS=torch, or in float64."""
    return (relaxed_top_k(scores, k),)


def residual_inputs(utterances: int, kept: int, frames: int, width: int, dtype) -> list:
    """Return the op's arguments for three sizes, of which the first `kept` keep the layer."""
    random = self_check.normal_on(DEVICE)
    x = random(3 * utterances, frames, width)
    branch = random(kept * utterances, frames, width).detach().to(dtype).requires_grad_()
    gate = random(len(branch))
    seed = torch.arange(utterances, device=DEVICE)
    return [
        *(x, branch, gate, 0.5, 0.1, seed),
        *(random(width), random(width), len(branch), dtype, 1e-5),
    ]


def ctc_inputs(utterances: int, labels: int, frames: int, vocabulary: int) -> list:
    """Return logits and the other arguments of CTC; of the utterances one is shorter."""
    logits = self_check.normal_on(DEVICE)(utterances, frames, vocabulary)
    lengths = torch.full((utterances,), frames, device=DEVICE)
    lengths[-1] = frames - 1
    generator = torch.Generator(DEVICE).manual_seed(0)
    shape = (utterances, labels)
    targets = torch.randint(1, vocabulary, shape, generator=generator, device=DEVICE)
    count = torch.full((utterances,), labels, device=DEVICE)
    count[-1] = labels - 1
    return [logits, lengths, targets, count]


def below_softmax(loss: Callable) -> Callable:
    """Return a CTC loss as a function of logits."""
    return lambda logits, *others: loss(logits.log_softmax(-1), *others)


# The parts.


def machine() -> None:
    """Print what computes here."""
    load = attempt(importlib.import_module, "triton")
    triton = told(load) if isinstance(load, Exception) else load.__version__
    ask = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    driver = attempt(functools.partial(subprocess.check_output, ask, text=True))
    known = GPU and isinstance(driver, str)
    header("what", "here")
    row("card", processes.processor(DEVICE))
    row("driver", driver.split()[0] if known else "–")
    row("capability", torch.cuda.get_device_capability() if GPU else "–")
    row("torch", torch.__version__)
    row("Triton", triton)
    row("numpy", np.__version__)
    row("Python", platform.python_version())


def compiled() -> None:
    """Print whether each op compiles and passes its self-check, or why not."""
    config = config_of()
    header("op", "dtype", "runs", "error of its self-check, or why not")
    faults = []
    cases = [("gated_residual_layer_norm", dtype, config.width) for dtype in SHAPES.dtypes]
    cases += [("ctc_loss", torch.float32, 0), ("relaxed_top_k", torch.float32, config.layers)]
    for op, dtype, size in cases:
        reason, error = kernels.obstacle(DEVICE.type), 0.0
        if not reason:
            error, reason = self_check.compare(op, DEVICE, dtype, size)
        if reason:
            faults.append(op)
        runs = "no" if reason else "yes"
        row(op, str(dtype)[6:], runs, reason.replace("|", "/") or f"{error:.0e}")
    print(f"\nA training says: {processes.hardware(config, DEVICE)}", flush=True)
    assert not faults, f"these do not run: {', '.join(faults)}"


def errors() -> None:
    """Print the largest errors against float64, relative to the largest number of a tensor."""
    load_ops()
    header("op", "shape", "forward", "gradients", "bar")
    cases = []
    for width in SHAPES.widths:
        for dtype in SHAPES.dtypes:
            inputs = residual_inputs(2, 2, 20, width, dtype)
            bar = self_check.TOLERANCE["gated_residual_layer_norm"][dtype]
            pair = (residual, reference.gated_residual_layer_norm)
            cases.append(("residual", f"D {width}, {str(dtype)[6:]}", *pair, inputs, bar))
    for labels in SHAPES.labels:
        inputs = ctc_inputs(3, labels, 5 * labels, SHAPES.vocabulary)
        pair = (below_softmax(ctc), below_softmax(torchs_ctc))
        cases.append(("CTC", f"U {labels}, T {5 * labels}", *pair, inputs, 1e-3))
    for layers, k in SHAPES.top_k:
        inputs = [self_check.normal_on(DEVICE)(layers), k]
        bar = self_check.TOLERANCE["relaxed_top_k"][torch.float32]
        cases.append(("top-k", f"L {layers}, k {k}", top_k, torchs_top_k, inputs, bar))
    faults = []
    for op, shape, ours, truth, inputs, bar in cases:
        found = attempt(largest_errors, ours, truth, inputs)
        if isinstance(found, Exception):
            row(op, shape, told(found), "–", bar)
            faults.append(f"{op}, {shape}: fails")
            continue
        forward, gradients = found
        row(op, shape, f"{forward:.0e}", f"{gradients:.0e}", bar)
        if not (forward <= bar and gradients <= bar):  # so that NaN is a fault
            faults.append(f"{op}, {shape}: above the bar")
    assert not faults, "; ".join(faults)


def largest_errors(ours: Callable, truth: Callable, inputs: list) -> tuple[float, float]:
    """Return the largest error of the outputs, and that of the gradients."""
    results = self_check.differentiated(ours, inputs)
    exact = self_check.differentiated(truth, [self_check.in_float64(value) for value in inputs])
    pairs = zip(results, exact, strict=True)
    found = torch.stack([(a - b).abs().max() / b.abs().max() for a, b in pairs])
    learned = sum(isinstance(value, Tensor) and value.requires_grad for value in inputs)
    return found[:-learned].max().item(), found[-learned:].max().item()


FORMS = ("Triton", "torch", "compiled torch")


def times() -> None:
    """Print the milliseconds of each op, and its bytes over its time as a share of a copy's."""
    load_ops()
    size = 2**30 if GPU else 2**10
    source, target = torch.zeros(2, size, dtype=torch.uint8, device=DEVICE)
    copied = milliseconds(lambda: target.copy_(source))
    bandwidth = 2 * size / copied if copied else None  # bytes in a millisecond
    speed = shown(bandwidth and bandwidth / 1e6, ".0f")
    print(f"A copy of {size >> 20} MiB moves {speed} GB/s, bytes read and bytes written.\n")
    header(
        "op", "pass", "least MB", *(f"{form}, {what}" for form in FORMS for what in ("ms", "share"))
    )
    faults = []
    for name, ours, theirs, inputs, least in timed_cases():
        forms = [ours, theirs]
        if GPU:
            torch._dynamo.reset()
            torch._functorch.config.donated_buffer = False  # else there is one backward pass
            forms.append(torch.compile(theirs, dynamic=False))
        with computed_by("torch"):
            found = [attempt(measured, form, inputs) for form in forms]
        for number, direction in enumerate(("forward", "backward")):
            cells = []
            for of_form in found:
                failed = isinstance(of_form, Exception)
                spent = None if failed else of_form[number]
                cells.append(told(of_form) if failed else shown(spent, ".3f"))
                cells.append(shown(spent and least[number] / spent / bandwidth, ".0%"))
            cells += ["–"] * (6 - len(cells))
            row(name, direction, f"{least[number] / 1e6:.1f}", *cells)
        faults += [f"{name}: {told(failed)}" for failed in found if isinstance(failed, Exception)]
    assert not faults, "; ".join(faults)


def timed_cases() -> Iterator[tuple]:
    """Yield name, Triton's and torch's form, arguments, and the least bytes forward and backward.

    Each input and output of a pass counts once. Of CTC's log-probabilities those of the blank and
    the labels count.
    """
    utterances, frames, dtype = SHAPES.utterances, SHAPES.feature_frames // 4, SHAPES.dtypes[-1]
    for width in SHAPES.timed_widths:
        for kept in (1, 2, 3):
            inputs = residual_inputs(utterances, kept, frames, width, dtype)
            x, branch = inputs[:2]
            normed, statistics = branch.nbytes, 2 * 4 * len(branch) * frames
            forward = 2 * x.nbytes + branch.nbytes + normed + statistics
            y = len(branch) * x[0].nbytes
            backward = 2 * x.nbytes + y + normed + statistics + 2 * branch.nbytes
            name = f"residual, D {width}, {kept} of 3 sizes"
            yield name, residual, torchs_residual, inputs, (forward, backward)
    for labels in SHAPES.timed_labels:
        inputs = ctc_inputs(3 * utterances, labels, 5 * labels, SHAPES.vocabulary)
        log_probs = inputs[0].detach().log_softmax(-1).requires_grad_()
        read = 4 * log_probs[..., 0].numel() * (labels + 1)
        inputs[0] = log_probs
        name = f"CTC, V {SHAPES.vocabulary}, U {labels}, T {5 * labels}"
        yield name, ctc, torchs_ctc, inputs, (read, log_probs.nbytes)
    for layers, k in SHAPES.top_k:
        scores = self_check.normal_on(DEVICE)(layers)
        moved = 2 * scores.nbytes
        yield f"top-k, L {layers}, k {k}", top_k, torchs_top_k, [scores, k], (moved, moved)


def measured(function: Callable, inputs: list) -> tuple[float | None, float | None]:
    """Return the milliseconds of the forward pass and of the backward pass."""
    outputs = function(*inputs)
    leaves = [a for a in inputs if isinstance(a, Tensor) and a.requires_grad]
    ones = [torch.ones_like(output) for output in outputs]
    backward = functools.partial(torch.autograd.grad, outputs, leaves, ones, retain_graph=True)
    return milliseconds(functools.partial(function, *inputs)), milliseconds(backward)


def milliseconds(call: Callable) -> float | None:
    """Return the median time of a call on a GPU; on a CPU call it once."""
    if not GPU:
        call()
        return None
    return importlib.import_module("triton.testing").do_bench(call, return_mode="median")


# Whole updates.


def config_of(**changes) -> Config:
    """Return the settings of the network and its training."""
    return preset("librispeech", device=DEVICE.type, **(dict(SHAPES.network) | changes))


def batch_of(config: Config, seed: int) -> Batch:
    """Return a random batch, always the same for a seed."""
    draw = torch.Generator().manual_seed(seed)
    count, frames = SHAPES.utterances, SHAPES.feature_frames
    labels = max(2, frames // 20)
    tensors = dict(
        features=torch.randn(count, frames, config.mel_bins, generator=draw),
        lengths=torch.linspace(0.8 * frames, frames, count).long(),
        labels=torch.randint(1, SHAPES.vocabulary, (count, labels), generator=draw),
        label_lengths=torch.full((count,), labels),
        seeds=torch.arange(count) + 1000 * seed,
    )
    return Batch([], corrupt={}, **{name: value.to(DEVICE) for name, value in tensors.items()})


class Training:
    """A network with its optimizer, from one seed, of which each update is called by its number."""

    def __init__(self, config: Config, labels: int, losses_of: Callable = steps.losses_of) -> None:
        torch.manual_seed(0)
        self.config = config
        self.model = Supernet(config, labels, shuffled(config.layers, 0)).to(DEVICE)
        self.optimizer = optimizer_for(self.model, config)
        self.losses_of = losses_of

    def update(self, number: int, batch: Batch) -> Tensor:
        """Train one update, and return the CTC loss of each network, (M,)."""
        update = steps.planned(self.model, number)
        label_count = batch.labels.numel()
        loss, by_network = self.losses_of(update, batch, label_count, self.model, None)
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
    print(f"utterances of up to {SHAPES.feature_frames} feature frames. Busy: the time of kernels")
    print("over that of the update. Compiled: its losses, by torch.compile, as one graph.")
    print("" if GPU else "Nothing is compiled on a CPU.\n")
    header("computed by", "step", "ms", "launches", "GPU busy", "peak GB")
    forms = [("torch", False), ("triton", False), ("triton", True), ("torch", True)]
    faults = []
    for mode, compile in forms if GPU else forms[:2]:
        name = f"{mode}, compiled" if compile else mode
        with computed_by(mode):
            for number, step in ((0, 1), (config.updates - 1, 2)):
                found = attempt(update_cost, config, number, compile)
                if isinstance(found, Exception):
                    row(name, step, told(found), "–", "–", "–")
                    faults.append(f"{name}, step {step}: fails")
                    continue
                spent, launches, busy, peak = found
                share = shown(spent and busy / spent, ".0%")
                launches = launches if GPU else "–"
                row(name, step, shown(spent, ".1f"), launches, share, shown(peak, ".1f"))
    assert not faults, "; ".join(faults)


def update_cost(config: Config, number: int, compile: bool) -> tuple:
    """Return an update's milliseconds, launches, the kernels' milliseconds, and its peak in GB."""
    processes.hardware(config, DEVICE)  # chooses what computes, outside of what is compiled
    losses_of = steps.losses_of
    if compile:
        torch._dynamo.reset()
        losses_of = torch.compile(losses_of, fullgraph=True, dynamic=False)
    training = Training(config, SHAPES.vocabulary, losses_of)
    call = functools.partial(training.update, number, batch_of(config, 0))
    if not GPU:
        return (None, *profiled(call), None)
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
    peak = torch.cuda.max_memory_allocated() / 1e9
    return statistics.median(spent), *profiled(call), peak


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
    right = list(trained("torch"))
    header("update", "largest: torch", "Triton", "smallest: torch", "Triton", "difference")
    for number, (ours, theirs) in enumerate(zip(trained("triton"), right, strict=True), 1):
        if number % SHAPES.shown == 0 or number == 1:
            (a, b), (c, d) = theirs.tolist(), ours.tolist()
            difference = max(abs(a - c) / a, abs(b - d) / b)
            row(number, f"{a:.4f}", f"{c:.4f}", f"{b:.4f}", f"{d:.4f}", f"{difference:.0e}")


def trained(mode: str) -> Iterator[Tensor]:
    """Yield each update's loss of the largest and of the smallest network, (2,), step 1 and 2."""
    config = config_of(updates=SHAPES.updates)
    with computed_by(mode):
        processes.hardware(config, DEVICE)
        training = Training(config, SHAPES.vocabulary)
        batches = [batch_of(config, seed) for seed in range(4)]
        for number in range(config.updates):
            by_network = training.update(number, batches[number % len(batches)])
            yield by_network[[0, -1]]


PARTS = dict(
    machine=machine, compiled=compiled, errors=errors, times=times, update=update, losses=losses
)


def main(arguments: list[str] | None = None) -> int:
    """Print all parts but those that are skipped. Return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--skip", nargs="+", default=[], choices=PARTS, metavar="PART")
    parser.add_argument("--minutes", type=float, default=6.0, help="most for each part (6)")
    parser.add_argument("--updates", type=int, default=SHAPES.updates, help="of losses")
    flags = parser.parse_args(arguments)
    SHAPES.updates = flags.updates
    where = processes.processor(DEVICE)
    rehearsal = "A rehearsal on a CPU, in Triton's interpreter, at small shapes: no times."
    print(f"The kernels on one {where}." if GPU else rehearsal, flush=True)
    code = 0
    for name, part in PARTS.items():
        if name in flags.skip:
            continue
        print(f"\n## {name}\n", flush=True)
        try:
            with at_most(flags.minutes):
                part()
        except (Exception, OutOfTime) as error:
            print(f"\nThe part {name} failed: {told(error)}", flush=True)
            code = 1
    return code


if __name__ == "__main__":
    if not GPU:
        self_check.LABELS = (10,)  # 200 take the interpreter seconds
    sys.exit(main())
