"""The configuration of a training: one frozen dataclass, its checks, and the table of presets."""

import dataclasses
import typing
from dataclasses import dataclass, field

CORPUS_KINDS = (
    "librispeech",
    "stm",
    "common-voice",
    "manifest",
    "kaldi",
)  # stm: TED-LIUM 2, Switchboard
LAYERS = ("ff1", "conv", "mhsa", "ff2")  # the prunable layers of a block, in the paper's order
LEARNING_METHODS = ("simple-top-k", "iterative-zero-out")
METHODS = (*LEARNING_METHODS, "none", "layerdrop", "aux-loss")


def setting(default: object, section: str, help: str) -> typing.Any:
    """A field of `Config` with the words that `train.py --help` says about it."""
    return field(default=default, metadata={"section": section, "help": help})


@dataclass(frozen=True)
class Config:
    """All that decides a training. The defaults are the preset `demo`; `PRESETS` lists what the others change."""

    corpus: str = setting(
        "spoken", "corpus", "directory of a corpus, or 'spoken': the embedded one"
    )
    corpus_kind: str = setting("auto", "corpus", "auto: recognised; or " + ", ".join(CORPUS_KINDS))
    train_splits: tuple[str, ...] = setting(
        ("train",), "corpus", "splits to train on; A+B: A and B"
    )
    dev_splits: tuple[str, ...] = setting(
        ("dev-clean", "dev-other"), "corpus", "splits to validate on"
    )
    test_splits: tuple[str, ...] = setting(
        ("test-clean", "test-other"), "corpus", "splits that evaluate.py decodes"
    )
    normaliser: str = setting(
        "none",
        "corpus",
        "of the text: none, lower, upper, or plain: lower case without punctuation",
    )
    speeds: tuple[float, ...] = setting(
        (1.0,), "corpus", "of speech in training; each epoch draws one an utterance"
    )
    cache_features: str = setting(
        "", "corpus", "directory where features are kept between runs; none if empty"
    )
    vocabulary: int = setting(
        48, "corpus", "SentencePiece units, blank not counted; fewer if the text is too small"
    )

    sample_rate: int = setting(16000, "features", "of the audio, in Hz")
    mel_bins: int = setting(40, "features", "mel filters")
    lowest_hz: float = setting(60.0, "features", "lower edge of the mel filters, in Hz")
    highest_hz: float = setting(7600.0, "features", "upper edge of the mel filters, in Hz")
    window_ms: float = setting(25.0, "features", "analysis window, in ms")
    hop_ms: float = setting(12.5, "features", "from one feature frame to the next, in ms")

    frequency_masks: int = setting(
        2, "SpecAugment", "frequency masks of an utterance, at most (2 or fewer: always so many)"
    )
    frequency_mask_bins: int = setting(
        8, "SpecAugment", "width of a frequency mask, in mel bins, at most"
    )
    time_mask_every: int = setting(
        50, "SpecAugment", "an utterance of T frames gets 2 to T / this time masks; 0: none"
    )
    time_mask_frames: int = setting(
        20, "SpecAugment", "width of a time mask, in feature frames, at most"
    )

    blocks: int = setting(
        5, "network", "Conformer blocks N; each has the four layers " + ", ".join(LAYERS)
    )
    width: int = setting(96, "network", "model width D")
    attention_heads: int = setting(
        4, "network", "attention heads H; divides the width, rotary an even number of times"
    )
    kernel: int = setting(
        15, "network", "width K of the depthwise convolution, in encoder frames, 4 hops each; odd"
    )
    front_end: str = setting(
        "conv2d", "network", "conv2d: two convolutions of stride 2; vgg: the paper's"
    )
    front_end_channels: tuple[int, ...] = setting(
        (32, 32), "network", "channels: two for conv2d, four for vgg"
    )
    rotary: bool = setting(True, "network", "rotary positions in the attention")
    dropout: float = setting(
        0.0, "network", "share of every layer's output that is dropped in training"
    )
    shared_head: bool = setting(
        False, "network", "one CTC output layer for all sizes instead of one for each"
    )

    sizes: tuple[int, ...] = setting(
        (7, 13, 20), "algorithm", "layers of each network, ascending; the last is all 4 N"
    )
    method: str = setting(
        "simple-top-k",
        "algorithm",
        "how layers are chosen: simple-top-k, iterative-zero-out; or, to compare with: none (one size trained alone), "
        "layerdrop (random layers dropped, every other one kept), aux-loss (every size is the first layers)",
    )
    size: int = setting(
        0, "algorithm", "method none: the number of layers that are trained alone; 0: all"
    )
    layers_from: str = setting(
        "", "algorithm", "method none: a run whose ranking names these layers, else the first"
    )
    relaxation: str = setting(
        "straight-through", "algorithm", "layer weights of step 1: straight-through or soft"
    )
    step1_share: float = setting(
        0.25, "algorithm", "share of the updates that are step 1, which learns the scores"
    )
    delta: int = setting(1, "algorithm", "simple-top-k: layers that k falls at a time in step 1")
    score_start: float = setting(
        0.5, "algorithm", "simple-top-k: value that every layer score starts with"
    )
    score_rate: float = setting(
        1.0, "algorithm", "simple-top-k: learning rate of the scores over the weights'"
    )
    zero_out_delta: int = setting(
        4, "algorithm", "iterative-zero-out: layers zeroed out at the end of an iteration"
    )
    zero_out_start: float = setting(
        2.0, "algorithm", "iterative-zero-out: value that every layer score starts with"
    )
    zero_out_rate: float = setting(
        10.0, "algorithm", "iterative-zero-out: learning rate of the scores likewise"
    )
    layer_drop: float = setting(
        0.2, "algorithm", "layerdrop: share of utterances that skip a layer"
    )
    subnet_loss: float = setting(
        1.0, "algorithm", "weight of each subnet's loss, beside the supernet's 1"
    )
    stochastic_depth: float = setting(
        0.0, "algorithm", "share of utterances that skip a supernet-only layer in step 2"
    )

    updates: int = setting(1500, "training", "updates of the whole training, both steps")
    batch_seconds: float = setting(
        40.0, "training", "audio of one batch with its padding, in seconds, at most"
    )
    batch_utterances: int = setting(60, "training", "utterances of one batch, at most")
    accumulate: int = setting(
        1, "training", "batches of each process whose gradients make one update"
    )
    checkpoint_activations: bool = setting(
        False, "training", "compute layers again in the backward pass: less memory"
    )
    peak_learning_rate: float = setting(
        4e-3, "training", "highest learning rate; it starts at 1/100 of it"
    )
    warmup: float = setting(
        0.1, "training", "share of the updates in which the learning rate rises"
    )
    cooldown: float = setting(
        0.8, "training", "share in which it falls back; then on to 1e-8 in what is left"
    )
    weight_decay: float = setting(1e-3, "training", "AdamW's weight decay")
    epsilon: float = setting(1e-8, "training", "AdamW's epsilon")
    beta2: float = setting(0.98, "training", "AdamW's decay of the squared gradient")
    clip: float = setting(1.0, "training", "largest norm of the gradient; 0: no clipping")
    precision: str = setting(
        "auto", "training", "bfloat16 (autocast), float32, or auto: bfloat16 where hardware has it"
    )
    device: str = setting("auto", "training", "cpu, cuda, or auto: cuda where there is one")
    workers: int = setting(
        0, "training", "loader processes; 0: none, and features stay in memory (115 MB an hour)"
    )
    seed: int = setting(0, "training", "of everything that is drawn")
    log_every: int = setting(20, "training", "updates from one line of metrics.jsonl to the next")
    validate_every: int = setting(
        500, "training", "updates from one validation to the next; one more at the end"
    )
    save_every: int = setting(
        500, "training", "updates from one checkpoint to the next; one more at the end"
    )
    save_minutes: float = setting(
        10.0, "training", "minutes after which there is a checkpoint in any case"
    )
    keep: int = setting(3, "training", "checkpoints that are kept; average.pt is the mean of these")

    def __post_init__(self) -> None:
        for name, (holds, rule) in self.rules().items():
            if not holds:
                raise ValueError(f"--{name.replace('_', '-')} {shown(getattr(self, name))}: {rule}")

    @property
    def layers(self) -> int:
        """L, the number of prunable layers."""
        return 4 * self.blocks

    def rules(self) -> dict[str, tuple[bool, str]]:
        """For each field that has one: whether its rule holds, and the rule."""
        rules = {name: (getattr(self, name) >= 1, "must be 1 or more") for name in POSITIVE}
        rules |= {name: (getattr(self, name) >= 0, "must be 0 or more") for name in NOT_NEGATIVE}
        rules |= {
            name: (0 <= getattr(self, name) < 1, "must be 0 or more and below 1") for name in SHARES
        }
        rules |= {
            name: (getattr(self, name) in words, "must be " + " or ".join(words))
            for name, words in WORDS.items()
        }
        head_width = self.width // self.attention_heads if self.attention_heads > 0 else 0
        sizes, largest = self.sizes, self.sizes[-1] if self.sizes else 0
        rules["attention_heads"] = (
            head_width * self.attention_heads == self.width > 0
            and not (self.rotary and head_width % 2),
            f"must divide the width {self.width}"
            + (" an even number of times (rotary)" if self.rotary else ""),
        )
        rules["size"] = (
            0 <= self.size <= self.layers and (self.size == 0 or self.method == "none"),
            f"must be 0 to {self.layers}, and needs --method none",
        )
        rules["layers_from"] = (
            not self.layers_from or self.method == "none",
            "needs --method none",
        )
        rules["kernel"] = (self.kernel > 0 and self.kernel % 2 == 1, "must be odd")
        rules["sizes"] = (
            list(sizes) == sorted(set(sizes))
            and min(sizes, default=0) >= 1
            and largest == self.layers,
            f"must be ascending numbers of layers, from 1 up; the last: all {self.layers} of the {self.blocks} blocks",
        )
        channels = {"conv2d": 2, "vgg": 4}.get(self.front_end, 0)
        rules["front_end_channels"] = (
            len(self.front_end_channels) == channels and min(self.front_end_channels) >= 1,
            f"the front-end {self.front_end} needs {channels} numbers of 1 or more",
        )
        rules["highest_hz"] = (
            0 <= self.lowest_hz < self.highest_hz <= self.sample_rate / 2,
            f"must lie above --lowest-hz {self.lowest_hz} and not above half the sample rate {self.sample_rate}",
        )
        rules["cooldown"] = (
            0 <= self.cooldown <= 1 - self.warmup,
            f"must be 0 to 1 - warmup = {1 - self.warmup:g}",
        )
        rules["hop_ms"] = (
            0 < self.hop_ms <= self.window_ms,
            f"must be above 0 and at most --window-ms {self.window_ms}",
        )
        rules["window_ms"] = (
            self.window_ms * self.sample_rate >= 2000,
            "must be two samples or more",
        )
        rules["seed"] = (0 <= self.seed < 2**31, "must be 0 or more and below 2^31")
        rules["speeds"] = (
            bool(self.speeds) and all(0.5 <= s <= 2 for s in self.speeds),
            "must be from 0.5 to 2",
        )
        rules["keep"] = (1 <= self.keep <= 10, "must be 1 to 10")
        rules |= {name: (getattr(self, name) > 0, "must be above 0") for name in ABOVE_0}
        return rules


POSITIVE = (
    "vocabulary sample_rate mel_bins blocks width attention_heads delta zero_out_delta updates batch_utterances "
    "accumulate log_every validate_every save_every"
).split()
NOT_NEGATIVE = (
    "frequency_masks frequency_mask_bins time_mask_every time_mask_frames score_rate zero_out_rate subnet_loss "
    "weight_decay epsilon clip workers"
).split()
ABOVE_0 = ("batch_seconds", "peak_learning_rate", "save_minutes")
SHARES = ("dropout", "beta2", "step1_share", "stochastic_depth", "layer_drop", "warmup")
WORDS = {
    "front_end": ("conv2d", "vgg"),
    "method": METHODS,
    "relaxation": ("straight-through", "soft"),
    "corpus_kind": ("auto", *CORPUS_KINDS),
    "normaliser": ("none", "lower", "upper", "plain"),
    "precision": ("auto", "bfloat16", "float32"),
}


def shown(value: object) -> str:
    """A value as it is written on the command line."""
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


# What the paper's two setups share, read from the authors' published configurations.
PAPER = dict(
    vocabulary=512, mel_bins=80, hop_ms=10.0, time_mask_every=25, time_mask_frames=20, front_end="vgg",
    front_end_channels=(32, 64, 64, 32), blocks=12, kernel=31, rotary=False, sizes=(16, 32, 48), subnet_loss=0.3,
    stochastic_depth=0.3, zero_out_start=10.0, zero_out_rate=1.0,
    warmup=0.45, cooldown=0.45, peak_learning_rate=4e-4, weight_decay=1e-3, epsilon=1e-16, beta2=0.999, clip=0.0,
    batch_seconds=150.0, workers=4, log_every=100, validate_every=5000, save_every=1000,
)  # fmt: skip
PRESETS: dict[str, dict[str, typing.Any]] = {
    "demo": dict(),
    "digits": dict(
        corpus="digits", sample_rate=8000, highest_hz=3800.0, window_ms=40.0, hop_ms=20.0, time_mask_frames=10,
        vocabulary=32, blocks=6, sizes=(8, 16, 24), dropout=0.1, step1_share=0.4, subnet_loss=0.3, stochastic_depth=0.1,
        updates=4000, batch_seconds=25.0, peak_learning_rate=1.2e-3,
    ),
    "librispeech": PAPER | dict(
        corpus="LibriSpeech", train_splits=("train-clean-100", "train-clean-360", "train-other-500"),
        width=512, attention_heads=8, dropout=0.1, updates=732_000, step1_share=0.64, delta=1, batch_utterances=60,
        frequency_masks=5, frequency_mask_bins=8,
    ),
    "tedlium2": PAPER | dict(
        corpus="TEDLIUM_release2", dev_splits=("dev",), test_splits=("test",),
        width=384, attention_heads=6, dropout=0.2, updates=350_000, step1_share=0.61, delta=4, batch_utterances=128,
        frequency_masks=10, frequency_mask_bins=5,
    ),
}  # fmt: skip


def preset(name: str, **changes: typing.Any) -> Config:
    """The preset `name` with some fields changed. Raises ValueError for an unknown preset or an impossible value."""
    if name not in PRESETS:
        raise ValueError(f"--preset {name}: must be {' or '.join(PRESETS)}")
    return for_method(Config(**(PRESETS[name] | changes)))


def for_method(config: Config) -> Config:
    """The configuration with what its method asks for: `none` has one size, LayerDrop's sizes share their output
    layer, and with auxiliary losses no layer is dropped."""
    changes: dict[str, dict] = {
        "none": dict(sizes=config.sizes[-1:]),
        "layerdrop": dict(shared_head=True),
        "aux-loss": dict(stochastic_depth=0.0),
    }
    return dataclasses.replace(config, **changes.get(config.method, {}))


def from_dict(values: dict) -> Config:
    """The inverse of `dataclasses.asdict`, where tuples may have become lists."""
    return Config(
        **{
            name: tuple(value) if isinstance(value, list) else value
            for name, value in values.items()
        }
    )


def fields() -> tuple[dataclasses.Field, ...]:
    """All settings, in the order in which they are shown."""
    return dataclasses.fields(Config)
