"""From files to batches: features, corpora, tokenizer, batch plan, the embedded corpus."""

import errno
import io
import math
import multiprocessing
import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import torch
from conftest import RATE, limited, read, tiny
from hypothesis import given
from hypothesis import strategies as st

from dynsize import batching, spoken
from dynsize.batching import Example, Examples, batch_plan, epoch_plan, read_batches
from dynsize.config import Config
from dynsize.corpora import Corpus, Utterance, read_audio, read_corpus, summary
from dynsize.features import feature_frames, log_mel, mel_filters, spec_augment
from dynsize.tokenizer import Tokenizer, tokenizer_for, train_tokenizer
from dynsize.training_data import keep_usable


def test_log_mel_by_definition():
    """Against numpy in float64: frames, window, spectrum, filters and logarithm written out."""
    config = tiny()
    waveform = np.random.default_rng(0).standard_normal(1000)
    window, hop = 200, 80
    frames = np.stack([waveform[i : i + window] for i in range(0, 801, hop)])
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(window) / window)
    frames = (frames - frames.mean(1, keepdims=True)) * hann
    power = np.abs(np.fft.rfft(frames, 256)) ** 2
    mel = np.log(power @ mel_filters(config).double().numpy() + 1e-10)
    expected = (mel - mel.mean(0)) / np.sqrt(mel.var(0) + 1e-5)
    found = log_mel(torch.from_numpy(waveform).float(), config)
    np.testing.assert_allclose(found, expected, atol=1e-3)


def test_mel_filters_are_triangles_between_neighbours():
    """The k-th of 12 peaks at the k-th of 12 steps on the mel scale, where its neighbours end."""
    filters = mel_filters(tiny(window_ms=1000.0))
    hz = np.linspace(0, RATE / 2, len(filters))
    low, high = (2595 * math.log10(1 + edge / 700) for edge in (60, 3900))
    mels = 2595 * np.log10(1 + hz / 700)
    peaks = mels[filters.argmax(0).numpy()]
    steps = low + (high - low) * np.arange(1, 13) / 13
    np.testing.assert_allclose(peaks, steps, atol=1)
    inside = (hz > hz[filters[:, 0].argmax()]) & (hz < hz[filters[:, -1].argmax()])
    np.testing.assert_allclose(filters.sum(1)[inside], 1, atol=1e-3)


@given(
    samples=st.integers(1, 2000),
    seed=st.integers(0, 2**20),
    level=st.sampled_from([0.0, 1e-30, 1e-4, 0.3, 100.0]),
    constant=st.booleans(),
)
def test_any_waveform_has_finite_features(samples, seed, level, constant):
    """Silence, a constant, noise of any level, and clipped noise."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(1 if constant else samples, generator=generator)
    features = log_mel((level * noise).clamp(-1, 1).expand(samples), tiny())
    assert features.shape == (feature_frames(samples, tiny()), 12) and features.isfinite().all()


MASKS = dict(mel_bins=40, frequency_mask_bins=8, time_mask_every=25, time_mask_frames=20)


@given(st.integers(0, 2**20), st.integers(1, 300))
def test_spec_augment_stays_within_its_bounds(seed, frames):
    config, features = tiny(**MASKS, frequency_masks=3), torch.ones(frames, 40)
    masked = spec_augment(features, config, random.Random(seed))
    hidden_bins, hidden_frames = (masked == 0).all(0), (masked == 0).all(1)
    assert hidden_bins.sum() <= 3 * 8 or hidden_frames.all()
    assert hidden_frames.sum() <= 20 * max(2, frames // 25)
    assert (masked[~hidden_frames][:, ~hidden_bins] == 1).all() and (features == 1).all()
    assert torch.equal(masked, spec_augment(features, config, random.Random(seed)))


def test_spec_augment_off_and_on():
    features, draw = torch.ones(400, 40), random.Random(0)
    off = tiny(mel_bins=40, frequency_masks=0, time_mask_every=0)
    assert torch.equal(spec_augment(features, off, draw), features)
    on = tiny(**MASKS, frequency_masks=2)
    hidden = torch.stack([spec_augment(features, on, draw) for _ in range(50)]) == 0
    bins, frames = hidden.all(1), hidden.all(2)
    assert 6 < bins.sum(1).float().mean() < 9  # two masks of 4 bins in the mean
    assert 40 < frames.sum(1).float().mean() < 95  # 2 to 16 of 10, which may overlap
    assert frames[:, -5:].any() and frames[:, :5].any()  # masks reach both ends


def test_what_is_drawn_for_an_utterance_is_its_own(tones):
    config = tiny(corpus=str(tones), speeds=(0.9, 1.0, 1.1))
    utterances = read(tones).utterances
    tokenizer = train_tokenizer((utterance.text for utterance in utterances), 12)
    among_others = Examples(utterances, tokenizer, config, keep=True)
    alone = Examples(utterances[-1:], tokenizer, config, keep=True)

    def drawn(examples: Examples, epoch: int | None) -> Example:
        examples.epoch = epoch
        return examples[len(examples) - 1]

    for epoch in range(3):
        one, other = drawn(alone, epoch), drawn(among_others, epoch)
        assert torch.equal(one.features, other.features) and one.seed == other.seed
    epochs = [drawn(alone, epoch) for epoch in range(20)]
    assert len({example.seed for example in epochs}) == 20
    outside = drawn(alone, None).features  # masks are drawn in training alone
    assert not any(torch.equal(example.features, outside) for example in epochs)
    lengths = [round(utterances[-1].samples / speed) for speed in config.speeds]
    expected = {feature_frames(samples, config) for samples in lengths}
    assert {len(example.features) for example in epochs} == expected


@pytest.mark.parametrize("kind", ["unigram", "bpe", "characters"])
@pytest.mark.parametrize("units", [1, 12, 5000])
def test_units_of_every_kind_spell_the_texts(kind, units):
    texts = ["LOW MID HIGH TOP", "TOP LOW", "MÄH 你好", "A", *50 * ["ONE TWO THREE"], "X" * 5000]
    tokenizer = Tokenizer(train_tokenizer(texts, units, kind).model)
    assert tokenizer.labels <= max(units, len(set("".join(texts))) + 1) + 1
    for text in texts:
        labels = tokenizer.encode(text)
        assert tokenizer.decode(labels) == text and 0 not in labels
        if kind == "characters":
            pieces = [tokenizer.pieces.id_to_piece(label) for label in labels]
            assert pieces == list("▁" + text.replace(" ", "▁"))


def write_model(path: Path, **settings) -> Path:
    """Train a SentencePiece model as its users do."""
    model, texts = io.BytesIO(), ["low mid high top", "top low"]
    settings = dict(vocab_size=30, minloglevel=2, hard_vocab_limit=False) | settings
    settings |= dict(sentence_iterator=iter(texts), model_writer=model)
    sentencepiece.SentencePieceTrainer.train(**settings)
    path.write_bytes(model.getvalue())
    return path


@pytest.mark.parametrize(
    "settings",
    [
        dict(),
        dict(model_type="bpe"),
        dict(pad_id=0, unk_id=1, bos_id=2, eos_id=3),
        dict(byte_fallback=True, vocab_size=300),
    ],
)
def test_a_sentencepiece_model_is_used_where_unit_0_is_free(tmp_path, settings):
    file = write_model(tmp_path / "own.model", **settings)
    tokenizer = tokenizer_for([], tiny(tokenizer=str(file)))
    labels = tokenizer.encode("low mid")
    assert 0 not in labels and tokenizer.decode([*labels, tokenizer.unknown]) == "low mid"
    if "byte_fallback" in settings:
        assert tokenizer.decode(tokenizer.encode("low ☃")) == "low ☃"
    else:
        with pytest.raises(ValueError, match="unknown to the tokenizer, '☃', in 'low ☃'"):
            tokenizer.encode("low ☃")


def test_what_cannot_be_used_as_a_sentencepiece_model_is_refused(tmp_path):
    file = write_model(tmp_path / "own.model", unk_id=3, bos_id=-1, eos_id=-1)
    with pytest.raises(ValueError, match=r"own\.model: its unit 0 is .*--unk_id=0"):
        tokenizer_for([], tiny(tokenizer=str(file)))
    for data in (b"", b"noise" * 99):
        (tmp_path / "own.model").write_bytes(data)
        with pytest.raises(ValueError, match=r"own\.model: not a SentencePiece model"):
            tokenizer_for([], tiny(tokenizer=str(tmp_path / "own.model")))
    os.mkfifo(tmp_path / "pipe")
    for name in ("pipe", "missing"):
        with pytest.raises(ValueError, match=f"{name}: no such file"):
            tokenizer_for([], tiny(tokenizer=str(tmp_path / name)))


def test_texts_that_a_tokenizer_spells_otherwise_are_told(tones, tmp_path):
    file = write_model(tmp_path / "own.model", normalization_rule_name="nmt_nfkc_cf")
    config = tiny(corpus=str(tones), tokenizer=str(file))
    corpus = read_corpus(config, ["train"])
    text = corpus.utterances[0].text
    keep_usable(corpus, tokenizer_for([], config), config)
    told = summary(corpus, config, {})
    number = len({utterance.text for utterance in corpus.utterances})
    assert f"spells {number} texts otherwise, {text!r} as {text.lower()!r}" in told


def test_features_in_memory_have_a_limit(tones, monkeypatch):
    config, utterances = tiny(), read(tones).utterances
    examples = Examples(utterances, train_tokenizer(["x"], 1), config, keep=True)
    monkeypatch.setattr(batching, "MOST_KEPT", 3 * examples[0].features.nbytes + 2)
    for number in range(24):
        assert torch.equal(examples[number].features, examples[number].features)
    assert 2 <= len(examples.in_memory) < 6
    assert sum(kept.nbytes for kept in examples.in_memory.values()) <= batching.MOST_KEPT


def test_empty_texts_have_no_units():
    with pytest.raises(ValueError, match="all empty"):
        train_tokenizer(["", ""], 20)


FRAMES = st.lists(st.integers(1, 900), min_size=1, max_size=60)


@given(FRAMES, st.integers(1, 2000), st.integers(1, 9))
def test_batch_plan_holds_every_utterance_once_within_the_limits(frames, most, most_utterances):
    plan = batch_plan(frames, most, most_utterances)
    assert sorted(index for batch in plan for index in batch) == list(range(len(frames)))
    for batch in plan:
        assert len(batch) <= most_utterances
        assert len(batch) == 1 or len(batch) * max(frames[i] for i in batch) <= most


def test_epoch_plan_is_a_function_of_seed_and_epoch():
    frames = [100 + i % 37 for i in range(200)]
    draws = ((0, 0), (0, 0), (0, 1), (1, 0))
    plans = [epoch_plan(frames, tiny(seed=seed), epoch) for seed, epoch in draws]
    assert plans[0] == plans[1] and plans[0] != plans[2] and plans[0] != plans[3]
    assert {frozenset(batch) for batch in plans[0]} != {frozenset(batch) for batch in plans[2]}
    padded = sum(len(batch) * max(frames[i] for i in batch) for batch in plans[0])
    assert padded < 1.15 * sum(frames)


@pytest.mark.parametrize(("front_end", "channels"), [("conv2d", (4, 4)), ("vgg", (2, 2, 2, 2))])
def test_labels_that_cannot_be_aligned_are_left_out_exactly(tmp_path, front_end, channels):
    config = tiny(front_end=front_end, front_end_channels=channels)
    tokenizer = train_tokenizer(["AAB", "B"], 3)  # characters and the mark of a word's beginning
    utterances = [
        Utterance(f"u{n}", f"{tmp_path}/u{n}.flac", "AAB", 80 * n, (0, 80 * n), RATE)
        for n in range(1, 60)
    ]
    labels = tokenizer.encode("AAB")
    corpus = Corpus(utterances=list(utterances))
    keep_usable(corpus, tokenizer, config)
    good, left_out = corpus.utterances, corpus.left_out["too few frames for its labels"]
    for utterance in utterances:
        features = feature_frames(utterance.samples, config)
        frames = features // 4 if front_end == "vgg" else math.ceil(features / 4)
        possible = frames > 0
        if possible:  # as torch's CTC sees it
            log_probs, target = torch.zeros(frames, 1, 9), torch.tensor([labels])
            lengths = torch.tensor([frames]), torch.tensor([len(labels)])
            possible = torch.nn.functional.ctc_loss(log_probs, target, *lengths).isfinite().item()
        assert (utterance in good) == possible
    assert left_out and len(left_out) + len(good) == len(utterances) and "u1.flac" in left_out["u1"]


def test_a_transducer_trains_on_five_labels_a_frame(tmp_path):
    tokenizer = train_tokenizer(["AAB", "B"], 3)
    assert len(tokenizer.encode("AABAAB")) == 7  # with two repeats: 9 frames for CTC
    utterance = Utterance("u", f"{tmp_path}/u.flac", "AABAAB", 200 + 4 * 80, (0, 520), RATE)
    corpus = Corpus(utterances=[utterance] * 2)
    keep_usable(corpus, tokenizer, tiny(output="transducer"))
    assert len(corpus.utterances) == 2
    for output in ("ctc", "attention"):
        with pytest.raises(ValueError, match="7 labels need 9 encoder frames, and it has 2"):
            keep_usable(Corpus(utterances=[utterance] * 2), tokenizer, tiny(output=output))


def test_the_spoken_corpus(tmp_path):
    pytest.importorskip("espeakng_loader", reason="it is not installed: pip install -e '.[demo]'")
    minutes = {"train": 0.7, "dev-clean": 0.1, "dev-other": 0.1, "test-clean": 0.2}
    minutes["test-other"] = 0.2
    code = "from dynsize.spoken import speak_corpus; from pathlib import Path; "
    code += f"speak_corpus(Path('DIR'), 3, {minutes})"
    for name in ("one", "two"):
        command = [sys.executable, "-c", code.replace("DIR", str(tmp_path / name))]
        subprocess.run(command, check=True, capture_output=True)
    one, two = tmp_path / "one", tmp_path / "two"
    names = [path.relative_to(one) for path in one.rglob("*.*")]
    assert names and all((one / name).read_bytes() == (two / name).read_bytes() for name in names)
    config = Config(corpus=str(one))
    splits = {split: read_corpus(config, [split]).utterances for split in minutes}
    texts = {split: {u.text for u in read} for split, read in splits.items()}
    speakers = {split: {u.speaker for u in read} for split, read in splits.items()}
    for split, length in minutes.items():
        seconds = sum(utterance.samples for utterance in splits[split]) / 16000
        assert 60 * length <= seconds < 60 * length + 10
        assert split == "train" or not texts[split] & texts["train"]
    assert speakers["test-clean"] <= speakers["train"]
    assert not speakers["test-other"] & (speakers["train"] | speakers["dev-other"])
    assert all(0.02 < read_audio(u, 16000).abs().max() <= 1 for u in splits["train"])


def test_a_corpus_that_is_there_is_not_spoken_again(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(spoken, "Espeak", None)  # nothing is spoken
    with pytest.raises(SystemExit) as end:
        spoken.main([str(tmp_path)])
    assert end.value.code == 2 and f"{tmp_path}: exists" in capsys.readouterr().err


def test_speaking_ends_with_the_training_that_waits_for_it(tmp_path, monkeypatch):
    monkeypatch.setattr(spoken, "Espeak", lambda seed: None)
    monkeypatch.setattr(spoken, "speak_split", lambda *_: iter(9 * [1.0]))
    other = os.getpid()  # is not its own parent
    with pytest.raises(ValueError, match=f"process {other}, which waits for it, has ended"):
        spoken.speak_corpus(tmp_path / "corpus", parent=other)
    assert not list(tmp_path.iterdir())


def test_workers_that_could_not_send_their_batches_are_an_error(tones):
    examples = Examples(read(tones).utterances, None, tiny(workers=2), keep=False)
    with limited(resource.RLIMIT_NOFILE, len(os.listdir("/dev/fd")) + 16):
        with pytest.raises(ValueError, match=r"--workers 2: needs \d+ open files.* ulimit -n"):
            next(read_batches(examples, [[0]]))
        examples.config = tiny()
        assert len(list(read_batches(examples, [[0]]))) == 1


def test_no_signal_reaches_a_worker_before_it_ignores_them(tones, monkeypatch):
    def blocked() -> bool:
        return signal.pthread_sigmask(signal.SIG_BLOCK, ()) >= set(batching.SIGNALS)

    monkeypatch.setattr(batching, "ignore_signals", lambda worker: 1 / blocked())
    examples = Examples(read(tones).utterances, None, tiny(workers=2), keep=False)
    assert len(list(read_batches(examples, [[0]]))) == 1
    assert not blocked()


def test_workers_that_cannot_all_be_started_leave_none(tones, monkeypatch):
    fork, before, first = os.fork, set(multiprocessing.active_children()), []

    def second_fails() -> int:
        first.extend(set(multiprocessing.active_children()) - before)
        if first:
            time.sleep(0.5)  # until it ignores SIGTERM
            raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")
        return fork()

    monkeypatch.setattr(os, "fork", second_fails)
    examples = Examples(read(tones).utterances, None, tiny(workers=2), keep=False)
    with pytest.raises(ValueError, match=r"--workers 2: .*can't be started.* lower it"):
        next(read_batches(examples, [[0]]))
    first[0].join(3)
    assert first[0].exitcode == -signal.SIGKILL
