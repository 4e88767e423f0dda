r"""Learning rates that are planned over a whole run, by its steps or by the clock, and the end of a run by the clock.

A run is planned by its progress p, from 0 before the first step to 1 at the end: the share of the steps of all epochs
that are done or, with ``max_time``, the share of the time if that is larger. The learning rate of a step is
:math:`\eta\, w\, f(p)`, with the warm-up :math:`w = \min(1, (k + 1) / K)` of step k, counted from 0, over K steps and

.. math::
    f_\mathrm{cosine}(p) = \tfrac12 (1 + \cos \pi q), \quad q = \frac{p - p_w}{1 - p_w}, \qquad
    f_\mathrm{wsd}(p) = \min\Big(1, \frac{1 - p}{d}\Big)

where the warm-up ends at :math:`p_w` and the decay of the warm-up-stable-decay schedule takes the share d of the run.
"""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor

from torchmdnet.options import value_of

__all__ = ["RunPlan", "cosine", "warmup_stable_decay"]

log = logging.getLogger(__name__)

#: The share of a run after which a cosine falls although the warm-up is not over.
LONGEST_WARMUP = 0.5


def cosine(progress: float, start: float = 0.0) -> float:
    """Half a cosine from 1, where ``progress`` is ``start`` or less, to 0, where it is 1."""
    passed = min(1.0, max(0.0, progress - start) / max(1 - start, 1e-12))
    return 0.5 * (1 + math.cos(math.pi * passed))


def warmup_stable_decay(progress: float, decay_fraction: float) -> float:
    """1 until the last ``decay_fraction`` of the run, then linear to 0."""
    return max(0.0, min(1.0, (1 - progress) / decay_fraction))


class RunPlan:
    """The learning rate of each step, and whether there is time for another one.

    Time counts from :meth:`begin`, with validation and checkpoints; that of the parts of a run before it was continued
    is added. Of ``max_time``, what comes after the last step (the longest time between two epochs so far) is held back,
    and an epoch after which there is no time for another, with its validation, is the last one.

    Args:
        options: Of the run: ``lr_schedule``, ``lr``, ``lr_warmup_steps``, ``lr_decay_fraction``, ``max_time``.
    """

    def __init__(self, options: Mapping[str, Any]) -> None:
        self.kind = str(value_of(options, "lr_schedule"))
        self.lr = float(value_of(options, "lr"))
        self.warmup_steps = int(value_of(options, "lr_warmup_steps"))
        self.decay_fraction = float(value_of(options, "lr_decay_fraction"))
        #: Seconds; None for no limit.
        self.max_time: float | None = value_of(options, "max_time")
        #: Steps of all epochs; None where their number is open.
        self.num_steps: int | None = None
        #: Whether the current step is the last one for which there is time.
        self.is_over = False
        self._begun: float | None = None
        self._earlier = 0.0  # seconds before the run was continued
        self._held_back = 0.0  # seconds
        self._end = math.inf if self.max_time is None else self.max_time  # seconds at which the progress is 1
        self._is_last_epoch = False
        self._epoch: float | None = None  # seconds from the first step of the latest epoch to its last
        self._epoch_began: float | None = None
        self._latest_step: float | None = None  # when it began
        self._is_warm = False  # whether the first step, in which loops are compiled, is over
        self._steps: deque[float] = deque(maxlen=2)  # seconds of the latest
        self._step_ended: float | None = None
        self._clock = 0.0  # share of the time at the latest step, the same on all processes
        self._warm_from = 0.0  # by the clock, the progress at which the warm-up was over

    @property
    def is_planned(self) -> bool:
        """Whether the learning rate follows the progress of the run rather than a loss."""
        return self.kind != "plateau"

    @property
    def seconds(self) -> float:
        """Time spent on the run so far."""
        return self._earlier + (0.0 if self._begun is None else time.monotonic() - self._begun)

    @property
    def seconds_left(self) -> float | None:
        """Until the limit; None without one."""
        return None if self.max_time is None else max(0.0, self.max_time - self.seconds)

    def begin(self, num_steps: float, state: Mapping[str, Any] | None = None) -> None:
        """Start the clock.

        Args:
            num_steps: Steps of all epochs; infinite where their number is open.
            state: Of the run that is continued, from :meth:`state_dict`.
        """
        self.num_steps = int(num_steps) if 0 < num_steps < math.inf else None
        if self.is_planned and self.max_time is None and self.num_steps and self.warmup_steps >= self.num_steps:
            log.warning(
                "lr_warmup_steps: %d are all steps of the run (%d in num_epochs), so the learning rate never reaches "
                "lr before lr_schedule=%s brings it to 0. Lower lr_warmup_steps, or raise num_epochs.",
                self.warmup_steps, self.num_steps, self.kind,
            )  # fmt: skip
        over = 0.0
        if state:
            self._earlier = float(state["seconds"])
            self._held_back = float(state["held_back"])
            self._warm_from = float(state["warm_from"])
            self._epoch = state["epoch"]
            over = float(state["over"])
        self._begun = time.monotonic()
        self._end -= self._held_back
        self.is_over = self.max_time is not None and max(over, self.seconds) >= self.max_time

    def state_dict(self) -> dict[str, float | None]:
        """What a run that is continued needs."""
        return {
            "seconds": self.seconds,
            "held_back": self._held_back,
            "warm_from": self._warm_from,
            "epoch": self._epoch,
            "over": (self.max_time or 0.0) if self.is_over else 0.0,
        }

    def begin_epoch(self) -> None:
        """Note how long the epoch before took, and what came after it, and see whether this one is the last."""
        if self._step_ended is not None and self._epoch_began is not None:
            self._held_back = max(self._held_back, time.monotonic() - self._step_ended)
            self._epoch = self._step_ended - self._epoch_began
        self._latest_step = self._step_ended = self._epoch_began = None
        if self.max_time is None:
            return
        self._end = self.max_time - self._held_back
        if self._epoch is not None:
            after = self.seconds + self._epoch
            self._is_last_epoch = after + self._held_back + min(self._steps, default=0.0) >= self._end
            self._end = min(self._end, after) if self._is_last_epoch else self._end

    def begin_step(self, ends_epoch: bool = False, largest: Callable[[Tensor], Tensor] = lambda shares: shares) -> None:
        """Look at the clock.

        Args:
            ends_epoch: Whether the step is the last of its epoch.
            largest: The largest of each number over all processes, which must agree on when to stop.
        """
        if self.max_time is None:
            return
        now = time.monotonic()
        if self._latest_step is not None:
            if self._is_warm:
                self._steps.append(now - self._latest_step)
            self._is_warm = True
        self._latest_step = now
        self._epoch_began = now if self._epoch_began is None else self._epoch_began
        each = min(self._steps, default=0.0)
        end = max(self._end, 1e-9)
        shares = [self.seconds / end, (self.seconds + 2 * each) / end, float(ends_epoch and self._is_last_epoch)]
        self._clock, after_another, is_last = largest(torch.tensor(shares, dtype=torch.float64)).tolist()
        self.is_over = max(after_another, is_last) >= 1

    def end_step(self) -> None:
        """Note when it was."""
        self._step_ended = time.monotonic()

    def progress(self, step: int) -> float:
        """Share of the run before a step, counted from 0."""
        return min(1.0, max(step / self.num_steps if self.num_steps else 0.0, self._clock))

    def learning_rate(self, step: int) -> float | None:
        """The learning rate of a step, counted from 0; None where the plateau scheduler has it."""
        warm = min(1.0, (step + 1) / self.warmup_steps) if self.warmup_steps else 1.0
        if not self.is_planned:
            return self.lr * warm if step < self.warmup_steps else None
        progress = self.progress(step)
        if self.kind == "warmup-stable-decay":
            return self.lr * warm * warmup_stable_decay(progress, self.decay_fraction)
        if self.max_time is None:
            start = min(self.warmup_steps / self.num_steps, LONGEST_WARMUP) if self.num_steps else 0.0
        else:
            if step <= self.warmup_steps:
                self._warm_from = min(progress, LONGEST_WARMUP)
            start = self._warm_from
        return self.lr * warm * cosine(progress, start)

    def __str__(self) -> str:
        """What is planned, for the log."""
        steps = None if self.num_steps is None else f"{self.num_steps:,} steps"
        limit = None if self.max_time is None else str(timedelta(seconds=round(self.max_time)))
        over = " or ".join(words for words in (limit, steps) if words)
        over += ", whichever ends first" if limit and steps else ""
        return f"{self.kind} over {over}" if self.is_planned else f"{self.kind}, for at most {over}"
