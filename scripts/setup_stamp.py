"""Whether .venv is what pyproject.toml and constraints.txt ask for.

    .venv/bin/python -I -S scripts/setup_stamp.py --is-current [PYTHON]

exits with 0 if so (and made with PYTHON, where that is given). This is asked before
every `make`, so it imports next to nothing.
"""

import hashlib
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
STAMP = ROOT / ".venv" / "baton-setup-stamp"

_IDENTITY = "import sys; print(sys.version, sys.base_prefix)"


def wanted(identity: str) -> str:
    """What the stamp holds after a set-up with the interpreter of that ``identity``.

    The folder counts too: an environment that was moved has wrong paths inside.
    """
    digest = hashlib.sha256()
    for name in ("pyproject.toml", "constraints.txt", "scripts/setup_env.py"):
        digest.update((ROOT / name).read_bytes())
    return f"{digest.hexdigest()}\n{ROOT}\n{identity}\n"


def own_identity() -> str:
    """Of the interpreter that runs this."""
    return f"{sys.version} {sys.base_prefix}"


def is_current(python: str) -> bool:
    """Whether nothing needs to be done. Runs ``python`` if that is not empty."""
    identity = own_identity()
    if python:
        command = [python, "-I", "-S", "-c", _IDENTITY]
        asked = subprocess.run(command, capture_output=True, text=True, check=False)
        if asked.stdout != identity + "\n":
            return False
    return STAMP.exists() and STAMP.read_text() == wanted(identity)


if __name__ == "__main__":
    sys.exit(not is_current(sys.argv[2] if len(sys.argv) > 2 else ""))
