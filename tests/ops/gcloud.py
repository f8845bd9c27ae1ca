"""A fake gcloud: it records how it was called and carries the remote command out here.

A worker of the "VM" is a directory, which is the home directory of what runs there. It is a script
of its own, so that tests put it on the PATH as ``gcloud``.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

WHERE = Path(os.environ["STAND_IN"])


def processes_that_hold(text: bytes) -> list[str]:
    """Return the arguments and environments, of all processes that may be read, that hold text."""
    found = []
    for path in Path("/proc").glob("[0-9]*/*"):
        if path.name in ("cmdline", "environ"):
            try:
                if text in path.read_bytes():
                    found.append(str(path))
            except OSError:
                pass  # of another user, or gone
    return found


def describe(format_option: str) -> int:
    """Answer as the TPU VM of the test is."""
    if "networkEndpoints" in format_option:
        print(len(list(WHERE.glob("worker-*"))))
        return 0
    state = WHERE / "state"
    if not state.exists():
        print("ERROR: (gcloud.compute.tpus.tpu-vm.describe) NOT_FOUND", file=sys.stderr)
        return 1
    print(state.read_text())
    return 0


def ssh(options: dict[str, str]) -> int:
    """Run the command on each worker that is asked for; gcloud gives back the first failure."""
    chosen = options["--worker"]
    homes = sorted(WHERE.glob("worker-*" if chosen == "all" else f"worker-{chosen}"))
    codes = [
        subprocess.run(
            ["sh", "-c", options["--command"]], cwd=home, env={**os.environ, "HOME": str(home)}
        ).returncode
        for home in homes
    ]
    return next(filter(None, codes), 0)


def main() -> int:
    """Record the call, then do what it asks for."""
    arguments = sys.argv[1:]
    call = {"argv": arguments}
    secret = WHERE / "secret"
    if secret.exists():
        call["leaks"] = processes_that_hold(secret.read_bytes())
    with (WHERE / "calls.jsonl").open("a") as calls:
        calls.write(json.dumps(call) + "\n")
    options = dict(a.split("=", 1) for a in arguments if a.startswith("--") and "=" in a)
    return describe(options["--format"]) if "describe" in arguments else ssh(options)


sys.exit(main())
