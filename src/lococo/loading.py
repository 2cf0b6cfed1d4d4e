"""What all ways to load a model share: transformers kept quiet, failures in one line, no model that is no decoder."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from lococo.errors import ModelError, UnsupportedModelError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def check_causal(config: PreTrainedConfig, label: str) -> None:
    """Refuse a model that does not continue text.

    Raises:
        UnsupportedModelError: Says what it is.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModelError(
            f"{label} is an encoder-decoder model ({config.model_type}); expected a decoder-only causal language model"
        )
    remote = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    masked = any("MaskedLM" in architecture for architecture in config.architectures or ())
    if masked or not (remote or type(config) in MODEL_FOR_CAUSAL_LM_MAPPING):
        raise UnsupportedModelError(
            f"{label} ({config.model_type}) has no causal language-modelling head; "
            "expected a decoder-only model such as Llama, Qwen or SmolLM2"
        )


@contextmanager
def explained(subject: str) -> Iterator[None]:
    """Say in one line what transformers, the hub or the disk said in many."""
    try:
        yield
    # A hub that is out of reach, a file that is missing or damaged, an unknown architecture and a missing optional
    # package arrive as these; huggingface_hub's and safetensors' own exceptions derive from OSError or Exception.
    except (OSError, ValueError, KeyError, ImportError, EOFError) as error:
        raise ModelError(_failure(subject, error)) from error
    except Exception as error:
        if type(error).__module__.split(".")[0] in {"safetensors", "safetensors_rust", "huggingface_hub", "httpx"}:
            raise ModelError(_failure(subject, error)) from error
        raise


def _failure(subject: str, error: Exception) -> str:
    said = " ".join(str(error).split()) or type(error).__name__
    if "does not recognize this architecture" in said and (kind := re.search(r"model type `([^`]+)`", said)):
        return (
            f"{subject} has the architecture {kind[1]!r}, which this transformers does not know; upgrade "
            "transformers, or trust the code that the model brings along (--trust-remote-code)"
        )
    if "contains custom code" in said:
        return (
            f"{subject} runs on Python code that it brings along; trust it (--trust-remote-code), or, if it is a "
            "ChatGLM, convert its folder with `lococo convert chatglm3`"
        )
    short = said if len(said) <= 300 else said[:297] + "..."
    return f"{subject} cannot be loaded: {short}; check the name and the network, or name a local folder"


@contextmanager
def quiet(*, progress: bool) -> Iterator[None]:
    """Hold back transformers' warnings, and its bars unless they show a download."""
    from huggingface_hub.utils import logging as hub_logging
    from transformers.utils import logging as own_logging

    levels = own_logging.get_verbosity(), hub_logging.get_verbosity()
    hide = not progress and own_logging.is_progress_bar_enabled()
    own_logging.set_verbosity(logging.ERROR)
    hub_logging.set_verbosity(logging.ERROR)
    if hide:
        own_logging.disable_progress_bar()
    try:
        yield
    finally:
        own_logging.set_verbosity(levels[0])
        hub_logging.set_verbosity(levels[1])
        if hide:
            own_logging.enable_progress_bar()
