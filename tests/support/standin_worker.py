"""In a worker's place: notes its pid, and what it was given; ends on SIGTERM.

``STANDIN_BEHAVIOUR`` may be ``fails`` (dies at its start), ``deaf`` (ignores SIGTERM) or
``hides`` (never becomes ready).
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--config", type=Path)
    parser.add_argument("--worker-id")
    worker_id = parser.parse_args().worker_id
    behaviour = os.environ.get("STANDIN_BEHAVIOUR")
    if behaviour == "fails":
        sys.exit("the weights are missing")
    end = signal.SIG_IGN if behaviour == "deaf" else lambda *_: sys.exit(0)
    signal.signal(signal.SIGTERM, end)
    given = {"BATON_SECRET", "REDIS_URL"} <= os.environ.keys()
    file = Path(os.environ["STANDIN_FOLDER"]) / f"{worker_id}.worker"
    if behaviour != "hides":
        file.write_text(str(os.getpid()) if given else "")
    while True:
        time.sleep(60)


if __name__ == "__main__":
    main()
