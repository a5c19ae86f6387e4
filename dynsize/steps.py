"""What an update trains: in step 1 by the algorithm, in step 2 by the sandwich rule.

An update of step 1 trains two networks. The supernet has all layers, each with gate True. The
subnet has the algorithm's layer weights as gates, and the output layer of the largest trained size
that is at most its size k. A layer whose weight is a tensor is computed even where that is 0, so
the subnet takes as long as the supernet; only Iterative-Zero-Out saves the layers that it has
zeroed out. There is no stochastic depth.

`update` is the number of an update, from 0. The settings are the model's.
"""

import torch
from torch import Tensor

from dynsize import sandwich
from dynsize.algorithms import ALGORITHMS
from dynsize.conformer import Gates
from dynsize.kernels import layer_gates
from dynsize.schedule import ends_span, in_step1
from dynsize.supernet import Supernet


def loss_weights(model: Supernet, update: int) -> dict[int, float]:
    """Return the networks that an update trains, largest first: size → weight of its loss."""
    config = model.config
    if in_step1(update, config):
        size = ALGORITHMS[config.method].size_at(update, config)
        return {config.layers: 1.0, size: config.subnet_loss}
    if config.method == "layerdrop":
        return {config.layers: 1.0}
    return sandwich.loss_weights(update, model.sizes, config)


def gates(model: Supernet, update: int, seeds: Tensor) -> list[Gates]:
    """Return the gates of the networks of `loss_weights`, for utterances with these seeds."""
    config = model.config
    if in_step1(update, config):
        algorithm = ALGORITHMS[config.method]
        supernet = [True] * config.layers
        subnet = algorithm.layer_weights(model.scores, model.ranking, update, config)
        return [supernet, subnet]
    if config.method == "layerdrop":
        return [list(layer_gates(seeds, config.layers, config.layer_drop))]
    masks = [model.mask(size) for size in loss_weights(model, update)]
    return sandwich.gates(masks, seeds, config)


def extra_loss(model: Supernet, update: int) -> Tensor:
    """Return the algorithm's extra loss in an update of step 1."""
    algorithm = ALGORITHMS[model.config.method]
    return algorithm.extra_loss(model.scores, model.ranking, update, model.config)


def rank_at_span_end(model: Supernet, update: int) -> None:
    """Rank the layers after the last update of a span: the next one may depend on the ranking."""
    if in_step1(update, model.config) and ends_span(update, model.config):
        rank_layers(model, update)


def rank_layers(model: Supernet, update: int) -> None:
    """Rank the layers by their scores after an update, where it was one of step 1.

    Note: this waits for the device.
    """
    if update >= 0 and in_step1(update, model.config):
        algorithm = ALGORITHMS[model.config.method]
        model.ranking = algorithm.rank(model.scores, model.ranking, update, model.config)


def shown_scores(model: Supernet, update: int, values: list[float]) -> dict:
    """Return the layers' scores and their ranking before an update, for metrics.jsonl.

    `values`: the numbers in `model.scores`. Where the scores are a matrix, the layer weights of the
    subnet are shown instead.
    """
    config = model.config
    algorithm = ALGORITHMS[config.method]
    scores = torch.tensor(values).view_as(model.scores)
    shown = scores
    if scores.dim() > 1:
        shown = algorithm.layer_weights(scores, model.ranking, update, config)
    rounded = [round(float(score), 5) for score in shown]
    ranked = algorithm.rank(scores, model.ranking, update, config)
    return dict(scores=rounded, ranking=ranked)
