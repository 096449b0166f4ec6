"""The one owner of KV blocks: reference counts, prefix hash chain, least-recently-used eviction.

A block is in use (count > 0), or free. A free block may still hold the keys and values of a known prefix; it serves a
later request with that prefix until it is the longest-unused one and its memory is wanted (the design of vLLM's
automatic prefix caching, Kwon et al. 2023, arXiv 2309.06180).
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Sequence

from powertrain.types import PowertrainError

BlockHash = bytes


def root_hash(cache_salt: str) -> BlockHash:
    """Start of a hash chain. Requests with different salts share nothing, whatever their tokens."""
    return hashlib.blake2b(cache_salt.encode("utf-8", "surrogatepass"), digest_size=32, person=b"pt-kv-root").digest()


def chain_hash(parent: BlockHash, token_ids: Sequence[int]) -> BlockHash:
    """Hash of a full block given all tokens before it: a 256-bit digest, so that no crafted prompt meets another's."""
    return hashlib.blake2b(parent + array("q", token_ids).tobytes(), digest_size=32).digest()


class BlockPool:
    """Hands out block numbers 0..num_blocks-1. Every `acquire` or `share` is answered by one `release`."""

    def __init__(self, num_blocks: int, is_caching: bool = True) -> None:
        self.num_blocks = num_blocks
        self.is_caching = is_caching
        self._counts = [0] * num_blocks
        self._hashes: list[BlockHash | None] = [None] * num_blocks
        self._by_hash: dict[BlockHash, int] = {}
        # Least recently used first; blocks never used are at the front from the start.
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_in_use(self) -> int:
        return self.num_blocks - len(self._free)

    def acquire(self) -> int:
        """Take the longest-unused free block, forgetting what it held. The caller checked `num_free`."""
        block, _ = self._free.popitem(last=False)
        known = self._hashes[block]
        if known is not None:
            del self._by_hash[known]
            self._hashes[block] = None
        self._counts[block] = 1
        return block

    def find(self, block_hash: BlockHash) -> int | None:
        """The block that holds this prefix, in use or free; None if no block does."""
        return self._by_hash.get(block_hash)

    def is_free(self, block: int) -> bool:
        return self._counts[block] == 0

    def share(self, block: int) -> None:
        """One more user of a block that `find` returned."""
        if self._counts[block] == 0:
            del self._free[block]
        self._counts[block] += 1

    def publish(self, block: int, block_hash: BlockHash) -> None:
        """Make a full, computed block findable. If another block holds the same prefix, that one stays the answer."""
        if self.is_caching and self._hashes[block] is None and block_hash not in self._by_hash:
            self._hashes[block] = block_hash
            self._by_hash[block_hash] = block

    def release(self, blocks: Sequence[int]) -> None:
        """One user less of each; the table's tail becomes evictable before its head, which more prompts share."""
        for block in reversed(blocks):
            self._counts[block] -= 1
            if self._counts[block] == 0:
                self._free[block] = None
                if self._hashes[block] is None:
                    # holds nothing findable: use it up before any block that does
                    self._free.move_to_end(block, last=False)

    def forget(self) -> None:
        """Drop all cached prefixes of free blocks."""
        for block in self._free:
            known = self._hashes[block]
            if known is not None:
                del self._by_hash[known]
                self._hashes[block] = None

    def check(self, tables: Sequence[Sequence[int]]) -> None:
        """Compare the counts with the block tables of all live sequences; raise on a leak or a wrong share."""
        users = [0] * self.num_blocks
        for table in tables:
            for block in table:
                users[block] += 1
        for block, count in enumerate(self._counts):
            if count != users[block]:
                raise PowertrainError(f"block {block} has count {count} but {users[block]} users")
            if (count == 0) != (block in self._free):
                raise PowertrainError(f"block {block} has count {count} and is_free {block in self._free}")
        for block_hash, block in self._by_hash.items():
            if self._hashes[block] != block_hash:
                raise PowertrainError(f"block {block} is listed under a hash it does not hold")
        if sum(known is not None for known in self._hashes) != len(self._by_hash):
            raise PowertrainError("a block holds a hash it is not listed under")
