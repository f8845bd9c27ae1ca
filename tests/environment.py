"""The environment as the tests found it, for commands that are started from threads.

It is read once: pytest sets a variable for each test, and who reads the live one beside that may find
a variable gone while he looks.
"""

import os

INHERITED = dict(os.environ)
# Without what a fixture may have set for jax in this process.
WITHOUT_JAX = {k: v for k, v in INHERITED.items() if k not in ("JAX_PLATFORMS", "XLA_FLAGS")}
