"""The blocks of a transformer as diffusers' own caches find them, and what goes in and comes out of one."""

from __future__ import annotations

from typing import Any

from diffusers.hooks._common import _ALL_TRANSFORMER_BLOCK_IDENTIFIERS
from diffusers.hooks._helpers import TransformerBlockMetadata, TransformerBlockRegistry
from diffusers.utils.torch_utils import unwrap_module
from torch import Tensor, nn

from otcache.schemas.errors import ModelError


def block_lists(transformer: nn.Module) -> list[nn.ModuleList]:
    """The transformer's lists of blocks in order. Raises ModelError where there are no two blocks."""
    found = [
        child
        for name, child in transformer.named_children()
        if name in _ALL_TRANSFORMER_BLOCK_IDENTIFIERS and isinstance(child, nn.ModuleList)
    ]
    if sum(len(blocks) for blocks in found) < 2:
        raise ModelError(f"{type(transformer).__name__} has no list of blocks that diffusers' caches know")
    return found


class Passage:
    """How hidden states pass through one class of blocks, from diffusers' table. Raises ModelError for what is not in
    it.
    """

    def __init__(self, block: nn.Module) -> None:
        kind = unwrap_module(block).__class__
        try:
            self._known: TransformerBlockMetadata = TransformerBlockRegistry.get(kind)
        except ValueError:
            raise ModelError(
                f"{kind.__name__} is no block that diffusers' caches know: its residual programs run on the runtime "
                "only; use a budget of payload 'output' here"
            ) from None

    def source(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """The hidden states among a block's arguments."""
        return self._argument(self._known.hidden_states_argument_name, args, kwargs)

    def result(self, output: Any) -> Tensor:
        """The hidden states in a block's output."""
        found: Tensor = output[self._known.return_hidden_states_index] if isinstance(output, tuple) else output
        return found

    def output(self, hidden_states: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What the block would return with these hidden states, all else as it was given."""
        others = self._known.return_encoder_hidden_states_index
        if others is None:
            return hidden_states
        result: list[Any] = [None, None]
        result[self._known.return_hidden_states_index] = hidden_states
        result[others] = self._argument(self._known.encoder_hidden_states_argument_name, args, kwargs)
        return tuple(result)

    def _argument(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return self._known._get_parameter_from_args_kwargs(name, args, kwargs)
