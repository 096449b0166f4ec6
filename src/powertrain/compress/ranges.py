"""Temporary: replaced at the merge."""

from __future__ import annotations

import torch


def choose_range(groups, num_bits, symmetric, observer, scale_dtype, name):
    low = groups.amin(-1).clamp(max=0.0)
    high = groups.amax(-1).clamp(min=0.0)
    q_min, q_max = -(2 ** (num_bits - 1)), 2 ** (num_bits - 1) - 1

    def grid(f):
        if symmetric:
            s = (torch.maximum(-low, high) * f / ((q_max - q_min) / 2)).to(scale_dtype).float().clamp(min=1e-30)
            return s, torch.zeros_like(s)
        s = ((high - low) * f / (q_max - q_min)).to(scale_dtype).float().clamp(min=1e-30)
        return s, torch.round(q_min - low * f / s).clamp(q_min, q_max)

    best = grid(1.0)
    if observer == "mse":

        def err(s, z):
            q = torch.round(groups / s.unsqueeze(-1) + z.unsqueeze(-1)).clamp_(q_min, q_max)
            return ((q - z.unsqueeze(-1)) * s.unsqueeze(-1) - groups).square().sum(-1)

        e = err(*best)
        for i in range(1, 50, 2):
            g = grid(1 - i * 0.01)
            n = err(*g)
            better = n < e
            e = torch.where(better, n, e)
            best = tuple(torch.where(better, a, b) for a, b in zip(g, best, strict=True))
    return best[0], None if symmetric else best[1]
