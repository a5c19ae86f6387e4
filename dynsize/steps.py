"""One update: which networks it trains, with which gates and loss weights, and their losses.

Step 1 trains two networks. The supernet has all layers. The subnet has the algorithm's layer
weights as gates, and the output of the largest trained size that is at most its size k. In
Iterative-Zero-Out k is the target of the iteration, and up to Δ layers more run. A layer whose
weight is a tensor is computed even where that is 0, so the subnet takes as long as the supernet;
only Iterative-Zero-Out saves the layers that it has zeroed out. There is no stochastic depth.

Step 2 trains the largest size, the smallest one and a random size between, each with the binary
mask that the ranking gives it: the sandwich rule. The largest has stochastic depth.

Between the steps nothing is reset: the optimizer keeps its moments, the scores stay as they are.

Baselines have no step 1. `none` trains one size. LayerDrop trains the largest, of which each
utterance skips random layers. Aux-loss is step 2 with the layers in their order as the ranking.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dynsize.batching import Batch
from dynsize.config import Config
from dynsize.conformer import Gates, padding_mask
from dynsize.kernels import layer_gates
from dynsize.schedule import in_step1
from dynsize.supernet import Supernet


@dataclass(frozen=True)
class Update:
    """What one update trains."""

    number: int  # from 0
    step: int  # of the paper: 1 learns the layer scores, 2 trains all sizes
    loss_weights: dict[int, float]  # size → weight of its loss, largest size first


def planned(model: Supernet, number: int) -> Update:
    """Return what the update of this number trains."""
    config = model.config
    largest = model.sizes[-1]
    if in_step1(number, config):
        size = model.algorithm.size_at(number, config)
        return Update(number, 1, {largest: 1.0, size: config.subnet_loss})
    if config.method == "layerdrop":
        return Update(number, 2, {largest: 1.0})
    return Update(number, 2, sandwich(number, model.sizes, config))


def sandwich(number: int, sizes: Sequence[int], config: Config) -> dict[int, float]:
    """Return size → weight of its loss, largest size first, by the sandwich rule.

    The largest size trains with weight 1. The smallest one and one between, drawn from
    (seed, update), train with the weight `subnet_loss`. `sizes`: ascending.
    """
    smallest, largest = sizes[0], sizes[-1]
    between = sizes[1:-1]
    loss_weights = {largest: 1.0}
    if between:
        draw = random.Random(f"sandwich {config.seed} {number}")
        loss_weights[draw.choice(between)] = config.subnet_loss
    if smallest != largest:
        loss_weights[smallest] = config.subnet_loss
    return loss_weights


def gates_of(update: Update, model: Supernet, seeds: Tensor) -> list[Gates]:
    """Return the L gates of each network, largest first, for utterances with these seeds, (B,)."""
    config = model.config
    if update.step == 1:
        all_layers = model.mask(model.sizes[-1])
        weights = model.algorithm.layer_weights(model.scores, model.ranking, update.number, config)
        return [all_layers, weights]
    if config.method == "layerdrop":
        drawn = layer_gates(seeds, model.sizes[-1], config.layer_drop)  # (L, B)
        return [list(drawn)]
    largest, *smaller = [model.mask(size) for size in update.loss_weights]
    if smaller and config.stochastic_depth > 0:
        largest = stochastic_depth(smaller[-1], seeds, config)
    return [largest, *smaller]


def stochastic_depth(smallest: Sequence[bool], seeds: Tensor, config: Config) -> Gates:
    """Return the supernet's L gates: True inside the smallest subnet's mask, else (B,) float32.

    Each utterance skips each layer outside of the smallest subnet with the probability
    `stochastic_depth`. Layers that only a middle size keeps are skipped too. The gate of a skipped
    layer is 0; the layer is computed all the same. The gate of any other layer is 1: it is not
    scaled up.

    `smallest`: the mask of the smallest subnet. `seeds`: (B,) int64, one for each utterance.
    """
    drawn = layer_gates(seeds, len(smallest), config.stochastic_depth)  # (L, B)
    pairs = zip(smallest, drawn, strict=True)
    return [True if kept else gate for kept, gate in pairs]


def losses_of(
    update: Update,
    batch: Batch,
    label_count: float,
    model: Supernet,
    teacher: Supernet | None,
) -> tuple[Tensor, Tensor]:
    """Return what a batch adds to an update's loss, (), and the loss of each network, (M,).

    Both are sums over the batch's utterances, divided by `label_count`: how many target labels the
    update has, in all batches of all processes. The first is Σ weight · loss. A teacher adds the
    network's divergence from it, and `self_distillation` that of each subnet from the supernet,
    see `distillation_loss`.
    """
    device = next(model.parameters()).device
    features, frames, targets, target_lengths, seeds = batch.to(device)
    gates = gates_of(update, model, seeds)
    sizes = list(update.loss_weights)
    emissions, lengths = model(features, frames, sizes, gates, seeds)
    by_utterance = model.losses(emissions, lengths, sizes, targets, target_lengths)  # (M, B)
    losses = by_utterance.sum(1) / label_count  # (M,)
    pairs = zip(update.loss_weights.values(), losses, strict=True)
    loss = sum(weight * of_network for weight, of_network in pairs)
    if teacher is not None:
        with torch.no_grad():
            (target,), _ = teacher(features, frames, [teacher.sizes[-1]])  # (B, T', V)
        loss = loss + distillation_loss(target, emissions[0], lengths) / label_count
    if model.config.self_distillation > 0:
        target = emissions[0].detach()  # (B, T', V), the supernet's
        of_subnets = emissions[1:]
        divergence = sum(distillation_loss(target, of_subnet, lengths) for of_subnet in of_subnets)
        loss = loss + model.config.self_distillation * divergence / label_count
    return loss, losses.detach()


def distillation_loss(target: Tensor, log_probs: Tensor, lengths: Tensor) -> Tensor:
    """Return KL(target ‖ network), summed over all frames of the utterances, in nats.

    It is the divergence of the labels' probabilities in each frame (Hinton et al. 2015,
    arXiv 1503.02531, at temperature 1).

    `target`: (B, T', V) log-probabilities of a teacher, without a gradient. `log_probs`: (B, T',
    V), the network's. `lengths`: (B,) encoder frames.
    """
    divergence = F.kl_div(log_probs, target, reduction="none", log_target=True)  # (B, T', V)
    divergence = divergence.sum(-1)
    inside = padding_mask(lengths, divergence.shape[1])  # (B, T')
    return (divergence * inside).sum()


def extra_loss(update: Update, model: Supernet) -> Tensor | float:
    """Return the algorithm's extra loss, (); 0 in step 2."""
    if update.step == 2:
        return 0.0
    return model.algorithm.extra_loss(model.scores, model.ranking, update.number, model.config)


def rank_layers(model: Supernet, number: int) -> None:
    """Rank the layers by their scores after the update of this number, where it was in step 1.

    Note: this waits for the device.
    """
    if number >= 0 and in_step1(number, model.config):
        model.ranking = model.algorithm.rank(model.scores, model.ranking, number, model.config)


def shown_scores(update: Update, model: Supernet) -> dict:
    """Return the layers' scores and their ranking before an update, for metrics.jsonl.

    Where the scores are a matrix, the layer weights of the subnet are shown instead. Note: this
    waits for the device.
    """
    scores = model.scores.detach().cpu()
    now = (scores, model.ranking, update.number, model.config)
    shown = scores if scores.dim() == 1 else model.algorithm.layer_weights(*now)
    rounded = [round(float(score), 5) for score in shown]
    return dict(scores=rounded, ranking=model.algorithm.rank(*now))
