"""When this process began, by time.monotonic."""

import time

BEGUN = time.monotonic()
