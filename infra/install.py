"""Makes `.venv` and installs the project into it: what `make` runs first, with the Python of the system.

Uses the standard library alone. The versions are those of constraints.txt. Without an NVIDIA GPU on Linux the CPU build
of PyTorch is taken, when its index can be reached: it is 2.5 GB smaller.
"""

from __future__ import annotations

import hashlib
import platform
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
VENV = ROOT / ".venv"
STAMP = VENV / "installed"
LOG = VENV / "install.log"
CPU_TORCH = "https://download.pytorch.org/whl/cpu"


def main() -> int:
    wanted = fingerprint()
    if STAMP.exists() and STAMP.read_text() == wanted:
        STAMP.touch()  # the files are newer than the stamp but say the same: nothing to do
        return 0
    began = time.monotonic()
    python = VENV / "bin" / "python"
    if not works(python):
        print(f"making .venv with Python {platform.python_version()} …", flush=True)
        try:
            venv.create(VENV, with_pip=True, clear=True)
        except (subprocess.CalledProcessError, OSError) as error:
            print(f"error: cannot make .venv ({error}): on Debian or Ubuntu install python3-venv", file=sys.stderr)
            return 2
    options = ["--disable-pip-version-check", "--no-input", "--constraint", "constraints.txt"]
    if wants_cpu_torch():
        options += ["--extra-index-url", CPU_TORCH]
    print("installing Figment and what it needs into .venv (about 2 minutes, once) …", flush=True)
    code = run_quietly([str(python), "-m", "pip", "install", *options, "--editable", ".[dev]"])
    if code:
        print(f"error: the installation failed; the whole log is {LOG}. It ends:", file=sys.stderr)
        print(last_words(LOG.read_text(errors="replace")), file=sys.stderr)
        return 2
    STAMP.write_text(wanted)
    print(f"installed in {time.monotonic() - began:.0f} s", flush=True)
    return 0


def fingerprint() -> str:
    """Of everything that the installation depends on."""
    digest = hashlib.sha256(platform.python_version().encode())
    for name in ("pyproject.toml", "constraints.txt"):
        digest.update((ROOT / name).read_bytes())
    return digest.hexdigest()


def works(python: Path) -> bool:
    """Whether it is a Python 3.11 or newer with pip; one whose system Python went away is not."""
    check = "import sys, pip; sys.exit(sys.version_info < (3, 11))"
    try:
        return subprocess.run([str(python), "-c", check], capture_output=True, check=False).returncode == 0
    except OSError:
        return False


def wants_cpu_torch() -> bool:
    if platform.system() != "Linux" or shutil.which("nvidia-smi") or Path("/dev/nvidia0").exists():
        return False
    try:
        with urllib.request.urlopen(f"{CPU_TORCH}/torch/", timeout=3):
            return True
    except (urllib.error.URLError, OSError):
        return False  # then whatever build the usual index has


def run_quietly(command: list[str]) -> int:
    """Runs `command` with its output in the log; now and then a sign of life. Returns its exit code."""
    began = time.monotonic()
    with LOG.open("w") as log:
        process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)
        while True:
            try:
                return process.wait(timeout=20)
            except subprocess.TimeoutExpired:
                print(f"  … {time.monotonic() - began:.0f} s: {now_doing(LOG.read_text(errors='replace'))}", flush=True)


def now_doing(log: str) -> str:
    steps = [
        line.strip() for line in log.splitlines() if line.lstrip().startswith(("Collecting", "Downloading", "Inst"))
    ]
    return steps[-1][:90] if steps else "starting"


def last_words(log: str) -> str:
    """The errors that pip named, or else the end of what it said."""
    lines = [line for line in log.splitlines() if line.strip()]
    errors = [line for line in lines if line.lstrip().startswith("ERROR")]
    return "\n".join(f"    {line}" for line in (errors or lines)[-8:])


if __name__ == "__main__":
    raise SystemExit(main())
