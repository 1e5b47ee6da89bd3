"""Whether a lowered program keeps to what Trainium's compiler takes, by the rules of `anypool check`."""

from typing import Any

from jax.interpreters import mlir
from jaxlib.mlir import ir

from anypool.check import errors, lint


def refused(text: str) -> list[str]:
    """What breaks a rule in a StableHLO module (`lowered.as_text()`): "rule: operation", and nothing if it may pass."""
    with mlir.make_ir_context():
        module: Any = ir.Module.parse(text)
        return [f"{finding.rule}: {finding.operation}" for finding in errors(lint(module))]
