"""Rows drawn on the device beside rows that need the host; on a CPU under Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

from powertrain.engine.gpu_runner import draw_rows
from powertrain.engine.sampler import Row, sample
from powertrain.types import SamplingParams

pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array")  # of the interpreter's own
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def test_plain_rows_are_drawn_as_the_sampler_draws_them() -> None:
    settings = [
        SamplingParams(temperature=0.0),
        SamplingParams(temperature=0.7, top_p=0.9),
        SamplingParams(temperature=1.0, top_k=5),
        SamplingParams(temperature=1.5, min_p=0.1),
    ]
    rows = [Row(one, [1] * (3 + at), 3, (), 11 + at, 0) for at, one in enumerate(settings)]
    settings.append(SamplingParams(temperature=0.8, repetition_penalty=1.4, frequency_penalty=0.3))
    rows.append(Row(settings[4], [1, 2, 3, 9, 9, 40], 3, (), 3, 0))
    logits = torch.randn(6, 700, generator=torch.Generator().manual_seed(0)).to(DEVICE) * 3
    logits[4, [2, 9, 40]] += 6.0
    logits[5, 9] = torch.nan
    rows.append(Row(settings[0], [1], 1, (), 0, 0))
    assert draw_rows(logits, rows) == sample(logits.clone(), rows)
