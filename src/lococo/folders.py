"""What may be wrong with a model's folder, looked for before and after transformers reads it, and said in one line."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from lococo.convert.whole import UNFINISHED
from lococo.errors import ModelError, UnsupportedModelError

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

INDEX = "model.safetensors.index.json"

# Releases of transformers from 4.50 on are published without this script.
META_CONVERTER = (
    'in an environment of its own `pip install "transformers==4.44.2" "numpy<2.2" torch accelerate sentencepiece`, run '
    "`python -m transformers.models.llama.convert_llama_weights_to_hf --input_dir {source} --output_dir NEW "
    "--model_size SIZE --llama_version VERSION` (such as 7B and 2), then name NEW"
)


def check_folder(folder: Path) -> None:
    """Refuse a folder that cannot be read, by its files' names and its config.

    Raises:
        UnsupportedModelError: Its weights are pickles alone, such as Meta's own checkpoint of a Llama, or it is a
            ChatGLM that was not converted.
        ModelError: A shard that its index names is missing, or it is half-converted.
    """
    if folder.name.endswith(UNFINISHED):
        raise ModelError(
            f"{folder.name} is half-converted: the conversion that made it was stopped; delete it, and convert again"
        )
    if _kind(folder) == "chatglm":
        raise UnsupportedModelError(
            f"{folder.name} is a ChatGLM as it was published, which runs on code of its own; put it into transformers' "
            f"layout with `lococo convert chatglm3 {folder} NEW`, then name NEW"
        )
    if not (folder / "config.json").exists() and sorted(folder.glob("consolidated.*.pth")):
        raise UnsupportedModelError(
            f"{folder.name} is a checkpoint in Meta's own format (consolidated.*.pth), a pickle, which lococo does not "
            f"read; {META_CONVERTER.format(source=folder)}"
        )
    if not sorted(folder.glob("*.safetensors")) and (pickled := sorted(folder.glob("pytorch_model*.bin"))):
        raise UnsupportedModelError(
            f"{folder.name} holds pickled weights alone ({pickled[0].name}), which lococo does not read; where "
            "they are trusted, load them once with transformers and save_pretrained() them, which writes safetensors"
        )
    missing = [name for name in _shards(folder) if not (folder / name).is_file()]
    if missing:
        raise ModelError(
            f"{folder.name} lacks {len(missing)} of the {len(_shards(folder))} shards that {INDEX} names "
            f"({missing[0]}{', ...' if len(missing) > 1 else ''}); copy or download the folder again"
        )


def _kind(folder: Path) -> str | None:
    """Return the model_type of a folder's config.json; None where transformers will find out what is wrong with it."""
    try:
        return cast("str | None", json.loads((folder / "config.json").read_text("utf-8")).get("model_type"))
    except (OSError, ValueError, AttributeError):
        return None


def _shards(folder: Path) -> list[str]:
    try:
        named: dict[str, str] = json.loads((folder / INDEX).read_text("utf-8"))["weight_map"]
        return sorted(set(named.values()))
    except FileNotFoundError:
        return []
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{folder.name}/{INDEX} is damaged ({error!r}); copy or download the folder again") from error


def check_loaded(label: str, report: dict[str, Any]) -> None:
    """Refuse a model of which transformers has made something up.

    Args:
        label: The model's name.
        report: transformers' account of what it loaded.

    Raises:
        ModelError: A weight has another shape than config.json says.
        UnsupportedModelError: Weights are not in the checkpoint; the head of a classifier is how one gets here.
    """
    if mismatched := sorted(report["mismatched_keys"]):
        name, theirs, ours = mismatched[0]
        raise ModelError(
            f"{label}: {name} has the shape {list(theirs)}, and {list(ours)} by its config.json"
            f"{_and_more(mismatched)}; use the config.json that belongs to these weights"
        )
    if missing := sorted(report["missing_keys"]):
        raise UnsupportedModelError(
            f"{label} lacks {len(missing)} of the weights of a causal language model ({missing[0]}, ...); "
            "name a checkpoint that was saved with its language-modelling head"
        )


def _and_more(found: list[Any]) -> str:
    return f" (and {len(found) - 1} more)" if len(found) > 1 else ""


def check_tokenizer(label: str, model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase") -> None:
    """Refuse a tokenizer with ids that the model has no embedding for.

    Special tokens that no prompt contains may lie beyond: transformers adds some unasked, and they are never read.

    Raises:
        ModelError: Names both sizes.
    """
    rows = len(cast("Tensor", model.get_input_embeddings().weight))
    if len(tokenizer) <= rows:  # ids may have gaps, but then there are no more of them than rows
        return
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    special -= {str(tokenizer.bos_token), str(tokenizer.eos_token)}
    unread = {token for token in special if token not in str(tokenizer.chat_template or "")}
    beyond = {index: token for token, index in tokenizer.get_vocab().items() if index >= rows and token not in unread}
    if beyond:
        raise ModelError(
            f"the tokenizer of {label} does not belong to it: its token {beyond[min(beyond)]!r} has the "
            f"id {min(beyond)}, but the model knows {rows} tokens; take its files from where the weights are from"
        )
