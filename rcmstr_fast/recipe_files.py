"""The recipes and studies that come with the package, found by name; stdlib only."""

import difflib
from pathlib import Path

from rcmstr_fast.fields import ConfigError

#: Recipes are `NAME.yaml` here, studies `studies/NAME.yaml`.
FOLDER = Path(__file__).parent / "recipes"


def names(kind: str = "") -> list[str]:
    """Names of all recipes, or (`studies`) of all studies."""
    return sorted(path.stem for path in (FOLDER / kind).glob("*.yaml"))


def find(name: str, kind: str = "") -> Path:
    """The file of a recipe: a path that exists, or the name of one that comes with the package.

    Args:
        name: a path, or a name with or without `.yaml`.
        kind: empty for recipes, `studies` for studies.
    Raises:
        ConfigError: there is none; names the nearest.
    """
    path = Path(name)
    if path.is_file():
        return path
    known = names(kind)
    if path.name.removesuffix(".yaml") in known and path.parent in (Path(), Path("recipes"), Path("recipes") / kind):
        return FOLDER / kind / f"{path.name.removesuffix('.yaml')}.yaml"
    what = "study" if kind else "recipe"
    near = difflib.get_close_matches(path.name.removesuffix(".yaml"), known, 1)
    hint = f"; did you mean {near[0]}?" if near else "; `rcmstr recipes` lists them"
    raise ConfigError(f"{name}: no such file, and no {what} of that name{hint}")
