"""Distillation: a student trained to give a teacher's distributions. Plain torch over `compress.plain_model`."""
