"""Write the JSON schema of the manifest: `python -m otcache.schemas.publish schemas/manifest.schema.json`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from .manifest import Manifest
from .whole_files import write_whole


def main() -> None:
    """Write the file that the command line names."""
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        raise SystemExit("usage: python -m otcache.schemas.publish FILE")
    write_whole(Path(sys.argv[1]), json.dumps(Manifest.model_json_schema(), indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
