"""Progress where no terminal shows a bar: a thread that says every half minute how far a command is.

It speaks whatever the main thread is at, a library's one long call among it. Both houses use it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import TracebackType

INTERVAL_S = 25.0
"""Between two lines: so that never 30 s pass without one on a host that is busy."""


class Pulse:
    """While it lasts, `say` is called every `interval_s` seconds, by a thread of its own."""

    def __init__(self, say: Callable[[], None], interval_s: float | None = None) -> None:
        self._say, self._interval_s = say, INTERVAL_S if interval_s is None else interval_s
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="otc-pulse", daemon=True)

    def __enter__(self) -> Pulse:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()

    def _beat(self) -> None:
        while not self._ended.wait(self._interval_s):
            self._say()


def progress_line(what: str, share: float, seconds: float, seconds_left: float | None) -> str:
    """What is said of something that is under way.

    Args:
        what: it is.
        share: of it that is done, in [0, 1]; 0 where nothing counts it.
        seconds: since it began.
        seconds_left: until it ends; None where that is not known.

    >>> progress_line("anchor: 20 trials", 0.35, 70.0, 130.0)
    'anchor: 20 trials: 35 % in 1 min 10 s, about 2 min 10 s left'
    >>> progress_line("load: ./flux", 0.0, 50.0, None)
    'load: ./flux: 50 s so far, time left not known'
    """
    spent = f"{int(100 * share)} % in {time_text(seconds)}" if share > 0 else f"{time_text(seconds)} so far"
    left = "time left not known" if seconds_left is None else f"about {time_text(seconds_left)} left"
    return f"{what}: {spent}, {left}"


def time_text(seconds: float) -> str:
    """Seconds as people say them, in two units at most.

    >>> time_text(9.6), time_text(130), time_text(7380), time_text(200_000)
    ('10 s', '2 min 10 s', '2 h 3 min', '2 days 7 h')
    """
    whole = max(0, round(seconds))
    for large, name, small, other in ((86400, "days", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if whole >= large:
            count, rest = divmod(whole, large)
            rest //= small
            return f"{count} {name}" + (f" {rest} {other}" if rest else "")
    return f"{whole} s"
