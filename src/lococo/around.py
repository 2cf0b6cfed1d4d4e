"""What a model around the decoder was given, where it hands the decoder something made of it.

Models that see images hold a decoder within. Some make masks for each type of layer before they call it, or tell a
token's place in several dimensions; for text alone that says no more than the mask of padding and a number do.
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from lococo.errors import UnsupportedModelError


class Around:
    """The module that calls the decoder, watched while the model is attached."""

    def __init__(self, model: PreTrainedModel, decoder: PreTrainedModel) -> None:
        """Find it.

        Args:
            model: Or a module within, which has the decoder as its own.
            decoder: Reads tokens.
        """
        holders = (module for module in model.modules() if any(child is decoder for child in module.children()))
        self.holder = next(
            (module for module in holders if getattr(module, "config", None) is not decoder.config), None
        )
        self.given: dict[str, Any] = {}

    def watch(self) -> Callable[[], None]:
        """Take down what the holder is called with; what is returned ends that."""
        if self.holder is None:
            return lambda: None
        signature = inspect.signature(self.holder.forward)

        def note(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            arguments = signature.bind_partial(*args, **kwargs).arguments
            self.given = arguments | arguments.pop("kwargs", {})

        def forget(*called: Any) -> None:
            self.given = {}

        handles = [
            self.holder.register_forward_pre_hook(note, with_kwargs=True),
            self.holder.register_forward_hook(forget, always_call=True),
        ]

        def end() -> None:
            for handle in handles:
                handle.remove()

        return end

    def plain(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """Return the decoder's arguments that were made of a mask of padding or of a position per token, as these.

        Raises:
            UnsupportedModelError: If tokens of an image see those behind them.
        """
        plain: dict[str, Any] = {}
        mask, places = arguments.get("attention_mask"), arguments.get("position_ids")
        if isinstance(mask, dict) and self.given:
            plain["attention_mask"] = self.given.get("attention_mask")
            types = self.given.get("token_type_ids")
            if types is not None and types.shape[-1] > 1 and bool(types.any()):
                raise UnsupportedModelError(
                    "the patches of an image see each other in this model, which chunks cannot give them; "
                    "let it read text alone"
                )
        if isinstance(places, Tensor) and places.ndim == 3 and bool((places == places[:1]).all()):
            plain["position_ids"] = places[0]
        return plain
