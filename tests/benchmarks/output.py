"""What a benchmark says of itself: JSON on stdout and, with `-o FILE`, in a file that the repository keeps."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from otcache.runtime.serving.bench import host_facts


def output_option(parser: argparse.ArgumentParser) -> None:
    """`-o FILE`."""
    parser.add_argument("-o", "--output", type=Path)


def host() -> dict[str, Any]:
    """What kind of machine it was, without its name."""
    return {key: value for key, value in host_facts().items() if key != "name"}


def write(found: dict[str, Any], output: Path | None) -> None:
    """Print the figures, and keep them in the file."""
    text = json.dumps(found, indent=1)
    print(text)
    if output:
        output.write_text(text + "\n", encoding="utf-8")
