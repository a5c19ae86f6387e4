"""How an evaluation is written: tables, Markdown, sclite's trn files, aligned text.

Everything that comes from a corpus passes `printable`, so no id, name or text can end a line or
control a terminal.
"""

import json
import re
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dynsize import files
from dynsize.corpora import Utterance
from dynsize.terminal import printable

if TYPE_CHECKING:
    from dynsize.evaluation import Scored

NOTHING = "(nothing)"  # beside a deleted or inserted word
SPEAKERS = 50  # at most, in Markdown; results.json has all


def write(report: dict, scored: dict[int, list["Scored"]], output: Path) -> None:
    """Write all files of an evaluation to a directory; `results.json` is the last one."""
    output.mkdir(parents=True, exist_ok=True)
    files.clean(output)
    references = [s.utterance.reference or s.utterance.text for s in next(iter(scored.values()))]
    contents = {"ref.trn": trn(references, next(iter(scored.values())))}
    for size, of_size in scored.items():
        contents[f"hyp-{size}.trn"] = trn([s.text for s in of_size], of_size)
        contents[f"aligned-{size}.txt"] = "\n".join(map(aligned, of_size))
    contents["results.md"] = markdown(report)
    contents["results.json"] = json.dumps(report, indent=2, allow_nan=False) + "\n"
    for name, text in contents.items():
        files.write(output / name, text.encode())


def written_id(utterance: Utterance) -> str:
    """Return an utterance's id as files have it: safe to show, _ for blanks and parentheses."""
    return re.sub(r"[\s()]", "_", printable(utterance.id))


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


def table(header: Sequence[str], rows: Sequence[Sequence[object]], text_columns: int = 0) -> str:
    """Return a Markdown table that is aligned as plain text too.

    The first `text_columns` columns begin at the left, the others end at the right.
    """
    cells = [[printable(cell).replace("|", "\\|") for cell in row] for row in [header, *rows]]
    widths = [max(map(columns, column)) for column in zip(*cells, strict=True)]
    lines = []
    for row in cells:
        sides = enumerate(zip(row, widths, strict=True))
        parts = [padded(cell, width, right=i >= text_columns) for i, (cell, width) in sides]
        lines.append(f"| {' | '.join(parts)} |")
    rules = ["-" * width for width in widths]
    rules[text_columns:] = [rule[:-1] + ":" for rule in rules[text_columns:]]
    lines.insert(1, f"| {' | '.join(rules)} |")
    return "\n".join(lines) + "\n"


def percent(rate: float) -> str:
    return f"{100 * rate:.2f}%"


def millions(number: int) -> str:
    return f"{number / 1e6:,.2f} M"


def spread(bounds: Sequence[float]) -> str:
    """Return an interval in percent."""
    return f"{100 * bounds[0]:.2f} to {100 * bounds[1]:.2f}"


def headline(report: dict) -> str:
    """Return one line: how much was scored, and how much was left out."""
    first = report["sizes"][0]
    left_out = sum(map(len, report["left_out"].values()))
    amount = f"{report['utterances']:,} utterances, {first['words']:,} words"
    minutes = f"{report['audio_seconds'] / 60:,.1f} minutes"
    return f"{printable(report['split'])}: {amount}, {minutes}; {left_out} left out"


def error_rates(report: dict) -> str:
    """Return the table of sizes: error rates, with the interval of the one that counts; costs."""
    characters = report["measure"] == "cer"
    names = ("CER", "WER") if characters else ("WER", "CER")
    rows = []
    for row in report["sizes"]:
        counts = row["characters"] if characters else row
        rates = [row["cer"], row["wer"]] if characters else [row["wer"], row["cer"]]
        bounds = row["cer_interval"] if characters else row["interval"]
        errors = [counts[kind] for kind in ("substitutions", "deletions", "insertions")]
        costs = [millions(row["parameters"]), millions(row["macs"])]
        factor = f"{row['real_time_factor']:.4f}"
        figures = [percent(rates[0]), spread(bounds), percent(rates[1])]
        rows.append([row["size"], *figures, *errors, *costs, factor])
    header = ["size", names[0], "95% interval", names[1], "sub", "del", "ins"]
    return table([*header, "parameters", "MACs", "RTF"], rows)


def examples(rows: Sequence[dict], width: int = 0) -> str:
    """Return utterances: the reference above the text of each size. `width`: cut lines there."""
    lines = []
    for row in rows:
        worse = "  errors: {} → {}".format(*row["errors"]) if "errors" in row else ""
        lines.append(row["id"] + worse)
        lines.append(f"  reference  {row['reference'] or NOTHING}")
        texts = row["texts"].items()
        lines += [f"  size {size:<5}  {text or NOTHING}" for size, text in texts]
    lines = [printable(line) for line in lines]
    if width:
        lines = [line if len(line) <= width else line[: width - 1] + "…" for line in lines]
    return "\n".join(lines) + "\n"


def markdown(report: dict) -> str:
    """Return the report as Markdown."""
    facts = [f"{name} {printable(report[name])}" for name in ("checkpoint", "corpus", "normaliser")]
    sizes = [row["size"] for row in report["sizes"]]
    parts = [f"# {headline(report)}\n", ", ".join(facts) + "\n", error_rates(report)]
    unit = "Characters" if report["measure"] == "cer" else "Words"
    parts.append(
        f"{unit} count for the interval, sub, del and ins: substitutions, deletions, insertions. "
        "The interval is a bootstrap over utterances. MACs are for one second of audio. RTF, the "
        "real-time factor, is the time to decode divided by the audio's duration.\n"
    )
    parts.append(f"## Three utterances\n\n{indented(examples(report['examples']))}")
    if len(sizes) > 1:
        parts.append(f"## Worse at size {sizes[-1]} than at size {sizes[0]}\n")
        rows = report["worse"]
        parts.append(indented(examples(rows)) if rows else "No utterance has more errors.\n")
    if any(row["speakers"] for row in report["sizes"]):
        parts.append(f"## Speakers\n\n{speakers(report)}")
    for row in report["sizes"]:
        parts.append(f"## Most frequent confusions at size {row['size']}\n")
        pairs = [[s or NOTHING, h or NOTHING, count] for s, h, count in row["confusions"]]
        parts.append(table(["said", "recognised", "times"], pairs, text_columns=2))
    for why, names in report["left_out"].items():
        parts.append(f"## Left out: {printable(why)}\n")
        parts.append(
            "".join(f"* {printable(name)}: {printable(what)}\n" for name, what in names.items())
        )
    return "\n".join(parts)


def indented(text: str) -> str:
    """Return a text as Markdown shows it unchanged."""
    return "".join(f"    {line}\n" for line in text.splitlines())


def speakers(report: dict) -> str:
    """Return the table of speakers, the worst at the largest size first."""
    measure, first = report["measure"], report["sizes"][0]["speakers"]
    worst = sorted(first, key=lambda speaker: -first[speaker][measure])
    rows = []
    for speaker in worst[:SPEAKERS]:
        rates = [percent(row["speakers"][speaker][measure]) for row in report["sizes"]]
        rows.append([speaker, first[speaker]["utterances"], first[speaker]["words"], *rates])
    sizes = [f"{measure.upper()}, size {row['size']}" for row in report["sizes"]]
    shown = table(["speaker", "utterances", "words", *sizes], rows, text_columns=1)
    left = len(worst) - len(rows)
    return shown + (f"\n{left} more are in results.json.\n" if left else "")
