"""`rcmstr recipes`: the recipes and studies that come with the package."""

from jsonargparse import ArgumentParser, Namespace

from rcmstr_fast import recipe_files

NAME = "recipes"
HELP = "list the recipes and studies that come with the package, or print one"


def add_arguments(parser: ArgumentParser) -> None:
    """Optionally a name."""
    parser.add_argument("name", type=str, nargs="?", default="", help="print this recipe or study")


def run(arguments: Namespace) -> int:
    """List all with their first line, or print one."""
    if arguments.name:
        kind = "studies" if arguments.name in recipe_files.names("studies") else ""
        print(recipe_files.find(arguments.name, kind).read_text(encoding="utf-8"), end="")
        return 0
    for kind, title in (("", "recipes (--config NAME)"), ("studies", "studies (rcmstr study NAME)")):
        print(f"{title}:")
        for name in recipe_files.names(kind):
            lines = recipe_files.find(name, kind).read_text(encoding="utf-8").splitlines() or [""]
            print(f"  {name:<28}{lines[0].lstrip('# ') if lines[0].startswith('#') else ''}")
    return 0
