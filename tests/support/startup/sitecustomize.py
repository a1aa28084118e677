"""Every Python process that the tests start imports this first: conftest puts it on PYTHONPATH.

Importing vLLM makes a million objects, none of which is garbage, and Python looks through them
again and again: 1.4 of 10 seconds.
"""

import gc

gc.set_threshold(200_000, 20, 100)
