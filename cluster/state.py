"""What a running ``baton serve`` leaves on disk: its lock, its state, its logs.

One folder per cluster name, ``$BATON_STATE_DIR/NAME`` or
``$XDG_STATE_HOME/baton/NAME`` or ``~/.local/state/baton/NAME``, private to its owner:

- ``lock``: held by the launcher for as long as it lives; two never run at once.
- ``state.json``: who runs, where it answers, and its controller's token. The pid comes
  with the process's start time, so that a recycled pid is never taken for the launcher.
- ``config.yaml``: the configuration in effect, which all processes read.
- ``logs/``: one file per process; ``logs.old/``: those of the run before.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path

from baton.errors import UnavailableError
from cluster.procfs import ProcessName, is_alive


@dataclass(frozen=True, slots=True)
class ServerState:
    """A running launcher, as it describes itself."""

    pid: int
    start_time: int
    url: str
    cluster: str
    stop_within_s: float
    """A stop that was asked for is over by then."""
    temp_folder: str
    """Made by that launcher; no use to anybody once it is gone."""
    controller_url: str
    controller_token: str = field(repr=False)
    """What `baton scale` shows there; the file is its owner's alone to read."""

    @property
    def process(self) -> ProcessName:
        return ProcessName(self.pid, self.start_time)


def state_root() -> Path:
    """Where the folders of all clusters lie."""
    if own := os.environ.get("BATON_STATE_DIR"):
        return Path(own)
    base = os.environ.get("XDG_STATE_HOME")
    return (Path(base) if base else Path.home() / ".local" / "state") / "baton"


_TEMP_PARENT = Path("/tmp")
"""Not ``$TMPDIR``: sockets lie in there, and their paths may have 107 bytes."""
_TEMP_PREFIX = "baton-"


def make_temp_folder() -> Path:
    """A fresh folder, private to this user, for what must not outlive the launcher."""
    return Path(tempfile.mkdtemp(prefix=_TEMP_PREFIX, dir=_TEMP_PARENT))


def _remove_temp_folder(folder: Path) -> None:
    """Removes one of ``make_temp_folder``'s, and nothing else, whatever a file may say."""
    if folder.parent == _TEMP_PARENT and folder.name.startswith(_TEMP_PREFIX):
        shutil.rmtree(folder, ignore_errors=True)


class RunFolder:
    """One cluster's folder. Reading needs no lock; everything else does."""

    def __init__(self, cluster: str) -> None:
        self.path = state_root().absolute() / cluster
        self.logs = self.path / "logs"
        self.config_file = self.path / "config.yaml"
        self._state_file = self.path / "state.json"
        self._lock: int | None = None

    def lock(self) -> None:
        """Takes the folder for this process, until it ends or ``unlock``.

        Raises: UnavailableError when another launcher has it.
        """
        self.path.mkdir(parents=True, exist_ok=True, mode=0o700)
        descriptor = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise UnavailableError(self._occupied()) from None
        self._lock = descriptor

    def _occupied(self) -> str:
        other = self.running()
        who = f" (pid {other.pid}, {other.url})" if other else ""
        name = self.path.name
        return (
            f"cluster {name!r} is already being served{who}; end it with "
            f"`baton stop --cluster {name}`, or choose another name with --cluster"
        )

    def unlock(self) -> None:
        """Forgets the state and lets the next launcher in."""
        assert self._lock is not None
        self._state_file.unlink(missing_ok=True)
        os.close(self._lock)
        self._lock = None

    def prepare(self) -> None:
        """Removes what a killed launcher left, and puts its logs aside."""
        assert self._lock is not None
        left = self._read()
        if left is not None:
            _remove_temp_folder(Path(left.temp_folder))
        old = self.path / "logs.old"
        if self.logs.exists():
            shutil.rmtree(old, ignore_errors=True)
            self.logs.rename(old)
        self.logs.mkdir(mode=0o700)

    def write(self, state: ServerState) -> None:
        assert self._lock is not None
        temporary = self._state_file.with_suffix(".new")
        temporary.unlink(missing_ok=True)
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w") as out:
            out.write(json.dumps(asdict(state), indent=2) + "\n")
        temporary.replace(self._state_file)

    def _read(self) -> ServerState | None:
        try:
            return ServerState(**json.loads(self._state_file.read_text()))
        except (FileNotFoundError, ValueError, TypeError):
            return None

    def running(self) -> ServerState | None:
        """The launcher that serves this cluster now; None when there is none."""
        state = self._read()
        return state if state is not None and is_alive(state.process) else None

    def log_tail(self, worker_id: str, num_lines: int = 15) -> list[str]:
        """The last lines that a process wrote."""
        try:
            with (self.logs / f"{worker_id}.log").open("rb") as log:
                log.seek(0, os.SEEK_END)
                log.seek(max(0, log.tell() - 16384))
                text = log.read().decode(errors="replace")
        except FileNotFoundError:
            return []
        return text.splitlines()[-num_lines:]
