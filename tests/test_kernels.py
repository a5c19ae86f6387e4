"""The kernels, interpreted on a CPU or compiled on a GPU, against float64 formulas."""

import ast
import dataclasses
import math
import os
import subprocess
import sys
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import one_update, tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from test_ctc import problems

import dynsize.ctc
from dynsize import kernels
from dynsize.kernels import reference, self_check
from dynsize.training import Trainer

triton = pytest.importorskip("triton")
from dynsize.kernels import ctc, residual  # noqa: E402

# the interpreter's numpy takes logarithms of 0
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BFLOAT16 = pytest.param(torch.bfloat16, marks=pytest.mark.gpu)
DTYPES = [torch.float32, torch.float16, BFLOAT16]
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
    kernels.decide.cache_clear()
    monkeypatch.setattr(self_check, "error_of", lambda *_: 0.0)
    yield
    kernels.decide.cache_clear()


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
    gradients = torch.autograd.grad(outputs, list(leaves.values()), cotangents)
    results = {f"output {i}": output for i, output in enumerate(outputs)}
    results |= {f"gradient of {name}": g for name, g in zip(leaves, gradients, strict=True)}
    return {name: result.detach() for name, result in results.items()}


def assert_close(ours: dict, truth: dict, tolerance: float) -> None:
    for name, right in truth.items():
        allowed = tolerance * max(1.0, right.abs().max().item() if right.numel() else 0.0)
        torch.testing.assert_close(
            ours[name].double(),
            right,
            rtol=0,
            atol=allowed,
            msg=lambda text, n=name: f"{n}: {text}",
        )


def strange(tensor: torch.Tensor, layout: str) -> torch.Tensor:
    """Return the same numbers in another memory layout, or one row's numbers for all rows."""
    if layout == "transposed" and tensor.dim() == 3:
        return tensor.transpose(0, 2).contiguous().transpose(0, 2)
    if layout == "expanded" and tensor.dim() == 3 and len(tensor):
        return tensor[:1].expand(tensor.shape)
    return tensor


def drawn(rows: int, branch_rows: int, frames: int, width: int, gate=None) -> dict:
    """Return random float32 inputs of the residual op, by name."""
    leaves = dict(
        x=torch.randn(rows, frames, width), branch=torch.randn(branch_rows, frames, width)
    )
    leaves |= dict(weight=1 + torch.randn(width), bias=torch.randn(width))
    return leaves if gate is None else leaves | dict(gate=gate)


@st.composite
def cases(draw):
    """Return the residual op's inputs, rows, dropout, seeds, and a memory layout."""
    utterances, sizes = draw(st.integers(1, 2)), draw(st.integers(1, 3))
    rows, branch_rows = sizes * utterances, draw(st.integers(1, sizes)) * utterances
    frames = draw(st.sampled_from([1, 5, 65, 130]))
    width = draw(st.sampled_from([1, 18, 37, 144] + ([1000] if frames < 65 else [])))
    torch.manual_seed(draw(st.integers(0, 2**20)))
    gate = None
    if draw(st.booleans()):
        values = st.sampled_from([0.0, 1.0, 0.25, -1.75])
        gate = torch.tensor([draw(values) for _ in range(branch_rows)])
    p, seed = draw(st.sampled_from([0.0, 0.25])), torch.randint(-(2**62), 2**62, (utterances,))
    leaves = drawn(rows, branch_rows, frames, width, gate)
    layout = draw(st.sampled_from(["plain", "transposed", "expanded"]))
    return leaves, draw(st.integers(0, rows)), p, seed, layout


@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=20)
@given(case=cases())
def test_residual_is_the_formula(dtype, case):
    """Triton's outputs and gradients are those of the formula, and torch's definition's are too."""
    leaves, rows, p, seed, layout = case
    leaves = {name: strange(leaf.to(DEVICE), layout) for name, leaf in leaves.items()}
    leaves["branch"] = leaves["branch"].to(dtype)
    seed = seed.to(DEVICE)
    frames, width = leaves["x"].shape[1:]
    keep = reference.kept(seed, frames, width, p) if p else None
    cotangents = []
    for number in (len(leaves["x"]), rows):
        cotangents.append(strange(torch.randn(number, frames, width), layout).to(dtype))

    def right(x, branch, weight, bias, gate=None):
        return formula(x, branch, gate, keep, p, weight, bias, rows)

    def ours(x, branch, weight, bias, gate=None):
        out = dtype if x.dtype == torch.float32 else x.dtype
        others = (SCALE, p, seed, weight, bias, rows, out)
        return kernels.gated_residual_layer_norm(x, branch, gate, *others)

    doubled = {name: leaf.double() for name, leaf in leaves.items()}
    truth = differentiated(right, doubled, cotangents)
    assert_close(differentiated(ours, leaves, cotangents), truth, TOLERANCE[dtype])
    assert_close(differentiated(ours, doubled, cotangents), truth, TOLERANCE[torch.float64])


@pytest.mark.parametrize("mode", ["triton", "torch"])
@pytest.mark.parametrize("learned", [True, False])
def test_a_gate_of_zero_lets_nothing_through(learned, mode, monkeypatch):
    monkeypatch.setattr(kernels, "triton_runs", lambda *_: mode == "triton")
    torch.manual_seed(0)
    leaves = drawn(4, 3, 70, 20, torch.tensor([0.0, 1.0, 0.0]))
    leaves = {name: leaf.to(DEVICE) for name, leaf in leaves.items()}
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


@pytest.mark.parametrize("mode", ["triton", "torch"])
@pytest.mark.parametrize("used", [0, 1])
def test_gradients_where_one_output_is_not_used(used, mode, monkeypatch):
    monkeypatch.setattr(kernels, "triton_runs", lambda *_: mode == "triton")
    torch.manual_seed(0)
    leaves = drawn(4, 2, 5, 12, torch.tensor([1.0, 0.5]))
    leaves = {name: leaf.to(DEVICE) for name, leaf in leaves.items()}
    cotangents = [torch.randn(4 - used, 5, 12)]

    def right(x, branch, weight, bias, gate):
        unused = 0 * weight.sum() * bias.sum()  # so that both have a gradient
        return (formula(x, branch, gate, None, 0.0, weight, bias, 3)[used] + unused,)

    def ours(x, branch, weight, bias, gate):
        others = (SCALE, 0.0, None, weight, bias, 3)
        unused = 0 * weight.sum() * bias.sum()
        return (kernels.gated_residual_layer_norm(x, branch, gate, *others)[used] + unused,)

    truth = differentiated(right, {n: t.double() for n, t in leaves.items()}, cotangents)
    assert_close(differentiated(ours, leaves, cotangents), truth, TOLERANCE[torch.float32])


@pytest.mark.parametrize("mode", ["triton", "torch"])
@pytest.mark.parametrize("rows, frames", [(0, 5), (2, 0)])
def test_no_rows_or_no_frames(rows, frames, mode, monkeypatch):
    monkeypatch.setattr(kernels, "triton_runs", lambda *_: mode == "triton")
    leaves = drawn(rows, rows, frames, 8, torch.ones(rows))
    leaves = {name: leaf.to(DEVICE) for name, leaf in leaves.items()}

    def ours(x, branch, weight, bias, gate):
        return kernels.gated_residual_layer_norm(x, branch, gate, SCALE, 0.0, None, weight, bias)

    results = differentiated(ours, leaves, [torch.zeros(rows, frames, 8)] * 2)
    assert all((result == 0).all() for name, result in results.items() if "gradient" in name)


def test_torch_computes_what_has_no_values():
    """On the device `meta` nothing can wait for a value, and a tensor on the CPU is an error."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "triton_runs", lambda *_: False)
        for gate in (None, torch.ones(4, device="meta", requires_grad=True)):
            x = torch.empty(6, 5, 12, device="meta", requires_grad=True)
            branch = torch.empty(4, 5, 12, device="meta", dtype=torch.half, requires_grad=True)
            seed = kernels.layer_seed(torch.empty(2, device="meta", dtype=torch.int64), 3)
            norm = (torch.empty(12, device="meta"), torch.empty(12, device="meta"), 2, torch.half)
            y, normed = kernels.gated_residual_layer_norm(x, branch, gate, SCALE, 0.1, seed, *norm)
            assert y.dtype == torch.float32 and normed.dtype == torch.half and len(normed) == 2
            (y.sum() + normed.sum()).backward()
            assert branch.grad.dtype == torch.half
        assert kernels.layer_gates(seed, 7, 0.3).shape == (7, 2)


def dropped(p: float, seed: torch.Tensor, rows: int, frames: int, width: int) -> tuple:
    """Return what the kernel drops, (R, T, D) bool, seen in y, and seen in the gradient."""
    x = torch.zeros(rows, frames, width, device=DEVICE)
    branch = torch.ones_like(x, requires_grad=True)
    norm = (torch.ones(width, device=DEVICE), torch.zeros(width, device=DEVICE), 0)
    y, _ = kernels.gated_residual_layer_norm(x, branch, None, SCALE, p, seed.to(DEVICE), *norm)
    (grad,) = torch.autograd.grad(y.sum(), branch)
    return (y == 0).cpu(), (grad == 0).cpu()


def test_dropout_keeps_the_right_share_and_repeats():
    rows, frames, width, p = 4, 60, 202, 0.3
    seed = torch.tensor([1, 2, 3, -4])
    mask, backward = dropped(p, seed, rows, frames, width)
    deviation = (p * (1 - p) / mask.numel()) ** 0.5
    assert abs(mask.float().mean().item() - p) < 5 * deviation
    for dim in range(3):  # no row, frame or column is special
        shares = mask.float().mean([d for d in range(3) if d != dim])
        assert (shares - p).abs().max() < 6 * deviation * len(shares) ** 0.5
    m = mask.float() - p
    neighbours = [(m[..., 1:], m[..., :-1]), (m[:, 1:], m[:, :-1]), (m[1:], m[:-1])]
    for a, b in [*neighbours, (m[..., 4:], m[..., :-4])]:
        assert abs((a * b).mean().item()) < 6 * p * (1 - p) / a.numel() ** 0.5
    assert torch.equal(mask, backward)
    assert torch.equal(~mask, reference.kept(seed, frames, width, p))
    assert not torch.equal(mask, dropped(p, seed + 1, rows, frames, width)[0])
    two, _ = dropped(p, seed[:2], rows, frames, width)
    assert torch.equal(two, mask[:2].repeat(2, 1, 1))  # all sizes of an utterance drop the same


def splitmix64(state: int) -> int:
    z = state % 2**64
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ z >> 27) * 0x94D049BB133111EB % 2**64
    return z ^ z >> 31


def test_dropout_draws_from_splitmix64():
    assert splitmix64(0x9E3779B97F4A7C15) == 0xE220A8397B1DCDAF  # its first number from seed 0
    seeds, frames, width, p = [7, -(2**61)], 3, 10, 0.3
    mask, _ = dropped(p, torch.tensor(seeds), 2, frames, width)
    for row, seed in enumerate(seeds):
        for frame in range(frames):
            for column in range(width):
                number = frame * 3 + column // 4  # a frame has ⌈10 / 4⌉ words
                word = splitmix64(seed + number * 0x9E3779B97F4A7C15)
                draw = ((word >> 16 * (column % 4) & 0xFFFF) ^ 0x8000) - 0x8000  # signed
                assert mask[row, frame, column] == (draw < round(65536 * p) - 32768)


def test_dropout_does_not_depend_on_block_shapes(monkeypatch):
    seed = torch.tensor([11])
    mask, _ = dropped(0.4, seed, 1, 70, 50)
    monkeypatch.setattr(residual, "FORWARD", 256)
    monkeypatch.setattr(residual, "PROGRAM", 16)
    assert torch.equal(mask, dropped(0.4, seed, 1, 70, 50)[0])


def test_layers_and_layer_gates_draw_from_different_seeds():
    """Layer l draws from seed + l and the layers' gates from seed − 1, which is no layer's."""
    seed = torch.tensor([3, 4])
    seeds = [kernels.layer_seed(seed, layer).tolist() for layer in range(4)]
    assert seeds == [[3, 4], [4, 5], [5, 6], [6, 7]]
    gates = kernels.layer_gates(seed, 48, 0.3)
    assert torch.equal(gates, reference.kept(torch.tensor([2, 3]), 1, 48, 0.3)[:, 0].T.float())
    assert gates.dtype == torch.float32 and set(gates.unique().tolist()) == {0.0, 1.0}


def assert_ctc_is_torchs(logits, lengths, labels, label_lengths) -> None:
    """Triton's losses and gradients are those of torch's `ctc_loss` in float64."""
    others = [tensor.to(DEVICE) for tensor in (lengths, labels, label_lengths)]
    cotangents = [torch.linspace(-1, 2, len(logits))]
    logits = logits.float().to(DEVICE)

    def right(logits):
        by_frame = logits.log_softmax(-1).transpose(0, 1)
        return (F.ctc_loss(by_frame, others[1], others[0], others[2], reduction="none"),)

    def ours(logits):
        return (kernels.ctc_loss(logits.log_softmax(-1), *others),)

    truth = differentiated(right, dict(logits=logits.double()), cotangents)
    assert_close(differentiated(ours, dict(logits=logits), cotangents), truth, CTC_TOLERANCE)


@settings(max_examples=10)
@given(problems())
def test_ctc_is_torchs(problem):
    assert_ctc_is_torchs(*problem)


def test_ctc_of_long_targets():
    torch.manual_seed(0)
    logits, labels = 3 * torch.randn(2, 64, 5), torch.randint(1, 5, (2, 25))
    lengths, label_lengths = torch.tensor([64, 51]), torch.tensor([25, 13])
    assert_ctc_is_torchs(logits, lengths, labels, label_lengths)


def test_ctc_of_what_cant_be_aligned():
    log_probs = torch.randn(4, 5, 4, device=DEVICE).log_softmax(-1)
    log_probs[3] = math.nan
    log_probs.requires_grad_()
    labels = [[1, 1, 1, 1], [1, 2, 99, 99], [2, 2, 2, -1], [1, 2, 3, 1]]  # with padding
    labels, lengths, label_lengths = (
        torch.tensor(values, device=DEVICE) for values in (labels, [5, 4, 5, 5], [4, 2, 3, 3])
    )
    loss = dynsize.ctc.ctc_loss(log_probs, lengths, labels, label_lengths)
    assert loss[0] == math.inf and loss[1].isfinite() and loss[2].isfinite() and loss[3].isnan()
    loss.nansum().backward()
    grad = log_probs.grad
    assert (grad[0] == 0).all() and (grad[3] == 0).all()
    assert (grad[1, :4] != 0).any() and (grad[1, 4:] == 0).all()
    nothing = (log_probs[:0], lengths[:0], labels[:0], label_lengths[:0])
    assert kernels.ctc_loss(*nothing).shape == (0,)


def test_ctc_of_too_many_labels_is_a_value_error():
    labels = torch.ones(1, ctc.MOST_STATES // 2, dtype=torch.int64, device=DEVICE)
    one = torch.ones(1, dtype=torch.int64, device=DEVICE)
    with pytest.raises(ValueError, match="at most 2047"):
        kernels.ctc_loss(torch.zeros(1, 1, 2, device=DEVICE), one, labels, one)


def arguments_of(op: str) -> tuple:
    torch.manual_seed(0)
    if op == "ctc_loss":
        log_probs = torch.randn(2, 6, 4, device=DEVICE).log_softmax(-1).requires_grad_()
        others = ([6, 5], [[1, 2], [3, 3]], [2, 2])
        return log_probs, *(torch.tensor(values, device=DEVICE) for values in others)
    leaves = drawn(2, 2, 5, 12, torch.tensor([0.0, 0.4]))
    leaves = {name: leaf.to(DEVICE).requires_grad_() for name, leaf in leaves.items()}
    first = leaves["x"], leaves["branch"], leaves["gate"]
    seed = torch.tensor([3, 4], device=DEVICE)
    return *first, SCALE, 0.3, seed, leaves["weight"], leaves["bias"]


@pytest.mark.parametrize("op", ["gated_residual_layer_norm", "ctc_loss"])
def test_what_does_not_fit_is_a_value_error(op):
    good = arguments_of(op)
    for i, argument in enumerate(good):
        if isinstance(argument, torch.Tensor):
            for bad in (argument[..., None], argument.bool(), argument.to("meta")):
                with pytest.raises(ValueError, match=r"\(.*\)"):
                    getattr(kernels, op)(*good[:i], bad, *good[i + 1 :])


def test_seed_rows_width_that_do_not_fit_are_value_errors():
    good = arguments_of("gated_residual_layer_norm")
    for bad in (good[5][:0], torch.ones(3, dtype=torch.int64, device=DEVICE), None):
        with pytest.raises(ValueError, match="seed"):
            kernels.gated_residual_layer_norm(*good[:5], bad, *good[6:])
    with pytest.raises(ValueError, match="rows 3"):
        kernels.gated_residual_layer_norm(*good, rows=3)
    with pytest.raises(ValueError, match="dropout_p 1"):
        kernels.gated_residual_layer_norm(*good[:4], 1.0, *good[5:])
    wide, one = torch.ones(1, 1, 8193, device=DEVICE), torch.ones(8193, device=DEVICE)
    with pytest.raises(ValueError, match="8193"):
        kernels.gated_residual_layer_norm(wide, wide, None, SCALE, 0.0, None, one, one)


def test_which_implementation_runs(monkeypatch):
    def decided(mode, device="cpu", interpreted=False, installed=True) -> bool:
        kernels.decide.cache_clear()
        monkeypatch.setenv("DYNSIZE_KERNELS", mode)
        monkeypatch.setattr(triton.knobs.runtime, "interpret", interpreted)
        monkeypatch.setattr(kernels.importlib.util, "find_spec", lambda name: installed or None)
        return kernels.decide(device)

    assert decided("auto", "cuda") and decided("triton", "cpu", interpreted=True)
    assert not decided("auto", "cpu", interpreted=True) and not decided("auto", "meta")
    assert not decided("torch", "cuda") and not decided("auto", "cuda", installed=False)
    for bad in (("triton",), ("triton", "cuda", False, False), ("cuda",)):
        with pytest.raises(ValueError, match="DYNSIZE_KERNELS"):
            decided(*bad)


@pytest.fixture
def unchecked(monkeypatch):
    """Let the self-check run as in a new process."""
    monkeypatch.undo()
    monkeypatch.setenv("DYNSIZE_KERNELS", "triton")
    kernels.decide.cache_clear()
    self_check.error_of.cache_clear()
    yield
    self_check.error_of.cache_clear()


@pytest.mark.parametrize("dtype", DTYPES)
def test_self_check_accepts_the_kernels(unchecked, dtype, caplog):
    described = kernels.describe(DEVICE, dtype)
    assert described.startswith("triton (checked: ") and "torch" not in described
    assert not caplog.records
    assert self_check.error_of("gated_residual_layer_norm", DEVICE, dtype) < 2 * TOLERANCE[dtype]


def wrong(function: Callable) -> Callable:
    """Return `function` with a first result that is 1% off."""

    def changed(*arguments):
        first, *others = function(*arguments)
        return first * 1.01, *others

    return changed


def broken(*_, **__):
    raise RuntimeError("out of registers")


@pytest.mark.parametrize("launcher", ["launch_forward", "launch_backward"])
def test_torch_runs_where_a_kernel_is_wrong(unchecked, launcher, monkeypatch, caplog):
    """Only the op that fails goes to torch; the log names it and says why."""
    monkeypatch.setattr(residual, launcher, wrong(getattr(residual, launcher)))
    described = kernels.describe(DEVICE, torch.float32)
    assert described.endswith("torch for gated_residual_layer_norm")
    (record,) = caplog.records
    assert "gated_residual_layer_norm on" in record.message
    assert "its error is 1.0e-02, above 1e-04" in record.message
    monkeypatch.setattr(residual, launcher, broken)  # it is not called again
    good = arguments_of("gated_residual_layer_norm")
    y, normed = kernels.gated_residual_layer_norm(*good)
    (y.sum() + normed.sum()).backward()
    assert len(caplog.records) == 1


def test_torch_runs_where_nothing_compiles(unchecked, monkeypatch, caplog):
    monkeypatch.setattr(residual, "launch_forward", broken)
    monkeypatch.setattr(ctc, "launch_ctc", broken)
    assert kernels.describe(DEVICE, torch.float16) == "torch"
    assert ["out of registers" in record.message for record in caplog.records] == [True, True]
    good = arguments_of("ctc_loss")
    loss = dynsize.ctc.ctc_loss(*good)
    log_probs, lengths, labels, label_lengths = good
    by_frame = log_probs.transpose(0, 1)
    right = F.ctc_loss(by_frame, labels, lengths, label_lengths, reduction="none")
    torch.testing.assert_close(loss, right)


def test_self_check_runs_inside_of_a_forward(unchecked):
    """Its first use may be without gradients and under autocast."""
    good = [a.detach() if isinstance(a, torch.Tensor) else a for a in arguments_of("ctc_loss")]
    with torch.inference_mode(), torch.autocast(DEVICE.type, torch.bfloat16):
        dynsize.ctc.ctc_loss(*good)
    assert self_check.error_of("ctc_loss", DEVICE, torch.float32) is not None


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
assert kernels.describe(torch.device("cpu"), torch.float32) == "torch"
assert not any(name.startswith("triton.") for name in sys.modules)
"""
    environment = os.environ | dict(DYNSIZE_KERNELS="auto")
    subprocess.run([sys.executable, "-c", program], check=True, env=environment)


def test_kernels_import_nothing_of_dynsize_but_kernels():
    for path in Path(kernels.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in getattr(node, "names", []) if hasattr(alias, "name")]
            if isinstance(node, ast.ImportFrom):
                names = [f"{node.module}.{name}" for name in names]
            if isinstance(node, ast.Import | ast.ImportFrom):
                foreign = [n for n in names if f"{n}.".startswith("dynsize.")]
                assert all(f"{n}.".startswith("dynsize.kernels.") for n in foreign), path


def test_training_gives_the_same_losses(tones, tmp_path, monkeypatch):
    losses = {}
    for mode in ("torch", "triton"):
        monkeypatch.setattr(kernels, "triton_runs", lambda *_, mode=mode: mode == "triton")
        config = tiny(
            updates=6, batch_seconds=0.9, step1_share=0.5, stochastic_depth=0.5, dropout=0.2,
            blocks=1, sizes=(1, 3, 4), validate_every=100, save_every=100, hop_ms=20.0,
        )  # fmt: skip
        run = tmp_path / mode
        run.mkdir()
        trainer = Trainer(dataclasses.replace(config, corpus=str(tones)), run)
        batches = list(islice(trainer.batches(), 6))
        records = [one_update(trainer, [batch]) for batch in batches]
        losses[mode] = [loss for record in records for loss in record["losses"].values()]
    assert len(losses["torch"]) >= 12
    ours, right = torch.tensor(losses["triton"]), torch.tensor(losses["torch"])
    torch.testing.assert_close(ours, right, rtol=1e-4, atol=1e-4)
