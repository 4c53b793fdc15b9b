"""The pages that people read: their code blocks, commands, links and headings, as a Markdown parser sees them."""

from __future__ import annotations

import itertools
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from markdown_it import MarkdownIt
from markdown_it.token import Token

ROOT = Path(__file__).parents[2]
FOLDERS = ("compiler", "runtime", "schemas", "artifacts", "tests")
PAGES = sorted([*ROOT.glob("*.md"), *(page for folder in FOLDERS for page in (ROOT / folder).rglob("*.md"))])
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
COMMAND_WORDS = ("otc", "python", "pip", "make", "curl", "openssl", "tritonserver", "serve", "docker")
"""What a line begins with that a reader would type."""


@dataclass(frozen=True)
class Block:
    """A fenced or indented block of code."""

    line: int
    """Of the page, where the block begins; from 1."""
    language: str
    name: str
    """What follows the language in the fence: a file's name, or nothing."""
    text: str


def parse(name: str) -> list[Token]:
    """The page's tokens."""
    return MarkdownIt("commonmark").enable("table").parse((ROOT / name).read_text(encoding="utf-8"))


def blocks(name: str) -> list[Block]:
    """Every block of code on a page, in order."""
    found = []
    for token in parse(name):
        if token.type in ("fence", "code_block"):
            language, _, rest = token.info.strip().partition(" ")
            found.append(Block(token.map[0] + 1 if token.map else 0, language, rest.strip(), token.content))
    return found


def commands(block: Block) -> Iterator[tuple[int, str]]:
    """(line of the page, command) of a block that is no Python, whatever its language is said to be."""
    if block.language == "python":
        return
    for number, line in enumerate(block.text.splitlines(), block.line + 1):
        if line.strip().split(" ")[0] in COMMAND_WORDS:
            yield number, line.strip()


def inline(name: str) -> Iterator[Token]:
    """Every inline token: text, code, links, pictures, pieces of HTML."""
    for token in parse(name):
        yield from token.children or ()
        if token.type == "html_block":
            yield token


def links(name: str) -> list[str]:
    """What a page refers to, pictures included."""
    found = []
    for token in inline(name):
        if token.type in ("link_open", "image"):
            found.append(str(token.attrs["href" if token.type == "link_open" else "src"]))
        elif token.type.startswith("html_"):
            found += re.findall(r'(?:href|src)="([^"]*)"', token.content)
    return found


def pictures(name: str) -> list[str]:
    """Paths of the pictures that a page shows."""
    return [link for link in links(name) if link.endswith((".png", ".jpg", ".gif"))]


def anchors(name: str) -> set[str]:
    """What `#…` may follow the page's name, as GitHub makes it of headings."""
    found: set[str] = set()
    tokens = parse(name)
    for token, content in itertools.pairwise(tokens):
        if token.type == "heading_open":
            words = "".join(child.content for child in content.children or ())
            slug = base = re.sub(r"[^\w\- ]", "", words.lower()).strip().replace(" ", "-")
            count = 0
            while slug in found:
                count += 1
                slug = f"{base}-{count}"
            found.add(slug)
    return found


def code_spans(name: str) -> list[str]:
    """The page's inline code."""
    return [token.content for token in inline(name) if token.type == "code_inline"]


def command_line(name: str, begin: str) -> list[str]:
    """The words of the one command on a page that begins so."""
    (found,) = {text for block in blocks(name) for _, text in commands(block) if text.startswith(begin)}
    return shlex.split(found, comments=True)


def snippet(name: str, file: str) -> str:
    """The Python of a page's block that is named so."""
    (found,) = [block.text for block in blocks(name) if block.name == file]
    return found
