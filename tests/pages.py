"""The pages that people read, and the code in them."""

from collections.abc import Iterator
from pathlib import Path

from markdown_it import MarkdownIt

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES += sorted((ROOT / "examples").rglob("*.md"))


def code_of(page: Path) -> Iterator[tuple[bool, str]]:
    """Each line of code, and each piece of code within text; and whether it is the former."""
    for token in MarkdownIt().enable("table").parse(page.read_text()):
        if token.type in ("code_block", "fence"):
            yield from ((True, line.strip().removeprefix("$ ")) for line in token.content.splitlines())
        for child in token.children or ():
            if child.type == "code_inline":
                yield False, child.content
