"""What crosses the network, counted: bytes of questions and answers by what was asked, and samples and steps of it."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

TENSORS = "tensors"
"""Answers that are tensors themselves, counted apart: pictures for the report, and what an export takes of the first
samples.
"""
TENSOR_ROWS = {"pictures", "latents", "conditioning"}
"""Names of rows in such answers."""


@dataclass
class Count:
    """Of one kind of question."""

    questions: int = 0
    """Of one worker each."""
    sent: int = 0
    received: int = 0
    sample_steps: int = 0
    """Samples of each question, times the steps that it was about."""

    @property
    def bytes(self) -> int:
        """Both ways."""
        return self.sent + self.received


@dataclass
class Traffic:
    """Counts by kind of question. Ray's own messages and headers are not among them."""

    counts: dict[str, Count] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, kind: str, sent: int, received: int, sample_steps: int) -> None:
        """Count a question."""
        with self.lock:
            count = self.counts.setdefault(kind, Count())
            count.questions += 1
            count.sent += sent
            count.received += received
            count.sample_steps += sample_steps

    @property
    def bytes(self) -> int:
        """Of everything but tensors."""
        return sum(count.bytes for kind, count in self.counts.items() if kind != TENSORS)

    @property
    def tensor_bytes(self) -> int:
        """Of tensors."""
        return self.counts[TENSORS].bytes if TENSORS in self.counts else 0

    @property
    def sample_steps(self) -> int:
        """Of everything but tensors."""
        return sum(count.sample_steps for kind, count in self.counts.items() if kind != TENSORS)

    @property
    def bytes_per_sample_step(self) -> float:
        """0 where nothing was asked."""
        return self.bytes / self.sample_steps if self.sample_steps else 0.0

    def text(self) -> str:
        """
        >>> traffic = Traffic()
        >>> traffic.add("compute", 800, 200, 2)
        >>> traffic.text()
        '0.0 MB crossed the network, 0.5 kB a sample and step, and 0.0 MB of pictures and first samples'
        """
        return (
            f"{self.bytes / 1e6:.1f} MB crossed the network, {self.bytes_per_sample_step / 1e3:.1f} kB a sample and "
            f"step, and {self.tensor_bytes / 1e6:.1f} MB of pictures and first samples"
        )
