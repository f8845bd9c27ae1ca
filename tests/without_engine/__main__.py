"""``python -m tests.without_engine``: the command ``kvpipe``, but no run of it starts an engine.

Everything is the real thing except for the module that runs as the worker. A test may also set how
long the parent waits, once its worker has ended, for the signal that may have ended both.
"""

import os
from functools import partial

from kvpipe.__main__ import main
from kvpipe.parent import supervisor
from kvpipe.worker import work
from tests.without_engine.worker import without_engine

SAME_SIGNAL_S = "KVPIPE_TEST_SAME_SIGNAL_S"

if __name__ == "__main__":
    if SAME_SIGNAL_S in os.environ:
        supervisor._SAME_SIGNAL_S = float(os.environ[SAME_SIGNAL_S])
    supervisor.Run.worker_module = "tests.without_engine.worker"
    work.execute = partial(work.execute, load=without_engine)  # with runner.isolate=false
    main()
