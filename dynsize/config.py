"""The configuration of a training: one frozen dataclass, its checks, and the table of presets."""

import dataclasses
import os
import re
import typing
from dataclasses import dataclass, field

# stm: TED-LIUM 2, Switchboard
CORPUS_KINDS = ("librispeech", "stm", "common-voice", "manifest", "kaldi")
LAYERS = ("ff1", "conv", "mhsa", "ff2")  # the prunable layers of a block, in the paper's order
# What each algorithm has by default: the paper's values (Iterative-Zero-Out, Simple-Top-k on
# LibriSpeech). `METHOD_PRESETS` has what a preset changes.
METHOD_DEFAULTS: dict[str, dict[str, typing.Any]] = {
    "simple-top-k": dict(delta=1, initial_score=0.5, score_rate=1.0),
    "iterative-zero-out": dict(delta=4, initial_score=10.0, score_rate=1.0),
    "ortho-softmax": dict(delta=1, initial_score=0.0, score_rate=10.0),
}
NO_SCORES = dict(delta=1, initial_score=0.0, score_rate=1.0)  # of a method that learns none
METHODS = (*METHOD_DEFAULTS, "none", "layerdrop", "aux-loss")
HIGHEST = 2**31 - 1  # of settings that have no other limit
CHANNELS = {"conv2d": 2, "vgg": 4}  # convolutions of each front-end


def setting(
    default: object,
    section: str,
    help: str,
    least: float | None = None,
    most: float | None = None,
    below: float | None = None,
    choices: tuple[str, ...] = (),
) -> typing.Any:
    """Return a field of `Config` with the words that `train.py --help` says about it.

    A number, or each number of a tuple, lies from `least` to `most`, or from `least` to below
    `below`. Every setting that is a number has these limits, so it is finite. `choices`: the values
    that a text may have.
    """
    limits = dict(least=least, most=most, below=below, choices=choices)
    return field(default=default, metadata=dict(section=section, help=help) | limits)


def share(default: float, section: str, help: str) -> typing.Any:
    """Return a field of `Config` for a number from 0 to below 1."""
    return setting(default, section, help, least=0, below=1)


@dataclass(frozen=True)
class Config:
    """All that decides a training.

    The defaults are the preset `demo`; `PRESETS` lists what the others change.
    """

    corpus: str = setting(
        "spoken", "corpus", "directory of a corpus, or spoken: sentences that espeak-ng speaks"
    )
    corpus_kind: str = setting(
        "auto",
        "corpus",
        "form of the corpus; auto: recognised by its files",
        choices=("auto", *CORPUS_KINDS),
    )
    train_splits: tuple[str, ...] = setting(
        ("train",), "corpus", "splits to train on; A+B is A and B"
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
        "change of every text; plain: lower case without punctuation",
        choices=("none", "lower", "upper", "plain"),
    )
    speeds: tuple[float, ...] = setting(
        (1.0,),
        "corpus",
        "speeds of speech; one is drawn for each utterance in each epoch",
        least=0.5,
        most=2,
    )
    cache_features: str = setting(
        "", "corpus", "directory that keeps features between trainings; empty: none"
    )
    min_seconds: float = setting(
        0.0, "corpus", "training leaves out utterances that are shorter", least=0, most=86_400
    )
    max_seconds: float = setting(
        0.0,
        "corpus",
        "training leaves out utterances that are longer; 0: none",
        least=0,
        most=86_400,
    )
    units: str = setting(
        "unigram", "corpus", "kind of SentencePiece units", choices=("unigram", "bpe", "characters")
    )
    tokenizer: str = setting(
        "", "corpus", "a SentencePiece model to use as it is; empty: one is made from the texts"
    )
    vocabulary: int = setting(
        48,
        "corpus",
        "SentencePiece units without the blank; fewer where the text is small",
        least=1,
        most=100_000,
    )

    sample_rate: int = setting(
        16000, "features", "rate to which audio is resampled, in Hz", least=1000, most=192_000
    )
    mel_bins: int = setting(40, "features", "mel filters", least=1, most=1024)
    lowest_hz: float = setting(
        60.0, "features", "lower edge of the mel filters, in Hz", least=0, most=96_000
    )
    highest_hz: float = setting(
        7600.0, "features", "upper edge of the mel filters, in Hz", least=1, most=96_000
    )
    window_ms: float = setting(25.0, "features", "analysis window, in ms", least=1, most=1000)
    hop_ms: float = setting(
        12.5, "features", "step from one feature frame to the next, in ms", least=1, most=1000
    )

    frequency_masks: int = setting(
        2,
        "SpecAugment",
        "most frequency masks of an utterance; their number is drawn from 2 to this",
        least=0,
        most=1000,
    )
    frequency_mask_bins: int = setting(
        8, "SpecAugment", "widest frequency mask, in mel bins", least=0, most=HIGHEST
    )
    time_mask_every: int = setting(
        50,
        "SpecAugment",
        "an utterance of T frames gets 2 to T / this time masks; 0: none",
        least=0,
        most=HIGHEST,
    )
    time_mask_frames: int = setting(
        20, "SpecAugment", "widest time mask, in feature frames", least=0, most=HIGHEST
    )

    blocks: int = setting(
        5,
        "network",
        "Conformer blocks N; each has the four layers " + ", ".join(LAYERS),
        least=1,
        most=256,
    )
    width: int = setting(96, "network", "model width D", least=1, most=8192)
    attention_heads: int = setting(
        4,
        "network",
        "attention heads H; the width of a head, D / H, is whole, and even with --rotary",
        least=1,
        most=8192,
    )
    kernel: int = setting(
        15,
        "network",
        "odd width K of the depthwise convolution, in encoder frames of 4 hops",
        least=1,
        most=1023,
    )
    front_end: str = setting(
        "conv2d",
        "network",
        "conv2d: two convolutions of stride 2; vgg: the paper's",
        choices=tuple(CHANNELS),
    )
    front_end_channels: tuple[int, ...] = setting(
        (32, 32),
        "network",
        "channels of its convolutions: two for conv2d, four for vgg",
        least=1,
        most=1024,
    )
    rotary: bool = setting(True, "network", "rotary positions in the attention")
    dropout: float = share(
        0.0, "network", "share of each layer's output that is dropped in training"
    )
    shared_output_layer: bool = setting(
        False, "network", "one CTC output layer for all sizes instead of one for each"
    )

    sizes: tuple[int, ...] = setting(
        (7, 13, 20),
        "algorithm",
        "layers of each network, ascending; the last is all 4 N",
        least=1,
        most=1024,
    )
    method: str = setting(
        "simple-top-k",
        "algorithm",
        "how layers are chosen. To compare with: none (one size trained alone), layerdrop (layers "
        "dropped at random, then every other one pruned), aux-loss (each size is the first layers)",
        choices=METHODS,
    )
    size: int = setting(
        0, "algorithm", "method none: layers of the network; 0: all", least=0, most=1024
    )
    layers_from: str = setting(
        "",
        "algorithm",
        "method none: a run whose ranking chooses the layers; empty: the first ones",
    )
    teacher: str = setting(
        "",
        "algorithm",
        "method none: a run, of whose largest network the frame posteriors are learned beside CTC",
    )
    relaxation: str = setting(
        "straight-through",
        "algorithm",
        "simple-top-k: layer weights of step 1",
        choices=("straight-through", "soft"),
    )
    step1_share: float = share(
        0.25, "algorithm", "share of the updates that are step 1, which learns the scores"
    )
    # None stands for the method's value in the preset, by which `__post_init__` replaces it.
    delta: int = setting(
        None,
        "algorithm",
        "layers by which the subnet of step 1 shrinks at a time; by default the method's; "
        "ortho-softmax has none",
        least=1,
        most=1024,
    )
    initial_score: float = setting(
        None,
        "algorithm",
        "initial value of the layer scores; by default the method's",
        least=-1000,
        most=1000,
    )
    score_rate: float = setting(
        None,
        "algorithm",
        "learning rate of the scores, as a multiple of the weights'; by default the method's",
        least=0,
        most=1e6,
    )
    layer_drop: float = share(
        0.2, "algorithm", "layerdrop: share of the utterances that skip a layer"
    )
    subnet_loss: float = setting(
        1.0,
        "algorithm",
        "weight of each subnet's loss; the supernet's is 1",
        least=0,
        most=1000,
    )
    stochastic_depth: float = share(
        0.0,
        "algorithm",
        "share of the utterances for which the supernet skips a layer in step 2; "
        "layers of the smallest size are never skipped",
    )

    updates: int = setting(
        1500, "training", "updates of the whole training, both steps", least=1, most=HIGHEST
    )
    batch_seconds: float = setting(
        40.0,
        "training",
        "most audio in a batch with its padding, in seconds; a longer utterance is alone",
        least=0.01,
        most=1e6,
    )
    batch_utterances: int = setting(
        60, "training", "most utterances in a batch", least=1, most=HIGHEST
    )
    accumulate: int = setting(
        1, "training", "batches of each process in one update", least=1, most=10_000
    )
    checkpoint_activations: bool = setting(
        False, "training", "save memory: compute each layer again in the backward pass"
    )
    peak_learning_rate: float = setting(
        4e-3, "training", "highest learning rate; the first is 1/100 of it", least=1e-12, most=1
    )
    warmup: float = share(0.1, "training", "share of the updates in which the learning rate rises")
    cooldown: float = setting(
        0.8,
        "training",
        "share of the updates in which it falls to 1/100; the rest goes on to 1e-8",
        least=0,
        most=1,
    )
    weight_decay: float = share(1e-3, "training", "AdamW's weight decay")
    epsilon: float = setting(1e-8, "training", "AdamW's epsilon", least=1e-30, most=1)
    beta2: float = share(0.98, "training", "AdamW's decay of the squared gradient")
    clip: float = setting(
        1.0, "training", "largest norm of the gradient; 0: no clipping", least=0, most=1e9
    )
    precision: str = setting(
        "auto",
        "training",
        "number format of the layers; auto: bfloat16 where the hardware computes it, else float32",
        choices=("auto", "bfloat16", "float32"),
    )
    device: str = setting(
        "auto", "training", "cpu, cuda, cuda:N, or auto: cuda where there is a GPU"
    )
    workers: int = setting(
        0,
        "training",
        "processes that read audio; 0: none, and features stay in memory (115 MB an hour)",
        least=0,
        most=64,
    )
    seed: int = setting(0, "training", "seed of everything that is drawn", least=0, most=HIGHEST)
    log_every: int = setting(
        20, "training", "updates from one line of the log to the next", least=1, most=HIGHEST
    )
    validate_every: int = setting(
        500,
        "training",
        "updates from one validation to the next; one more at the end",
        least=1,
        most=HIGHEST,
    )
    save_every: int = setting(
        500,
        "training",
        "updates from one checkpoint to the next; one more at the end",
        least=1,
        most=HIGHEST,
    )
    save_minutes: float = setting(
        10.0, "training", "most minutes between two checkpoints", least=0.01, most=1e6
    )
    keep: int = setting(3, "training", "newest checkpoints that are kept", least=1, most=10)
    most_left_out: float = share(
        0.1, "training", "share of utterances that may be unreadable; with more the training ends"
    )

    preset: str = "demo"  # whose METHOD_PRESETS apply; it has no help text, as it is no setting

    def __post_init__(self) -> None:
        for name, value in method_settings(self.preset, self.method).items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        for setting in fields():
            if rule := fault(setting, getattr(self, setting.name)):
                self.refuse(setting.name, rule)
        for name, (holds, rule) in self.rules().items():
            if not holds:
                self.refuse(name, rule)

    def refuse(self, name: str, rule: str) -> typing.NoReturn:
        """Raise ValueError for the value of a setting that breaks a rule."""
        flag, value = name.replace("_", "-"), shown(getattr(self, name))
        raise ValueError(f"--{flag} {value or repr(value)}: {rule}")

    @property
    def layers(self) -> int:
        """L, the number of prunable layers."""
        return 4 * self.blocks

    @property
    def learns(self) -> bool:
        """Whether the training has a step 1, in which layer scores are learned."""
        return self.method in METHOD_DEFAULTS and len(self.sizes) > 1

    def rules(self) -> dict[str, tuple[bool, str]]:
        """Return the rules that limits can't express: setting → whether it holds, and the rule."""
        rules = self.corpus_rules() | self.feature_rules() | self.network_rules()
        rules["cooldown"] = (
            self.cooldown <= 1 - self.warmup,
            f"must be 0 to 1 - warmup = {1 - self.warmup:g}",
        )
        rules["device"] = (
            re.fullmatch(r"auto|cpu|cuda(:\d{1,4})?", self.device) is not None,
            "must be auto, cpu, cuda or cuda:N",
        )
        return rules

    def corpus_rules(self) -> dict[str, tuple[bool, str]]:
        """Return the rules of the settings of the corpus."""
        rules = {"corpus": (bool(self.corpus.strip()), "must be a directory, or spoken")}
        for name in ("train_splits", "dev_splits", "test_splits"):
            names = getattr(self, name)
            rules[name] = (are_splits(names), "must be names inside the corpus; A+B: A and B")
        return rules

    def feature_rules(self) -> dict[str, tuple[bool, str]]:
        """Return the rules of the settings of the features."""
        nyquist = self.sample_rate / 2
        return {
            "speeds": (bool(self.speeds), "must be one or more"),
            "max_seconds": (
                self.max_seconds == 0 or self.max_seconds > self.min_seconds,
                f"must be above --min-seconds {self.min_seconds:g}, or 0",
            ),
            "highest_hz": (
                self.lowest_hz + self.mel_bins <= self.highest_hz <= nyquist,
                f"must be at most {nyquist:g}, half the sample rate, and at least 1 Hz for each of "
                f"the {self.mel_bins} mel bins above --lowest-hz {self.lowest_hz:g}",
            ),
            "window_ms": (self.window_ms * self.sample_rate >= 2000, "must be two samples or more"),
            "hop_ms": (
                self.hop_ms <= self.window_ms and self.hop_ms * self.sample_rate >= 1000,
                f"must be a sample or more and at most --window-ms {self.window_ms:g}",
            ),
        }

    def network_rules(self) -> dict[str, tuple[bool, str]]:
        """Return the rules of the settings of the network and its sizes."""
        head_width, rest = divmod(self.width, self.attention_heads)
        channels = CHANNELS[self.front_end]
        alone = self.method == "none"
        return {
            "attention_heads": (
                rest == 0 and not (self.rotary and head_width % 2),
                f"must divide --width {self.width}"
                + (" an even number of times (--rotary)" if self.rotary else ""),
            ),
            "kernel": (self.kernel % 2 == 1, "must be odd"),
            "front_end_channels": (
                len(self.front_end_channels) == channels,
                f"the front-end {self.front_end} needs {channels} numbers",
            ),
            "sizes": (
                list(self.sizes) == sorted(set(self.sizes)) and self.layers in self.sizes[-1:],
                f"must be ascending; the last: all {self.layers} layers of {self.blocks} blocks",
            ),
            "size": (
                self.size <= self.layers and (self.size == 0 or alone),
                f"must be 0 to {self.layers}, and needs --method none",
            ),
            "layers_from": (not self.layers_from or alone, "needs --method none"),
            "teacher": (not self.teacher or alone, "needs --method none"),
        }


def are_splits(names: tuple[str, ...]) -> bool:
    """Return whether there are names, and each part of a name `A+B` stays inside the corpus."""
    parts = [part for name in names for part in name.split("+")]
    return bool(parts) and all(
        part.strip()
        and part.isprintable()
        and not os.path.isabs(part)
        and ".." not in part.split("/")
        for part in parts
    )


def limits(setting: dataclasses.Field) -> str:
    """Return what the numbers of a setting must be, for people; '' for other settings."""
    least, most, below = (setting.metadata[name] for name in ("least", "most", "below"))
    if below is not None:
        return f"must be {least:g} or more and below {below:g}"
    if most == HIGHEST:
        return f"must be {least:g} or more and below 2^31"
    return "" if least is None else f"must be {least:g} to {most:g}"


def fault(setting: dataclasses.Field, value: object) -> str:
    """Return what a setting must be, where this value is not that; else ''."""
    least, most, below, choices = (
        setting.metadata[name] for name in ("least", "most", "below", "choices")
    )
    if choices and value not in choices:
        return "must be " + " or ".join(choices)
    numbers = value if isinstance(value, tuple) else (value,)
    within = least is None or all(
        least <= number and (number <= most if below is None else number < below)
        for number in numbers
    )
    return "" if within else limits(setting)


def shown(value: object) -> str:
    """Return a value as it is written on the command line."""
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


# What the paper's two setups share, read from the authors' published configurations.
PAPER = dict(
    vocabulary=512, mel_bins=80, hop_ms=10.0, time_mask_every=25, time_mask_frames=20,
    front_end="vgg", front_end_channels=(32, 64, 64, 32), blocks=12, kernel=31, rotary=False,
    sizes=(16, 32, 48), subnet_loss=0.3, stochastic_depth=0.3,
    warmup=0.45, cooldown=0.45, peak_learning_rate=4e-4, weight_decay=1e-3, epsilon=1e-16,
    beta2=0.999, clip=0.0,
    batch_seconds=150.0, workers=4, log_every=100, validate_every=5000, save_every=1000,
)  # fmt: skip
PRESETS: dict[str, dict[str, typing.Any]] = {
    "demo": dict(),
    "digits": dict(
        corpus="digits", sample_rate=8000, highest_hz=3800.0, window_ms=40.0, hop_ms=20.0,
        time_mask_frames=10, vocabulary=32, blocks=6, sizes=(8, 16, 24), dropout=0.1,
        step1_share=0.4, subnet_loss=0.3, stochastic_depth=0.1,
        updates=8000, batch_seconds=25.0, peak_learning_rate=1.2e-3, validate_every=1000,
        precision="float32",  # on a CPU as fast as bfloat16 for this network, and alike everywhere
    ),
    "librispeech": PAPER | dict(
        corpus="LibriSpeech",
        train_splits=("train-clean-100", "train-clean-360", "train-other-500"),
        width=512, attention_heads=8, dropout=0.1, updates=732_000, step1_share=0.64,
        batch_utterances=60, frequency_masks=5, frequency_mask_bins=8,
    ),
    "tedlium2": PAPER | dict(
        corpus="TEDLIUM_release2", dev_splits=("dev",), test_splits=("test",),
        width=384, attention_heads=6, dropout=0.2, updates=350_000, step1_share=0.61,
        batch_utterances=128, frequency_masks=10, frequency_mask_bins=5,
    ),
}  # fmt: skip

# In a short training the scores start nearer to 0 and learn faster, else they would hardly move.
SHORT_ZERO_OUT = dict(initial_score=2.0, score_rate=10.0)
# Preset → method → settings, where they differ from `METHOD_DEFAULTS`.
METHOD_PRESETS: dict[str, dict[str, dict[str, typing.Any]]] = {
    "demo": {"iterative-zero-out": SHORT_ZERO_OUT},
    "digits": {"iterative-zero-out": SHORT_ZERO_OUT},
    "tedlium2": {"simple-top-k": dict(delta=4)},
}


def method_settings(preset: str, method: str) -> dict[str, typing.Any]:
    """Return a method's `delta`, `initial_score` and `score_rate` in a preset."""
    defaults = METHOD_DEFAULTS.get(method, NO_SCORES)
    return defaults | METHOD_PRESETS.get(preset, {}).get(method, {})


def preset(name: str, **changes: typing.Any) -> Config:
    """Return the preset `name` with some settings changed.

    Raises ValueError for an unknown preset or an impossible value.
    """
    if name not in PRESETS:
        raise ValueError(f"--preset {name}: must be {' or '.join(PRESETS)}")
    return for_method(Config(preset=name, **(PRESETS[name] | changes)))


def with_method(config: Config, method: str, **changes: typing.Any) -> Config:
    """Return the configuration with another method and some settings changed.

    Settings of `method_settings` that have the old method's values take the new method's.
    """
    old = method_settings(config.preset, config.method)
    unset = {name: None for name, value in old.items() if getattr(config, name) == value}
    return for_method(dataclasses.replace(config, method=method, **unset | changes))


def for_method(config: Config) -> Config:
    """Return the configuration with what its method asks for.

    `none` has one size. LayerDrop's sizes share their output layer. Auxiliary losses drop no layer.
    """
    changes: dict[str, dict] = {
        "none": dict(sizes=config.sizes[-1:]),
        "layerdrop": dict(shared_output_layer=True),
        "aux-loss": dict(stochastic_depth=0.0),
    }
    return dataclasses.replace(config, **changes.get(config.method, {}))


def from_dict(values: dict) -> Config:
    """Return the configuration of `dataclasses.asdict(config)`, in which lists become tuples."""
    settings = {
        name: tuple(value) if isinstance(value, list) else value for name, value in values.items()
    }
    return Config(**settings)


def fields() -> tuple[dataclasses.Field, ...]:
    """Return all settings that have a flag, in the order in which they are shown."""
    return tuple(field for field in dataclasses.fields(Config) if field.metadata)
