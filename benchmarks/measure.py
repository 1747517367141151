"""Interleaved timing, memory peaks, and one row of the table."""

from __future__ import annotations

import gc
import math
import os
import statistics
import time
import tracemalloc
from collections.abc import Callable
from dataclasses import dataclass

import torch

REPEATS = 5


@dataclass(frozen=True)
class Row:
    """One measured value and the bar it is held to.

    ``agreement``: the value says whether results are right, not how fast they come. It does not depend on the machine,
    is judged at every size, and a miss makes the command fail.
    """

    id: str
    what: str
    value: float | None
    """None: not measured, for the reason in ``note``"""
    unit: str
    bar: float | None = None
    at_least: bool = False
    """the bar is a lower limit (speed-up), not an upper one"""
    agreement: bool = False
    note: str = ""

    def verdict(self, quick: bool = False) -> str:
        if self.value is None:
            return "skipped"
        if self.bar is None or (quick and not self.agreement):
            return "not judged"
        # NaN is in no order with the bar and so a miss.
        return (
            "met"
            if (self.value >= self.bar if self.at_least else self.value <= self.bar)
            else "missed"
        )


@dataclass(frozen=True)
class Timing:
    """Seconds of each repeat, by the clock on the wall and by the processor time of the process."""

    wall: list[float]
    cpu: list[float]

    @property
    def judged(self) -> list[float]:
        """With one thread the processor time: what the wall clock would say if no other program ran."""
        return self.cpu if torch.get_num_threads() == 1 else self.wall


def clocked(form: Callable, calls: int = 1) -> tuple[float, float]:
    """(wall, processor) seconds of one call, the mean of several; the collector is kept out of it."""
    gc.disable()
    try:
        wall, cpu = time.perf_counter(), time.process_time()
        for _ in range(calls):
            form()
        return (time.perf_counter() - wall) / calls, (time.process_time() - cpu) / calls
    finally:
        gc.enable()


def interleaved(forms: dict[str, Callable], calls: int = 1) -> dict[str, Timing]:
    """Time each form once per repeat, in turn, so that whatever else the machine does meets all of them.

    ``calls``: how often a form that takes milliseconds is called per repeat. A form may return its own
    (wall, processor) seconds, for work in another process.
    """
    for form in forms.values():  # the first call fills caches
        form()
    gc.collect()
    found = {name: Timing([], []) for name in forms}
    for repeat in range(REPEATS):
        # Every other round backwards: no form always runs in the wake of the same other one.
        for name in list(forms)[:: 1 if repeat % 2 == 0 else -1]:
            own = []
            measured = clocked(lambda form=forms[name], own=own: own.append(form()), calls)
            wall, cpu = own[0] if isinstance(own[0], tuple) else measured
            found[name].wall.append(wall)
            found[name].cpu.append(cpu)
    return found


def ratio(above: Timing, below: Timing) -> float:
    """Median over the repeats of the ratio within one repeat."""
    return statistics.median(a / b for a, b in zip(above.judged, below.judged, strict=True))


def times_note(above: Timing, below: Timing) -> str:
    """Both medians, and the ratio by the wall clock: where it differs, other programs interfered."""
    wall = statistics.median(a / b for a, b in zip(above.wall, below.wall, strict=True))
    a, b = (statistics.median(timing.judged) for timing in (above, below))
    return f"{seconds(a)} against {seconds(b)}; by the wall clock {wall:.3g} x"


def seconds(value: float) -> str:
    return f"{value:.3g} s" if value >= 1 else f"{value * 1e3:.3g} ms"


def numpy_peak(form: Callable) -> int:
    """Bytes that one call allocates through Python and NumPy at most, above what was there before."""
    tracemalloc.start()
    try:
        form()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def torch_peak(form: Callable) -> int:
    """Bytes of CPU tensors that one call holds at most, above what was there before, from torch's profiler."""
    form()
    os.environ.setdefault(
        "KINETO_LOG_LEVEL", "99"
    )  # the profiler would say on stderr that it starts and stops
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        form()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def largest_difference(a, b) -> float:
    """Largest absolute difference of two equally long sequences of numbers or tensors; NaN stays NaN."""
    differences = [
        float((torch.as_tensor(x) - torch.as_tensor(y)).abs().max())
        for x, y in zip(a, b, strict=True)
    ]
    return math.nan if any(map(math.isnan, differences)) else max(differences)
