"""CTC's loss and its gradient for a whole batch in one launch, with one program for each utterance.

States s = 0 … 2U are the labels with blanks around them; e(t, s) is the log-probability of the
state's label in frame t. An alignment goes from s on to s, to s + 1, and to s + 2 where that is
another label than s:

    α(t, s) = e(t, s) + a(t, s)    a(t, s) = log Σ exp α(t − 1, s') − m(t − 1)    s' = s, s−1, s−2
    β(t, s) = e(t, s) + b(t, s)    b(t, s) = log Σ exp β(t + 1, s') − m(t + 1)    s' = s, s+1, s+2

with m(t) the largest α(t, s) of the frame. Without m, α and β reach −10⁴ in long utterances, where
float32 rounds to 10⁻³; the same m for both leaves their sum right:

    log Z = log Σ exp(α(T − 1, s) − m(T − 1)) over the last two states, where b(T − 1, s) = −log Z
    loss = −log Z − Σ m(t)
    −∂loss/∂e(t, s) = exp(α(t, s) − m(t) + b(t, s))

This replaces torch's loop over the frames, with a dozen launches in each. A program holds the
states of a frame in registers and loads the next frame's log-probabilities while it computes this
one. α is stored for the second half, which computes β. Gradients of equal labels meet in atomic
sums, so their last bit may depend on the order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLANK = tl.constexpr(0)
NEVER = tl.constexpr(-float("inf"))  # the logarithm of a probability of 0
MOST_STATES = 4096  # of a program; more spill registers


@triton.jit
def log_sum(a, b, c):
    """Return log(exp a + exp b + exp c), NEVER where all three are."""
    largest = tl.maximum(a, tl.maximum(b, c))
    finite = tl.where(largest == NEVER, 0.0, largest)
    total = tl.exp(a - finite)
    total += tl.exp(b - finite)
    total += tl.exp(c - finite)
    return finite + tl.log(total)


@triton.jit
def label_of(labels_ptr, s, last):
    """Return the label of each state of `s`: odd states up to `last` have one, others BLANK."""
    labelled = (s >= 0) & (s <= last) & (s % 2 == 1)
    return tl.load(labels_ptr + s // 2, mask=labelled, other=BLANK)


@triton.jit
def row(pointer, t, width):
    """Return the pointer to row `t` of a matrix with rows of this width."""
    return pointer + tl.cast(t, tl.int64) * width


@triton.jit
def emission(frame_ptr, label, valid):
    """Return e(t, s) for the label of each state, NEVER where not `valid`. `frame_ptr`: (V,)."""
    log_prob = tl.load(frame_ptr + label, mask=valid, other=NEVER)
    return log_prob.to(tl.float32)


@triton.jit
def neighbour(state, s, exists):
    """Return state[s], and NEVER where not `exists`."""
    index = tl.where(exists, s, 0)
    near = tl.gather(state, index, 0)
    return tl.where(exists, near, NEVER)


@triton.jit
def sweep(
    log_probs_ptr,  # (T, V), of one utterance
    labels_ptr,  # (U,), of one utterance
    alpha_ptr,  # (T, S) float32, of one utterance
    grad_ptr,  # (T, V) float32, out, of one utterance
    length,  # frames of the utterance
    last,  # its last state
    first,  # a or b of the two states where alignments begin: 0 or −log Z
    vocabulary,  # V
    SIDE: tl.constexpr,  # −1: store α, from the first frame on; 1: β, from the last back, and grad
    STATES: tl.constexpr,  # at least S
):
    """Return α − m of the last frame, (STATES,), and Σ m. Fills `alpha_ptr`, or else `grad_ptr`."""
    s = tl.arange(0, STATES)
    exists = s <= last
    label = label_of(labels_ptr, s, last)
    beyond = label_of(labels_ptr, s + 2 * SIDE, last)
    valid = exists & (label >= 0) & (label < vocabulary)
    steps = (s + SIDE >= 0) & (s + SIDE <= last)
    skips = (label != BLANK) & (beyond != BLANK) & (label != beyond)
    distance = s if SIDE < 0 else last - s  # from the end where alignments begin
    before = tl.where(distance < 2, first, NEVER)  # a or b
    begin = 0 if SIDE < 0 else length - 1
    upcoming = emission(row(log_probs_ptr, begin, vocabulary), label, valid)
    alpha = before
    total = 0.0
    for step in range(0, length):
        t = step if SIDE < 0 else length - 1 - step
        emitted = upcoming
        following = tl.minimum(tl.maximum(t - SIDE, 0), length - 1)
        upcoming = emission(row(log_probs_ptr, following, vocabulary), label, valid)
        state = emitted + before  # α or β
        here = row(alpha_ptr, t, last + 1) + s
        if SIDE < 0:
            alpha = state
            tl.store(here, alpha, mask=exists)
        else:
            alpha = tl.load(here, mask=exists, other=NEVER)
        largest = tl.max(alpha, 0)
        largest = tl.where(largest == NEVER, 0.0, largest)  # m, if any alignment gets here
        total += largest
        alpha -= largest
        if SIDE > 0:
            posterior = tl.exp(alpha + before)
            posterior = tl.where(valid, posterior, 0.0)
            of_blanks = tl.where(label == BLANK, posterior, 0.0)
            grad = row(grad_ptr, t, vocabulary)
            tl.atomic_add(grad + BLANK, -tl.sum(of_blanks, 0), sem="relaxed")
            labelled = valid & (label != BLANK)
            tl.atomic_add(grad + label, -posterior, mask=labelled, sem="relaxed")
        one = neighbour(state, s + SIDE, steps)
        two = neighbour(state, s + 2 * SIDE, skips)
        before = log_sum(state, one, two) - largest
    return alpha, total


@triton.jit(do_not_specialize=["frames", "vocabulary", "most_labels"])
def kernel(
    log_probs_ptr,  # (N, T, V)
    lengths_ptr,  # (N,) frames
    labels_ptr,  # (N, U)
    label_lengths_ptr,  # (N,)
    alpha_ptr,  # (N, T, S) float32, scratch
    loss_ptr,  # (N,) float32, out
    grad_ptr,  # (N, T, V) float32, zeros, out: of the log-probabilities; None: only the loss
    frames,  # T
    vocabulary,  # V
    most_labels,  # U
    STATES: tl.constexpr,  # at least S = 2U + 1
):
    n = tl.program_id(0).to(tl.int64)
    length = tl.load(lengths_ptr + n).to(tl.int32)
    length = tl.maximum(tl.minimum(length, frames), 1)
    labelled = tl.load(label_lengths_ptr + n).to(tl.int32)
    last = 2 * tl.minimum(labelled, most_labels)
    log_probs = log_probs_ptr + n * frames * vocabulary
    labels = labels_ptr + n * most_labels
    alpha = alpha_ptr + n * frames * (2 * most_labels + 1)
    end, total = sweep(log_probs, labels, alpha, None, length, last, 0.0, vocabulary, -1, STATES)
    s = tl.arange(0, STATES)
    end = tl.where((s == last) | (s == last - 1), end, NEVER)
    largest = tl.max(end, 0)
    finite = tl.where(largest == NEVER, 0.0, largest)
    log_z = finite + tl.log(tl.sum(tl.exp(end - finite), 0))
    tl.store(loss_ptr + n, -(log_z + total))
    if grad_ptr is not None:
        # Each α is loaded by the thread that stored it: compiled, all arrays of states have one
        # layout, which tests/kernel_counts.py counts. On AMD that matters, as a barrier there waits
        # for no store (no vmcnt(0) for gfx942), and only a thread's own are certain to be seen.
        tl.debug_barrier()
        grad = grad_ptr + n * frames * vocabulary
        if tl.abs(log_z) < float("inf"):  # false for NaN as well
            sweep(log_probs, labels, alpha, grad, length, last, -log_z, vocabulary, 1, STATES)


def outputs(
    log_probs, lengths, labels, label_lengths, differentiate: bool
) -> tuple[Tensor, Tensor]:
    """Return tensors for the losses, (N,), and the gradients, (N, T, V) or empty; both float32."""
    loss = log_probs.new_empty(len(log_probs), dtype=torch.float32)
    shape = log_probs.shape if differentiate else (0,)
    return loss, log_probs.new_zeros(shape, dtype=torch.float32)


torch.library.define(
    "dynsize::ctc_loss",
    "(Tensor log_probs, Tensor lengths, Tensor labels, Tensor label_lengths, bool differentiate)"
    " -> (Tensor, Tensor)",
)


@torch.library.impl("dynsize::ctc_loss", ("cpu", "cuda"))
def launch(log_probs, lengths, labels, label_lengths, differentiate: bool) -> tuple[Tensor, Tensor]:
    """Launch the kernel; arguments as in `dynsize.ctc.ctc_loss`. Return what `outputs` describes.

    Raises ValueError for more than (MOST_STATES − 1) / 2 labels.
    """
    n, frames, vocabulary = log_probs.shape
    most_labels = labels.shape[1]
    width = 2 * most_labels + 1  # S
    if width > MOST_STATES:
        most = (MOST_STATES - 1) // 2
        told = f"{most_labels} labels of an utterance: at most {most}, or DYNSIZE_KERNELS=torch"
        raise ValueError(told)
    loss, grad = outputs(log_probs, lengths, labels, label_lengths, differentiate)
    alpha = log_probs.new_empty(n, frames, width, dtype=torch.float32)
    states = max(32, triton.next_power_of_2(width))
    if n > 0:
        with torch.cuda.device_of(log_probs):
            kernel[(n,)](
                log_probs.contiguous(),
                lengths.contiguous(),
                labels.contiguous(),
                label_lengths.contiguous(),
                alpha,
                loss,
                grad if differentiate else None,
                frames,
                vocabulary,
                most_labels,
                states,
                num_warps=min(max(1, states // 128), 16),
            )
    return loss, grad


def save(ctx, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    """Keep the gradient for the backward pass."""
    log_probs = inputs[0]
    _, grad = output
    ctx.save_for_backward(grad)
    ctx.dtype = log_probs.dtype


def backward(ctx, loss_grad: Tensor, _: Tensor) -> tuple[Tensor, None, None, None, None]:
    """Return the gradient of the log-probabilities, (N, T, V)."""
    (grad,) = ctx.saved_tensors
    log_probs_grad = loss_grad[:, None, None] * grad
    return log_probs_grad.to(ctx.dtype), None, None, None, None


torch.library.register_fake("dynsize::ctc_loss", outputs)
torch.library.register_autograd("dynsize::ctc_loss", backward, setup_context=save)
