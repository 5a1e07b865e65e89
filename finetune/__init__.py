"""Tuning and evaluation through LLaMA-Factory, and the rows that it trains on."""
