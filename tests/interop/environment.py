"""The peers' virtual environment, data/interop-venv: made on first use (1.9 GB, a minute or two), kept between runs."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from filelock import FileLock

from saelib.paths import DATA

HERE = Path(__file__).parent
FOLDER = DATA / "interop-venv"
REQUIREMENTS = ("requirements.txt", "requirements-no-deps.txt")


class Unavailable(RuntimeError):
    """The environment could not be installed; the message is pip's last line."""


def python() -> Path:
    """The environment's interpreter. Made anew when a requirement has changed. Raises `Unavailable`."""
    wanted = "".join((HERE / name).read_text() for name in REQUIREMENTS)
    interpreter, installed = FOLDER / "bin" / "python", FOLDER / "installed"
    (DATA / "runs").mkdir(parents=True, exist_ok=True)
    with FileLock(DATA / "runs" / ".interop-venv.lock"):
        if not installed.exists() or installed.read_text() != wanted:
            shutil.rmtree(FOLDER, ignore_errors=True)
            subprocess.run([sys.executable, "-m", "venv", FOLDER], check=True)
            (FOLDER / ".gitignore").write_text("*\n")
            for name in REQUIREMENTS:
                options = ["--no-deps"] if "no-deps" in name else []
                _install(interpreter, [*options, "-r", HERE / name])
            installed.write_text(wanted)
    return interpreter


def _install(interpreter: Path, what: list) -> None:
    # few retries, so that a machine without a network skips within a minute or so
    command = [interpreter, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--retries", "1", *what]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        lines = (done.stdout + done.stderr).splitlines() or ["pip failed and said nothing"]
        raise Unavailable(next((line for line in reversed(lines) if line.startswith("ERROR")), lines[-1]))


def run(*arguments) -> str:
    """Run peers.py with `arguments` in the environment, offline; its standard output. An error shows its last lines."""
    environment = {"HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled", "WANDB_SILENT": "true", "PYTHONPATH": ""}
    command = [python(), HERE / "peers.py", *map(str, arguments)]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"peers.py {' '.join(map(str, arguments))}:\n{done.stderr[-3000:]}")
    return done.stdout
