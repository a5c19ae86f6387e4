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

from kernels import reference
from kernels.residual import launch

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
    i = tl.arange(0, STATES)
    for first in range(0, last + 1, STATES):
        s = first + i
        label = label_of(labels_ptr, s, last)
        valid = (s <= last) & (label >= 0) & (label < vocabulary)
        skips = (label != BLANK) & (label != label_of(labels_ptr, s - 2, last))
        alpha = tl.where(s < 2, emission(log_probs_ptr, 0, vocabulary, label, valid), -float("inf"))
        tl.store(alpha_ptr + s, alpha, mask=s <= last)
        upcoming = emission(log_probs_ptr, tl.minimum(1, length - 1), vocabulary, label, valid)
        for t in range(1, length):
            emitted = upcoming
            upcoming = emission(log_probs_ptr, tl.minimum(t + 1, length - 1), vocabulary, label, valid)
            now = alpha_ptr + tl.cast(t, tl.int64) * width + s
            one = beside(alpha, i, -1, now - width - 1, s >= 1, STATES)
            two = beside(alpha, i, -2, now - width - 2, skips & (s >= 2), STATES)
            alpha = emitted + log_sum(alpha, one, two)
            tl.store(now, alpha, mask=s <= last)
        tl.debug_barrier()  # the next block, or the loss, reads what other threads stored
    end = alpha_ptr + (length - 1).to(tl.int64) * width + last - i
    log_z = tl.load(end, mask=(i < 2) & (i <= last), other=-float("inf"))
    largest = tl.max(log_z, 0)
    finite = tl.where(tl.abs(largest) < float("inf"), largest, 0.0)
    log_z = finite + tl.log(tl.sum(tl.exp(log_z - finite), 0))
    tl.store(loss_ptr + utterance, -log_z)
    if grad_ptr is None:
        return
    if tl.abs(log_z) < float("inf"):  # not so for NaN
        grad_ptr += utterance * frames * vocabulary
        blocks = last // STATES
        for block in range(0, blocks + 1):
            s = (blocks - block) * STATES + i
            label = label_of(labels_ptr, s, last)
            valid = (s <= last) & (label >= 0) & (label < vocabulary)
            after = label_of(labels_ptr, s + 2, last)
            skips = (after != BLANK) & (after != label)
            beta = tl.zeros((STATES,), tl.float32)
            upcoming = emission(log_probs_ptr, length - 1, vocabulary, label, valid)
            for back in range(0, length):
                t = tl.cast(length - 1 - back, tl.int64)
                emitted = upcoming
                upcoming = emission(log_probs_ptr, tl.maximum(t - 1, 0), vocabulary, label, valid)
                now = alpha_ptr + t * width + s
                one = beside(beta, i, 1, now + width + 1, (s < last) & (back > 0), STATES)
                two = beside(beta, i, 2, now + width + 2, skips & (s + 2 <= last) & (back > 0), STATES)
                rest = log_sum(beta, one, two)
                rest = tl.where(back > 0, rest, tl.where((s <= last) & (s >= last - 1), 0.0, -float("inf")))
                alpha = tl.load(now, mask=s <= last, other=-float("inf"))
                posterior = tl.exp(alpha + rest - log_z)
                beta = emitted + rest
                tl.store(now, beta, mask=s <= last)
                grad = grad_ptr + t * vocabulary
                tl.atomic_add(grad + label, -posterior, mask=valid & (label != BLANK))
                tl.atomic_add(grad + BLANK, -tl.sum(tl.where(valid & (label == BLANK), posterior, 0.0), 0))
            tl.debug_barrier()


@torch.library.custom_op("dynsize::ctc_loss", mutates_args=())
def loss_and_gradient(
    log_probs: Tensor, lengths: Tensor, labels: Tensor, label_lengths: Tensor, with_gradient: bool
) -> tuple[Tensor, Tensor]:
    """Launches the kernel. Arguments as in `kernels.ctc_loss`. Returns the (N,) losses and the (N, T, V) gradients of
    the log-probabilities, both float32; the gradients of no elements unless `with_gradient`."""
    (n, frames, vocabulary), most = log_probs.shape, labels.shape[1]
    loss, alpha = (log_probs.new_empty(shape, dtype=torch.float32) for shape in ((n,), (n, frames, 2 * most + 1)))
    grad = log_probs.new_zeros(log_probs.shape if with_gradient else 0, dtype=torch.float32)
    states = min(max(32, triton.next_power_of_2(2 * most + 1)), LARGEST_BLOCK)
    arguments = (log_probs, lengths, labels, label_lengths, alpha, loss, grad if with_gradient else None)
    launch(kernel, n, *arguments, frames, vocabulary, most, states, num_warps=max(1, states // 128))
    return loss, grad


@loss_and_gradient.register_fake
def _(log_probs, lengths, labels, label_lengths, with_gradient):
    loss = log_probs.new_empty(log_probs.shape[:1], dtype=torch.float32)
    return loss, log_probs.new_empty(log_probs.shape if with_gradient else (0,), dtype=torch.float32)


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
    return loss_and_gradient(log_probs, *others, torch.is_grad_enabled() and log_probs.requires_grad)[0]
