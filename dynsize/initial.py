"""What a training starts with: its network, its teacher and its optimizer.

The network is new, or has the weights of another training.
"""

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path

import torch

from dynsize import checkpoint
from dynsize.algorithms import every_other
from dynsize.checkpoint import Checkpoint
from dynsize.config import Config, flag_of, marked, require_ctc, shown, with_method
from dynsize.corpora import read_corpus
from dynsize.supernet import Supernet
from dynsize.tokenizer import Tokenizer, tokenizer_for


def beginning(path: Path, changes: Mapping[str, object]) -> Checkpoint:
    """Return the initial network of a training that begins with the weights of a checkpoint.

    Its settings are the checkpoint's with `changes`. A network that was cut is trained as it is,
    by the method none. Scores and ranking of a supernet come along. So does the tokenizer, unless
    `changes` asks for other units: then it is made from the new texts. The outputs begin anew where
    the tokenizer does, and where they are of another kind.

    Raises ValueError for changes of what the weights were trained for: features, network, layers.
    """
    loaded = checkpoint.load(path)
    for name in sorted(marked("weights")):
        if name in changes:
            what = f"{flag_of(name)} with --init-from"
            raise ValueError(f"{what}: it stays as {loaded.path} has it")
    old = loaded.model
    config = old.config
    if old.size is not None:
        config = with_method(config, "none", size=old.size, layers_from="")
    new_units = changes.keys() & marked("units")
    unnamed = dict(tokenizer="") if new_units else {}  # the file of the old tokenizer
    config = dataclasses.replace(config, **unnamed | changes)
    tokenizer = loaded.tokenizer
    weights = old.state_dict()
    if new_units:
        corpus = read_corpus(config, config.train_splits, "--train-splits")
        tokenizer = tokenizer_for((utterance.text for utterance in corpus.utterances), config)
    if new_units or config.output != old.config.output:
        for name in old.output_layers.state_dict():
            del weights[f"output_layers.{name}"]
    torch.manual_seed(config.seed)
    model = Supernet(config, tokenizer.labels, old.ranking, old.size)
    model.load_state_dict(model.state_dict() | weights)
    if model.scores is not None and model.scores.dim() == 1:
        # A zeroed-out layer still has the score it had then. The ranking is what was learned.
        model.scores.data[model.ranking] = model.scores.data.sort(descending=True).values
    return dataclasses.replace(loaded, model=model, tokenizer=tokenizer, training=None)


def new_network(config: Config, labels: int) -> Supernet:
    """Return the initial network of a training.

    Raises ValueError where `layers_from` has other layers, and for a network that does not fit into
    the memory.
    """
    ranking = None
    if config.layers_from:
        model = checkpoint.load(Path(config.layers_from)).model
        there, here = (f"{c.blocks} × {shown(c.block)}" for c in (model.config, config))
        if there != here:
            raise ValueError(f"{config.layers_from}: its layers are {there}, this network's {here}")
        ranking = model.ranking
    if config.method == "layerdrop":
        ranking = every_other(config.layers, config.sizes)
    size = config.size if 0 < config.size < config.layers else None
    with torch.device("meta"):  # weights without memory
        check_memory(Supernet(config, labels, ranking, size))
    return Supernet(config, labels, ranking, size)


def check_memory(model: Supernet) -> None:
    """Raise ValueError where a network can't be trained in this machine's memory.

    A float32 weight takes 16 bytes: itself, its gradient and AdamW's two moments.
    """
    weights = sum(weight.numel() for weight in model.parameters())
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if 16 * weights > memory:
        raise ValueError(
            f"a network of {weights:,} weights takes {16e-9 * weights:.0f} GB in training, "
            f"more than the {1e-9 * memory:.0f} GB of this machine: lower --blocks or --width"
        )


def load_teacher(config: Config, tokenizer: Tokenizer) -> Supernet:
    """Return the network that `config.teacher` names.

    Raises ValueError where its output is not CTC, and where its labels or its features are not
    those of this training.
    """
    loaded = checkpoint.load(Path(config.teacher))
    require_ctc(loaded.model.config, f"--teacher {loaded.path}: a teacher")
    if loaded.tokenizer.model != tokenizer.model:
        raise ValueError(
            f"--teacher {loaded.path}: its labels are not those of this training; "
            "train both on the same corpus with the same --vocabulary"
        )
    for name in marked("frames"):
        here, there = getattr(config, name), getattr(loaded.model.config, name)
        if here != there:
            what = f"was trained with {flag_of(name)} {there}, not {here}"
            raise ValueError(f"--teacher {loaded.path}: {what}")
    return loaded.model


def optimizer_for(model: Supernet, config: Config) -> torch.optim.Optimizer:
    """Return AdamW, in which the layer scores have another learning rate and no weight decay.

    The norm that is clipped is that of all gradients, the scores' too.
    """
    weights = [weight for name, weight in model.named_parameters() if name != "scores"]
    groups = [dict(params=weights, factor=1.0)]
    if model.scores is not None:
        groups.append(dict(params=[model.scores], factor=config.score_rate, weight_decay=0.0))
    return torch.optim.AdamW(
        groups,
        lr=0.0,
        betas=(0.9, config.beta2),
        eps=config.epsilon,
        weight_decay=config.weight_decay,
        fused=True,
    )
