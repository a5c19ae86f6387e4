"""The kernels, interpreted on a CPU or compiled on a GPU, against float64 formulas."""

import math
import os
import re
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import needs_gpu, skip_without_interpreter, tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from test_ctc import problems
from torch.utils._python_dispatch import TorchDispatchMode

import dynsize.ctc
from dynsize import kernels, steps
from dynsize.config import PRESETS, Config
from dynsize.kernels import reference, self_check
from dynsize.simple_top_k import relaxed_top_k
from dynsize.supernet import Supernet

triton = pytest.importorskip("triton")
from benchmark_kernels import batch_of  # noqa: E402

from dynsize.kernels import ctc, residual, top_k  # noqa: E402

skip_without_interpreter()

# the interpreter's numpy takes logarithms of 0
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BFLOAT16 = pytest.param(torch.bfloat16, marks=needs_gpu)
SCALE = 0.5
# the largest error, relative to the largest number of a tensor, and at least to 1
TOLERANCE = {
    torch.float64: 1e-11,  # torch's definition, on any device
    torch.float32: 1e-5,  # 80 roundings: sums over 400 frames
    torch.float16: 1e-3,  # 2 roundings
    torch.bfloat16: 8e-3,  # 2 roundings
}
CTC_TOLERANCE = 3e-5  # float32: α and β reach −100, where a rounding is 4e-6


@pytest.fixture(autouse=True)
def triton_everywhere(monkeypatch):
    """Without it, tensors on a CPU would go to torch."""
    monkeypatch.setenv("DYNSIZE_KERNELS", "triton")
    monkeypatch.setattr(self_check, "compare", lambda *_: (0.0, ""))
    kernels.CHOSEN.clear()
    yield
    kernels.CHOSEN.clear()


def formula(x, branch, gate, keep, p, weight, bias, rows) -> tuple[torch.Tensor, torch.Tensor]:
    """Return y and the normalised rows as one would write them in torch."""
    added = branch
    if keep is not None:
        added = added * keep.repeat(len(branch) // len(keep), 1, 1) / (1 - p)
    if gate is not None:
        added = added * gate[:, None, None]
    y = torch.cat([x[: len(branch)] + SCALE * added, x[len(branch) :]])
    return y, F.layer_norm(y[:rows], y.shape[-1:], weight, bias)


def differentiated(function: Callable, leaves: dict, cotangents: list) -> dict[str, torch.Tensor]:
    """Return the outputs of `function` and the gradients of all its `leaves`, by name."""
    leaves = {name: leaf.detach().requires_grad_() for name, leaf in leaves.items()}
    outputs = function(**leaves)
    cotangents = [c.to(o) for c, o in zip(cotangents, outputs, strict=True)]
    wanted = list(leaves.values())
    gradients = torch.autograd.grad(outputs, wanted, cotangents, materialize_grads=True)
    results = {f"output {i}": output for i, output in enumerate(outputs)}
    results |= {f"gradient of {name}": g for name, g in zip(leaves, gradients, strict=True)}
    return {name: result.detach() for name, result in results.items()}


def assert_close(ours: dict, truth: dict, tolerance: float) -> None:
    for name, right in truth.items():
        allowed = tolerance * max(1.0, right.abs().max().item() if right.numel() else 0.0)
        told = partial("{}: {}".format, name)
        torch.testing.assert_close(ours[name].double(), right, rtol=0, atol=allowed, msg=told)


def laid_out(tensor: torch.Tensor, layout: str) -> torch.Tensor:
    """Return the same numbers in another memory layout. "expanded": those of row 0 in all rows."""
    if layout == "every second":
        return torch.stack([tensor, tensor], -1)[..., 0]
    if layout == "transposed" and tensor.dim() > 1:
        return tensor.transpose(0, 1).contiguous().transpose(0, 1)
    if layout == "expanded":
        return tensor[:1].expand(tensor.shape)
    return tensor


def drawn(rows: int, branch_rows: int, frames: int, width: int, gate=None) -> dict:
    """Return random float32 inputs of the residual op, by name."""
    x, branch = torch.randn(rows, frames, width), torch.randn(branch_rows, frames, width)
    leaves = dict(x=x, branch=branch, weight=1 + torch.randn(width), bias=torch.randn(width))
    if gate is not None:
        leaves["gate"] = torch.tensor(gate)
    return {name: leaf.to(DEVICE) for name, leaf in leaves.items()}


@st.composite
def cases(draw):
    """Return the residual op's inputs, rows, dropout, seeds, memory layout, and used outputs."""
    utterances, sizes = draw(st.integers(1, 2)), draw(st.integers(1, 3))
    rows, branch_rows = sizes * utterances, draw(st.integers(1, sizes)) * utterances
    frames = draw(st.sampled_from([0, 1, 5, 65]))
    width = draw(st.sampled_from([1, 18, 37, 144] + ([384, 512, 1000] if frames < 65 else [])))
    torch.manual_seed(draw(st.integers(0, 2**20)))
    values = st.sampled_from([0.0, 1.0, 0.25, -1.75])
    gates = st.none() | st.lists(values, min_size=branch_rows, max_size=branch_rows)
    leaves = drawn(rows, branch_rows, frames, width, draw(gates))
    p, seed = draw(st.sampled_from([0.0, 0.25])), torch.randint(-(2**62), 2**62, (utterances,))
    layout = draw(st.sampled_from(["plain", "transposed", "expanded", "every second"]))
    used = draw(st.sampled_from([(0, 1), (0, 1), (0,), (1,)]))
    return leaves, draw(st.integers(0, rows)), p, seed.to(DEVICE), layout, used


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, BFLOAT16])
@settings(max_examples=12)
@given(case=cases())
def test_residual_is_the_formula(dtype, case):
    """Triton's outputs and gradients are those of the formula, and torch's definition's are too."""
    leaves, rows, p, seed, layout, used = case
    leaves["branch"] = leaves["branch"].to(dtype)
    leaves = {name: laid_out(leaf, layout) for name, leaf in leaves.items()}
    seed = laid_out(seed, layout)
    frames, width = leaves["x"].shape[1:]
    keep = reference.dropout_mask(seed, frames, width, p) if p else None
    shapes = [(len(leaves["x"]), frames, width), (rows, frames, width)]
    cotangents = [laid_out(torch.randn(shapes[i]).to(dtype), layout) for i in used]

    def right(x, branch, weight, bias, gate=None):
        outputs = formula(x, branch, gate, keep, p, weight, bias, rows)
        return [outputs[i] for i in used]

    def ours(x, branch, weight, bias, gate=None):
        out = dtype if x.dtype == torch.float32 else x.dtype
        others = (SCALE, p, seed, weight, bias, rows, out)
        outputs = kernels.gated_residual_layer_norm(x, branch, gate, *others)
        return [outputs[i] for i in used]

    doubled = {name: leaf.double() for name, leaf in leaves.items()}
    truth = differentiated(right, doubled, cotangents)
    assert_close(differentiated(ours, leaves, cotangents), truth, TOLERANCE[dtype])
    assert_close(differentiated(ours, doubled, cotangents), truth, TOLERANCE[torch.float64])


@pytest.mark.parametrize("mode", ["triton", "torch"])
@pytest.mark.parametrize("learned", [True, False])
def test_a_gate_of_zero_lets_nothing_through(learned, mode, monkeypatch):
    monkeypatch.setattr(kernels, "triton_runs", lambda *_: mode == "triton")
    torch.manual_seed(0)
    leaves = drawn(4, 3, 70, 20, gate=[0.0, 1.0, 0.0])
    x, branch, gate = leaves["x"], leaves["branch"], leaves["gate"]
    x[0, 0, :2] = -0.0
    x[3, 0, :2] = -0.0  # beyond the branch
    branch[0], branch[2, 4] = math.nan, math.inf
    for name, leaf in leaves.items():
        leaf.requires_grad_(learned or name != "gate")
    others = (SCALE, 0.2, torch.tensor([5], device=DEVICE), leaves["weight"], leaves["bias"])
    y, normed = kernels.gated_residual_layer_norm(x, branch, gate, *others)
    for row in (0, 2, 3):
        assert torch.equal(y[row], x[row])
        assert torch.equal(y[row].signbit(), x[row].signbit())
    (y.square().sum() + normed.square().sum()).backward()
    assert (branch.grad[[0, 2]] == 0).all() and (branch.grad[1] != 0).any()
    for name, leaf in leaves.items():
        if name != "gate":
            assert leaf.grad.isfinite().all(), name
    if learned:
        assert gate.grad[0].isnan() and gate.grad[1].isfinite()


def splitmix64(state: int) -> int:
    z = state % 2**64
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ z >> 27) * 0x94D049BB133111EB % 2**64
    return z ^ z >> 31


@pytest.mark.parametrize("at_a_time", [16, 1])
def test_dropout_draws_from_splitmix64(at_a_time, monkeypatch):
    """In the forward and the backward pass, the same for both sizes of an utterance."""
    monkeypatch.setattr(residual, "INTERPRETED", at_a_time)  # 1: as on a GPU
    monkeypatch.setattr(residual, "MOST", 8)
    assert splitmix64(0x9E3779B97F4A7C15) == 0xE220A8397B1DCDAF  # its first number from seed 0
    seeds, frames, width, p = [7, -(2**61)], 13, 10, 0.3
    right = torch.zeros(len(seeds), frames, width, dtype=torch.bool)
    for row, seed in enumerate(seeds):
        for frame in range(frames):
            for column in range(width):
                number = frame * 3 + column // 4  # a frame has ⌈10 / 4⌉ words
                word = splitmix64(seed + number * 0x9E3779B97F4A7C15)
                draw = ((word >> 16 * (column % 4) & 0xFFFF) ^ 0x8000) - 0x8000  # signed
                right[row, frame, column] = draw >= round(65536 * p) - 32768
    x = torch.zeros(4, frames, width, device=DEVICE)
    branch = torch.ones_like(x, requires_grad=True)
    seed, norm = torch.tensor(seeds, device=DEVICE), torch.ones(2, width, device=DEVICE)
    y, _ = kernels.gated_residual_layer_norm(x, branch, None, SCALE, p, seed, *norm)
    (grad,) = torch.autograd.grad(y.sum(), branch)
    assert torch.equal((y != 0).cpu(), right.repeat(2, 1, 1))
    assert torch.equal((grad != 0).cpu(), right.repeat(2, 1, 1))
    assert torch.equal(reference.dropout_mask(seed, frames, width, p).cpu(), right)


def test_layers_and_layer_gates_draw_from_different_seeds():
    """Layer l draws from seed + l and the layers' gates from seed − 1, which is no layer's."""
    seed = torch.tensor([3, 4])
    assert [kernels.layer_seed(seed, layer).tolist() for layer in range(2)] == [[3, 4], [4, 5]]
    gates = kernels.layer_gates(seed, 48, 0.3)
    assert torch.equal(
        gates, reference.dropout_mask(torch.tensor([2, 3]), 1, 48, 0.3)[:, 0].T.float()
    )
    assert gates.dtype == torch.float32 and set(gates.unique().tolist()) == {0.0, 1.0}


def assert_ctc_is_torchs(problem: tuple, tolerance: float, layout: str = "plain") -> None:
    logits, *others = (tensor.to(DEVICE) for tensor in problem)
    lengths, labels, label_lengths = others
    cotangents = [torch.linspace(-1, 2, len(logits))]

    def right(logits):
        by_frame = logits.log_softmax(-1).transpose(0, 1)
        return (F.ctc_loss(by_frame, labels, lengths, label_lengths, reduction="none"),)

    def ours(logits):
        arguments = [logits.log_softmax(-1), *others]
        return (dynsize.ctc.ctc_loss(*(laid_out(tensor, layout) for tensor in arguments)),)

    truth = differentiated(right, dict(logits=logits.double()), cotangents)
    results = differentiated(ours, dict(logits=logits.float()), cotangents)
    assert_close(results, truth, tolerance)


@settings(max_examples=10)
@given(problems(), st.sampled_from(["plain", "transposed", "every second"]))
def test_ctc_is_torchs(problem, layout):
    assert_ctc_is_torchs(problem, CTC_TOLERANCE, layout)


LONG = [(200, 250), (1000, 1003), (1000, 5000)]
LONG = [pytest.param(*case, marks=needs_gpu) for case in LONG]


@pytest.mark.parametrize("count, frames", [(63, 66), (64, 67), (130, 133), *LONG])
def test_ctc_of_many_states(count, frames):
    """From 64 labels on, several warps share the states of a frame."""
    long = count >= 200
    torch.manual_seed(0)
    logits = torch.randn(1, frames, 80) if long else 3 * torch.randn(1, frames, 5)
    labels = torch.arange(count)[None] % 4 + 1
    labels[0, 1] = labels[0, 0]  # a blank must be between them
    problem = (logits, torch.tensor([frames]), labels, torch.tensor([count]))
    assert_ctc_is_torchs(problem, tolerance=1e-3 if long else 2e-4)


@pytest.mark.parametrize("layers, k", [(2, 1), (8, 3), (16, 15), (100, 4)])
@pytest.mark.parametrize("kind", ["equal", "normal", "wide", "strided"])
def test_relaxed_top_k_is_its_definition(kind, layers, k, monkeypatch):
    torch.manual_seed(0)
    scores = torch.randn(layers) * dict(equal=0, wide=30).get(kind, 1)
    cotangent = torch.randn(layers)
    if kind == "strided":
        scores, cotangent = laid_out(scores, "every second"), laid_out(cotangent, "every second")

    def function(scores):
        return (relaxed_top_k(scores, k),)

    truth = differentiated(function, dict(scores=scores.double()), [cotangent])
    ours = differentiated(function, dict(scores=scores.to(DEVICE)), [cotangent.to(DEVICE)])
    ours = {name: result.cpu() for name, result in ours.items()}
    tolerance = TOLERANCE[torch.float32]
    if kind == "wide":  # scores of ±100, where one rounding is 4e-6
        tolerance *= 3
    assert_close(ours, truth, tolerance)


def test_ctc_of_what_cant_be_aligned():
    log_probs = torch.randn(4, 5, 4, device=DEVICE).log_softmax(-1)
    log_probs[3] = math.nan
    log_probs.requires_grad_()
    labels = [[1, 1, 1, 1], [1, 2, 99, 99], [2, 2, 2, -1], [1, 2, 3, 1]]  # with padding
    numbers = (labels, [5, 4, 5, 5], [4, 2, 3, 3])
    labels, lengths, label_lengths = (torch.tensor(n, device=DEVICE) for n in numbers)
    loss = dynsize.ctc.ctc_loss(log_probs, lengths, labels, label_lengths)
    assert loss[0] == math.inf and loss[1].isfinite() and loss[2].isfinite() and loss[3].isnan()
    loss.nansum().backward()
    grad = log_probs.grad
    assert (grad[0] == 0).all() and (grad[3] == 0).all()
    assert (grad[1, :4] != 0).any() and (grad[1, 4:] == 0).all()
    nothing = (log_probs[:0], lengths[:0], labels[:0], label_lengths[:0])
    assert dynsize.ctc.ctc_loss(*nothing).shape == (0,)


def test_what_is_too_large_is_a_value_error():
    labels = torch.ones(1, ctc.MOST_STATES // 2, dtype=torch.int64, device=DEVICE)
    one = torch.ones(1, dtype=torch.int64, device=DEVICE)
    with pytest.raises(ValueError, match="at most 2047"):
        dynsize.ctc.ctc_loss(torch.zeros(1, 1, 2, device=DEVICE), one, labels, one)
    with pytest.raises(ValueError, match="1025"):
        relaxed_top_k(torch.zeros(top_k.MOST_LAYERS + 1, device=DEVICE), 1)
    wide, one = torch.ones(1, 1, 8193, device=DEVICE), torch.ones(8193, device=DEVICE)
    with pytest.raises(ValueError, match="8193"):
        kernels.gated_residual_layer_norm(wide, wide, None, SCALE, 0.0, None, one, one)


def test_which_implementation_runs(monkeypatch):
    def decided(mode, device="cpu", interpreted=False, installed=True, reason="") -> bool:
        kernels.CHOSEN.clear()
        monkeypatch.setenv("DYNSIZE_KERNELS", mode)
        monkeypatch.setattr(triton.knobs.runtime, "interpret", interpreted)
        monkeypatch.setattr(kernels.importlib.util, "find_spec", lambda name: installed or None)
        monkeypatch.setattr(self_check, "compare", lambda *_: (0.0, reason))
        return kernels.triton_runs("ctc_loss", torch.device(device), torch.float32)

    assert decided("auto", "cuda") and decided("triton", "cpu", interpreted=True)
    assert not decided("auto", "cpu", interpreted=True) and not decided("auto", "meta")
    assert not decided("torch", "cuda") and not decided("auto", "cuda", installed=False)
    assert not decided("auto", "cuda", reason="its error is 1")
    for bad in (("triton",), ("triton", "cuda", False, False), ("cuda",)):
        with pytest.raises(ValueError, match="DYNSIZE_KERNELS"):
            decided(*bad)
    with pytest.raises(ValueError, match=r"=triton: ctc_loss .*: its error is 1"):
        decided("triton", "cuda", reason="its error is 1")
    assert not kernels.triton_runs("ctc_loss", torch.device("cuda"), torch.float64)


@pytest.mark.parametrize(
    "reason, installed, told",
    [
        ("", True, "Triton (largest error 3e-4)"),
        ("it is 1", True, "Triton (largest error 3e-4), but torch for ctc_loss, because it is 1"),
        ("", False, "torch, because triton is not installed"),
    ],
)
def test_a_training_is_told_what_computes(reason, installed, told, monkeypatch, caplog):
    """On a GPU only the op that fails goes to torch; the log names it once."""
    monkeypatch.setenv("DYNSIZE_KERNELS", "auto")
    monkeypatch.setattr(kernels.importlib.util, "find_spec", lambda name: installed or None)
    monkeypatch.setattr(self_check, "compare", lambda op, *_: (3e-4, reason * (op == "ctc_loss")))
    device = torch.device("cuda")
    for _ in range(2):
        assert kernels.describe(device, torch.bfloat16, width=512, layers=48) == told
    assert kernels.describe(torch.device("cpu"), torch.float32, 512, 48) == "torch"
    keys = [("gated_residual_layer_norm", "cuda", torch.bfloat16, 512)]
    keys += [(op, "cuda", torch.float32, n) for op, n in dict(ctc_loss=0, relaxed_top_k=48).items()]
    assert list(kernels.CHOSEN)[:3] == keys
    if installed:
        right = [f"torch, not Triton, computes ctc_loss: {reason}"] * bool(reason)
        assert [record.message for record in caplog.records] == right


OPS = dict(gated_residual_layer_norm=144, ctc_loss=0, relaxed_top_k=48)  # with sizes


@pytest.mark.parametrize("op, size", OPS.items())
def test_self_check_accepts_the_kernels(op, size, monkeypatch):
    """Also where the first use is without gradients and under autocast."""
    monkeypatch.undo()
    if DEVICE.type == "cpu":
        monkeypatch.setattr(self_check, "LABELS", (10,))  # interpreted, 200 take 6 s
    for dtype in (torch.float32, torch.float16):
        with torch.inference_mode(), torch.autocast(DEVICE.type, torch.bfloat16):
            error, reason = self_check.compare(op, DEVICE, dtype, size)
        if dtype in self_check.TOLERANCE[op]:
            assert not reason and 0 < error < 2 * max(TOLERANCE[dtype], CTC_TOLERANCE)
        else:
            assert reason == "it has no self-check in torch.float16"


@needs_gpu
@pytest.mark.parametrize("width", [16, 144, 256, 384, 512, 1000, 1024])
def test_self_check_accepts_the_residual_at_any_width(width, monkeypatch):
    monkeypatch.undo()
    _, reason = self_check.compare("gated_residual_layer_norm", DEVICE, torch.bfloat16, width)
    assert not reason


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("factor, error", [(1.01, "1.0e-02"), (math.nan, "nan")])
def test_self_check_refuses_what_is_wrong(op, factor, error, monkeypatch):
    monkeypatch.undo()
    largest = self_check.largest_error

    def changed(ours: Callable, truth: Callable, arguments: list) -> float:
        def other(*arguments):
            first, *others = truth(*arguments)
            return first * factor, *others

        return largest(other, truth, arguments)

    monkeypatch.setattr(self_check, "largest_error", changed)
    _, reason = self_check.compare(op, DEVICE, torch.float32, OPS[op])
    assert reason == f"its error is {error}, above {'3e-04' if op == 'ctc_loss' else '1e-04'}"


def test_self_check_refuses_what_does_not_compile(monkeypatch):
    def fails(*_):
        raise RuntimeError("long\nout of registers")

    monkeypatch.undo()
    monkeypatch.setattr(self_check, "ctc_error", fails)
    _, reason = self_check.compare("ctc_loss", DEVICE, torch.float32, 0)
    assert reason == "RuntimeError: out of registers"


def test_works_without_triton():
    program = """
import sys
sys.modules["triton"] = None
import torch, dynsize.training
from dynsize import kernels
x = torch.ones(1, 2, 3, requires_grad=True)
w = torch.ones(3)
y, n = kernels.gated_residual_layer_norm(x, x, torch.ones(1), 0.5, 0.1, w[:1].long(), w, w)
(y.sum() + n.sum()).backward()
assert kernels.describe(torch.device("cpu"), torch.float32, 3, 4) == "torch"
assert not any(name.startswith("triton.") for name in sys.modules)
"""
    environment = os.environ | dict(DYNSIZE_KERNELS="auto")
    subprocess.run([sys.executable, "-c", program], check=True, env=environment)


def test_kernels_import_nothing_of_dynsize_but_kernels():
    for path in Path(kernels.__file__).parent.glob("*.py"):
        imported = re.findall(r"^\s*(?:from|import) (dynsize\S*)", path.read_text(), re.MULTILINE)
        assert all(f"{name}.".startswith("dynsize.kernels.") for name in imported), path


class Launches(TorchDispatchMode):
    """Counts the ops that compute or copy something; an op of ours counts as one."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        allocates = "empty" in function.name() or function.name() == "aten::detach"
        self.count += not (function.is_view or allocates)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "mode, step, most", [("triton", 1, 1600), ("triton", 2, 1800), ("torch", 1, 9000)]
)
def test_launches_of_an_update_of_the_papers_shape(mode, step, most, monkeypatch):
    """On the device `meta`, where nothing can wait for a value. It has no autocast."""
    monkeypatch.setattr(kernels, "triton_runs", lambda *_: mode == "triton")
    config = Config(**PRESETS["librispeech"])
    with torch.device("meta"):
        model = Supernet(config, 80)
    update = steps.planned(model, config.updates // 4 if step == 1 else config.updates - 1)
    assert update.step == step
    with Launches() as launches:
        loss, _ = steps.losses_of(update, batch_of(config, 16, 1000, 50), 800.0, model, None)
        loss.backward()
    assert 1000 < launches.count <= most


@pytest.mark.parametrize("step, mode, backend", [(1, "triton", "aot_eager"), (2, "torch", "eager")])
def test_an_update_is_one_graph(step, mode, backend, monkeypatch):
    """`torch.compile` breaks nowhere, both ways. It changes no gradient, nor does Triton."""
    torch.manual_seed(0)
    config = tiny(blocks=1, sizes=(2, 4), stochastic_depth=0.3, step1_share=0.5)
    model = Supernet(config, 7).to(DEVICE)
    with torch.no_grad():
        for weight in model.parameters():  # the layers of a new one are the identity
            weight.add_(0.2 * torch.randn_like(weight))
    batch = batch_of(config, 1, 16, 2)
    update = steps.planned(model, 0 if step == 1 else config.updates - 1)
    torch._dynamo.reset()
    compiled = torch.compile(steps.losses_of, fullgraph=True, backend=backend)
    gradients = []
    ways = [("torch", steps.losses_of), ("triton", steps.losses_of), (mode, compiled)]
    for by, losses_of in ways:
        monkeypatch.setattr(kernels, "triton_runs", lambda *_, by=by: by == "triton")
        model.zero_grad()
        loss, _ = losses_of(update, batch, 2.0, model, None)
        loss.backward()
        learned = {name: weight.grad for name, weight in model.named_parameters()}
        gradients.append({name: g.double() for name, g in learned.items() if g is not None})
    assert_close(gradients[1], gradients[0], TOLERANCE[torch.float32])
    assert_close(gradients[2], gradients[0], TOLERANCE[torch.float32])
