"""An empty torchaudio for machines without one: LLaMA-Factory imports it at the top and text needs none of it."""

__version__ = "0.0.0"
