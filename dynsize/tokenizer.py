"""SentencePiece units as CTC labels. Label 0 is CTC's blank, which no text is made of."""

import io
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import sentencepiece

from dynsize.config import Config
from dynsize.text import quoted

WORD = "▁"  # SentencePiece's mark: a label that begins with it begins a word
MODELS = {"unigram": "unigram", "bpe": "bpe", "characters": "char"}  # SentencePiece's names


class LabelledWord(NamedTuple):
    text: str
    first: int  # index of the label with its first letter
    last: int  # index of the label with its last letter


class Tokenizer:
    """A SentencePiece model, given as the bytes of its file.

    `units`: V times what a label adds to a text, in UTF-8; the mark ▁ is a space. A label adds a
    word or a part of one, several words, or one byte of a character; CTC's blank adds nothing.
    """

    def __init__(self, model: bytes) -> None:
        self.model = model
        self.pieces = sentencepiece.SentencePieceProcessor()
        self.pieces.load_from_serialized_proto(model)
        self.unknown = self.pieces.unk_id()
        self.units = [self.unit(label) for label in range(self.labels)]

    def unit(self, label: int) -> bytes:
        """Return what a label adds to a text."""
        piece = self.pieces.id_to_piece(label)
        if self.pieces.is_unknown(label) or self.pieces.is_control(label):
            return b""
        if self.pieces.is_byte(label):  # <0x41>
            return bytes([int(piece[3:5], 16)])
        return piece.replace(WORD, " ").encode()

    @property
    def labels(self) -> int:
        """V, the number of labels with the blank."""
        return self.pieces.vocab_size()

    def encode(self, text: str) -> list[int]:
        """Return labels from 1 to V − 1. Raises ValueError for characters that no unit covers."""
        labels = self.pieces.encode(text)
        if self.unknown in labels:
            characters = sorted(set("".join(text.split())))
            unknown = [c for c in characters if self.unknown in self.pieces.encode(c)]
            names = " ".join(map(repr, unknown))
            raise ValueError(f"characters unknown to the tokenizer, {names}, in {quoted(text)}")
        return labels

    def letters(self) -> set[str]:
        """Return the characters that whole units write, so without those that only bytes write."""
        whole = [unit for label, unit in enumerate(self.units) if not self.pieces.is_byte(label)]
        return set(b"".join(whole).decode()) - {" "}

    def words(self, labels: Sequence[int]) -> list[LabelledWord]:
        """Return the words that SentencePiece decodes from labels, and which labels write each."""
        units = [self.units[label] for label in labels]
        writer = [index for index, unit in enumerate(units) for _ in unit]  # of each byte
        words = []
        for word in re.finditer(rb"\S+", b"".join(units)):
            text = word[0].decode(errors="replace")
            words.append(LabelledWord(text, writer[word.start()], writer[word.end() - 1]))
        return words

    def decode(self, labels: Sequence[int]) -> str:
        """Return the text of labels, with one space between words."""
        return " ".join(word.text for word in self.words(labels))


def tokenizer_for(texts: Iterable[str], config: Config) -> Tokenizer:
    """Return the configured tokenizer, a file's or one that is trained on the texts."""
    if config.tokenizer:
        return load_tokenizer(Path(config.tokenizer))
    return train_tokenizer(texts, config.vocabulary, config.units)


def train_tokenizer(texts: Iterable[str], units: int, kind: str = "unigram") -> Tokenizer:
    """Return a tokenizer of at most `units` units that covers every character of the texts.

    The tokenizer has fewer units where the texts are too small for `units`, and more where they
    have more different characters.
    `kind`: unigram (Kudo 2018), bpe, or characters. Raises ValueError for texts without a
    character.
    """
    texts = [text for text in texts if text]
    characters = set().union(*texts)
    if not characters:
        raise ValueError("the training transcripts are all empty: there are no units to learn")
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_writer=model,
        model_type=MODELS[kind],
        # the blank, and the mark for a word's beginning
        vocab_size=1 + max(units, 1 + len(characters)),
        hard_vocab_limit=False,  # fewer units are no error
        normalization_rule_name="identity",
        character_coverage=1.0,
        bos_id=-1,
        eos_id=-1,
        num_threads=1,  # one result on every machine
        minloglevel=2,
        max_sentence_length=1 << 16,
    )
    return Tokenizer(model.getvalue())


def load_tokenizer(file: Path) -> Tokenizer:
    """Return the tokenizer in a SentencePiece model file.

    Raises ValueError for a missing or damaged file, and where a text can need unit 0, which is
    CTC's blank.
    """
    if not file.is_file():
        raise ValueError(f"--tokenizer {file}: no such file")
    try:
        tokenizer = Tokenizer(file.read_bytes())
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"--tokenizer {file}: not a SentencePiece model") from error
    pieces = tokenizer.pieces
    if not (pieces.is_unknown(0) or pieces.is_control(0) or pieces.is_unused(0)):
        what = f"its unit 0 is {pieces.id_to_piece(0)!r}, but label 0 is CTC's blank"
        advice = "train it with --unk_id=0 (SentencePiece's default) or --pad_id=0"
        raise ValueError(f"--tokenizer {file}: {what}; {advice}")
    return tokenizer
