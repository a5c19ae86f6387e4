"""What tests share: a corpus of tones, networks, and hypothesis's profiles."""

import json
import os
import random
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import hypothesis
import numpy as np
import pytest
import soundfile

# Read when torch is imported. Networks as small as these take longer with more threads, and each
# core has its process.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

if not torch.cuda.is_available():  # read when triton is imported, so it comes first
    os.environ["TRITON_INTERPRET"] = "1"

from dynsize.batching import Batch
from dynsize.config import LAYERS, Config
from dynsize.corpora import Corpus, read_corpus
from dynsize.supernet import Supernet
from dynsize.tokenizer import Tokenizer, train_tokenizer
from dynsize.training import Trainer

hypothesis.settings.register_profile("dev", deadline=None, max_examples=30)
hypothesis.settings.register_profile("ci", hypothesis.settings.get_profile("dev"), derandomize=True)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "dev")


needs_gpu = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="Triton's interpreter computes bfloat16 wrong"
)


def pytest_xdist_auto_num_workers() -> int:
    """One more than there are cores: a test may wait for other processes."""
    return os.cpu_count() + 1


def skip_without_interpreter() -> None:
    """Skip a module of tests where Triton can't interpret: before 3.7, with numpy from 2.4 on."""
    import triton

    old = tuple(map(int, triton.__version__.split(".")[:2])) < (3, 7)
    new = tuple(map(int, np.__version__.split(".")[:2])) >= (2, 4)
    if old and new and not torch.cuda.is_available():
        reason = f"triton {triton.__version__} does not interpret with numpy {np.__version__}"
        pytest.skip(reason, allow_module_level=True)


RATE = 8000  # Hz
TONES = {"LOW": 300, "MID": 900, "HIGH": 2000, "TOP": 3200}  # Hz
SPLITS = {"train": 24, "dev-clean": 4, "dev-other": 4, "test-clean": 6, "test-other": 4}


def write_tones(root: Path, splits: dict[str, int] = SPLITS) -> Path:
    """A corpus in LibriSpeech's layout whose words are tones of 0.2 s."""
    draw, noise = random.Random(0), np.random.default_rng(0)
    for number, (split, utterances) in enumerate(splits.items()):
        folder = root / split / f"{number}" / "7"
        folder.mkdir(parents=True)
        lines = []
        for utterance in range(utterances):
            words = draw.choices(list(TONES), k=draw.randint(2, 4))
            time = np.arange(round(0.2 * RATE)) / RATE
            audio = np.concatenate([0.3 * np.sin(2 * np.pi * TONES[word] * time) for word in words])
            audio = audio + 0.01 * noise.standard_normal(len(audio))
            soundfile.write(folder / f"{number}-7-{utterance:04}.flac", audio, RATE)
            lines.append(f"{number}-7-{utterance:04} {' '.join(words)}\n")
        (folder / f"{number}-7.trans.txt").write_text("".join(lines))
    return root


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory) -> Iterator[None]:
    """The tests keep what they keep in a directory of their own, scripts that they start too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def tones(tmp_path_factory) -> Path:
    """The corpus of tones, not to be changed."""
    return write_tones(tmp_path_factory.mktemp("corpus"))


def everything_in(folder: Path) -> dict[Path, bytes]:
    """The content of each file in a folder and in the folders in it."""
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def tiny(**changes) -> Config:
    """A configuration for the corpus of tones that trains in seconds."""
    values = dict(
        sample_rate=RATE, mel_bins=12, highest_hz=3900.0, hop_ms=10.0, vocabulary=12, blocks=2,
        width=16, attention_heads=2, kernel=3, rotary=False, dropout=0.1,
        front_end_channels=(4, 4), sizes=(3, 5, 8), step1_share=0.6, subnet_loss=0.3,
        stochastic_depth=0.3, precision="float32", device="cpu", updates=12,
        batch_seconds=5.0, warmup=0.2,
        cooldown=0.7, log_every=4, validate_every=6, save_every=6, time_mask_every=100,
        time_mask_frames=4, frequency_mask_bins=2,
    )  # fmt: skip
    return Config(**(values | changes))


def read(root: Path, *splits: str, **changes) -> Corpus:
    """Read a corpus, by default its training split."""
    return read_corpus(tiny(corpus=str(root), **changes), splits or ["train"])


def begun(corpus: Path, run: Path, **changes) -> Trainer:
    """A tiny training in its new run directory."""
    return Trainer(tiny(**changes | dict(corpus=str(corpus))), run).begin()


def finish(trainer: Trainer) -> dict[str, torch.Tensor]:
    """Train to the end; return the weights."""
    for _ in trainer.updates():
        pass
    return dict(trainer.model.named_parameters())


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    """Whether two networks have bitwise the same weights."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def logged(run: Path) -> list[dict]:
    """The lines of metrics.jsonl."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@contextmanager
def limited(what: int, most: int) -> Iterator[None]:
    """Inside, this process has at most so much of a resource."""
    limits = resource.getrlimit(what)
    resource.setrlimit(what, (most, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(what, limits)


def one_update(trainer: Trainer, batches: list[Batch]) -> dict:
    """Train one update of these batches, without what comes before and after; return its record."""
    trainer.data.batches = lambda *_, **__: iter(batches)
    trainer.prepare = trainer.save = lambda: None
    trainer.validate = trainer.log = lambda *_: {}
    return next(trainer.updates())


def network(seed: int = 0, labels: int = 7, **changes) -> Supernet:
    """A supernet in float64 with random weights: the layers of a new one are the identity."""
    torch.manual_seed(seed)
    model = Supernet(tiny(dropout=0.0, **changes), labels).double().eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.2 * torch.randn_like(weight))
    random.Random(seed).shuffle(model.ranking)
    return model


def random_supernet(
    ranking: list[int] | None = None, vocabulary: int = 12, **changes
) -> tuple[Supernet, Tokenizer]:
    """A supernet whose layers and outputs are random, and a tokenizer of the tones' names."""
    tokenizer = train_tokenizer([" ".join(TONES)] * 9, vocabulary)
    torch.manual_seed(0)
    model = Supernet(tiny(**changes), tokenizer.labels, ranking).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.3 * torch.randn_like(weight))
    return model, tokenizer


def utterances(
    model: Supernet, lengths: list[int], seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Features, with noise in the padding too, and lengths."""
    generator = torch.Generator().manual_seed(seed)
    shape = (len(lengths), max(lengths), model.config.mel_bins)
    return torch.randn(shape, generator=generator, dtype=torch.float64), torch.tensor(lengths)


def layer_of(model: Supernet, layer: int) -> torch.nn.Module:
    """The module of a layer, which is numbered from the input."""
    return model.encoder.blocks[layer // 4][LAYERS[layer % 4]]


def computed_rows(model: Supernet, gates: list, batch: int = 2) -> list[int]:
    """The number of streams for which each of the L layers is computed in one forward."""
    rows = [0] * model.config.layers
    for layer in range(len(rows)):

        def count(module, inputs, layer=layer):
            rows[layer] += len(inputs[0]) // batch

        layer_of(model, layer).register_forward_pre_hook(count)
    model(*utterances(model, [9] * batch), [len(rows)] * len(gates), gates)
    return rows
