"""Counters of a server, as text that Prometheus reads."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

TEXT = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
_IMAGES = (1, 2, 4, 8, 16, 32, 64)

Samples = Iterable[tuple[str, Mapping[str, str], float]]


class Histogram:
    """Counts of values up to each bound, their sum and their number."""

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * len(bounds)
        self.total, self.number = 0.0, 0

    def add(self, value: float) -> None:
        """Takes one value."""
        self.total += value
        self.number += 1
        for place, bound in enumerate(self.bounds):
            self.counts[place] += value <= bound

    def samples(self) -> Samples:
        """As Prometheus has them."""
        for bound, count in zip(self.bounds, self.counts, strict=True):
            yield "_bucket", {"le": f"{bound:g}"}, count
        yield "_bucket", {"le": "+Inf"}, self.number
        yield "_sum", {}, self.total
        yield "_count", {}, self.number


class Metrics:
    """What happened since the start; safe to use from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._requests: Counter[tuple[str, int]] = Counter()
        self._seconds, self._batches = Histogram(_SECONDS), Histogram(_IMAGES)

    def request(self, path: str, status: int, seconds: float) -> None:
        """A request has been answered."""
        with self._lock:
            self._requests[path, status] += 1
            if path == "/predict" and status == 200:
                self._seconds.add(seconds)

    def batch(self, images: int) -> None:
        """A forward pass begins."""
        with self._lock:
            self._batches.add(images)

    def text(self, now: Mapping[str, tuple[str, str, float]], generation: str) -> str:
        """The whole page.

        Args:
            now: name to type, help and value, of what is read at this moment.
            generation: that is served.
        """
        with self._lock:
            answered: Samples = [
                ("", {"path": path, "status": str(status)}, count)
                for (path, status), count in sorted(self._requests.items())
            ]
            parts = [
                _family("requests_total", "counter", "requests by path and status", answered),
                _family(
                    "predict_seconds", "histogram", "time of answered predictions", self._seconds.samples()
                ),
                _family("batch_images", "histogram", "images of a forward pass", self._batches.samples()),
            ]
        parts += [_family(name, kind, about, [("", {}, value)]) for name, (kind, about, value) in now.items()]
        served: Samples = [("", {"generation": generation}, 1)]
        parts.append(_family("model_info", "gauge", "the generation that is served", served))
        return "".join(parts)


def resident_bytes() -> float:
    """Memory of this process; 0 where the system does not say."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except (OSError, ValueError, IndexError):
        return 0.0
    import resource

    return float(pages * resource.getpagesize())


def _family(name: str, kind: str, about: str, samples: Samples) -> str:
    lines = [f"# HELP duallora_{name} {about}", f"# TYPE duallora_{name} {kind}"]
    for suffix, labels, value in samples:
        inside = ",".join(f'{key}="{_escaped(text)}"' for key, text in labels.items())
        lines.append(f"duallora_{name}{suffix}{'{' + inside + '}' if inside else ''} {value:.10g}")
    return "\n".join(lines) + "\n"


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
