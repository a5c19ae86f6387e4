"""Transcripts: one spelling for the same text, normalisers, and the notation of STM files."""

import re
import unicodedata
from collections import Counter
from collections.abc import Callable

WORD = "▁"  # SentencePiece's mark: a label that begins with it begins a word
SHOWN = 80  # characters of a text that a message shows
# Characters without width (joiners, marks of direction, variation selectors, soft hyphens), and
# controls that are not white space: nobody sees them, and each would become a label.
INVISIBLE = [0x00AD, 0x061C, 0x180E, 0xFEFF, *range(0x200B, 0x2010)]
INVISIBLE += [*range(0x202A, 0x202F), *range(0x2060, 0x2070), *range(0xFE00, 0xFE10)]
INVISIBLE += [code for code in range(0xA0) if not (chr(code).isprintable() or chr(code).isspace())]
REMOVED = dict.fromkeys(INVISIBLE)
UNKNOWN = re.compile(r"(?<!\S)<unk>(?!\S)", re.IGNORECASE)

MARK = re.compile(r"<[^<>\s]*>|%[\w-]+|@")  # <sil>, %hesitation; @: nothing
OPTIONAL = re.compile(r"\(([^\s(){}<>\[\]]+)\)")  # (uh)
PRONUNCIATION = re.compile(r"([^\s(){}<>\[\]]+)\(\d+\)")  # word(2)
CLITIC = re.compile(r"(?<=\w)\s+('(?:s|re|ve|ll|d|m|t))(?!\S)")  # it 's


def shown(text: str) -> str:
    """Return a text in quotes, its first 80 characters if it is longer, for a message."""
    return repr(text if len(text) <= SHOWN else text[:SHOWN] + "…")


def counted(number: int, noun: str) -> str:
    """Return a number with its noun, which gets an s unless the number is 1."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def lower(text: str) -> str:
    """Return the text in lower case; İ becomes i, one character."""
    return text.replace("İ", "i").lower()


def plain(text: str) -> str:
    """Return letters with their marks, digits, and apostrophes inside words, in lower case."""
    text = lower(unicodedata.normalize("NFKC", text)).replace("’", "'")
    for character in set(text):
        if unicodedata.category(character)[0] not in "LMN" and character != "'":
            text = text.replace(character, " ")
    return " ".join(word.strip("'") for word in text.split())


NORMALISERS: dict[str, Callable[[str], str]] = {
    "none": str,
    "lower": lower,
    "upper": str.upper,
    "plain": plain,
}


def clean(text: str, normaliser: str) -> str:
    """Return a text normalised, in Unicode's form NFC, with one space between words.

    Characters that nobody sees are removed. `normaliser` is a name in `NORMALISERS`.
    """
    if not text.isprintable():
        text = text.translate(REMOVED)
    if text.isascii():
        text = NORMALISERS[normaliser](text)
    else:
        text = NORMALISERS[normaliser](unicodedata.normalize("NFC", text))
        text = unicodedata.normalize("NFC", text)
    return " ".join(text.split())


def without_unknown(text: str) -> tuple[str, int]:
    """Return a text without the word `<unk>`, and how often it was there."""
    return UNKNOWN.subn(" ", text) if "<" in text else (text, 0)


def parse_stm(raw: str, changes: Counter[str]) -> tuple[str, str]:
    """Return the plain text of an STM's transcript, and its notation for scoring.

    The notation is sclite's: `{ a / b c / @ }` are alternatives (@ is nothing), `(uh)` is a word
    that may be missing; each sign but the parentheses is a separate word. It is empty where the
    text has neither. The plain text takes the first alternative and keeps the optional words.
    Marks such as `<sil>`, `{NOISE}` and `%hesitation` are taken out and counted in `changes`, and
    `word(2)`, a pronunciation, is `word`. Raises ValueError for what is not understood.
    """
    text, joined = CLITIC.subn(r"\1", raw)
    changes["× words joined, as it 's → it's"] += joined
    words: list[str] = []  # of the plain text
    notation: list[str] = []
    inside: list[list[str]] | None = None  # the alternatives of the braces that are open
    for token in re.sub(r"([{}])", r" \1 ", text).split():
        if token == "{" and inside is None:
            inside = [[]]
        elif token == "}" and inside is not None:
            close_braces(inside, words, notation, changes)
            inside = None
        elif inside is not None:
            first, *others = token.split("/")  # blanks around a slash may be missing
            inside[-1] += stm_word(first, changes)
            inside += [stm_word(other, changes) for other in others]
        else:
            word = stm_word(token, changes)
            words += word
            notation += word
    if inside is not None:
        raise ValueError("{ without }")
    plainly = " ".join(bare(word) for word in words)
    return plainly, "" if words == notation and not has_optional(words) else " ".join(notation)


def close_braces(
    inside: list[list[str]], words: list[str], notation: list[str], changes: Counter[str]
) -> None:
    """Add the alternatives of one pair of braces to the plain words and to the notation."""
    if len(inside) == 1:  # {NOISE}
        if len(inside[0]) > 1:
            raise ValueError(f"{{ {' '.join(inside[0])} }} has no alternatives, a / between them")
        changes[f"× {{{''.join(inside[0])}}} taken out"] += 1
        return
    changes["× alternatives, of which the first is trained on"] += 1
    words += inside[0]
    joined = " / ".join(" ".join(alternative) or "@" for alternative in inside)
    notation += ["{", *joined.split(), "}"]


def stm_word(token: str, changes: Counter[str]) -> list[str]:
    """Return the word that one token of an STM stands for, or nothing for a mark or for ''."""
    optional = OPTIONAL.fullmatch(token)
    mark = optional[1] if optional else token
    if not token:
        return []
    if MARK.fullmatch(mark):
        changes[f"× {mark} taken out"] += mark != "@"
        return []
    pronounced = PRONUNCIATION.fullmatch(token)
    word = pronounced[1] if pronounced else token
    if word == "/" or (not optional and re.search(r"[(){}<>\[\]]", word)):
        raise ValueError(f"{shown(token)} is not understood")
    return [word]


def has_optional(words: list[str]) -> bool:
    return any(map(OPTIONAL.fullmatch, words))


def bare(word: str) -> str:
    """Return a word without the parentheses of an optional one."""
    optional = OPTIONAL.fullmatch(word)
    return optional[1] if optional else word


def clean_notation(notation: str, normaliser: str) -> str:
    """Return the notation of `parse_stm` with each of its words normalised."""
    tokens: list[str] = []
    for token in notation.split():
        if token in ("{", "/", "}", "@"):
            if token in ("/", "}") and tokens[-1] in ("{", "/"):  # no word of it was left
                tokens.append("@")
            tokens.append(token)
        else:
            form = "({})" if OPTIONAL.fullmatch(token) else "{}"
            tokens += [form.format(word) for word in clean(bare(token), normaliser).split()]
    return " ".join(tokens)
