"""Will a model run on a chip that is not here, and does it fit: compiled, linted or estimated, and said which.

Other rooms use:
- `check(model, targets, options, running)`: a `Result` for every target and job;
- `lint`, `lint_traced`: a program against the rules of Trainium's compiler;
- `predict(question)`: memory of a device without a compiler;
- `CheckError`: a question that makes no sense.
"""

from anypool.check.errors import CheckError, CompilerMissingError
from anypool.check.lint import Finding, errors, lint, lint_traced
from anypool.check.memory import predict
from anypool.check.options import Options
from anypool.check.question import Question
from anypool.check.result import Result
from anypool.check.run import Running, check

__all__ = [
    "CheckError",
    "CompilerMissingError",
    "Finding",
    "Options",
    "Question",
    "Result",
    "Running",
    "check",
    "errors",
    "lint",
    "lint_traced",
    "predict",
]
