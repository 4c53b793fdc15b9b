"""The licences of everything that otcache's extras install, read from the packages' own metadata.

    python -m otcache.artifacts.licences [--report FILE]… LICENSES.md

Lists what is installed here. Packages that are not (GPU libraries) are read from reports of
`pip install --dry-run --ignore-installed --no-deps --report FILE PACKAGE…`.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from otcache.schemas.whole_files import write_whole

BASE = "base"
UNKNOWN = "see the package"
LONGEST = 60
"""Characters of a `License` field that is a name; longer ones are the licence's text."""
LEAD = (
    "otcache itself is under Apache-2.0 (`LICENSE`). It contains no code of the packages below; pip installs them.",
    "Written by `python -m otcache.artifacts.licences`, from the packages' own metadata, on Linux with the CPU build",
    "of torch: its CUDA builds bring NVIDIA's libraries under NVIDIA's terms. Bold: extras that name the package.",
)


def packages_by_extra(distribution: str = "otcache") -> dict[str, list[str]]:
    """Extra → names of the packages that it names; `base` is what is always installed."""
    found: dict[str, list[str]] = {BASE: []}
    for text in metadata.requires(distribution) or []:
        requirement = Requirement(text)
        match = re.search(r"extra == ['\"]([\w.-]+)['\"]", str(requirement.marker or ""))
        found.setdefault(match.group(1) if match else BASE, []).append(canonicalize_name(requirement.name))
    return found


def closure(names: list[str]) -> set[str]:
    """The packages and everything that they pull in here, by canonical name; markers decide, extras are left out."""
    seen: set[str] = set()
    left = list(names)
    while left:
        name = left.pop()
        if name in seen:
            continue
        seen.add(name)
        try:
            texts = metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            continue
        for requirement in map(Requirement, texts):
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                left.append(canonicalize_name(requirement.name))
    return seen


def licence_from_metadata(fields: Mapping[str, Any]) -> str:
    """The licence that a package's metadata states: its expression, else a short name, else its classifiers.

    >>> licence_from_metadata({"License-Expression": "Apache-2.0"})
    'Apache-2.0'
    >>> licence_from_metadata({"license": "UNKNOWN", "classifier": ["License :: OSI Approved :: MIT License"]})
    'MIT License'
    """
    values = {key.lower().replace("-", "_"): value for key, value in fields.items() if value}
    stated = str(values.get("license_expression") or values.get("license") or "").strip()
    if stated and len(stated) <= LONGEST and "\n" not in stated and stated.upper() != "UNKNOWN":
        return stated
    classifiers = values.get("classifier") or []
    names = [text.split(" :: ")[-1] for text in classifiers if text.startswith("License :: ")]
    return ", ".join(dict.fromkeys(names)) or UNKNOWN


def installed_metadata(name: str) -> dict[str, Any] | None:
    """Metadata of an installed package, or None."""
    try:
        found = metadata.metadata(name)
    except metadata.PackageNotFoundError:
        return None
    fields: dict[str, Any] = {key: found.get(key) for key in ("License-Expression", "License")}
    return {**fields, "classifier": found.get_all("Classifier") or []}


def metadata_from_reports(paths: list[Path]) -> dict[str, dict[str, Any]]:
    """Metadata by canonical name from pip's reports."""
    entries = [entry["metadata"] for path in paths for entry in json.loads(path.read_text())["install"]]
    return {canonicalize_name(entry["name"]): entry for entry in entries}


def render(reports: list[Path]) -> str:
    """The page, in Markdown."""
    extras = packages_by_extra()
    others = metadata_from_reports(reports)
    needed: dict[str, list[str]] = {}
    for extra, names in extras.items():
        for name in closure(names):
            needed.setdefault(name, []).append(f"**{extra}**" if name in names else extra)
    rows = []
    for name in sorted(needed):
        fields = installed_metadata(name) or others.get(name)
        if fields is None and not any("**" in extra for extra in needed[name]):
            continue
        rows.append(f"| {name} | {licence_from_metadata(fields) if fields else UNKNOWN} | {', '.join(needed[name])} |")
    return "\n".join(
        [
            "# Licences of the dependencies",
            "",
            *LEAD,
            "",
            "| package | licence | extras |",
            "|---|---|---|",
            *rows,
            "",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--report", type=Path, action="append", default=[], help="what pip reported of packages not installed"
    )
    parser.add_argument("output", type=Path)
    options = parser.parse_args()
    write_whole(options.output, render(options.report))


if __name__ == "__main__":
    main()
