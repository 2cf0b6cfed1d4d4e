"""The tensors of ChatGLM and of GLM: which there are, their shapes, and what each is called on the other side.

All of ChatGLM's tensors have a counterpart of the same numbers in GLM, except two kinds. `query_key_value` has the rows
of GLM's three projections below one another, so cutting it moves no byte. `inv_freq` is computed anew by both sides.
"""

from collections.abc import Iterable
from typing import Final

from lococo.convert.glm_config import Sizes
from lococo.convert.shards import TensorPlace
from lococo.errors import ConversionError

INV_FREQ: Final = "transformer.rotary_pos_emb.inv_freq"
FUSED: Final = "self_attention.query_key_value"
LAYERS: Final = "transformer.encoder.layers"

OUTSIDE: Final = {
    "transformer.embedding.word_embeddings.weight": "model.embed_tokens.weight",
    "transformer.encoder.final_layernorm.weight": "model.norm.weight",
    "transformer.output_layer.weight": "lm_head.weight",
}
INSIDE: Final = {
    "input_layernorm.weight": "input_layernorm.weight",
    "self_attention.dense.weight": "self_attn.o_proj.weight",
    "post_attention_layernorm.weight": "post_attention_layernorm.weight",
    # The gate comes first, then what it gates, on both sides.
    "mlp.dense_h_to_4h.weight": "mlp.gate_up_proj.weight",
    "mlp.dense_4h_to_h.weight": "mlp.down_proj.weight",
}

Part = tuple[str, tuple[int, ...]]


class Layout:
    """What becomes of each of ChatGLM's tensors.

    Attributes:
        shapes: Of ChatGLM's tensors, by name. `inv_freq` is there, though a checkpoint may lack it.
        parts: Names and shapes of what each becomes in GLM, in the order of their bytes.
    """

    def __init__(self, sizes: Sizes) -> None:
        """Lay out a checkpoint of these sizes."""
        self.shapes: dict[str, tuple[int, ...]] = {INV_FREQ: (sizes.head_dim // 4,)}
        self.parts: dict[str, tuple[Part, ...]] = {INV_FREQ: ()}
        vocabulary, hidden = (sizes.vocab_size, sizes.hidden_size), (sizes.hidden_size,)
        for (name, new), shape in zip(OUTSIDE.items(), (vocabulary, hidden, vocabulary), strict=True):
            self._rename(name, new, shape)
        inner = sizes.num_attention_heads * sizes.head_dim
        inside = (
            hidden,
            (sizes.hidden_size, inner),
            hidden,
            (2 * sizes.intermediate_size, sizes.hidden_size),
            (sizes.hidden_size, sizes.intermediate_size),
        )
        for layer in range(sizes.num_hidden_layers):
            for (name, new), shape in zip(INSIDE.items(), inside, strict=True):
                self._rename(f"{LAYERS}.{layer}.{name}", f"model.layers.{layer}.{new}", shape)
            self._cut(layer, sizes)

    def _rename(self, name: str, new: str, shape: tuple[int, ...]) -> None:
        self.shapes[name] = shape
        self.parts[name] = ((new, shape),)

    def _cut(self, layer: int, sizes: Sizes) -> None:
        """Cut the fused projection of a layer into queries, keys and values."""
        rows = {"q": sizes.num_attention_heads * sizes.head_dim}
        rows |= dict.fromkeys("kv", sizes.num_key_value_heads * sizes.head_dim)
        kinds: dict[str, tuple[int, ...]] = {"weight": (sizes.hidden_size,)}
        if sizes.attention_bias:
            kinds["bias"] = ()
        for kind, rest in kinds.items():
            name = f"{LAYERS}.{layer}.{FUSED}.{kind}"
            self.shapes[name] = (sum(rows.values()), *rest)
            self.parts[name] = tuple(
                (f"model.layers.{layer}.self_attn.{letter}_proj.{kind}", (count, *rest))
                for letter, count in rows.items()
            )

    def check(self, places: Iterable[tuple[str, TensorPlace]]) -> None:
        """Hold the tensors of a checkpoint against those it should have.

        Args:
            places: Each tensor with the name of its shard.

        Raises:
            ConversionError: If one is missing, of another shape, there twice, or unknown.
        """
        found: dict[str, str] = {}
        for shard, place in places:
            if place.name not in self.shapes:
                raise ConversionError(
                    f"{shard} holds {place.name}, which a ChatGLM of config.json's sizes does not have; "
                    "expected the model alone, with nothing added to it"
                )
            if place.shape != (shape := self.shapes[place.name]):
                raise ConversionError(
                    f"{shard}: {place.name} is {_shape(place.shape)}, and by config.json it should be {_shape(shape)}; "
                    "take config.json and weights of one model"
                )
            if place.name in found:
                raise ConversionError(
                    f"{place.name} is in {found[place.name]} and in {shard}; expected it once: remove shards that "
                    "do not belong to the checkpoint"
                )
            found[place.name] = shard
        if missing := [name for name in self.shapes if name not in found and name != INV_FREQ]:
            raise ConversionError(
                f"{missing[0]} and {len(missing) - 1} other tensors that config.json asks for are in no shard; "
                "fetch the shards that are missing"
            )


def _shape(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape)) or "a single number"
