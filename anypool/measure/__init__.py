"""What drills and benchmarks share: a fleet started as its users start it, and streams read as its clients read them.

Nothing here looks inside the server: a fleet is an `anypool up` in a process of its own, spoken to over HTTP.

Other rooms use `serving` and `Serving`, `Stream` and `read_stream`, and from `report` what makes a figure worth
keeping: percentiles, the machine, the versions, the date.
"""

from anypool.measure.serving import Serving, ServingError, serving
from anypool.measure.stream import Stream, read_stream

__all__ = ["Serving", "ServingError", "Stream", "read_stream", "serving"]
