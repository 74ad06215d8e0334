"""Text to token ids and back: the Rust tokenizer, made safe for text that strangers wrote.

A post may hold the very characters of a control token (``<|im_end|>``, ``</s>``). A tokenizer as it comes reads them
as that token; this one never does. It adds no BOS or EOS either: where they stand is the template's business.

Left out: chat templates (a tuned model speaks the template of this package), SentencePiece's own `tokenizer.model`
files, padding (the forest has none).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as RustTokenizer
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from stackllama.errors import ModelError

_BOS, _EOS, _PAD = "<|startoftext|>", "<|endoftext|>", "<|pad|>"
SMALLEST_VOCABULARY = 256 + 3  # every byte and the three control tokens

_UNLIKELY = -1e6  # a Unigram score that no segmentation of real text prefers


@dataclass(frozen=True, slots=True, eq=False)
class Tokenizer:
    """A Rust tokenizer with the ids that the template needs.

    `bos_id` is None where the model was trained without a token at the start of a text; `control_ids` are the ids
    that mean something else than text, and `encode` never yields one of them.
    """

    rust: RustTokenizer
    eos_id: int
    bos_id: int | None
    pad_id: int | None
    control_ids: frozenset[int]
    fingerprint: str

    @staticmethod
    def wrap(rust: RustTokenizer, *, bos: str | None, eos: str, pad: str | None = None) -> Tokenizer:
        """Wrap a Rust tokenizer; `bos`, `eos` and `pad` are spelled as in its vocabulary (no `bos`: texts start bare).

        Raises ModelError where a token is not in the vocabulary, or where control text cannot be kept apart from text.
        """
        named: dict[str, int] = {}
        for name, token in (("bos", bos), ("eos", eos), ("pad", pad)):
            if token is None:
                continue
            number = rust.token_to_id(token)
            if number is None:
                raise ModelError(
                    f"the tokenizer's {name} token is {token!r}, which is not in its vocabulary; "
                    "give tokenizer files that belong together"
                )
            named[name] = number
        special = {number for number, token in rust.get_added_tokens_decoder().items() if token.special}
        # Where a vocabulary has no bytes, its unknown token stands for text; it is control only where it is EOS too.
        control = frozenset((special - {_unknown_id(rust)}) | set(named.values()))
        clean = _cleaned(rust, control, bos)
        tokenizer = Tokenizer(
            clean,
            eos_id=named["eos"],
            bos_id=named.get("bos"),
            pad_id=named.get("pad"),
            control_ids=control,
            fingerprint=hashlib.sha256(
                json.dumps([json.loads(clean.to_str()), bos, eos, pad], sort_keys=True).encode()
            ).hexdigest(),
        )
        tokenizer._check_control_text()
        return tokenizer

    @staticmethod
    def load(folder: Path) -> Tokenizer:
        """Read `tokenizer.json` of a model folder; the other JSON files there say which tokens start and end a text.

        Raises ModelError where the files are missing, broken, or name no EOS token.
        """
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise ModelError(
                f"{folder} has no tokenizer.json; write one with transformers: "
                f'AutoTokenizer.from_pretrained("{folder}").save_pretrained("{folder}")'
            )
        try:
            rust = RustTokenizer.from_file(str(path))
        except Exception as error:  # the Rust library raises bare Exception
            raise ModelError(f"{path} is not a readable tokenizer: {error}; fetch it again") from error
        configs = [_read_json(folder / name) for name in ("tokenizer_config.json", "special_tokens_map.json")]
        ids = [_read_json(folder / name) for name in ("generation_config.json", "config.json")]
        eos = _named_token(rust, "eos", configs, ids)
        if eos is None:
            raise ModelError(
                f"the tokenizer in {folder} names no EOS token, so answers could not end; "
                'set "eos_token" in its tokenizer_config.json'
            )
        bos = _named_token(rust, "bos", configs, ids)
        if bos is not None and not _starts_with_bos(rust, bos, configs[0].get("add_bos_token")):
            bos = None
        return Tokenizer.wrap(rust, bos=bos, eos=eos, pad=_named_token(rust, "pad", configs, ids))

    @staticmethod
    def train(texts: Iterable[str], vocabulary: int) -> Tokenizer:
        """Train a byte-level BPE of at most `vocabulary` tokens; each digit is a token of its own, each byte is one.

        The same texts give the same tokenizer. Raises ModelError where `vocabulary` has no room for the bytes.
        """
        if vocabulary < SMALLEST_VOCABULARY:
            raise ModelError(
                f"a vocabulary of {vocabulary} tokens has no room for the 256 bytes and 3 control tokens; "
                f"ask for {SMALLEST_VOCABULARY} or more"
            )
        rust = RustTokenizer(models.BPE())
        rust.pre_tokenizer = digits_and_bytes()
        rust.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocabulary,
            special_tokens=[_EOS, _PAD, _BOS],
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        rust.train_from_iterator(texts, trainer)
        return Tokenizer.wrap(rust, bos=_BOS, eos=_EOS, pad=_PAD)

    def save(self, folder: Path, *, context: int | None = None) -> None:
        """Write `tokenizer.json` and `tokenizer_config.json` so that transformers reads the same tokenizer.

        `context` is the model's length in tokens. transformers reads control text in a post as control tokens unless it
        is told `split_special_tokens=True`; on all other text the ids are equal.
        """
        folder.mkdir(parents=True, exist_ok=True)
        config: dict[str, Any] = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": self.rust.id_to_token(self.eos_id),
            "add_bos_token": self.bos_id is not None,
            "add_eos_token": False,
            "clean_up_tokenization_spaces": False,
        }
        if self.bos_id is not None:
            config["bos_token"] = self.rust.id_to_token(self.bos_id)
        if self.pad_id is not None:
            config["pad_token"] = self.rust.id_to_token(self.pad_id)
        if context is not None:
            config["model_max_length"] = context
        (folder / "tokenizer.json").write_text(self.rust.to_str(pretty=True), encoding="utf-8")
        (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, and nothing around them. No control id occurs, whatever the text says."""
        return self.rust.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of many texts, on all cores."""
        return [encoding.ids for encoding in self.rust.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`; control ids have none. Bytes that are no character become U+FFFD."""
        return self.rust.decode([number for number in ids if number not in self.control_ids], skip_special_tokens=False)

    @property
    def vocab_size(self) -> int:
        """One more than the largest id: the number of rows that an embedding needs."""
        return max(self.rust.get_vocab(with_added_tokens=True).values()) + 1

    def _check_control_text(self) -> None:
        for number in sorted(self.control_ids):
            token = self.rust.id_to_token(number)
            if token and not self.control_ids.isdisjoint(self.encode(f"a {token} b")):
                raise ModelError(
                    f"the tokenizer turns the text {token!r} into a control token, so a post could steer the model; "
                    "choose a model with a BPE tokenizer"
                )


def digits_and_bytes() -> pre_tokenizers.PreTokenizer:
    """How text is cut before merging: digits one by one, the rest into words as GPT-2 does, all spelled in bytes."""
    cutters = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    return pre_tokenizers.Sequence(cutters)


def _unknown_id(rust: RustTokenizer) -> int | None:
    """The id of characters outside the vocabulary; None for a BPE, which is made to have none."""
    model = json.loads(rust.to_str())["model"]
    if model["type"] == "Unigram":
        unknown: int | None = model["unk_id"]
        return unknown
    return None if model["type"] == "BPE" else rust.token_to_id(model["unk_token"])


def _cleaned(rust: RustTokenizer, control: frozenset[int], bos: str | None) -> RustTokenizer:
    """A copy that only turns text into ids: no truncation, padding, dropout, and no way from text to a control id."""
    data = json.loads(rust.to_str())
    data.update(truncation=None, padding=None, post_processor=None)
    model = data["model"]
    if model["type"] == "BPE":
        model["dropout"] = None
        # A character outside the vocabulary would become the unknown token, which often is the end-of-text token.
        if model.get("unk_token") is not None and rust.token_to_id(model["unk_token"]) in control:
            model["unk_token"] = None
    if model["type"] == "Unigram":
        # Pieces are found in text by their score, control pieces (score 0, the best of all) included.
        model["vocab"] = [
            [piece, _UNLIKELY if number in control else score] for number, (piece, score) in enumerate(model["vocab"])
        ]
    clean = RustTokenizer.from_str(json.dumps(data, ensure_ascii=False))
    clean.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A" if bos else "$A",
        pair=f"{bos} $A {bos} $B:1" if bos else "$A $B:1",
        special_tokens=[(bos, rust.token_to_id(bos))] if bos else [],
    )
    clean.encode_special_tokens = True
    return clean


def _named_token(
    rust: RustTokenizer, name: str, configs: list[dict[str, Any]], ids: list[dict[str, Any]]
) -> str | None:
    """The bos, eos or pad token: as the tokenizer's own files spell it, else the id in the model's files."""
    for config in configs:
        token = config.get(f"{name}_token")
        if isinstance(token, dict):  # a serialized AddedToken
            token = token.get("content")
        if isinstance(token, str):
            return token
    for config in ids:
        number = config.get(f"{name}_token_id")
        if isinstance(number, list) and number:  # several ends: the first is the one to write
            number = number[0]
        if isinstance(number, int):
            return rust.id_to_token(number)
    return None


def _starts_with_bos(rust: RustTokenizer, bos: str, add_bos_token: object) -> bool:
    """Whether the model was trained with BOS before a text: the config's word, else what its post-processor does."""
    if isinstance(add_bos_token, bool):
        return add_bos_token
    return rust.encode("a", add_special_tokens=True).ids[:1] == [rust.token_to_id(bos)]


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{path} is not valid JSON: {error}; fetch it again") from error
    if not isinstance(data, dict):
        raise ModelError(f"{path} holds {type(data).__name__} where an object is expected; fetch it again")
    return data
