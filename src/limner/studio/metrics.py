"""The studio's figures, in Prometheus' form."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest


class Metrics:
    """One registry an engine, so that two of them in one process don't meet."""

    def __init__(self) -> None:
        own = self.registry = CollectorRegistry()
        seconds = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)
        self.http = Counter("limner_http_requests", "Requests by path and status.", ("path", "status"), registry=own)
        self.ended = Counter("limner_jobs", "Drawings by how they ended.", ("outcome",), registry=own)
        self.pictures = Counter("limner_pictures", "Pictures drawn.", ("model",), registry=own)
        self.batch = Histogram("limner_batch_pictures", "Pictures drawn at once.", registry=own,
                               buckets=(1, 2, 4, 8, 16, 32, 64))  # fmt: skip
        self.drawing = Histogram("limner_drawing_seconds", "Of a batch.", registry=own, buckets=seconds)
        self.waited = Histogram("limner_waiting_seconds", "In the queue.", registry=own, buckets=seconds)
        self.waiting = Gauge("limner_waiting_jobs", "Requests in the queue.", registry=own)
        self.busy = Gauge("limner_drawing_jobs", "Requests being drawn.", registry=own)

    def text(self) -> bytes:
        """The exposition format."""
        return generate_latest(self.registry)
