"""CTC's loss and its gradient for a whole batch in one launch, a program for each utterance.

States s = 0 … 2U are the labels with blanks around them; e(t, s) is the log-probability of the state's label in frame
t. From s one goes on to s, to s + 1, and to s + 2 where that is another label than s:

    α(t, s) = e(t, s) + log Σ exp α(t − 1, s′)    s′ = s, s − 1, s − 2
    β(t, s) = e(t, s) + log Σ exp β(t + 1, s′)    s′ = s, s + 1, s + 2
    loss = −log Z, Z = Σ exp α(T − 1, s), s the last two        −∂loss/∂e(t, s) = exp(α + β − e − log Z)

Replaces torch's loop over the frames, with a dozen launches in each. States come in blocks of STATES. α of a block
needs only itself and the last two states of the block before, so the outer loop goes over blocks and the inner one over
frames: a block's labels are read once, the recursion stays in registers, and the log-probabilities of the next frame
are on their way while this one is computed. α goes to memory for the second half, in which β takes its place.
Gradients of equal labels meet in atomic sums, so their last bit may depend on the order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dynsize.kernels import reference
from dynsize.kernels.residual import launch

BLANK = tl.constexpr(reference.BLANK)
LARGEST_BLOCK = 1024  # states


@triton.jit
def log_sum(a, b, c):
    """log(exp a + exp b + exp c), −∞ for three of it."""
    largest = tl.maximum(a, tl.maximum(b, c))
    finite = tl.where(largest == -float("inf"), 0.0, largest)
    return finite + tl.log(tl.exp(a - finite) + tl.exp(b - finite) + tl.exp(c - finite))


@triton.jit
def label_of(labels_ptr, s, last):
    """The label of each state of `s`, BLANK where there is none. Labels lie at the odd states."""
    return tl.load(labels_ptr + s // 2, mask=(s >= 0) & (s <= last) & (s % 2 == 1), other=BLANK)


@triton.jit
def emission(log_probs_ptr, t, vocabulary, label, valid):
    """e(t, s) for the label of each state, −∞ where not `valid`."""
    at = tl.cast(t, tl.int64) * vocabulary + label
    return tl.load(log_probs_ptr + at, mask=valid, other=-float("inf")).to(tl.float32)


@triton.jit
def beside(state, i, shift, edge_ptr, inside, STATES: tl.constexpr):
    """state[i + shift], (STATES,); from memory, at `edge_ptr`, what lies beyond the block; −∞ where not `inside`."""
    other = i + shift
    within = (other >= 0) & (other < STATES)
    near = tl.gather(state, tl.where(within, other, 0), 0)
    far = tl.load(edge_ptr, mask=inside & (within == 0), other=-float("inf"))
    return tl.where(inside & within, near, far)


@triton.jit
def sweep(
    log_probs_ptr, labels_ptr, alpha_ptr, grad_ptr, length, last, log_z, vocabulary, width,  # of one utterance
    SIDE: tl.constexpr, STATES: tl.constexpr,
):  # fmt: skip
    """With SIDE −1, α, from the first frame and block on; with 1, β, from the last ones back, and with it the gradient.
    A state follows from itself and from the two on its SIDE."""
    i = tl.arange(0, STATES)
    blocks, end = last // STATES + 1, length - 1
    for number in range(0, blocks):
        s = (number if SIDE < 0 else blocks - 1 - number) * STATES + i
        label, beyond = label_of(labels_ptr, s, last), label_of(labels_ptr, s + 2 * SIDE, last)
        valid = (s <= last) & (label >= 0) & (label < vocabulary)
        skips = (label != BLANK) & (beyond != BLANK) & (label != beyond)
        first = tl.where((s if SIDE < 0 else last - s) < 2, 0.0, -float("inf"))
        state = tl.zeros((STATES,), tl.float32)
        upcoming = emission(log_probs_ptr, 0 if SIDE < 0 else end, vocabulary, label, valid)
        for step in range(0, length):
            t = tl.cast(step if SIDE < 0 else end - step, tl.int64)
            emitted = upcoming
            upcoming = emission(
                log_probs_ptr, tl.minimum(tl.maximum(t - SIDE, 0), end), vocabulary, label, valid
            )
            now = alpha_ptr + t * width + s
            exists = (step > 0) & (s + SIDE >= 0) & (s + SIDE <= last)
            one = beside(state, i, SIDE, now + SIDE * (width + 1), exists, STATES)
            two = beside(state, i, 2 * SIDE, now + SIDE * (width + 2), skips & (step > 0), STATES)
            rest = tl.where(step > 0, log_sum(state, one, two), first)
            if SIDE > 0:
                alpha = tl.load(now, mask=s <= last, other=-float("inf"))
                posterior = tl.exp(alpha + rest - log_z)
                grad = grad_ptr + t * vocabulary
                tl.atomic_add(grad + label, -posterior, mask=valid & (label != BLANK))
                tl.atomic_add(
                    grad + BLANK, -tl.sum(tl.where(valid & (label == BLANK), posterior, 0.0), 0)
                )
            state = emitted + rest
            tl.store(now, state, mask=s <= last)
        tl.debug_barrier()  # the next block, or what comes after, reads what other threads stored


@triton.jit
def kernel(
    log_probs_ptr,  # (N, T, V)
    lengths_ptr,  # (N,) frames
    labels_ptr,  # (N, U)
    label_lengths_ptr,  # (N,)
    alpha_ptr,  # (N, T, S) float32, scratch: α, then β
    loss_ptr,  # (N,) float32, out
    grad_ptr,  # (N, T, V) float32, zeros, out: of the log-probabilities; None: the loss alone
    frames, vocabulary, most_labels, STATES: tl.constexpr,  # T, V, U
):  # fmt: skip
    utterance = tl.program_id(0).to(tl.int64)
    length = tl.maximum(tl.minimum(tl.load(lengths_ptr + utterance), frames), 1).to(tl.int32)
    last = 2 * tl.minimum(tl.load(label_lengths_ptr + utterance), most_labels).to(tl.int32)
    width = 2 * most_labels + 1  # S
    log_probs_ptr += utterance * frames * vocabulary
    labels_ptr += utterance * most_labels
    alpha_ptr += utterance * frames * width
    sweep(
        log_probs_ptr,
        labels_ptr,
        alpha_ptr,
        grad_ptr,
        length,
        last,
        0.0,
        vocabulary,
        width,
        -1,
        STATES,
    )
    end = alpha_ptr + (length - 1).to(tl.int64) * width + last
    log_z = log_sum(
        tl.load(end), tl.load(end - 1, mask=last > 0, other=-float("inf")), -float("inf")
    )
    tl.store(loss_ptr + utterance, -log_z)
    if grad_ptr is None:
        return
    if tl.abs(log_z) < float("inf"):  # not so for NaN
        grad_ptr += utterance * frames * vocabulary
        sweep(
            log_probs_ptr,
            labels_ptr,
            alpha_ptr,
            grad_ptr,
            length,
            last,
            log_z,
            vocabulary,
            width,
            1,
            STATES,
        )


@torch.library.custom_op("dynsize::ctc_loss", mutates_args=())
def loss_and_gradient(
    log_probs: Tensor, lengths: Tensor, labels: Tensor, label_lengths: Tensor, with_gradient: bool
) -> tuple[Tensor, Tensor]:
    """Launches the kernel. Arguments as in `kernels.ctc_loss`. Returns the (N,) losses and the (N, T, V) gradients of
    the log-probabilities, both float32; the gradients of no elements unless `with_gradient`."""
    loss, grad = outputs(log_probs, lengths, labels, label_lengths, with_gradient)
    (n, frames, vocabulary), most = log_probs.shape, labels.shape[1]
    alpha = log_probs.new_empty(n, frames, 2 * most + 1, dtype=torch.float32)
    states = min(max(32, triton.next_power_of_2(2 * most + 1)), LARGEST_BLOCK)
    arguments = (
        log_probs,
        lengths,
        labels,
        label_lengths,
        alpha,
        loss,
        grad if with_gradient else None,
    )
    launch(kernel, n, *arguments, frames, vocabulary, most, states, num_warps=max(1, states // 128))
    return loss, grad


@loss_and_gradient.register_fake
def outputs(log_probs, lengths, labels, label_lengths, with_gradient):
    loss = log_probs.new_empty(len(log_probs), dtype=torch.float32)
    return loss, log_probs.new_zeros(log_probs.shape if with_gradient else 0, dtype=torch.float32)


def save_for_backward(ctx, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.dtype = inputs[0].dtype


def backward(ctx, loss_grad: Tensor, _: Tensor) -> tuple:
    (grad,) = ctx.saved_tensors
    return (loss_grad[:, None, None] * grad).to(ctx.dtype), None, None, None, None


loss_and_gradient.register_autograd(backward, setup_context=save_for_backward)


def ctc_loss(log_probs: Tensor, *others: Tensor) -> Tensor:
    """`kernels.ctc_loss`."""
    return loss_and_gradient(
        log_probs, *others, torch.is_grad_enabled() and log_probs.requires_grad
    )[0]
