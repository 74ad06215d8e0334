"""Small tokenizers of the three kinds that models come with, trained here in a blink."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from tokenizers import Tokenizer as RustTokenizer
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from stackllama.tokens.tokenizer import Tokenizer

TEXTS = [
    "Question: How do I read a file in Python?\n\nAnswer: Use `open` and read it line by line.",
    "Question: What is 42 times 1000?\n\nAnswer: 42000, since 42 times 1000 is 42000.",
    "Answer: the yeast. Answer: the hops. The answer is: the water.",
    "```python\nfor i in range(10):\n    print(i)\n```",
    "Bier schmeckt gut. 你好,世界。 Ça va? naïve café",
    'He said: "No." :) (yes) [1] <s> </s> <|im_end|>',
] * 4


@pytest.fixture(scope="session")
def trained() -> Tokenizer:
    """Byte-level, with BOS, as trained for a random base."""
    return Tokenizer.train(TEXTS, 400)


def _sentencepiece(pieces: RustTokenizer) -> RustTokenizer:
    """A BPE with byte fallback and the ids of Llama 2: `<unk>`, `<s>`, `</s>`, 256 bytes, pieces."""
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    names += [piece for piece, _ in sorted(pieces.get_vocab().items(), key=lambda item: item[1])]
    vocabulary = {name: index for index, name in enumerate(dict.fromkeys(names))}
    import json

    merges = [tuple(merge) for merge in json.loads(pieces.to_str())["model"]["merges"]]
    rust = RustTokenizer(
        models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    rust.add_special_tokens(["<unk>", "<s>", "</s>"])
    rust.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return rust


def _pieces(across_words: bool) -> RustTokenizer:
    rust = RustTokenizer(models.BPE())
    if across_words:
        rust.normalizer = _prepend()
    else:
        rust.pre_tokenizer = pre_tokenizers.Metaspace()
    rust.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=400, show_progress=False))
    return rust


def _prepend() -> normalizers.Normalizer:
    return normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])


def llama_style(across_words: bool = False) -> RustTokenizer:
    """The marker comes from a normalizer and nothing cuts the text into words (Llama 2)."""
    rust = _sentencepiece(_pieces(across_words))
    rust.normalizer = _prepend()
    rust.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return rust


def metaspace_style() -> RustTokenizer:
    """The marker comes from the Metaspace cutter (newer exports of the same family)."""
    rust = _sentencepiece(_pieces(across_words=False))
    rust.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    rust.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="first", split=False)])
    return rust


BUILDERS: dict[str, Callable[[], Tokenizer]] = {
    "trained": lambda: Tokenizer.train(TEXTS, 400),
    "llama": lambda: Tokenizer.wrap(llama_style(), bos="<s>", eos="</s>"),
    "metaspace": lambda: Tokenizer.wrap(metaspace_style(), bos="<s>", eos="</s>"),
}


@pytest.fixture(scope="session", params=BUILDERS)
def any_tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    """Each kind in turn."""
    return BUILDERS[request.param]()


@pytest.fixture(scope="session")
def across_words() -> Tokenizer:
    """A SentencePiece tokenizer whose tokens may span words, "Answer: the" included."""
    return Tokenizer.wrap(llama_style(across_words=True), bos="<s>", eos="</s>")
