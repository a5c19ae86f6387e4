"""evaluate.py with beam search and a language model, and the choice of its weights on dev."""

import json
from functools import partial
from pathlib import Path

import pytest
from conftest import TONES, random_supernet
from in_process import SCRIPTS, says

from dynsize import checkpoint

evaluate = partial(says, "evaluate.py")
UNIGRAMS = "".join(f"-0.7\t{word}\t0\n" for word in TONES)
ARPA = (
    f"\\data\\\nngram 1=7\nngram 2=1\n\n\\1-grams:\n-2\t<unk>\n-99\t<s>\t0\n-1\t</s>\n{UNIGRAMS}"
    "\n\\2-grams:\n-0.5\tLOW LOW\n\n\\end\\\n"
)


@pytest.fixture(scope="module")
def run(tones, tmp_path_factory) -> Path:
    """A run directory with a network of random weights, and a language model of the tones."""
    folder = tmp_path_factory.mktemp("run")
    checkpoint.save(folder / "checkpoint.pt", *random_supernet(vocabulary=16, corpus=str(tones)))
    (folder / "tones.arpa").write_text(ARPA)
    return folder


def test_the_beam_is_written_beside_the_results(run, tmp_path):
    code, _, error = evaluate(run, "--beam", 3, "--split", "test-other", "--output", tmp_path)
    assert (code, error) == (0, "")
    assert json.loads((tmp_path / "decoding.json").read_text()) == dict(beam=3)
    assert (tmp_path / "test-other" / "results.json").exists()


def test_a_beam_search_of_another_output_is_refused_before_anything_is_written(tmp_path):
    file = tmp_path / "attention.pt"
    checkpoint.save(file, *random_supernet(output="attention"))
    code, _, error = evaluate(file, "--beam", 3)
    assert code == 2 and "attention.pt: --beam or --lm is for the output ctc" in error
    assert list(tmp_path.iterdir()) == [file]


def test_weights_are_those_with_the_fewest_errors_on_dev(run, tmp_path, monkeypatch):
    pytest.importorskip("flashlight.lib.text", reason="flashlight-text is not installed")
    script = SCRIPTS["evaluate.py"]["main"].__globals__
    monkeypatch.setitem(script, "WEIGHTS", (0.0, 0.5))
    monkeypatch.setitem(script, "BONUSES", (0.0, -20.0))
    read_splits = []
    read = script["read_corpus"]
    monkeypatch.setitem(script, "read_corpus", lambda *a: read_splits.extend(a[1]) or read(*a))
    lm = run / "tones.arpa"
    arguments = (run, "--split", "test-other", "--output", tmp_path, "--lm", lm, "--beam", 2)
    code, shown, error = evaluate(*arguments, "--tune-lm")
    assert (code, error) == (0, "")
    assert read_splits == ["test-other", "dev-clean", "dev-other"]  # for `lacks`, then on dev
    assert "lacks 0 of " in shown
    found = json.loads((tmp_path / "decoding.json").read_text())
    assert len(found["tried"]) == 4 and found["lm"] == str(lm) and found["beam"] == 2
    best = min(found["tried"], key=lambda row: row["wer"])
    assert (found["weight"], found["bonus"]) == (best["weight"], best["bonus"])
    # a bonus of −20 leaves no word, so that every word of the reference is an error
    assert [row["wer"] for row in found["tried"] if row["bonus"] < 0] == [1.0, 1.0]
    code, _, error = evaluate(*arguments, "--overwrite", "--lm-weight", 0.3, "--word-bonus", "-2e1")
    found = json.loads((tmp_path / "decoding.json").read_text())
    assert (code, error) == (0, "") and found["weight"] == 0.3 and "tried" not in found
    assert (
        json.loads((tmp_path / "test-other" / "results.json").read_text())["sizes"][0]["wer"] == 1
    )


@pytest.mark.parametrize(
    "arguments, why",
    [
        (("--beam", "0"), "--beam 0: must be 1 or more"),
        (("--word-bonus", "1"), "--lm names it"),
        (("--tune-lm",), "--tune-lm is for one RUN with --lm"),
        (("--lm", "x.arpa", "--tune-lm", "--lm-weight", "1"), "leave them out"),
        (("--lm", "no.arpa"), "no.arpa: "),
        (("--lm", "other.arpa"), "lacks "),
    ],
)
def test_flags_that_cannot_be_are_refused(run, arguments, why, tmp_path, monkeypatch):
    if "--lm" in arguments:
        pytest.importorskip("flashlight.lib.text", reason="flashlight-text is not installed")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other.arpa").write_text(ARPA.replace("HIGH", "OTHER").replace("LOW", "MIDLOW"))
    code, _, error = evaluate(run, *arguments)
    assert code == 2 and why in error and error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["other.arpa"]
