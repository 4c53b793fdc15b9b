"""`OTC_LOG`: what otcache's loggers write to stderr. Loggers are named `otcache.…`; libraries' own logs stay theirs.

As a library otcache configures nothing: a host that wants these records adds its own handler to the logger `otcache`.
"""

from __future__ import annotations

import json
import logging
import os
import sys

from otcache.schemas.errors import UsageError
from otcache.schemas.messages import one_line

VARIABLE = "OTC_LOG"
LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}
DEFAULT = "warning"
ROOT = "otcache"


class JsonLines(logging.Formatter):
    """One event a record: `{"event": "log", "level": …, "logger": …, "message": …}`, with `traceback` where there is
    one.
    """

    def format(self, record: logging.LogRecord) -> str:
        event = {
            "event": "log",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            event["traceback"] = self.formatException(record.exc_info)
        return json.dumps(event, ensure_ascii=False)


class _Handler(logging.Handler):
    """Writes to whatever stderr is at the time."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            print(self.format(record), file=sys.stderr, flush=True)
        except Exception:
            self.handleError(record)


def configure(*, as_json: bool = False) -> None:
    """Send the records of `otcache.*` from the level of OTC_LOG upwards to stderr.

    Raises UsageError for another word.
    """
    word = os.environ.get(VARIABLE, "").strip().lower() or DEFAULT
    if word not in LEVELS:
        raise UsageError(
            f"{VARIABLE} is {one_line(word, 40)!r}: expected one of {', '.join(LEVELS)}: set one, or unset it"
        )
    logger = logging.getLogger(ROOT)
    for handler in [handler for handler in logger.handlers if isinstance(handler, _Handler)]:
        logger.removeHandler(handler)
    handler = _Handler()
    handler.setFormatter(JsonLines() if as_json else logging.Formatter("%(levelname)s %(name)s: %(message)s"))
    logger.addHandler(handler)
    logger.setLevel(LEVELS[word])
