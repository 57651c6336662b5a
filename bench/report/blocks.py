"""Parts of hand-written pages that are generated: what stands between `<!-- NAME: .. -->` and `<!-- end of NAME -->`."""

import re

from rcmstr_fast.config import ConfigError


def replace(text: str, name: str, body: str) -> str:
    """The page with the body of one block replaced.

    Args:
        text: of the page.
        name: of the block.
        body: what shall stand in it, without blank lines around it.
    Raises:
        ConfigError: the page has no such block, or several.
    """
    pattern = re.compile(rf"(<!-- {re.escape(name)}:[^\n]*-->\n).*?(<!-- end of {re.escape(name)} -->)", re.S)
    if len(pattern.findall(text)) != 1:
        raise ConfigError(f"expected one block <!-- {name}: .. --> .. <!-- end of {name} --> in the page")
    return pattern.sub(lambda found: f"{found[1]}\n{body}\n\n{found[2]}", text)
