"""Dynamic encoder size: one Conformer-CTC supernet whose subnets share all its weights."""

__version__ = "0.1.0"
