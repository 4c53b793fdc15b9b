"""What is asked of workers, and what they answer, as bytes that are counted.

A function that a set of samples is asked (`Samples.map`) may hold parts of the session that asks it: the pipeline that
a peer wraps, the reporter that is told of progress. Those are not sent: a worker puts its own pipeline in their place,
and something that says no in the place of what it does not have.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Mapping
from typing import Any

from ray import cloudpickle
from torch import nn

from ..calibration.trials import Calibration
from ..passes.prepare import Prepared
from ..passes.session import Session
from ..workspace.ledger import Ledger
from ..workspace.progress import Pass, Reporter
from ..workspace.workspace import Workspace

ELSEWHERE = (Calibration, Prepared, Session, Ledger, Reporter, Workspace)
"""What the asking process keeps for itself."""
SHARED = ("pipeline", "transformer", "interface")
"""What both have, by name."""


class Absent:
    """In the place of what a worker does not have: it may be held, and not used."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)

        def refuse(*_: Any, **__: Any) -> Any:
            raise RuntimeError(f"a worker has no {name}: it is the asking process's own")

        return refuse


def shared_by_name(session: Session) -> dict[str, Any]:
    """What a session has and each worker's own session as well."""
    return {
        "pipeline": session.model.pipeline,
        "transformer": session.model.transformer,
        "interface": session.interface,
    }


def pack(value: Any, shared: Mapping[str, Any]) -> bytes:
    """A value, functions and closures included, without what is `shared` (by name) and what stays at home.

    Raises TypeError for one that holds a module that is not shared: weights are not sent.
    """
    names = {id(each): name for name, each in shared.items()}

    class Packer(cloudpickle.CloudPickler):  # type: ignore[misc]
        def persistent_id(self, held: Any) -> Any:
            if id(held) in names:
                return ("shared", names[id(held)])
            if isinstance(held, Pass):
                return ("pass", None)
            if isinstance(held, ELSEWHERE) or hasattr(held, "trajectory_gram"):  # `Samples`
                return ("absent", None)
            if isinstance(held, nn.Module):
                raise TypeError(f"what is asked of workers holds a {type(held).__name__}: expected none but the model")
            return None

    file = io.BytesIO()
    Packer(file, protocol=5).dump(value)
    return file.getvalue()


def unpack(data: bytes, shared: Mapping[str, Any]) -> Any:
    """The inverse, with the worker's own `shared`."""

    class Unpacker(pickle.Unpickler):
        def persistent_load(self, key: Any) -> Any:
            kind, name = key
            if kind == "shared":
                return shared[name]
            return Pass() if kind == "pass" else Absent()

    return Unpacker(io.BytesIO(data)).load()


def pack_error(error: BaseException) -> bytes:
    """An exception with its cause, as far as they can be sent."""
    cause = error.__cause__
    try:
        data: bytes = cloudpickle.dumps((error, cause))
        pickle.loads(data)  # some exceptions do not take their own arguments
    except Exception:
        data = pickle.dumps((RuntimeError(f"{type(error).__name__}: {error}"), None))
    return data


def unpack_error(data: bytes) -> BaseException:
    """The inverse."""
    error, cause = pickle.loads(data)
    found: BaseException = error
    found.__cause__ = cause
    return found
