"""A process that makes units of a job, `python -m anypool.train.data.worker FOLDER`: numbers in, answers out."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from anypool.train.data.errors import DataError, complaint
from anypool.train.data.unit import Maker


def main() -> None:
    """A worker: units in, answers out."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints is no answer
    maker: Maker | None = None
    for line in sys.stdin:
        try:
            maker = maker or Maker(Path(sys.argv[1]))
            maker.make(int(line))
            answer = {}
        except DataError as error:
            answer = {"error": str(error)}
        except OSError as error:
            answer = {"error": complaint(error)}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
