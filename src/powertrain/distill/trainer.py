"""The training loop: a student moved towards a teacher's distributions, stopped and resumed without a trace.

Plain torch on one device, or one in each of several processes (`parallel.py`). Parameters, their moments and the sums
of gradients are float32; the forward and backward pass run in `compute_dtype`. A resumed run gives the losses that an
uninterrupted one gives, to the bit on a CPU.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from powertrain.compress.plain_model import POSITIONS_AT_ONCE, PlainModel, RunBlock, run_block
from powertrain.distill.batches import Batch, Batches
from powertrain.distill.losses import FORWARD_KL, Divergence, mean_by_chunks, stream_loss
from powertrain.distill.parallel import ALONE, Processes, ShardedStudent
from powertrain.distill.state import History, Saved, load_state, save_state
from powertrain.distill.student import Student
from powertrain.distill.teachers import Teacher, View, counted, run_with_streams
from powertrain.types import PowertrainError

Progress = Callable[[str, float, float | None], None]
"""Called as (what, done, total)."""

SAVE_EVERY = 300.0
"""Seconds between stored states."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """When training ends (`steps` or `seconds`, whichever comes first) and how it goes.

    The learning rate rises over `warmup` of the run and falls by a cosine to `final_rate` of its peak at the end.
    `hidden_weight` adds the streams' loss over pairs (student's block, teacher's block) in `hidden_pairs`. `patience`:
    evaluations without a better held-out KL after which it stops. `evaluate_every` counts steps.
    """

    steps: int | None = None
    seconds: float | None = None
    learning_rate: float = 3e-4
    warmup: float = 0.03
    final_rate: float = 0.02
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    divergence: Divergence = field(default_factory=Divergence)
    hidden_weight: float = 0.0
    hidden_pairs: tuple[tuple[int, int], ...] = ()
    evaluate_every: int = 100
    patience: int | None = None

    def __post_init__(self) -> None:
        if (self.steps or 0) < 1 and (self.seconds or 0) <= 0:
            raise PowertrainError("training needs an end: give a number of steps, or of seconds")
        if not (math.isfinite(self.learning_rate) and self.learning_rate > 0):
            raise PowertrainError(f"learning_rate must be positive, got {self.learning_rate}")
        if not 0 <= self.warmup < 1 or not 0 <= self.final_rate <= 1:
            raise PowertrainError("warmup must be in [0, 1) and final_rate in [0, 1]")
        if self.evaluate_every < 1 or (self.patience is not None and self.patience < 1):
            raise PowertrainError("evaluate_every and patience must be at least 1")

    def progress(self, step: int, seconds: float) -> float:
        """The share of the run that is over."""
        by_steps = step / self.steps if self.steps else 0.0
        return min(1.0, max(by_steps, seconds / self.seconds if self.seconds else 0.0))

    def rate(self, progress: float) -> float:
        """The learning rate at a share of the run."""
        if progress < self.warmup:
            return self.learning_rate * progress / self.warmup
        cosine = 0.5 * (1 + math.cos(math.pi * (progress - self.warmup) / (1 - self.warmup)))
        return self.learning_rate * (self.final_rate + (1 - self.final_rate) * cosine)


@dataclass(frozen=True, slots=True, kw_only=True)
class Compute:
    """Where and how the arithmetic is done; it does not say what is trained.

    `recomputes`: blocks run again in the backward pass instead of keeping their activations. `run`: how a block of the
    student runs, which may be compiled. `positions_at_once`: whose logits exist at a time. `processes`: those that
    share the work; each calls everything that all call, in the same order.
    """

    device: torch.device | str = "cpu"
    dtype: torch.dtype = torch.float32
    recomputes: bool = False
    positions_at_once: int = POSITIONS_AT_ONCE
    run: RunBlock = run_block
    processes: Processes = ALONE


class Trainer:
    """One run: `Trainer(...).run(...)` trains until it is over or told to pause; its state is in `folder`."""

    def __init__(
        self,
        teacher: Teacher,
        student: Student,
        batches: Batches,
        held_out: Batch | None,
        config: TrainConfig,
        *,
        compute: Compute | None = None,
        folder: Path | None = None,
        identity: Mapping[str, Any] | None = None,
    ) -> None:
        """teacher: on the same device; held_out: the windows whose KL is watched.

        `folder`: where states are kept, and one to go on from is looked for; `identity`: what else must be the same
        for that (hashes of models). Raises `PowertrainError` for a state of another run.
        """
        self._teacher, self._batches, self._held_out = teacher, batches, held_out
        self._config, self._compute, self._folder = config, compute or Compute(), folder
        self._processes = self._compute.processes
        self._identity = {**(identity or {}), "data": batches.sha256, "config": asdict(config)}
        self.history = History()
        self._best: dict[str, torch.Tensor] | None = None
        self._recent: list[torch.Tensor] = []
        device, is_alone = self._compute.device, self._processes.size == 1
        if is_alone:
            for name, tensor in student.parameters.items():
                student.parameters[name] = tensor.detach().to(device, torch.float32).clone().requires_grad_()
        else:
            student = ShardedStudent(student, self._processes, device, self._compute.dtype)
        self._student = student
        self._optimizer = self._new_optimizer()
        saved = load_state(folder, self._identity, device if is_alone else "cpu") if folder is not None else None
        if saved is not None:
            self._restore(saved)
        self._processes.check_alike(f"{self._identity} {self.history.step}")

    def run(
        self,
        *,
        max_seconds: float | None = None,
        save_every: float = SAVE_EVERY,
        pause_every: int = 1,
        progress: Progress | None = None,
    ) -> History:
        """Train until the run is over, or `max_seconds` have passed; the state is stored then, and every `save_every`
        seconds, so that a run that is killed loses no more. Both only after a multiple of `pause_every` steps: where
        batches come from the student itself, a run can go on as it was only from there.

        Raises `PowertrainError` where the loss is no longer a number; the last stored state stays.
        """
        clock = self._processes.clock
        begun = saved = clock()
        earlier, config, history = self.history.seconds, self._config, self.history
        while history.ended is None:
            if history.step % config.evaluate_every == 0:
                self._evaluate()
            now = clock()
            history.seconds = earlier + now - begun
            may_pause = history.step % pause_every == 0
            share = config.progress(history.step, history.seconds)
            if progress is not None:
                progress("distill", share, 1.0)
            if share >= 1.0:
                is_by_steps = config.steps is not None and history.step >= config.steps
                history.ended = history.ended or ("steps" if is_by_steps else "seconds")
            elif history.ended or (may_pause and max_seconds is not None and now - begun >= max_seconds):
                break
            else:
                if may_pause and now - saved >= save_every:
                    self.save()
                    saved = clock()
                self._step(config.rate(config.progress(history.step + 1, history.seconds)))
        if history.ended is not None:
            self._evaluate()
        history.seconds = earlier + clock() - begun
        self.save()
        return history

    def warm_up(self) -> None:
        """Take one gradient and throw it away: what is compiled at first use is compiled now, before time counts."""
        self._loss(self._batches.at(0)).backward()  # type: ignore[no-untyped-call]
        self._optimizer.zero_grad(set_to_none=True)

    def best_parameters(self) -> dict[str, torch.Tensor]:
        """Those of the best held-out KL; the last ones where nothing is held out. Only the first process has any."""
        return self._processes.whole(self._best or self._current_parameters())

    def save(self) -> None:
        """Store the state in the folder, if there is one."""
        self._collect_losses()
        if self._folder is None:
            return
        whole = self._processes.whole
        is_last_best = self._best is None or self.history.best_step == self.history.step
        best = None if is_last_best or self._best is None else whole(self._best)
        saved = Saved(self.history, whole(self._current_parameters()), whole(self._optimizer_tensors()), best)
        if self._processes.is_first:
            save_state(self._folder, saved, self._identity)

    @torch.no_grad()
    def held_out_kl(self) -> float:
        """Mean KL(teacher || student) in nats per token over the held-out windows."""
        assert self._held_out is not None
        # blocks run as they are: other shapes than training's are not worth a compilation
        model = self._student.model(self._compute.dtype)
        rows = max(1, self._compute.positions_at_once // self._held_out.token_ids.shape[1]) * self._processes.size
        total = 0.0
        for begin in range(0, len(self._held_out.token_ids), rows):
            chunk = self._held_out.part(slice(begin, begin + rows))
            share = self._processes.share(chunk)
            batch = self._placed(share.batch)
            view = self._teacher.look(batch, is_training=False)
            found = model.apply(partial(self._compared, batch=batch, view=view, divergence=FORWARD_KL))
            total += float(found) * share.of_positions * len(chunk.token_ids)
        return float(self._processes.mean(torch.tensor(total, dtype=torch.float64))) / len(self._held_out.token_ids)

    # ---- one step ----

    def _step(self, rate: float) -> None:
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        loss = self._loss(self._batches.at(self.history.step))
        self._optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self._student.parameters.values(), self._config.max_grad_norm)
        self._optimizer.step()
        self._recent.append(loss.detach())  # looked at later: a GPU need not wait for it
        self.history.step += 1

    def _loss(self, batch: Batch) -> torch.Tensor:
        compute, config = self._compute, self._config
        share = self._processes.share(batch)
        batch = self._placed(share.batch)
        model = self._student.model(compute.dtype, run=compute.run, recomputes=compute.recomputes)
        view = self._teacher.look(batch, {pair[1] for pair in config.hidden_pairs})

        def loss_of(model: PlainModel) -> torch.Tensor:
            streams: dict[int, torch.Tensor] = {}
            loss = share.of_positions * self._compared(model, batch, view, config.divergence, streams)
            for own, other in config.hidden_pairs:
                weight = share.of_windows * config.hidden_weight / len(config.hidden_pairs)
                loss = loss + weight * stream_loss(streams[own], view.streams[other])
            return loss

        return model.apply(loss_of)

    def _compared(
        self,
        model: PlainModel,
        batch: Batch,
        view: View,
        divergence: Divergence,
        streams: dict[int, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """The mean divergence over a batch; `streams` is filled with those that the hidden loss wants."""
        wanted = set() if streams is None else {pair[0] for pair in self._config.hidden_pairs}
        hidden, found = run_with_streams(model, batch.token_ids, wanted)
        if streams is not None:
            streams |= found

        def score(rows: slice, logits: torch.Tensor) -> torch.Tensor:
            return view.compare(rows, logits, divergence)

        return mean_by_chunks(counted(hidden, batch), model.head, score, self._compute.positions_at_once)

    def _placed(self, batch: Batch) -> Batch:
        """The batch on the device."""
        device = torch.device(self._compute.device)

        def place(tensor: torch.Tensor) -> torch.Tensor:
            if device.type == "cuda":
                tensor = tensor.pin_memory()  # a copy from other memory would wait for all that the GPU has to do
            return tensor.to(device, non_blocking=True)

        is_counted = None if batch.is_counted is None else place(batch.is_counted)
        return batch._replace(token_ids=place(batch.token_ids), is_counted=is_counted)

    # ---- what is watched and kept ----

    def _evaluate(self) -> None:
        """Add a row to the curve, unless this step has one."""
        self._collect_losses()
        history = self.history
        if history.curve and history.curve[-1]["step"] == history.step:
            return
        row: dict[str, float] = {"step": history.step, "seconds": history.seconds}
        since = int(history.curve[-1]["step"]) if history.curve else 0
        if recent := history.losses[since:]:
            row["loss"] = sum(recent) / len(recent)
        if self._held_out is not None:
            row["held_out_kl"] = kl = self.held_out_kl()
            if history.best_kl is None or kl < history.best_kl:
                history.best_kl, history.best_step = kl, history.step
                self._best = {name: tensor.clone() for name, tensor in self._current_parameters().items()}
        history.curve.append(row)
        patience = self._config.patience
        if patience is not None and self._held_out is not None:
            since_best = [row for row in history.curve if row["step"] > history.best_step]
            if len(since_best) >= patience:
                history.ended = "early stop"

    def _collect_losses(self) -> None:
        if not self._recent:
            return
        losses = self._processes.mean(torch.stack(self._recent)).tolist()
        self._recent = []
        if not all(map(math.isfinite, losses)):
            first = self.history.step - len(losses) + [math.isfinite(loss) for loss in losses].index(False)
            raise PowertrainError(f"the loss of step {first} is not a number: try a smaller learning rate")
        self.history.losses += losses

    # ---- what is stored ----

    def _current_parameters(self) -> dict[str, torch.Tensor]:
        return {name: tensor.detach() for name, tensor in self._student.parameters.items()}

    def _new_optimizer(self) -> torch.optim.AdamW:
        parameters = self._student.parameters.values()
        groups = [
            {"params": [p for p in parameters if p.dim() > 1], "weight_decay": self._config.weight_decay},
            {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
        ]
        is_fused = torch.device(self._compute.device).type == "cuda"
        return torch.optim.AdamW([group for group in groups if group["params"]], betas=(0.9, 0.95), fused=is_fused)

    def _optimizer_tensors(self) -> dict[str, torch.Tensor]:
        states = {name: self._optimizer.state[tensor] for name, tensor in self._student.parameters.items()}
        return {f"{key}|{name}": value for name, state in states.items() for key, value in state.items()}

    def _restore(self, saved: Saved) -> None:
        self.history, parameters, part_like = saved.history, self._student.parameters, self._processes.part_like
        if saved.parameters.keys() != parameters.keys():
            raise PowertrainError(f"{self._folder}: holds a run with other parameters")
        with torch.no_grad():
            for name, tensor in saved.parameters.items():
                parameters[name].copy_(part_like(tensor, parameters[name]))
        for full_name, tensor in saved.optimizer.items():
            key, name = full_name.split("|", maxsplit=1)
            self._optimizer.state[parameters[name]][key] = part_like(tensor, parameters[name])
        if saved.best is not None:
            self._best = {name: part_like(tensor, parameters[name]) for name, tensor in saved.best.items()}
        elif self.history.best_kl is not None:
            self._best = {name: tensor.clone() for name, tensor in self._current_parameters().items()}


def hidden_pairs(kept: tuple[int, ...], num_teacher_layers: int) -> tuple[tuple[int, int], ...]:
    """For a student made of the teacher's blocks `kept`: each block with the teacher's last block before the next kept.

    So a block that stands before removed ones learns to give what they gave.
    """
    ends = (*kept[1:], num_teacher_layers)
    return tuple((own, end - 1) for own, end in enumerate(ends))
