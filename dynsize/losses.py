"""The losses of one update and their gradients."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from dynsize import processes, steps
from dynsize.batching import Batch
from dynsize.config import Config
from dynsize.ctc import ctc_loss
from dynsize.distillation import distillation_loss
from dynsize.schedule import in_step1
from dynsize.supernet import Supernet


class Losses:
    """The losses by which a network learns: CTC, the algorithm's extra loss, distillation.

    CTC and distillation are in nats per label. With several processes the gradients become those of
    all batches. `teacher`: the network of which `distillation_loss` learns; None for no
    distillation.
    """

    def __init__(self, model: Supernet, teacher: Supernet | None) -> None:
        self.model = model
        self.teacher = teacher
        self.wrapped = processes.wrapped(model)

    def add_all_gradients(self, batches: Sequence[Batch], update: int, labels: float) -> Tensor:
        """Add the gradients of an update's batches; return the sums of their CTC losses, (M,).

        `labels`: how many the update has, in all batches of all processes.
        """
        read = [batch for batch in batches if batch.utterances]
        if not read:
            read = [silent_batch(self.model.config)]
        return sum(
            self.add_gradients(batch, update, labels, is_last=batch is read[-1]) for batch in read
        )

    def add_gradients(self, batch: Batch, update: int, labels: float, is_last: bool) -> Tensor:
        """Add the gradient of a batch's losses; return its CTC losses, (M,).

        `is_last`: whether this is the update's last batch, after which the gradients are averaged
        over the processes.
        """
        model = self.model
        device = next(model.parameters()).device
        features, frames, targets, target_lengths, seeds = batch.to(device)
        weights = steps.loss_weights(model, update)  # size → weight
        sizes = list(weights)
        gates = steps.gates(model, update, seeds)
        step1 = in_step1(update, model.config)
        unused = model.without_gradient(sizes, step1)
        with self.synchronised(is_last):
            log_probs, lengths = self.wrapped(features, frames, sizes, gates, seeds)
            losses = ctc_losses(log_probs, lengths, targets, target_lengths) / labels  # (M,)
            if not batch.utterances:
                losses = 0 * losses
            pairs = zip(weights.values(), losses, strict=True)
            weighted = sum(weight * loss for weight, loss in pairs)
            total = processes.count() * weighted
            if self.teacher is not None and batch.utterances:
                divergence = distillation_loss(self.teacher, features, frames, log_probs[0])
                total = total + processes.count() * divergence / labels
            if step1 and is_last:
                total = total + steps.extra_loss(model, update)
            # DistributedDataParallel waits for a gradient of every weight.
            nothing = 0 * sum(weight.sum() for weight in unused)
            (total + nothing).backward()
        for weight in unused:
            weight.grad = None  # a zero would move the optimizer's state
        return losses.detach()

    def synchronised(self, is_last: bool) -> AbstractContextManager:
        """Return a context in which the last batch's gradients become the mean of all processes."""
        if is_last or self.wrapped is self.model:
            return nullcontext()
        return self.wrapped.no_sync()


def ctc_losses(
    log_probs: Tensor, lengths: Tensor, targets: Tensor, target_lengths: Tensor
) -> Tensor:
    """Return the CTC loss of each network, summed over the utterances, (M,).

    `log_probs`: (M, B, T', V). `lengths`: (B,) encoder frames. `targets`: (B, U).
    """
    networks = len(log_probs)  # M
    losses = ctc_loss(
        log_probs.flatten(0, 1),  # (M·B, T', V)
        lengths.repeat(networks),
        targets.repeat(networks, 1),
        target_lengths.repeat(networks),
    )
    return losses.unflatten(0, log_probs.shape[:2]).sum(1)


def silent_batch(config: Config) -> Batch:
    """Return a batch for a process that could read nothing, while others wait for its gradients.

    It has no utterances and one row of silence, whose loss counts as 0.
    """
    features = torch.zeros(1, 8, config.mel_bins)
    lengths = torch.tensor([8])
    labels = torch.zeros(1, 1, dtype=torch.long)
    zero = torch.zeros(1, dtype=torch.long)
    return Batch([], features, lengths, labels, zero, zero, corrupt={})
