"""tunefleet: fine-tuning that is native to Ray."""

__version__ = "0.1.0"
