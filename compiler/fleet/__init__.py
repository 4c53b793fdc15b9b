"""A compile or a comparison on many workers: Ray starts them, replaces them and carries a few numbers.

Nothing outside of this room imports Ray, and this room is imported only where workers are asked for.
"""

import os

# Ray prints what happens to workers on the stdout of whoever asked for them, where our own result goes: what a user has
# to know of it is a note of ours. Read when Ray is imported.
os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", ".")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
