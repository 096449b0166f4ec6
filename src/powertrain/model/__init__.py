"""Weights as running code: formats, layers, one decoder, and the families that map onto it."""
