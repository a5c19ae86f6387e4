"""The kernels, interpreted on a CPU or compiled on a GPU, against float64 formulas that share nothing with them."""

import dataclasses
import logging
import math
import os
import subprocess
import sys
from itertools import islice

import pytest
import torch
import torch.nn.functional as F
from conftest import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from test_ctc import problems

from dynsize import kernels
from dynsize.training import Trainer
from dynsize.kernels import reference

triton = pytest.importorskip("triton")
from dynsize.kernels import ctc, linear_residual, residual  # noqa: E402

pytestmark = pytest.mark.filterwarnings(
    "ignore::RuntimeWarning"
)  # the interpreter's numpy: log 0, NaN
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]
OPS = ("gated_residual", "linear_gated_residual")
SCALE = 0.5


@pytest.fixture(scope="module", autouse=True)
def triton_everywhere():
    """Without it, tensors on a CPU would go to torch."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DYNSIZE_KERNELS", "triton")
        kernels.decide.cache_clear()
        yield
    kernels.decide.cache_clear()


def exact(op: str, tensors: dict, p: float, keep: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
    """The op's formula in the dtype of `tensors`, as one would write it in torch."""
    branch = (
        F.linear(tensors["h"], tensors["weight"], tensors["bias"])
        if "h" in tensors
        else tensors["branch"]
    )
    if keep is not None:
        branch = branch * keep / (1 - p)
    gate = tensors["gate"].reshape(-1, 1, 1) if "gate" in tensors else 1.0
    y = tensors["x"] + SCALE * gate * branch
    if "norm" not in op:
        return (y,)
    return y, F.layer_norm(y, y.shape[-1:], tensors["weight"], tensors["bias"])


def run(
    op: str, tensors: dict, p: float = 0.0, seed: torch.Tensor | None = None
) -> tuple[torch.Tensor, ...]:
    others = [tensors[name] for name in ("weight", "bias") if name in tensors]
    if op == "gated_residual":
        return (
            kernels.gated_residual(
                tensors["x"], tensors["branch"], tensors.get("gate"), SCALE, p, seed
            ),
        )
    if op == "linear_gated_residual":
        return (
            kernels.linear_gated_residual(
                tensors["x"], tensors["h"], *others, tensors.get("gate"), SCALE, p, seed
            ),
        )
    return kernels.gated_residual_layer_norm(
        tensors["x"], tensors["branch"], tensors.get("gate"), SCALE, p, seed, *others
    )


def drawn(
    op: str, rows: int, frames: int, width: int, gate: torch.Tensor | None, inner: int = 24
) -> dict:
    """Random float64 inputs, weights that are not trivial."""
    tensors = dict(x=torch.randn(rows, frames, width))
    if op == "linear_gated_residual":
        tensors |= dict(
            h=torch.randn(rows, frames, inner), weight=torch.randn(width, inner) / inner**0.5
        )
    else:
        tensors |= dict(branch=torch.randn(rows, frames, width))
    if op == "gated_residual_layer_norm":
        tensors |= dict(weight=1 + torch.randn(width))
    if op != "gated_residual":
        tensors |= dict(bias=torch.randn(width))
    return {
        name: t.double()
        for name, t in (tensors | ({} if gate is None else dict(gate=gate))).items()
    }


def strange(tensor: torch.Tensor, layout: str) -> torch.Tensor:
    """The same numbers in another memory layout. `expanded`: one row's numbers for all rows, without a copy."""
    if layout == "transposed" and tensor.dim() == 3:
        return tensor.transpose(0, 2).contiguous().transpose(0, 2)
    if layout == "expanded" and tensor.dim() == 3 and len(tensor):
        return tensor[:1].expand(tensor.shape)
    return tensor


def differentiated(
    function,
    tensors: dict,
    cotangents: list[torch.Tensor],
    dtype: torch.dtype,
    layout: str = "plain",
):
    """Outputs and the gradients of all inputs, as float64, computed in `dtype`."""
    leaves = {
        n: strange(t.to(DEVICE, dtype), layout).detach().requires_grad_()
        for n, t in tensors.items()
    }
    outputs = function(leaves)
    cotangents = [
        strange(c.to(DEVICE, output.dtype), layout)
        for c, output in zip(cotangents, outputs, strict=True)
    ]
    gradients = torch.autograd.grad(outputs, list(leaves.values()), cotangents)
    names = [f"output {i}" for i in range(len(outputs))] + [
        f"gradient of {name}" for name in leaves
    ]
    return dict(
        zip(names, [t.detach().double().cpu() for t in (*outputs, *gradients)], strict=True)
    )


def errors(ours: dict, truth: dict) -> dict[str, float]:
    """The largest of each result."""
    return {
        name: (ours[name] - right).abs().max().item()
        for name, right in truth.items()
        if right.numel()
    }


def assert_as_good(ours: dict, plain: dict[str, float], truth: dict, dtype: torch.dtype) -> None:
    """Errors of at most twice those of `plain` torch in the same dtype, plus the dtype's epsilon."""
    for name, error in errors(ours, truth).items():
        allowed = 2 * plain[name] + torch.finfo(dtype).eps * max(
            1.0, truth[name].abs().max().item()
        )
        assert error <= allowed, f"{name}: off by {error}, {allowed} allowed"


@st.composite
def cases(draw):
    """An op's inputs, dropout and seeds, memory layout."""
    op, utterances, sizes = (
        draw(st.sampled_from(OPS)),
        draw(st.integers(1, 2)),
        draw(st.integers(1, 2)),
    )
    frames = draw(st.sampled_from([1, 2, 5, 65, 130]))
    width = draw(st.sampled_from([1, 3, 16, 37, 144] + ([1000, 1024] if frames < 65 else [])))
    torch.manual_seed(draw(st.integers(0, 2**20)))
    kind, rows = draw(st.sampled_from(["none", "one for all", "by row"])), utterances * sizes
    values = st.sampled_from([0.0, 1.0, 0.3, -1.7])
    gate = {"none": None, "one for all": torch.tensor(draw(values))}.get(kind)
    if kind == "by row":
        gate = torch.tensor([draw(values) for _ in range(rows)])
    p, seed = draw(st.sampled_from([0.0, 0.25])), torch.randint(-(2**62), 2**62, (utterances,))
    layout = draw(st.sampled_from(["plain", "transposed", "expanded"]))
    tensors = {name: strange(t, layout) for name, t in drawn(op, rows, frames, width, gate).items()}
    return op, tensors, p, seed, layout


@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=25)
@given(case=cases())
def test_outputs_and_gradients_are_as_good_as_torchs(case, dtype):
    op, tensors, p, seed, layout = case
    rounded = {name: t.to(dtype).double() for name, t in tensors.items()}
    shape = (8, 1 + ("norm" in op), *tensors["x"].shape)
    draws = [[strange(c, layout) for c in draw] for draw in torch.randn(shape).to(dtype).double()]
    keep = None
    if p:
        keep = reference.kept(seed, *tensors["x"].shape[1:], p).repeat(
            len(tensors["x"]) // len(seed), 1, 1
        )
    formula = lambda leaves: exact(op, leaves, p, None if keep is None else keep.to(DEVICE))  # noqa: E731
    by_torch = []  # the largest error of several draws: of a single number, a gate's gradient, it may be 0 by luck
    for cotangents in draws:
        truth = differentiated(formula, rounded, cotangents, torch.float64)
        by_torch.append(errors(differentiated(formula, rounded, cotangents, dtype), truth))
    plain = {name: max(draw[name] for draw in by_torch) for name in by_torch[0]}
    ours = differentiated(
        lambda t: run(op, t, p, seed.to(DEVICE)), rounded, cotangents, dtype, layout
    )
    assert_as_good(ours, plain, truth, dtype)
    if layout == "plain":
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(kernels, "triton_runs", lambda device: False)
            in_torch = differentiated(
                lambda t: run(op, t, p, seed.to(DEVICE)), rounded, cotangents, torch.float64
            )
        for name, right in truth.items():
            torch.testing.assert_close(in_torch[name], right, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("learned", [True, False])
@pytest.mark.parametrize("mode", ["triton", "torch"])
def test_a_gate_of_zero_lets_nothing_through(op, learned, mode, monkeypatch):
    monkeypatch.setattr(kernels, "triton_runs", lambda device: mode == "triton")
    torch.manual_seed(0)
    tensors = {
        n: t.float().to(DEVICE)
        for n, t in drawn(op, 3, 70, 20, torch.tensor([0.0, 1.0, 0.0])).items()
    }
    tensors["x"][0, 0, :2] = -0.0
    poisoned = tensors["h" if "h" in tensors else "branch"]
    poisoned[0], poisoned[2, 4] = math.nan, math.inf
    leaves = {n: t.requires_grad_(learned or n != "gate") for n, t in tensors.items()}
    y, *rest = run(op, leaves, 0.2, torch.tensor([5, 6, 7], device=DEVICE))
    assert torch.equal(y[0], leaves["x"][0]) and torch.equal(y[2], leaves["x"][2])
    assert torch.equal(y[0].signbit(), leaves["x"][0].signbit())
    (y.square().sum() + sum(t.square().sum() for t in rest)).backward()
    of_branch = poisoned.grad
    assert (of_branch[0] == 0).all() and (of_branch[2] == 0).all() and (of_branch[1] != 0).any()
    for name, leaf in leaves.items():
        if name == "gate":
            assert not learned or (leaf.grad[0].isnan() and leaf.grad[1].isfinite())
        elif not (
            op == "linear_gated_residual" and mode == "torch" and name == "weight"
        ):  # there, it is 0 · NaN
            assert leaf.grad.isfinite().all(), name


@pytest.mark.parametrize("used", [0, 1])
@pytest.mark.skip(reason="the op changes")
def test_gradients_where_one_output_is_not_used(used):
    op = "gated_residual_layer_norm"
    torch.manual_seed(0)
    tensors = drawn(op, 2, 5, 12, torch.tensor([1.0, 0.4]))
    cotangents = [torch.randn(2, 5, 12, dtype=torch.float64)]
    right = differentiated(
        lambda t: (exact(op, t, 0.0, None)[used] + 0 * t["weight"] * t["bias"],),
        tensors,
        cotangents,
        torch.float64,
    )
    ours = differentiated(lambda t: (run(op, t)[used],), tensors, cotangents, torch.float32)
    for name in right:
        torch.testing.assert_close(ours[name], right[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("shape", [(0, 5, 8), (2, 0, 8)])
def test_no_rows_or_no_frames(op, shape):
    tensors = drawn(op, *shape, torch.ones(shape[0]))
    cotangents = [torch.zeros(shape, dtype=torch.float64)] * (1 + ("norm" in op))
    results = differentiated(lambda leaves: run(op, leaves), tensors, cotangents, torch.float32)
    assert all((result == 0).all() for name, result in results.items() if "gradient" in name)


@pytest.mark.parametrize("op", OPS)
def test_dtypes_mix_as_under_autocast(op):
    torch.manual_seed(0)
    tensors = {
        n: t.float().to(DEVICE) for n, t in drawn(op, 2, 5, 12, torch.tensor([1.0, 0.4])).items()
    }
    half = {
        n: t.half() if n in ("branch", "h") or (n == "weight" and "h" in tensors) else t
        for n, t in tensors.items()
    }
    leaves = {n: t.detach().requires_grad_() for n, t in half.items()}
    outputs = run(op, leaves)
    assert all(output.dtype == torch.float32 for output in outputs)
    sum(output.square().sum() for output in outputs).backward()
    assert all(leaf.grad.dtype == leaf.dtype for leaf in leaves.values())
    for output, right in zip(
        outputs, exact(op, {n: t.double() for n, t in leaves.items()}, 0.0, None), strict=True
    ):
        torch.testing.assert_close(output.double(), right, rtol=1e-4, atol=1e-4)


def dropped(
    p: float, seed: torch.Tensor, rows: int, frames: int, width: int, op: str = "gated_residual"
):
    """What the kernel drops, (R, T, D), seen from outside; and from the gradient."""
    tensors = dict(x=torch.zeros(rows, frames, width, device=DEVICE))
    tensors["branch"] = torch.ones(rows, frames, width, device=DEVICE, requires_grad=True)
    if op == "linear_gated_residual":
        tensors |= dict(
            h=torch.ones(rows, frames, 1, device=DEVICE),
            weight=torch.zeros(width, 1, device=DEVICE),
        )
        tensors["bias"] = torch.ones(width, device=DEVICE)
    y = run(op, tensors, p, seed.to(DEVICE))[0]
    grad = torch.autograd.grad(y.sum(), tensors["branch"])[0] if op == "gated_residual" else y
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
    for a, b in (
        (m[..., 1:], m[..., :-1]),
        (m[:, 1:], m[:, :-1]),
        (m[1:], m[:-1]),
        (m[..., 4:], m[..., :-4]),
    ):
        assert abs((a * b).mean().item()) < 6 * p * (1 - p) / a.numel() ** 0.5
    assert torch.equal(mask, backward)
    assert torch.equal(mask, dropped(p, seed, rows, frames, width, "linear_gated_residual")[0])
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
                word = splitmix64(
                    seed + (frame * 3 + column // 4) * 0x9E3779B97F4A7C15
                )  # ⌈10 / 4⌉ words in a frame
                draw = ((word >> 16 * (column % 4) & 0xFFFF) ^ 0x8000) - 0x8000  # signed
                assert mask[row, frame, column] == (draw < round(65536 * p) - 32768)


def test_dropout_does_not_depend_on_block_shapes(monkeypatch):
    seed = torch.tensor([11])
    masks = [
        dropped(0.4, seed, 1, 70, 50, op)[0] for op in ("gated_residual", "linear_gated_residual")
    ]
    monkeypatch.setattr(residual, "FORWARD", 256)
    monkeypatch.setattr(residual, "CHUNK", 16)
    monkeypatch.setattr(linear_residual, "SINGLE", linear_residual.Tiles(16, 16, 4, 1))
    monkeypatch.setattr(linear_residual, "DEPTH", 16)
    masks += [
        dropped(0.4, seed, 1, 70, 50, op)[0] for op in ("gated_residual", "linear_gated_residual")
    ]
    assert all(torch.equal(mask, masks[0]) for mask in masks)


def assert_ctc_as_good(logits, lengths, labels, label_lengths) -> None:
    log_probs = logits.float().log_softmax(-1).double()
    arguments = (lengths, labels, label_lengths)
    on_device = tuple(t.to(DEVICE) for t in arguments)
    weight = [torch.linspace(-1, 2, len(logits), dtype=torch.float64)]
    by_frame = lambda t: F.ctc_loss(
        t["x"].log_softmax(-1).transpose(0, 1), *theirs, reduction="none"
    )  # noqa: E731
    theirs = labels.to(DEVICE), lengths.to(DEVICE), label_lengths.to(DEVICE)
    truth = differentiated(lambda t: (by_frame(t),), dict(x=log_probs), weight, torch.float64)
    for mode, result in (("torch", {}), ("triton", {})):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(kernels, "triton_runs", lambda device, mode=mode: mode == "triton")
            loss = lambda t: (kernels.ctc_loss(t["x"].log_softmax(-1), *on_device),)  # noqa: E731
            result |= differentiated(loss, dict(x=log_probs), weight, torch.float32)
        if mode == "torch":
            plain = errors(result, truth)
    assert_as_good(result, plain, truth, torch.float32)


@settings(max_examples=15)
@given(problems())
def test_ctc_is_torchs(problem):
    assert_ctc_as_good(*problem)


@pytest.mark.parametrize("states", [32, 1024])
def test_ctc_of_long_targets(states, monkeypatch):
    monkeypatch.setattr(ctc, "LARGEST_BLOCK", states)
    torch.manual_seed(0)
    logits, labels = (
        3 * torch.randn(3, 64, 5, dtype=torch.float64),
        torch.randint(1, 5, (3, 35)),
    )  # three small blocks
    assert_ctc_as_good(logits, torch.tensor([64, 51, 62]), labels, torch.tensor([35, 12, 33]))


def test_ctc_of_what_cant_be_aligned():
    log_probs = torch.randn(4, 5, 4, device=DEVICE).log_softmax(-1)
    log_probs[3] = math.nan
    log_probs.requires_grad_()
    labels = torch.tensor(
        [[1, 1, 1, 1], [1, 2, 99, 99], [2, 2, 2, -1], [1, 2, 3, 1]], device=DEVICE
    )
    lengths, label_lengths = (
        torch.tensor([5, 4, 5, 5], device=DEVICE),
        torch.tensor([4, 2, 3, 3], device=DEVICE),
    )
    loss = kernels.ctc_loss(log_probs, lengths, labels, label_lengths)
    assert loss[0] == math.inf and loss[1].isfinite() and loss[2].isfinite() and loss[3].isnan()
    loss.nansum().backward()
    grad = log_probs.grad
    assert (
        (grad[0] == 0).all()
        and (grad[1, :4] != 0).any()
        and (grad[1, 4:] == 0).all()
        and (grad[3] == 0).all()
    )
    assert kernels.ctc_loss(log_probs[:0], lengths[:0], labels[:0], label_lengths[:0]).shape == (0,)


def arguments_of(op: str) -> tuple:
    torch.manual_seed(0)
    if op == "ctc_loss":
        log_probs = torch.randn(2, 6, 4, device=DEVICE).log_softmax(-1).requires_grad_()
        return log_probs, *(
            torch.tensor(t, device=DEVICE) for t in ([6, 5], [[1, 2], [3, 3]], [2, 2])
        )
    tensors = drawn(op, 2, 5, 12, torch.tensor([0.0, 0.4]))
    leaves = {n: t.float().to(DEVICE).requires_grad_() for n, t in tensors.items()}
    first = [leaves[n] for n in ("x", "h", "branch") if n in leaves]
    others, gate = [leaves[n] for n in ("weight", "bias") if n in leaves], leaves["gate"]
    last = (0.3, torch.tensor([3, 4], device=DEVICE))
    if op == "linear_gated_residual":
        return *first, *others, gate, SCALE, *last
    return *first, gate, SCALE, *last, *others


@pytest.mark.parametrize("op", [*OPS, "ctc_loss"])
def test_registered_and_compiled_whole(op):
    arguments = arguments_of(op)
    function = getattr(kernels, op)
    eager = function(*arguments)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")(*arguments)
    leaves = [t for t in arguments if isinstance(t, torch.Tensor) and t.requires_grad]
    gradients = [torch.autograd.grad(sum(t.square().sum() for t in (o if isinstance(o, tuple) else (o,))), leaves)
                 for o in (eager, compiled)]  # fmt: skip
    torch.testing.assert_close(compiled, eager)
    torch.testing.assert_close(gradients[1], gradients[0])
    rest = dict(
        gated_residual=(None, None, 0.0), gated_residual_layer_norm=(1e-5,), ctc_loss=(True,)
    ).get(op, ())
    registered = getattr(torch.ops.dynsize, op.removesuffix("_layer_norm")).default
    torch.library.opcheck(registered, (*arguments, *rest))


@pytest.mark.parametrize("for_gate", [True, False])
def test_backward_ops_are_registered(for_gate):
    x, h, weight, bias, gate, *last, seed = (
        t.detach() if isinstance(t, torch.Tensor) else t
        for t in arguments_of("linear_gated_residual")
    )
    arguments = (x, h, weight, bias.half(), gate, *last, seed, for_gate)
    torch.library.opcheck(torch.ops.dynsize.linear_gated_residual_backward.default, arguments)
    branch = x.half() if for_gate else None
    for norm in ((x, x, bias), (None, None, None)):
        arguments = (x, *norm, branch, gate, seed, *last, 1e-5, torch.float16)
        torch.library.opcheck(torch.ops.dynsize.gated_residual_backward.default, arguments)


@pytest.mark.parametrize("op", [*OPS, "ctc_loss"])
def test_what_does_not_fit_is_a_value_error(op):
    good = arguments_of(op)
    tensors = [i for i, argument in enumerate(good) if isinstance(argument, torch.Tensor)]
    for i in tensors:
        for bad in (good[i][..., None], good[i].bool(), good[i].to("meta")):
            with pytest.raises(ValueError, match=r"\(.*\)"):
                getattr(kernels, op)(*good[:i], bad, *good[i + 1 :])
    if op != "ctc_loss":
        at = next(i for i in tensors if good[i].dtype == torch.int64)
        for bad in (good[at][:0], torch.ones(3, dtype=torch.int64, device=DEVICE), None):
            with pytest.raises(ValueError, match="seed"):
                getattr(kernels, op)(*good[:at], bad, *good[at + 1 :])
    doubled = [
        t.double() if isinstance(t, torch.Tensor) and t.is_floating_point() else t for t in good
    ]
    with pytest.raises(ValueError, match="float64"):
        getattr(kernels, op)(*doubled)


def test_too_wide_is_a_value_error():
    with pytest.raises(ValueError, match="8193"):
        run("gated_residual", dict(x=torch.ones(1, 1, 8193), branch=torch.ones(1, 1, 8193)))


def test_which_implementation_runs(monkeypatch, caplog):
    def decided(
        mode: str, device: str = "cpu", interpreted: bool = False, installed: bool = True
    ) -> bool:
        kernels.decide.cache_clear()
        monkeypatch.setenv("DYNSIZE_KERNELS", mode)
        monkeypatch.setattr(triton.knobs.runtime, "interpret", interpreted)
        monkeypatch.setattr(kernels.importlib.util, "find_spec", lambda name: installed or None)
        return kernels.decide(device)

    with caplog.at_level(logging.INFO, "kernels"):
        assert decided("auto", "cuda")
        assert kernels.decide("cuda")
    assert [record.message for record in caplog.records] == [
        "kernels on cuda: triton, DYNSIZE_KERNELS=auto"
    ]
    assert not decided("auto", "cpu", interpreted=True) and not decided("torch", "cuda")
    assert decided("triton", "cpu", interpreted=True)
    assert not decided("auto", "cuda", installed=False)
    for case in (
        dict(mode="triton"),
        dict(mode="triton", device="cuda", installed=False),
        dict(mode="cuda"),
    ):
        with pytest.raises(ValueError, match="DYNSIZE_KERNELS"):
            decided(**case)
    kernels.decide.cache_clear()


def test_works_without_triton():
    program = """
import sys
sys.modules["triton"] = None
import torch, dynsize.training
from dynsize import kernels
x = torch.ones(1, 2, 3, requires_grad=True)
kernels.gated_residual(x, x, torch.ones(1), 0.5, 0.1, torch.ones(1, dtype=torch.int64)).sum().backward()
assert not any(name.startswith("triton.") for name in sys.modules)
"""
    environment = os.environ | dict(DYNSIZE_KERNELS="auto")
    subprocess.run([sys.executable, "-c", program], check=True, env=environment)


def test_training_gives_the_same_losses(tones, tmp_path, monkeypatch):
    losses = {}
    for mode in ("torch", "triton"):
        monkeypatch.setenv("DYNSIZE_KERNELS", mode)
        kernels.decide.cache_clear()
        config = tiny(updates=20, batch_seconds=1.2, step1_share=0.5, stochastic_depth=0.5, dropout=0.2, blocks=1,
                      sizes=(1, 3, 4), validate_every=100, save_every=100, hop_ms=20.0)  # fmt: skip
        run = tmp_path / mode
        run.mkdir()
        trainer = Trainer(dataclasses.replace(config, corpus=str(tones)), run)
        records = (trainer.train_on([batch]) for batch in islice(trainer.batches(), 20))
        losses[mode] = [loss for record in records for loss in record["losses"].values()]
    assert len(losses["torch"]) >= 40
    torch.testing.assert_close(
        torch.tensor(losses["triton"]), torch.tensor(losses["torch"]), rtol=1e-4, atol=1e-4
    )
