"""The initial network of a training that begins with the weights of another one."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import torch

from dynsize import checkpoint
from dynsize.checkpoint import Checkpoint
from dynsize.config import Config, fields, with_method
from dynsize.corpora import read_corpus
from dynsize.evaluation import corpus_root
from dynsize.supernet import Supernet
from dynsize.tokenizer import Tokenizer, tokenizer_for

UNITS = {"tokenizer", "units", "vocabulary"}  # settings that ask for another tokenizer
FREE = {"dropout"}  # a setting of the network that its weights do not depend on
CHOICE = {"method", "sizes", "size", "layers_from"}  # settings that decide which layers there are


def beginning(path: Path, changes: Mapping[str, object]) -> Checkpoint:
    """Return the initial network of a training that begins with the weights of a checkpoint.

    Its settings are the checkpoint's with `changes`. A network that was cut is trained as it is,
    by the method none. Scores and ranking of a supernet come along. So does the tokenizer, unless
    `changes` has one of `UNITS`: then the tokenizer is made from the new texts, and the output
    layers are new.

    Raises ValueError for changes of what the weights were trained for: features, network, layers.
    """
    loaded = checkpoint.load(path)
    for name in sorted(fixed_settings()):
        if name in changes:
            flag = f"--{name.replace('_', '-')}"
            raise ValueError(f"{flag} with --init-from: it stays as {loaded.path} has it")
    old = loaded.model
    config = dataclasses.replace(old.config, **changes)
    if old.size is not None:
        config = with_method(config, "none", size=old.size, layers_from="")
    tokenizer = loaded.tokenizer
    weights = old.state_dict()
    if UNITS & changes.keys():
        tokenizer = tokenizer_of(config)
        for name in old.output_layers.state_dict():
            del weights[f"output_layers.{name}"]
    torch.manual_seed(config.seed)
    model = Supernet(config, tokenizer.labels, old.ranking, old.size)
    model.load_state_dict(model.state_dict() | weights)
    return dataclasses.replace(loaded, model=model, tokenizer=tokenizer, training=None)


def fixed_settings() -> set[str]:
    """Return the names of the settings that a network keeps when its training begins again."""
    sections = ("features", "network")
    names = {field.name for field in fields() if field.metadata["section"] in sections}
    return (names | CHOICE) - FREE


def tokenizer_of(config: Config) -> Tokenizer:
    """Return the tokenizer for the configured corpus."""
    corpus = read_corpus(corpus_root(config), config.train_splits, config, "--train-splits")
    return tokenizer_for((utterance.text for utterance in corpus.utterances), config)
