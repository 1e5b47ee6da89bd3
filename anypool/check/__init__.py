"""Will a model run on a chip that is not here, and does it fit: compiled, linted or estimated, and said which.

Other rooms use:
- `lint`, `lint_traced`: a program against the rules of Trainium's compiler.
"""

from anypool.check.lint import Finding, errors, lint, lint_traced

__all__ = ["Finding", "errors", "lint", "lint_traced"]
