"""The relaxed top-k of Simple-Top-k with its gradient: one program forward and one backward.

    a₁ = s     pᵢ = softmax(aᵢ)     aᵢ₊₁ = aᵢ + log(1 − pᵢ)     r = p₁ + … + pₖ

Let f be the layer of largest a. Only p_f can be above ½, so only 1 − p_f can be 0 to rounding. Its
logarithm is computed from the other layers:

    log(1 − p_f) = log Σ exp a_l − log Σ exp a_m          over all l ≠ f and over all m

Backward, with g the gradient of r, u that of aᵢ₊₁ (0 after the last), and with the odds
q = p / (1 − p) of the layers other than f and 0 for f, that of aᵢ is

    p · (g − Σ p g + Σ u q) + u · (1 − q)                                       for the others, plus
    u_f · p_f · softmax of a without f
    p_f · (g_f − Σ p g + Σ u q) + u_f · (1 − p_f)                               for f

This replaces torch's loop, with two dozen launches for each of the k softmaxes. A program holds the
L layers in registers; the a of each softmax are stored for the backward pass.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

MOST_LAYERS = 1024  # of a program
NEVER = tl.constexpr(-float("inf"))


@triton.jit
def log_sum(a):
    """Return log Σ exp a, a scalar. Some a must be finite."""
    largest = tl.max(a, 0)
    return largest + tl.log(tl.sum(tl.exp(a - largest), 0))


@triton.jit
def softmax(a, layer):
    """Return p, whether each layer is f, log Σ exp a, and the same without a_f."""
    log_all = log_sum(a)
    is_first = layer == tl.argmax(a, 0)
    log_others = log_sum(tl.where(is_first, NEVER, a))
    return tl.exp(a - log_all), is_first, log_all, log_others


@triton.jit(do_not_specialize=["layers", "k"])
def forward_kernel(
    scores_ptr,  # (L,)
    relaxed_ptr,  # (L,) float32, out
    a_ptr,  # (k, L) float32, out
    layers,  # L
    k,
    LAYERS: tl.constexpr,  # at least L, a power of 2
):
    layer = tl.arange(0, LAYERS)
    exists = layer < layers
    a = tl.load(scores_ptr + layer, mask=exists, other=NEVER)
    a = a.to(tl.float32)
    relaxed = tl.zeros((LAYERS,), tl.float32)
    for i in range(0, k):
        tl.store(a_ptr + i * layers + layer, a, mask=exists)
        p, is_first, log_all, log_others = softmax(a, layer)
        relaxed += p
        unselected = tl.log(1 - tl.minimum(p, 0.5))
        a += tl.where(is_first, log_others - log_all, unselected)
    tl.store(relaxed_ptr + layer, relaxed, mask=exists)


@triton.jit(do_not_specialize=["layers", "k"])
def backward_kernel(
    a_ptr,  # (k, L) float32
    relaxed_grad_ptr,  # (L,)
    scores_grad_ptr,  # (L,) float32, out
    layers,  # L
    k,
    LAYERS: tl.constexpr,  # at least L, a power of 2
):
    layer = tl.arange(0, LAYERS)
    exists = layer < layers
    g = tl.load(relaxed_grad_ptr + layer, mask=exists, other=0.0)
    g = g.to(tl.float32)
    u = tl.zeros((LAYERS,), tl.float32)
    for i in range(0, k):
        a = tl.load(a_ptr + (k - 1 - i) * layers + layer, mask=exists, other=NEVER)
        p, is_first, _, log_others = softmax(a, layer)
        q = tl.where(is_first, 0.0, p / (1 - tl.minimum(p, 0.5)))
        of_all = p * (g - tl.sum(p * g, 0) + tl.sum(u * q, 0))
        through_first = tl.sum(tl.where(is_first, u * p, 0.0), 0)
        without_first = tl.exp(a - log_others)
        of_others = u * (1 - q) + through_first * without_first
        u = of_all + tl.where(is_first, u * (1 - p), of_others)
    tl.store(scores_grad_ptr + layer, u, mask=exists)


def outputs(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return tensors for the relaxed weights, (L,), and the a of each softmax, (k, L); float32."""
    layers = len(scores)
    relaxed = scores.new_empty(layers, dtype=torch.float32)
    return relaxed, scores.new_empty(k, layers, dtype=torch.float32)


def scores_grad(a: Tensor, relaxed_grad: Tensor) -> Tensor:
    """Return a tensor for the gradient of the scores, (L,) float32."""
    return a.new_empty(a.shape[1])


torch.library.define("dynsize::relaxed_top_k", "(Tensor scores, int k) -> (Tensor, Tensor)")
torch.library.define("dynsize::relaxed_top_k_backward", "(Tensor a, Tensor relaxed_grad) -> Tensor")


@torch.library.impl("dynsize::relaxed_top_k", ("cpu", "cuda"))
def launch_forward(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Launch `forward_kernel` for (L,) scores. Return what `outputs` describes.

    Raises ValueError for more than MOST_LAYERS layers.
    """
    layers = len(scores)
    if layers > MOST_LAYERS:
        raise ValueError(f"{layers} layers: at most {MOST_LAYERS}, or DYNSIZE_KERNELS=torch")
    assert 1 <= k <= layers and layers > 1
    relaxed, a = outputs(scores, k)
    lanes = triton.next_power_of_2(layers)
    with torch.cuda.device_of(scores):
        forward_kernel[(1,)](scores.contiguous(), relaxed, a, layers, k, lanes, num_warps=1)
    return relaxed, a


@torch.library.impl("dynsize::relaxed_top_k_backward", ("cpu", "cuda"))
def launch_backward(a: Tensor, relaxed_grad: Tensor) -> Tensor:
    """Launch `backward_kernel`. `a`: (k, L). `relaxed_grad`: (L,). Return (L,) float32."""
    k, layers = a.shape
    grad = scores_grad(a, relaxed_grad)
    lanes = triton.next_power_of_2(layers)
    with torch.cuda.device_of(a):
        backward_kernel[(1,)](a, relaxed_grad.contiguous(), grad, layers, k, lanes, num_warps=1)
    return grad


def save(ctx, inputs: tuple[Tensor, int], output: tuple[Tensor, Tensor]) -> None:
    """Keep what the backward pass needs."""
    scores, _ = inputs
    _, a = output
    ctx.save_for_backward(a)
    ctx.dtype = scores.dtype


def backward(ctx, relaxed_grad: Tensor, _: Tensor) -> tuple[Tensor, None]:
    """Return the gradient of the scores, (L,)."""
    (a,) = ctx.saved_tensors
    grad = torch.ops.dynsize.relaxed_top_k_backward(a, relaxed_grad)
    return grad.to(ctx.dtype), None


torch.library.register_fake("dynsize::relaxed_top_k", outputs)
torch.library.register_fake("dynsize::relaxed_top_k_backward", scores_grad)
torch.library.register_autograd("dynsize::relaxed_top_k", backward, setup_context=save)
