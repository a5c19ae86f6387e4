"""Decoding a split with networks of several sizes, and what comes of it: hypotheses, error rates, costs."""

import json
import time
from collections.abc import Sequence
from itertools import combinations, product
from pathlib import Path

import torch
from tqdm import tqdm

from dynsize.batching import Examples, batch_plan, labels_of, load
from dynsize.checkpoint import Checkpoint
from dynsize.config import Config
from dynsize.corpora import UNREADABLE, Corpus, Utterance, read_corpus
from dynsize.ctc import greedy
from dynsize.spoken import spoken_corpus
from dynsize.subnet import cut, macs, parameters
from dynsize.supernet import Supernet, layer_name
from dynsize.tokenizer import Tokenizer
from dynsize.wer import (
    Errors,
    Reference,
    align,
    errors_in,
    interval,
    paired_interval,
    plain_reference,
    sclite_reference,
)


def corpus_root(config: Config) -> Path:
    """The directory of the configured corpus; the embedded one is spoken where it isn't there yet."""
    return spoken_corpus() if config.corpus == "spoken" else Path(config.corpus)


def read_for_scoring(config: Config, splits: Sequence[str], tokenizer: Tokenizer) -> Corpus:
    """Splits to decode. Raises ValueError for audio that can't be read and for characters without a label."""
    corpus = read_corpus(corpus_root(config), splits, config)
    if unreadable := corpus.left_out.get(UNREADABLE):
        raise ValueError(
            f"{len(unreadable)} utterances can't be read:\n" + "\n".join(unreadable.values())
        )
    for utterance in corpus.utterances:
        labels_of(utterance, tokenizer)
    return corpus


def device_of(config: Config) -> torch.device:
    """The configured device; ValueError where it can't be had."""
    name = config.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return torch.zeros(1, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {config.device}: {error}") from error


@torch.inference_mode()
def transcribe(
    model: Supernet, examples: Examples, sizes: Sequence[int], title: str
) -> dict[int, list[str]]:
    """Size → the greedily decoded text of each example, in their order. Sizes, largest first, share one forward.

    Raises ValueError for audio that can't be read.
    """
    config, device = model.config, next(model.parameters()).device
    plan = batch_plan(
        examples.frames(), config.batch_seconds * 1000 / config.hop_ms, config.batch_utterances
    )
    texts: dict[int, list[str]] = {size: [""] * len(examples) for size in sizes}
    corrupt: dict[str, str] = {}
    with tqdm(total=len(examples), desc=title, unit="utt", leave=False, delay=1) as bar:
        for indices, batch in zip(plan, load(examples, plan), strict=True):
            if corrupt := corrupt | batch.corrupt:
                continue  # to find all that can't be read
            features, lengths, *_ = batch.to(device)
            log_probs, lengths = model(features, lengths, sizes)
            for size, of_size in zip(sizes, log_probs, strict=True):
                for index, labels in zip(indices, greedy(of_size, lengths), strict=True):
                    texts[size][index] = examples.tokenizer.decode(labels)
            bar.update(len(indices))
    if corrupt:
        raise ValueError(
            f"{len(corrupt)} utterances can't be read:\n" + "\n".join(corrupt.values())
        )
    return texts


def evaluate(checkpoint: Checkpoint, config: Config, split: str, output: Path) -> list[dict]:
    """Decodes a split with every size of a checkpoint, each cut out and alone, and writes what it finds.

    `config`: the checkpoint's, with corpus, device and batches as they are now. In the directory `output`:
    `size-K.txt` with a line `ID TEXT` for each utterance, and `results.json` with the rows, which are also returned.
    """
    model = checkpoint.model
    corpus = read_for_scoring(config, [split], checkpoint.tokenizer)
    utterances = corpus.utterances
    audio_seconds = sum(utterance.samples for utterance in utterances) / config.sample_rate
    rows, texts = [], {}
    for size in reversed(model.sizes):
        subnet = alone(checkpoint, size, config)
        start = time.perf_counter()
        texts[size] = decode(subnet, checkpoint, utterances, size, f"{split}, size {size}")
        seconds = time.perf_counter() - start
        errors = errors_of(utterances, texts[size])
        total = sum(errors, Errors())
        rows.append(
            dict(
                size=size,
                wer=total.rate,
                interval=interval(errors),
                substitutions=total.substitutions,
            )
            | dict(deletions=total.deletions, insertions=total.insertions, words=total.words)
            | dict(
                utterances=len(utterances), parameters=parameters(subnet), macs=macs(subnet, size)
            )
            | dict(real_time_factor=seconds / audio_seconds, layers=kept_names(model, size))
        )
    output.mkdir(parents=True, exist_ok=True)
    for size, hypotheses in texts.items():
        lines = [
            f"{u.id} {text}".rstrip() + "\n" for u, text in zip(utterances, hypotheses, strict=True)
        ]
        (output / f"size-{size}.txt").write_text("".join(lines), encoding="utf-8")
    facts = dict(
        checkpoint=str(checkpoint.path),
        corpus=config.corpus,
        split=split,
        device=str(device_of(config)),
    )
    facts |= dict(sizes=rows, left_out={why: list(names) for why, names in corpus.left_out.items()})
    (output / "results.json").write_text(json.dumps(facts, indent=2) + "\n")
    return rows


def alone(checkpoint: Checkpoint, size: int, config: Config) -> Supernet:
    """The network of one size, cut out where it shares its weights with others, on the configured device."""
    model = checkpoint.model
    return (cut(model, size) if model.size is None else model).to(device_of(config))


def decode(
    network: Supernet,
    checkpoint: Checkpoint,
    utterances: Sequence[Utterance],
    size: int,
    title: str,
) -> list[str]:
    """The text of each utterance by the network of one size."""
    examples = Examples(utterances, checkpoint.tokenizer, network.config, keep=False)
    return transcribe(network, examples, [size], title)[size]


def errors_of(utterances: Sequence[Utterance], texts: Sequence[str]) -> list[Errors]:
    """The word errors in each utterance's text."""
    return [
        errors_in(align(reference_of(utterance), text.split()))
        for utterance, text in zip(utterances, texts, strict=True)
    ]


def reference_of(utterance: Utterance) -> Reference:
    """What an utterance is scored against, with the alternatives that its corpus allows."""
    if utterance.reference:
        return sclite_reference(utterance.reference)
    return plain_reference(utterance.text)


def compare(networks: Sequence[tuple[Checkpoint, Config]], split: str) -> list[dict]:
    """Decodes a split with all sizes of all networks; for each pair of networks the differences of word error rates.

    Equal sizes are compared; all of them, where two networks have no size in common. `networks`: checkpoints with the
    configuration that names corpus and device. Returns rows with `first` and `second`, (path, size) each, their `wer`,
    and difference and `interval`, first minus second. Raises ValueError for different utterances.
    """
    decoded: list[dict[int, list[Errors]]] = []
    expected: list[tuple[str, str]] = []
    for checkpoint, config in networks:
        utterances = read_for_scoring(config, [split], checkpoint.tokenizer).utterances
        said = [(utterance.id, utterance.text) for utterance in utterances]
        expected = expected or said
        if said != expected:
            raise ValueError(
                f"{checkpoint.path}: the {split} of {config.corpus} has other utterances than the first's"
            )
        of_sizes = {}
        for size in checkpoint.model.sizes:
            title = f"{checkpoint.path}, {split}, size {size}"
            texts = decode(alone(checkpoint, size, config), checkpoint, utterances, size, title)
            of_sizes[size] = errors_of(utterances, texts)
        decoded.append(of_sizes)
    rows = []
    for (a, first), (b, second) in combinations(enumerate(decoded), 2):
        same = [(size, size) for size in first if size in second]
        for pair in same or product(first, second):
            errors = first[pair[0]], second[pair[1]]
            wer = [sum(e, Errors()).rate for e in errors]
            names = [(str(networks[i][0].path), size) for i, size in zip((a, b), pair, strict=True)]
            row = dict(first=names[0], second=names[1], wer=wer, difference=wer[0] - wer[1])
            first_errors, second_errors = errors
            rows.append(row | dict(interval=paired_interval([first_errors], [second_errors])))
    return rows


def kept_names(model: Supernet, size: int) -> list[str]:
    """The names of the layers that a size keeps, from the input on."""
    return [layer_name(layer) for layer, kept in enumerate(model.mask(size)) if kept]
