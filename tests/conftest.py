"""Settings for the whole suite."""

import os

from hypothesis import settings

# No deadline: a shared machine stalls for reasons that are not the code's. CI draws the same examples every
# time, so that a red run can be repeated.
settings.register_profile("default", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("ci" if os.environ.get("CI") else "default")
