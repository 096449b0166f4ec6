"""Orthogonal matrices that spread a vector's energy over all its places: Hadamard's, and random ones."""

from __future__ import annotations

import torch

from powertrain.types import PowertrainError


def hadamard(order: int) -> torch.Tensor:
    """A Hadamard matrix [order, order], float64 of -1 and 1: H H^T = order * I.

    Sylvester's doubling of a core: 1, or one that Paley's constructions give for a prime p (order p + 1 if p = 3 mod 4,
    2 (p + 1) if p = 1 mod 4): 12, 20, 24, 28, 36, 44, 60 ... So 576 = 16 * 36 and 1536 = 128 * 12. Raises
    `PowertrainError` for an order without.
    """
    core, doublings = order, 0
    while core > 0:
        matrix = _core(core)
        if matrix is not None:
            for _ in range(doublings):
                matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
            return matrix
        if core % 2:
            break
        core, doublings = core // 2, doublings + 1
    raise PowertrainError(f"no Hadamard matrix of order {order} is known here; a random rotation (kind: random) fits")


def random_hadamard(order: int, generator: torch.Generator) -> torch.Tensor:
    """diag(s) H / sqrt(order), s random signs: orthogonal [order, order] float64."""
    signs = torch.randint(0, 2, (order, 1), generator=generator).double() * 2 - 1
    made: torch.Tensor = signs * hadamard(order) / order**0.5
    return made


def random_orthogonal(order: int, generator: torch.Generator) -> torch.Tensor:
    """Q of a Gaussian matrix's QR, with R's diagonal made positive: uniform over the rotations and reflections.

    float64 [order, order].
    """
    q, r = torch.linalg.qr(torch.randn(order, order, dtype=torch.float64, generator=generator))
    rotation: torch.Tensor = q * r.diagonal().sign()
    return rotation


def _core(order: int) -> torch.Tensor | None:
    """One of Paley's matrices, or None where no prime gives that order."""
    if order in (1, 2):
        return torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)[:order, :order]
    if order % 4:
        return None
    if _is_prime(order - 1):  # which is 3 mod 4
        skew = _bordered(order - 1, -1.0)
        return torch.eye(order, dtype=torch.float64) + skew
    half = order // 2
    if half % 4 == 2 and _is_prime(half - 1):
        symmetric, eye = _bordered(half - 1, 1.0), torch.eye(half, dtype=torch.float64)
        both, one = torch.tensor([[1.0, 1.0], [1.0, -1.0]]).double(), torch.tensor([[1.0, -1.0], [-1.0, -1.0]]).double()
        return torch.kron(symmetric, both) + torch.kron(eye, one)
    return None


def _bordered(prime: int, sign: float) -> torch.Tensor:
    """Paley's conference matrix [p + 1, p + 1]: the quadratic characters of i - j below a row of ones."""
    character = torch.full((prime,), -1.0, dtype=torch.float64)
    character[torch.arange(1, prime).square() % prime] = 1.0
    character[0] = 0.0
    at = torch.arange(prime)
    matrix = torch.ones(prime + 1, prime + 1, dtype=torch.float64)
    matrix[0, 0] = 0.0
    matrix[1:, 0] = sign
    matrix[1:, 1:] = character[(at.unsqueeze(1) - at) % prime]
    return matrix


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % divisor for divisor in range(2, int(number**0.5) + 1))
