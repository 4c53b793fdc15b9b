"""The command that is tested, as a function."""

from __future__ import annotations

import pytest
from command import otc


@pytest.fixture(scope="session")
def deployed():
    """`otc deploy` of an artifact; the folder."""

    def deploy(artifact, target, folder, *options):
        result = otc("deploy", str(artifact), "--to", target, "-o", str(folder), *options)
        assert result.exit_code == 0, result.output
        return folder

    return deploy
