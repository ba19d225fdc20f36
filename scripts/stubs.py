"""Generates the gRPC stubs from proto/, beside the packages that use them.

python scripts/stubs.py            writes them
python scripts/stubs.py --check    exits with 1 unless the committed ones are the same
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PROTO = ROOT / "proto"
PATTERN = "*_pb2*"


def generate(target: Path) -> None:
    """Writes all stubs below ``target``; exits with protoc's status if it fails."""
    # protoc finds its plugins (mypy-protobuf) on the PATH.
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    outputs = [f"--{kind}_out={target}" for kind in ("python", "grpc_python", "mypy", "mypy_grpc")]
    sources = [str(source) for source in sorted(PROTO.rglob("*.proto"))]
    command = [sys.executable, "-m", "grpc_tools.protoc", "-I", str(PROTO), *outputs, *sources]
    done = subprocess.run(command, env={**os.environ, "PATH": path}, capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(done.stdout + done.stderr)


def stubs(folder: Path) -> dict[Path, bytes]:
    """Every stub below ``folder`` by its relative path; hidden folders are not searched."""
    packages = [one for one in folder.iterdir() if one.is_dir() and not one.name.startswith(".")]
    return {
        path.relative_to(folder): path.read_bytes()
        for package in packages
        for path in package.rglob(PATTERN)
        if path.suffix in (".py", ".pyi")
    }


def check() -> int:
    """Compares the committed stubs with fresh ones; says which differ."""
    with tempfile.TemporaryDirectory() as folder:
        generate(Path(folder))
        fresh = stubs(Path(folder))
    committed = stubs(ROOT)
    differing = [p for p in sorted({*fresh, *committed}) if fresh.get(p) != committed.get(p)]
    for path in differing:
        print(f"{path} is not what proto/ gives", file=sys.stderr)
    if differing:
        print("run `make proto`", file=sys.stderr)
        return 1
    print(f"{len(fresh)} stubs are in step with proto/")
    return 0


if __name__ == "__main__":
    if sys.argv[1:] == ["--check"]:
        sys.exit(check())
    generate(ROOT)
