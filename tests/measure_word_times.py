"""Print how far the times of recognised words lie from the true ones, which a CTM file holds.

    python tests/measure_word_times.py RUN [CORPUS [SPLIT ...]]

CORPUS, by default the training's, has a file SPLIT.ctm for each split, by default the test splits.
The largest size decodes, greedily. Words count that are right, by the alignment with the fewest
errors. No test: it asserts nothing.
"""

import dataclasses
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np

import dynsize
from dynsize import checkpoint
from dynsize.corpora import corpus_root, read_corpus
from dynsize.recogniser import Word
from dynsize.wer import align


def true_words(file: Path) -> dict[str, list[Word]]:
    """Return the words of each utterance of a CTM file."""
    words = defaultdict(list)
    for line in file.read_text(encoding="utf-8").splitlines():
        utterance, channel, start, seconds, text = line.split()
        assert channel == "1"
        words[utterance].append(Word(text, float(start), float(start) + float(seconds)))
    return words


def errors_of(said: list[Word], heard: list[Word]) -> list[tuple[float, float]]:
    """Return the errors of start and end, in seconds, of each word that was recognised."""
    true, found, errors = iter(said), iter(heard), []
    for expected, text in align([[[word.text]] for word in said], [word.text for word in heard]):
        word = next(true) if expected is not None else None
        other = next(found) if text is not None else None
        if word and other and word.text == other.text:
            errors.append((other.start - word.start, other.end - word.end))
    return errors


def main(run: Path, corpus: str = "", *splits: str) -> None:
    recogniser, config = dynsize.load(run), checkpoint.load(run).model.config
    config = dataclasses.replace(config, corpus=corpus or config.corpus)
    for split in splits or config.test_splits:
        truth, errors = true_words(corpus_root(config) / f"{split}.ctm"), []
        for utterance in read_corpus(config, [split]).utterances:
            errors += errors_of(truth[utterance.id], recogniser.transcribe(utterance.path).words)
        told = f"{split}: {len(errors)} words; milliseconds, median and 90th percentile:"
        for end, values in zip(("starts", "ends"), np.abs(errors).T, strict=True):
            told += f" {end} {1000 * np.median(values):.0f}, {1000 * np.quantile(values, 0.9):.0f};"
        print(told.rstrip(";"))


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
