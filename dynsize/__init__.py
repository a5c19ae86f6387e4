"""Dynamic encoder size: one Conformer-CTC supernet, and subnets of several sizes that share all its weights."""

__version__ = "0.1.0"
