"""Small tokenizers of other constructions than byte-level BPE."""

import json

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast


def sentencepiece_of(text: str) -> PreTrainedTokenizerFast:
    """Llama 2's construction: no pre-tokenizer, a space put before the text, unknown characters as bytes."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Metaspace()
    core.train_from_iterator([text], trainers.BpeTrainer(vocab_size=500, show_progress=False))
    vocab = core.get_vocab()
    vocab |= {f"<0x{byte:02X}>": len(vocab) + byte for byte in range(256)} | {"<unk>": len(vocab) + 256}
    merges = [tuple(pair) for pair in json.loads(core.to_str())["model"]["merges"]]
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")
