"""What a student writes while it is trained: our own engine over a copy of its weights.

Training changes parameters in place, and an engine wants them packed its own way. So the engine's model is made anew
from the parameters whenever training asks (`--refresh-every`): in memory, in the type and on the device of training,
by the loader that reads files. Making it costs a copy of the weights; writing hundreds of tokens costs far more.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from powertrain.checkpoint.load import load_decoder
from powertrain.config import EngineConfig, resolve
from powertrain.distill.on_policy import Refresh, Sample
from powertrain.distill.student import Student
from powertrain.engine.offline import run_offline
from powertrain.model.decoder import Decoder
from powertrain.types import ModelFileError, Request, SamplingParams


class StudentCheckpoint:
    """A student's weights as training multiplies them, offered like a file: every `load` gives a copy."""

    path = Path("the student")

    def __init__(self, student: Student, config: Mapping[str, Any], dtype: torch.dtype) -> None:
        """config: its Hugging Face config. A quantized student's matrices are the floats that they stand for."""
        self.config = {key: value for key, value in config.items() if key != "quantization_config"}
        self.generation_config: dict[str, Any] = {}
        with torch.no_grad():
            self._weights = student.model(dtype).weights

    def names(self) -> list[str]:
        return list(self._weights)

    def load(self, name: str) -> torch.Tensor:
        if name not in self._weights:
            raise ModelFileError(f"{self.path}: no tensor {name}")
        return self._weights[name].detach().clone()

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._weights[name].shape)

    def nbytes(self, name: str) -> int:
        return self._weights[name].nbytes


def engine_refresh(
    student: Student, config: Mapping[str, Any], *, device: torch.device | str, dtype: torch.dtype
) -> Refresh:
    """Gives, whenever it is called, a `Sample` of the student as it then stands: an engine on the same device.

    config: the student's Hugging Face config; dtype: of the forward pass in training.
    """
    place = torch.device(device).type
    options = EngineConfig.from_options(device=place, dtype=str(dtype).removeprefix("torch."))

    def refresh() -> Sample:
        settled = resolve(options, has_cuda=place == "cuda", model_dtype=options.dtype)
        return partial(sample_texts, load_decoder(StudentCheckpoint(student, config, dtype), settled))

    return refresh


def sample_texts(decoder: Decoder, prompts: list[list[int]], num_tokens: int, seed: int) -> list[list[int]]:
    """`num_tokens` more tokens of each prompt at temperature 1; a row's draws follow `seed` and its number.

    An end-of-text token does not end a row: behind it a new text begins, as in the windows that training reads.
    """
    requests = [
        Request(
            request_id=str(row),
            prompt_token_ids=tuple(prompt),
            sampling=SamplingParams(
                temperature=1.0, max_tokens=num_tokens, ignore_eos=True, seed=seed * 1_000_003 + row
            ),
        )
        for row, prompt in enumerate(prompts)
    ]
    return run_offline(decoder, requests, max(map(len, prompts)) + num_tokens)
