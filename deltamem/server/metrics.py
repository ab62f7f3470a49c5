"""What /metrics tells, in Prometheus' text format."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from deltamem.chat.reply import Reply


class Metrics:
    """One server's counters; each server has a registry of its own."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.requests = Counter("deltamem_requests", "Requests answered", ["path", "status"], registry=registry)
        self.tokens = Counter(
            "deltamem_tokens",
            "Tokens: read from the prompt, spared by the cache, generated",
            ["kind"],
            registry=registry,
        )
        self.forgotten = Counter(
            "deltamem_forgotten_messages",
            "Messages that left a prompt and stay in the memory only",
            registry=registry,
        )
        self.waiting = Gauge("deltamem_waiting", "Turns waiting for a place", registry=registry)
        self.reading = Gauge("deltamem_reading", "Turns whose prompt is being read", registry=registry)
        self.active = Gauge("deltamem_active", "Turns being decoded", registry=registry)
        self.sessions = Gauge("deltamem_sessions", "Sessions kept", ["where"], registry=registry)
        self.store_bytes = Gauge("deltamem_store_bytes", "Size of the kept sessions", ["where"], registry=registry)
        self.expired = Counter("deltamem_sessions_expired", "Sessions removed for their age", registry=registry)
        self.first_token = Histogram(
            "deltamem_first_token_seconds", "From the request to its first piece of text", registry=registry
        )
        self.batch_size = Histogram(
            "deltamem_batch_size",
            "Turns per decoding step",
            buckets=(1, 2, 4, 8, 16, 32, 64),
            registry=registry,
        )

    def count(self, reply: Reply) -> None:
        self.tokens.labels("read").inc(reply.prompt_tokens - reply.cached_tokens)
        self.tokens.labels("cached").inc(reply.cached_tokens)
        self.tokens.labels("generated").inc(reply.reply_tokens)
        self.forgotten.inc(reply.newly_forgotten)

    def text(self) -> bytes:
        return generate_latest(self.registry)
