"""The only place that builds paths. Notebooks and library ask here and never join folder names themselves.

``SAELIB_DATA`` moves the data root (a scratch disk, a temporary folder of a test); figures then move with it.
"""

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
_moved = os.environ.get("SAELIB_DATA")
DATA = Path(_moved).expanduser().resolve() if _moved else ROOT / "data"
FIGURES = DATA / "figures" if _moved else ROOT / "figures"
RAW = DATA / "raw"
NOTEBOOKS = ROOT / "notebooks"
PROFILES = NOTEBOOKS / "profiles"
SOURCES = ROOT / "data" / "sources.yaml"
EXPECTED = ROOT / "data" / "expected"


class MissingArtefact(FileNotFoundError):
    """An artefact of an earlier notebook is not there; the message says which notebook makes it."""


def run_dir(profile: str) -> Path:
    """Folder of everything that the profile computes: ``data/runs/<profile>``."""
    return DATA / "runs" / profile


def require(artefact: Path, made_by: str) -> Path:
    """Return `artefact`, or raise `MissingArtefact` naming the notebook stem `made_by` that makes it."""
    if not artefact.exists():
        raise MissingArtefact(
            f"{artefact} is missing. Notebook {made_by} makes it: run that notebook first, or `make replicate`."
        )
    return artefact
