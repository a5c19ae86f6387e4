"""How an evaluation is written: tables, Markdown, sclite's trn files, aligned text.

Everything that comes from a corpus passes `printable`, so no id, name or text can end a line or
control a terminal.
"""

import json
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dynsize.corpora import Utterance
from dynsize.terminal import printable

if TYPE_CHECKING:
    from dynsize.evaluation import Scored

NOTHING = "∅"  # beside a deleted or inserted word
SPEAKERS = 50  # at most, in Markdown; results.json has all


def folder(base: Path, split: str) -> Path:
    """Return the directory for a split's results, which lies in `base`.

    Raises ValueError for a split whose name leads out of it.
    """
    if Path(split).is_absolute() or ".." in Path(split).parts:
        raise ValueError(f"split {split!r}: must be a name inside the corpus, not a path out of it")
    return base / printable(split)


def write(report: dict, scored: dict[int, list["Scored"]], output: Path) -> None:
    """Write all files of an evaluation to a directory; `results.json` is the last one."""
    output.mkdir(parents=True, exist_ok=True)
    references = [s.utterance.reference or s.utterance.text for s in next(iter(scored.values()))]
    files = {"ref.trn": trn(references, next(iter(scored.values())))}
    for size, of_size in scored.items():
        files[f"hyp-{size}.trn"] = trn([s.text for s in of_size], of_size)
        files[f"aligned-{size}.txt"] = "\n".join(map(aligned, of_size))
    files["results.md"] = markdown(report)
    files["results.json"] = json.dumps(report, indent=2, allow_nan=False) + "\n"
    for name, text in files.items():
        (output / name).write_text(text, encoding="utf-8")


def written_id(utterance: Utterance) -> str:
    """Return an utterance's id as files have it: safe to show, and with _ for each blank."""
    return printable(utterance.id).replace(" ", "_")


def trn(texts: Sequence[str], scored: Sequence["Scored"]) -> str:
    """Return sclite's format: a line `TEXT (ID)` for each utterance."""
    return "".join(
        f"{printable(text)} ({written_id(s.utterance)})\n".lstrip()
        for text, s in zip(texts, scored, strict=True)
    )


def aligned(scored: "Scored") -> str:
    """Return the reference above the text, word below word; `***` stands for a missing word.

    Wrong words are marked in a third line: S substituted, D deleted, I inserted.
    """
    rows: tuple[list[str], ...] = ([], [], [])
    for said, heard in scored.pairs:
        mark = "D" if heard is None else "I" if said is None else "S" if said != heard else ""
        words = [printable("*" * columns(heard or "") if said is None else said)]
        words.append(printable("*" * columns(said or "") if heard is None else heard))
        most = max(map(columns, words))
        for row, word in zip(rows, [*words, mark], strict=True):
            row.append(padded(word, most))
    body = [" ".join(row).rstrip() for row in rows]
    return f"{written_id(scored.utterance)}\nREF  {body[0]}\nHYP  {body[1]}\n     {body[2]}\n"


def columns(text: str) -> int:
    """Return the columns that a text takes on a terminal: East Asian characters take two."""
    wide = sum(unicodedata.east_asian_width(character) in "WF" for character in text)
    return len(text) + wide - sum(unicodedata.combining(character) > 0 for character in text)


def padded(text: str, width: int, right: bool = False) -> str:
    """Return a text with blanks up to a width in columns, before it if `right`."""
    blanks = " " * (width - columns(text))
    return blanks + text if right else text + blanks


def table(header: Sequence[str], rows: Sequence[Sequence[object]], left: int = 0) -> str:
    """Return a Markdown table that is aligned as plain text too.

    The first `left` columns, and `left` alone of the others, begin at the left; numbers end at
    the right.
    """
    cells = [[printable(cell).replace("|", "\\|") for cell in row] for row in [header, *rows]]
    widths = [max(map(columns, column)) for column in zip(*cells, strict=True)]
    rule = [
        "-" * width if i < left else "-" * max(1, width - 1) + ":" for i, width in enumerate(widths)
    ]
    lines = [
        "| "
        + " | ".join(
            padded(cell, width, right=i >= left)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        + " |"
        for row in cells
    ]
    lines.insert(1, "| " + " | ".join(rule) + " |")
    return "\n".join(lines)
