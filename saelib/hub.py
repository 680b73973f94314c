"""Names of models and data sets: what can be written in a profile, and what to do when the Hub does not give it.

A model's name is ``[centred:]place[@revision]``. ``place`` is a bundled name, a folder, or ``owner/name`` on the Hub;
``@step1000`` (or any revision) takes a training checkpoint: on the Hub that revision, in a folder the subfolder of that
name. ``centred:`` asks for the paper's coordinates, see `saelib.models.centre_writes`.
"""

import re
from dataclasses import dataclass
from pathlib import Path

#: Steps of which Pythia keeps checkpoints: 0, ten powers of two, then every thousand (EleutherAI/pythia, README).
PYTHIA_STEPS = (0, *(2**power for power in range(10)), *range(1000, 143_001, 1000))


class HubError(ValueError):
    """A name cannot be read or the Hub does not give what it stands for; the message says what to do."""


@dataclass(frozen=True)
class ModelName:
    """The parts of a model's name; ``revision`` "" is the last one."""

    place: str
    revision: str = ""
    centred: bool = False


def parse(name: str, revision: str | None = None) -> ModelName:
    """The parts of `name`; `revision` goes before the one in it. A number means a step: ``@1000`` is ``@step1000``.

    Raises `HubError` with the nearest ones for a Pythia step, or a checkpoint of a folder, that does not exist.
    """
    centred, place = name.startswith("centred:"), name.removeprefix("centred:")
    if "@" in place and not Path(place).expanduser().exists():
        place, _, written = place.rpartition("@")
        revision = revision or written
    revision = f"step{revision}" if (revision or "").isdigit() else revision or ""
    if revision in ("", "main"):
        return ModelName(place, "", centred)
    folder = Path(place).expanduser()
    if folder.is_dir():
        _known(place, revision, [path.parent.name for path in folder.glob("*/config.json")])
        return ModelName(str(folder / revision), "", centred)
    if place.startswith("EleutherAI/pythia-") and revision.startswith("step"):
        _known(place, revision, [f"step{step}" for step in PYTHIA_STEPS])
    return ModelName(place, revision, centred)


def _known(place: str, revision: str, known: list[str]) -> None:
    """Raise unless `revision` is in `known`; name the nearest steps, or all where there is no number to go by."""
    if revision in known:
        return
    steps = sorted(int(found[1]) for name in known if (found := re.fullmatch(r"step(\d+)", name)))
    if steps and (wanted := re.fullmatch(r"step(\d+)", revision)):
        near = sorted(sorted(steps, key=lambda step: abs(step - int(wanted[1])))[:4])
        told = f"the nearest are {', '.join(f'step{step}' for step in near)}, the last is step{steps[-1]}"
    else:
        told = f"there are {', '.join(sorted(known)) or 'none: it has no subfolder that holds a config.json'}"
    raise HubError(f"'{place}' has no checkpoint '{revision}': {told}")


def explain(error: BaseException, place: str, revision: str = "", what: str = "model") -> str:
    """What to do about an `error` of transformers or datasets, from the kinds of errors behind it."""
    kinds, cause = set(), error
    while cause is not None:
        # datasets puts the name of the error that it swallows into its message
        kinds |= {kind.__name__ for kind in type(cause).__mro__} | {*re.findall(r"\w+", str(cause))}
        cause = cause.__cause__ or cause.__context__
    at, first = f" at revision '{revision}'" if revision else "", (str(error).splitlines() or [""])[0]
    head = f"cannot load '{place}'{at} ({type(error).__name__}: {first}). "
    if kinds & {"GatedRepoError", "gated"}:
        return head + (
            f"The {what} is gated: accept its terms on its page on the Hub, then give your token in HF_TOKEN (or run "
            "`hf auth login`)"
        )
    if "RevisionNotFoundError" in kinds:
        return head + f"The {what} exists, this revision does not: its page on the Hub lists branches and tags"
    unreachable = {"OfflineModeIsEnabled", "LocalEntryNotFoundError", "ConnectError", "ConnectionError", "Timeout"}
    if "RepositoryNotFoundError" in kinds or ("DatasetNotFoundError" in kinds and not kinds & unreachable):
        return head + (
            f"The Hub has no {what} of this name, or it is private: check the spelling; for a private one give your token "
            "in HF_TOKEN"
        )
    if kinds & unreachable:
        other = (
            "download the model on another machine, copy its folder here and give the folder's path as the model's name"
            if what == "model"
            else "save it on another machine as JSON lines with a 'text' field and give that file's path instead"
        )
        return head + (
            "The Hub was not reached. With a network: HF_HUB_OFFLINE=0 (`make` sets it to 1). Without a network, point HF_HOME "
            f"at a copied cache that holds it and leave HF_HUB_OFFLINE=1, or {other}"
        )
    return head + f"Is it a whole {what}? Download it again, or copy its folder here and give the folder's path"
