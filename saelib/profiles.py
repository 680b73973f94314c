"""Profiles: parameters for all notebooks in one YAML file, checked against the notebooks before anything runs.

A notebook's parameters cell is the schema. Each line is ``name = literal  # what it is; unit; paper's value``; the
comment may end with ``range 1..100`` (numbers, and each element of a list) or ``one of a | b`` (strings).
"""

import ast
import re
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import nbformat
import yaml
from pydantic import ConfigDict, Field, ValidationError, create_model

from saelib.paths import NOTEBOOKS, PROFILES


class ProfileError(ValueError):
    """A profile does not fit the notebooks. The message names notebook and parameter."""


def stems(folder: Path = NOTEBOOKS) -> list[str]:
    """Stems of the numbered notebooks, in order."""
    return sorted(path.stem for path in folder.glob("[0-9]*.ipynb"))


def parameters_cell(path: Path) -> str:
    """Source of the one cell tagged ``parameters``."""
    cells = nbformat.read(path, as_version=4).cells
    tagged = [cell.source for cell in cells if "parameters" in cell.metadata.get("tags", [])]
    if len(tagged) != 1:
        raise ProfileError(f"{path.name}: {len(tagged)} cells are tagged 'parameters', there must be one")
    return tagged[0]


def defaults(path: Path) -> dict[str, Any]:
    """The literal values that a notebook's parameters cell assigns."""
    values = {}
    for node in ast.parse(parameters_cell(path)).body:
        if not (isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name)):
            raise ProfileError(f"{path.name}: the parameters cell may hold only assignments of literals")
        try:
            values[node.targets[0].id] = ast.literal_eval(node.value)
        except ValueError:
            raise ProfileError(f"{path.name}: parameter '{node.targets[0].id}' is not a literal") from None
    return values


def schema(path: Path):
    """A strict pydantic model of a notebook's parameters: types of the defaults, ranges and choices of the comments."""
    comments = dict(re.findall(r"^(\w+) = .*?  # (.*)$", parameters_cell(path), flags=re.M))
    fields = {}
    for name, value in defaults(path).items():
        comment, constraints = comments.get(name, ""), {}
        if found := re.search(r"range ([^\s;]+)\.\.([^\s;]+)", comment):
            constraints = {"ge": float(found[1]), "le": float(found[2])}
        one = value[0] if isinstance(value, list) else value
        if choices := re.search(r"one of (.+)$", comment):
            kind = Literal[tuple(choice.strip() for choice in choices[1].split("|"))]
        else:
            kind = Annotated[type(one), Field(**constraints)]
        fields[name] = (Annotated[list[kind], Field(min_length=1)] if isinstance(value, list) else kind, value)
    return create_model(path.stem, __config__=ConfigDict(strict=True, extra="forbid"), **fields)


def load(profile: str, *, folder: Path = PROFILES, notebooks: Path = NOTEBOOKS) -> dict[str, dict]:
    """Parameters of every notebook under `profile`: ``{stem: {name: value}}``, the defaults overridden.

    Raises `ProfileError` with every fault at once: unknown profile (lists the known ones), section, parameter, type,
    range or choice, and an override that repeats the default.
    """
    known = sorted(path.stem for path in folder.glob("*.yaml"))
    if profile not in known:
        raise ProfileError(f"no profile '{profile}': known profiles are {', '.join(known)}")
    try:
        content = yaml.safe_load((folder / f"{profile}.yaml").read_text()) or {}
    except yaml.YAMLError as error:
        raise ProfileError(f"profile '{profile}' is not YAML: {error}") from None
    if not isinstance(content, dict) or not all(isinstance(part or {}, dict) for part in content.values()):
        raise ProfileError(f"profile '{profile}': wants sections (shared, a notebook) that hold name: value lines")
    models = {stem: schema(notebooks / f"{stem}.ipynb") for stem in stems(notebooks)}
    faults = [
        f"section '{section}' is no notebook; there are shared, {', '.join(models)}"
        for section in content
        if section != "shared" and section not in models
    ]
    shared = content.get("shared") or {}
    everywhere = {name for model in models.values() for name in model.model_fields}
    faults += [f"shared: no notebook has a parameter '{name}'" for name in shared if name not in everywhere]
    result = {}
    for stem, model in models.items():
        own = content.get(stem) or {}
        given = {name: value for name, value in shared.items() if name in model.model_fields} | own
        for name, value in own.items():
            if name in model.model_fields and model.model_fields[name].default == value and name not in shared:
                faults.append(f"{stem}: '{name}' repeats the notebook's default; leave it out")
        try:
            if "profile" in model.model_fields:
                given["profile"] = profile
            result[stem] = model(**given).model_dump()
        except ValidationError as error:
            faults += [f"{stem}: {_explain(fault, model)}" for fault in error.errors()]
    if faults:
        raise ProfileError(f"profile '{profile}':\n  " + "\n  ".join(faults))
    return result


def _explain(fault: dict, model) -> str:
    """One readable line for a pydantic fault, with the YAML trap named where it is the likely cause."""
    name, given = ".".join(map(str, fault["loc"])), fault["input"]
    if fault["type"] == "extra_forbidden":
        return f"unknown parameter '{name}'; it has {', '.join(model.model_fields)}"
    text = f"parameter '{name}' = {given!r}: {fault['msg']}"
    if isinstance(given, str) and re.fullmatch(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+", given):
        text += f". YAML reads {given} as text: write {float(given):.1e} with a point, like 1.0e-3"
    return text


if __name__ == "__main__":
    try:
        load(sys.argv[1] if len(sys.argv) > 1 else "laptop")
    except ProfileError as error:
        sys.exit(f"error: {error}")
