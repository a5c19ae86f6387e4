"""SentencePiece units as CTC labels. Label 0 is SentencePiece's 'unknown', which no known text needs: CTC's blank."""

import io
from collections.abc import Iterable

import sentencepiece
import torch
from torch import Tensor


class Tokenizer:
    """A trained SentencePiece model, given as its bytes in a uint8 tensor, the form that a checkpoint holds."""

    def __init__(self, model: Tensor) -> None:
        self.model = model
        self.pieces = sentencepiece.SentencePieceProcessor(model_proto=bytes(model.tolist()))

    @property
    def labels(self) -> int:
        """V, the number of labels with the blank."""
        return self.pieces.vocab_size()

    def encode(self, text: str) -> list[int]:
        """Labels from 1 to V − 1. Raises ValueError where the text has characters that no unit covers."""
        labels = self.pieces.encode(text)
        if 0 in labels:
            unknown = sorted({c for c in text if not c.isspace() and 0 in self.pieces.encode(c)})
            raise ValueError(
                f"characters unknown to the tokenizer, {' '.join(map(repr, unknown))}, in {text!r}"
            )
        return labels

    def decode(self, labels: list[int]) -> str:
        return self.pieces.decode(labels)


def train_tokenizer(texts: Iterable[str], units: int) -> Tokenizer:
    """A unigram model (Kudo 2018) of at most `units` units, fewer where the texts don't give as many, more where they
    have more characters. Raises ValueError for texts without a single character."""
    texts = [text for text in texts if text]
    characters = set().union(*texts)
    if not characters:
        raise ValueError(
            "the training transcripts are all empty: there is nothing to learn units from"
        )
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_writer=model,
        vocab_size=max(units, len(characters) + 1)
        + 1,  # the mark for a word's beginning, and the blank
        hard_vocab_limit=False,  # take what there is
        normalization_rule_name="identity",
        character_coverage=1.0,
        bos_id=-1,
        eos_id=-1,
        num_threads=1,  # one result on every machine
        minloglevel=2,
        max_sentence_length=1 << 16,
    )
    return Tokenizer(torch.frombuffer(bytearray(model.getvalue()), dtype=torch.uint8))
