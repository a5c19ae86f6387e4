"""The check, before the first update, that a training fits into the memory."""

import torch
from torch import Tensor

from dynsize.batching import epoch_plan
from dynsize.losses import Losses
from dynsize.supernet import Supernet
from dynsize.training_data import TrainingData


def rehearse(data: TrainingData, losses: Losses, optimizer: torch.optim.Optimizer) -> None:
    """Compute the gradients of the largest batch as in step 1 and as in step 2.

    Meanwhile tensors take the memory that the optimizer's state will take, so too little memory
    shows now and not after a day. Raises ValueError where it does.
    """
    config = data.config
    frames = data.begin_epoch(0)
    plan = epoch_plan(frames, config, 0)

    def longest(batch: list[int]) -> int:
        return max(frames[i] for i in batch)

    worst = max(plan, key=lambda batch: len(batch) * longest(batch))
    (batch,) = data.load([worst])
    try:
        reserved = state_to_come(losses.model, optimizer)
        for update in sorted({0, config.updates - 1}):
            losses.add_gradients(batch, update, labels=1, is_last=True)
        del reserved
    except RuntimeError as error:
        if "memory" not in str(error):
            raise
        first_line = str(error).splitlines()[0]
        raise ValueError(
            f"the largest batch, {len(worst)} utterances of up to {longest(worst)} frames, "
            f"does not fit into the memory: lower --batch-seconds {config.batch_seconds:g} "
            f"(and raise --accumulate), or set --checkpoint-activations. {first_line}"
        ) from error
    optimizer.zero_grad()


def state_to_come(model: Supernet, optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Return tensors of the size of an optimizer's state, where it has none yet."""
    if optimizer.state:
        return []
    moments = [torch.ones_like(weight) for weight in model.parameters()]
    squares = [torch.ones_like(weight) for weight in model.parameters()]
    return moments + squares
