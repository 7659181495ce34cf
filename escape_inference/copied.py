"""Read first by a process that others are copies of: the garbage collector rests while it reads, and it ends without tidying up."""

import atexit
import gc
import os
import sys

if any("multiprocessing.forkserver" in word for word in sys.orig_argv):
    gc.disable()  # it would look for long and find nothing; copies set it going
    atexit.register(os._exit, 0)
