"""Read by a process that others are copies of: when they have ended it has nothing to tidy up, and ends at once."""

import atexit
import os

atexit.register(os._exit, 0)
