"""`python -m anypool` is `anypool`."""

from anypool.cli import main

main()
