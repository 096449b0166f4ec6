"""Training by several processes: torch's FSDP2 around each block, each process taking its share of every batch.

FSDP2 (`torch.distributed.fsdp.fully_shard`; Zhao et al. 2023, arXiv 2304.11277) keeps a part of each tensor in each
process, gathers a block's while it runs, and averages gradients as it scatters them. Batches, their order and the
schedule know nothing of that: with any number of processes a run is the same up to rounding.
"""

from __future__ import annotations

import hashlib
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NamedTuple, TypeVar

import torch
from torch import distributed, nn
from torch.utils.checkpoint import checkpoint as recomputed

from powertrain.compress.blockwise import block_of
from powertrain.compress.plain_decoder import Rotations, Weights
from powertrain.compress.plain_model import PlainModel, RunBlock, in_dtype, run_block
from powertrain.distill.batches import Batch
from powertrain.distill.student import Parameters, Student
from powertrain.model.families import ModelConfig
from powertrain.types import PowertrainError

T = TypeVar("T")

LONGEST_WAIT = timedelta(hours=2)
"""For another process, which may be writing a model; of one that died the launcher tells at once."""

WeightsOf = Callable[[int | None, Parameters], Weights]
"""(block, or None for what is outside of blocks; its gathered parameters) -> the weights that it runs with."""


class Share(NamedTuple):
    """A process's part of a batch. The mean over processes of (weight * mean over the part) is the batch's mean.

    `of_positions` weighs a mean over counted positions, `of_windows` one over all.
    """

    batch: Batch
    of_positions: float = 1.0
    of_windows: float = 1.0


@dataclass(frozen=True, slots=True)
class Processes:
    """This process among those that train together. `mesh`: torch's `DeviceMesh` of all of them; None of one."""

    rank: int = 0
    size: int = 1
    mesh: Any = None

    @property
    def is_first(self) -> bool:
        """Whether this is the one that prints and writes."""
        return self.rank == 0

    def clock(self) -> float:
        """Seconds of the first process's clock, at all of them: what they decide by it is decided alike."""
        now = torch.tensor(time.perf_counter(), dtype=torch.float64)
        if self.size > 1:
            distributed.broadcast(now, src=0)
        return now.item()

    def mean(self, values: torch.Tensor) -> torch.Tensor:
        """The mean of what each has, float64 on the CPU: the same bits at all. One process has its own back."""
        if self.size == 1:
            return values
        return self._gathered(values.detach().cpu().double()).mean(0)

    def meet(self) -> None:
        """Wait until all are here."""
        self.mean(torch.zeros(()))

    def check_alike(self, what: str) -> None:
        """Raises `PowertrainError` at all of them where one is given another text."""
        if self.size == 1:
            return
        digests = self._gathered(torch.tensor(list(hashlib.sha256(what.encode()).digest())))
        if not bool((digests == digests[0]).all()):
            raise PowertrainError("the processes do not see the same models, text and state: give them one file system")

    def _gathered(self, own: torch.Tensor) -> torch.Tensor:
        """[size, ..] of a tensor on the CPU."""
        parts = [torch.empty_like(own) for _ in range(self.size)]
        distributed.all_gather(parts, own)
        return torch.stack(parts)

    def share(self, batch: Batch) -> Share:
        """This process's windows of a batch that all of them have.

        Where there are fewer windows than processes, some take one of which nothing counts, since all must run.
        """
        if self.size == 1:
            return Share(batch)
        num = len(batch.token_ids)
        begin, end = (num * at // self.size for at in (self.rank, self.rank + 1))
        if begin == end:
            nothing = torch.zeros_like(batch.token_ids[:1], dtype=torch.bool)
            return Share(batch.part(slice(0, 1))._replace(is_counted=nothing), 0.0, 0.0)
        of_windows = of_positions = self.size * (end - begin) / num
        if batch.is_counted is not None:
            own, all_counted = (int(mask.sum()) for mask in (batch.is_counted[begin:end], batch.is_counted))
            of_positions = self.size * own / max(1, all_counted)
        return Share(batch.part(slice(begin, end)), of_positions, of_windows)

    def whole(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The tensors put together, on the CPU, at the first process; nothing at the others. All must ask."""
        if self.size == 1:
            return dict(tensors)
        found: dict[str, torch.Tensor] = {}
        for name, tensor in tensors.items():
            full = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
            if self.is_first:
                found[name] = full.cpu()
        return found

    def part_like(self, whole: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """This process's part of a tensor that all have, cut as the parameter `like` is; numbers are not cut."""
        if self.size == 1:
            return whole
        from torch.distributed.tensor import DTensor, distribute_tensor

        whole = whole.to(like.device)
        if not isinstance(like, DTensor) or whole.shape != like.shape:
            return whole
        return distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None)


ALONE = Processes()


# ---- how they come and go ----


@contextmanager
def launched(device_type: str) -> Iterator[Processes]:
    """The processes that `torchrun` started, of which this is one; `ALONE` where it did not.

    The first to fail says why; the others, which its end stops, exit with status 1 and say nothing.
    """
    if not (distributed.is_available() and distributed.is_torchelastic_launched()):
        yield ALONE
        return
    from torch.distributed.rendezvous import rendezvous

    store, rank, size = next(rendezvous("env://"))
    try:
        _take_device(device_type, distributed.get_node_local_rank())
        backend = "gloo" if device_type == "cpu" else f"cpu:gloo,{device_type}:nccl"
        distributed.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=LONGEST_WAIT)
        yield grouped(device_type)
    except Exception as error:
        if not _is_first_failure(store):
            sys.exit(1)
        if _is_lost_connection(error):
            ended = f"process {rank} of {size} lost another one, which ended without a word (killed, or out of memory)"
            raise PowertrainError(f"{ended}: run the same command again to go on from the last state") from error
        raise
    distributed.destroy_process_group()


def grouped(device_type: str) -> Processes:
    """The processes of torch's default group, which exists already."""
    from torch.distributed.device_mesh import init_device_mesh

    size = distributed.get_world_size()
    mesh = init_device_mesh(device_type, (size,)) if size > 1 else None
    return Processes(distributed.get_rank(), size, mesh)


def _take_device(device_type: str, local_rank: int) -> None:
    if device_type != "cuda":
        return
    num = torch.cuda.device_count()
    if local_rank >= num:
        raise PowertrainError(f"there are more processes than the {num} GPUs here: set --nproc-per-node {num}")
    torch.cuda.set_device(local_rank)


def _is_first_failure(store: Any) -> bool:
    try:
        return bool(store.add("powertrain/failures", 1) == 1)
    except RuntimeError:  # the launcher has gone
        return False


def _is_lost_connection(error: Exception) -> bool:
    """Whether gloo found another process's end of a connection closed, for which torch has no type of its own."""
    return isinstance(error, RuntimeError) and "gloo" in str(error)


# ---- models in parts ----


class Group(nn.Module):
    """Tensors that are gathered together while a call of it runs."""

    def __init__(self, tensors: Mapping[str, torch.Tensor], *, is_trained: bool) -> None:
        super().__init__()
        for name, tensor in tensors.items():
            # torch takes a dot for a module within
            self.register_parameter(name.replace(".", "/"), nn.Parameter(tensor, requires_grad=is_trained))
        self.blocks = nn.ModuleList()

    def tensors(self, *, has_blocks: bool = False) -> dict[str, torch.Tensor]:
        """By name: parts outside of a call, whole inside."""
        found = self.named_parameters(recurse=has_blocks)
        return {name.rpartition(".")[2].replace("/", "."): tensor for name, tensor in found}

    def forward(self, use: Callable[..., T], *inputs: torch.Tensor) -> T:
        return use(self.tensors(), *inputs)


class ShardedModel(PlainModel):
    """A model whose blocks gather their weights as they run, and the rest while `apply` runs."""

    def __init__(
        self,
        config: ModelConfig,
        groups: Group,
        weights_of: WeightsOf,
        *,
        run: RunBlock = run_block,
        recomputes: bool = False,
        turns: dict[int, Rotations] | None = None,
    ) -> None:
        """groups: what is outside of blocks, with the groups of the blocks in it."""
        super().__init__(config, {}, run=run, recomputes=recomputes, turns=turns)
        self._groups, self._weights_of = groups, weights_of

    def apply(self, use: Callable[[PlainModel], T]) -> T:
        def inside(parameters: Parameters) -> T:
            self.weights = self._weights_of(None, parameters)
            return use(self)

        found: T = self._groups(inside)
        return found

    def through(self, index: int, x: torch.Tensor, turns: Rotations | None = None) -> torch.Tensor:
        turns = turns or self._rotations(x.shape[1], x.device)

        def run(parameters: Parameters, x: torch.Tensor) -> torch.Tensor:
            return self.run(self.config, self._kinds[index], self._weights_of(index, parameters), turns, x)

        def inside(parameters: Parameters, x: torch.Tensor) -> torch.Tensor:
            if not (self.recomputes and torch.is_grad_enabled()):
                return run(parameters, x)
            again: torch.Tensor = recomputed(run, parameters, x, use_reentrant=False)
            return again

        result: torch.Tensor = self._groups.blocks[index](inside, x)
        return result


class ShardedStudent(Student):
    """A student of whose float32 parameters each process keeps a part; they are taken from `student` one by one."""

    def __init__(self, student: Student, processes: Processes, device: torch.device | str, dtype: torch.dtype) -> None:
        # what is only cast may be gathered as what it is cast to
        gathered = dtype if student.are_weights and dtype != torch.float32 else None
        self.groups = _sharded(
            student.parameters, student.config.num_layers, processes, device, torch.float32, gathered, is_trained=True
        )
        parameters = self.groups.tensors(has_blocks=True)
        super().__init__(student.config, parameters, student.weights, student.stored, student.are_weights)

    def model(self, dtype: torch.dtype, *, run: RunBlock = run_block, recomputes: bool = False) -> PlainModel:
        def weights_of(index: int | None, parameters: Parameters) -> Weights:
            weights = in_dtype(self.weights(parameters, lambda name: block_of(name) == index), dtype)
            return _within(index, weights)

        return ShardedModel(self.config, self.groups, weights_of, run=run, recomputes=recomputes, turns=self.turns)


def sharded_teacher(
    model: PlainModel, processes: Processes, device: torch.device | str, dtype: torch.dtype
) -> PlainModel:
    """A frozen model of whose blocks each process keeps a part, and all of the rest."""
    weights = dict(model.weights)
    outside = {name: weights.pop(name).to(device, dtype) for name in list(weights) if block_of(name) is None}
    groups = _sharded(weights, model.config.num_layers, processes, device, dtype, None, is_trained=False)

    def weights_of(index: int | None, parameters: Parameters) -> Weights:
        return outside if index is None else _within(index, parameters)

    made = ShardedModel(model.config, groups, weights_of)
    made.weights = outside
    return made


def _sharded(
    tensors: dict[str, torch.Tensor],
    num_layers: int,
    processes: Processes,
    device: torch.device | str,
    kept: torch.dtype,
    gathered: torch.dtype | None,
    *,
    is_trained: bool,
) -> Group:
    """Groups of parts: what is outside of blocks, and in it those of the blocks; `tensors` is emptied on the way.

    Parts are of type `kept`, and of `gathered` when they are put together; gradients are averaged in float32.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    policy = MixedPrecisionPolicy(param_dtype=gathered, reduce_dtype=torch.float32, cast_forward_inputs=False)

    def group(index: int | None) -> Group:
        names = [name for name in tensors if block_of(name) == index]
        own = {name: tensors.pop(name).detach().to(device, kept) for name in names}
        return Group(own, is_trained=is_trained)

    def sharded(group: Group) -> Group:
        # gathered again in the backward pass, the outermost too: so that nothing stays whole beyond a step's half
        fully_shard(group, mesh=processes.mesh, reshard_after_forward=True, mp_policy=policy)
        return group

    outermost = group(None)
    for index in range(num_layers):
        outermost.blocks.append(sharded(group(index)))
    return sharded(outermost)


def _within(index: int | None, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """By names within the block."""
    prefix = "" if index is None else f"model.layers.{index}."
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
