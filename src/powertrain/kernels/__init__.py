"""Ops of the model: each is its torch reference; faster providers register beside it."""
