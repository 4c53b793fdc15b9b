"""Write the JSON schema of the manifest: `python -m otcache.schemas.publish schemas/manifest.schema.json`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from .manifest import Manifest


def main() -> None:
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        raise SystemExit("usage: python -m otcache.schemas.publish FILE")
    Path(sys.argv[1]).write_text(
        json.dumps(Manifest.model_json_schema(), indent=1, sort_keys=True) + "\n", encoding="utf-8"
    )


if __name__ == "__main__":
    main()
