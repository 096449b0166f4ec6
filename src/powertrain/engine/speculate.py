"""Draft tokens from the sequence's own past; a draft is tokens known but not computed, verified by an ordinary step.

Prompt lookup decoding (Saxena, 2023, github.com/apoorvumang/prompt-lookup-decoding): text that is being copied, edited
or quoted repeats n-grams of its context, so the tokens that followed the last n-gram before are a good guess of what
follows it now. It costs no second model and no training; a wrong guess costs the extra rows of one step.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from powertrain.config import SpeculationConfig
from powertrain.types import PowertrainError


class NgramProposer:
    """Proposes what followed the most recent earlier occurrence of the sequence's last n-gram, the longest n first."""

    def __init__(self, config: SpeculationConfig) -> None:
        if not 1 <= config.prompt_lookup_min <= config.prompt_lookup_max:
            raise PowertrainError(
                f"prompt_lookup_min ({config.prompt_lookup_min}) must be at least 1 and at most "
                f"prompt_lookup_max ({config.prompt_lookup_max})"
            )
        if config.num_speculative_tokens < 1:
            raise PowertrainError(f"num_speculative_tokens must be at least 1, got {config.num_speculative_tokens}")
        self._min_n = config.prompt_lookup_min
        self._max_n = config.prompt_lookup_max
        self._num_tokens = config.num_speculative_tokens

    def propose(self, token_ids: Sequence[int], max_tokens: int) -> list[int]:
        """Up to min(`max_tokens`, `num_speculative_tokens`) draft ids to follow `token_ids`; [] without a match.

        One pass over the sequence (about 0.3 ms for 32k ids in a list; less for an int32 array, which is not copied).
        """
        num_tokens = min(max_tokens, self._num_tokens)
        if num_tokens <= 0 or len(token_ids) <= self._min_n:
            return []
        ids = _as_int32(token_ids)
        source = self._continuation(ids)
        if source is None:
            return []
        # The copy may run past the known end into the draft itself, as in LZ77: a loop of period p stays a loop.
        period = len(ids) - source
        tail = ids[source : source + num_tokens].tolist()
        return [tail[i % period] for i in range(num_tokens)]

    def _continuation(self, ids: npt.NDArray[np.int32]) -> int | None:
        """Index right after the best earlier match of the suffix: longest first, then most recent."""
        # Ends of earlier matches of the last 1-gram, narrowed one token to the left at a time; ascending throughout.
        ends = np.flatnonzero(ids[:-1] == ids[-1])
        best = None
        for n in range(1, min(self._max_n, len(ids) - 1) + 1):
            if n > 1:
                ends = ends[ends >= n - 1]
                ends = ends[ids[ends - (n - 1)] == ids[-n]]
            if not ends.size:
                break
            if n >= self._min_n:
                best = int(ends[-1]) + 1
        return best


def _as_int32(token_ids: Sequence[int]) -> npt.NDArray[np.int32]:
    if isinstance(token_ids, (np.ndarray, array)):
        return np.asarray(token_ids, dtype=np.int32)
    # array() walks a list four times faster than numpy does.
    return np.frombuffer(array("i", token_ids), dtype=np.int32)
