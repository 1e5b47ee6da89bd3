"""The gateway's own settings."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Settings:
    """Every limit of the gateway, in seconds and bytes.

    heartbeat_limit_seconds: a worker that sends no byte for so long has stalled; its streams move on.
    recovery_seconds: how long a stream that lost its pool waits for another, and how long an external pool, which sends
        no heartbeat, may be silent.
    losses_without_progress: a request that was lost so many times in a row without a new token is given up, because it
        may be what kills the workers.
    max_body_bytes: larger request bodies are refused with 413.
    retry_after_seconds: what a refused client is told, where the worker did not say.
    suspect_seconds: how long a pool that lost a stream is used only when there is no other.
    """

    heartbeat_limit_seconds: float = 5.0
    recovery_seconds: float = 30.0
    losses_without_progress: int = 5
    max_body_bytes: int = 8 * 2**20
    retry_after_seconds: float = 1.0
    suspect_seconds: float = 5.0
