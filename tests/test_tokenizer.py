"""The tokenizer against transformers, and incremental decoding."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from exl_cli.errors import DamagedModelError
from exl_cli.models.tokenizer import Tokenizer

FABLE = Path(__file__).parent.parent / "exl_cli" / "models" / "builtin" / "fable-7m"
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)


@pytest.fixture(scope="module")
def oracle():
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast.from_pretrained(FABLE)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(FABLE)


@settings(deadline=None)
@given(text=TEXT)
def test_ids_and_text_are_those_of_transformers(oracle, tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text, add_special_tokens=True)
    assert ids == oracle(text)["input_ids"]
    assert tokenizer.decode(ids) == oracle.decode(ids, skip_special_tokens=True)


@settings(deadline=None)
@given(prompt=TEXT, text=TEXT)
def test_streaming_gives_the_whole_text_and_whole_characters(tokenizer: Tokenizer, prompt: str, text: str) -> None:
    before = tokenizer.encode(prompt, add_special_tokens=False)
    ids = tokenizer.encode(text, add_special_tokens=False)
    stream = tokenizer.decode_stream(before)
    pieces = [stream.push(token) for token in ids]
    assert "".join(pieces) == tokenizer.decode(ids)
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)


def sentencepiece_like(folder: Path, **config: object) -> Tokenizer:
    """A tokenizer of Llama 2's kind: <s> goes first, words begin with ▁, decoding drops the first space of a text."""
    from tokenizers import AddedToken, decoders, models, normalizers, processors
    from tokenizers import Tokenizer as Backend

    vocab = {token: i for i, token in enumerate(["<unk>", "<s>", "</s>", "▁Hello", "▁world", "▁", "!"])}
    backend = Backend(models.BPE(vocab, [], unk_token="<unk>", fuse_unk=True, ignore_merges=True))
    backend.add_special_tokens([AddedToken(token, special=True) for token in ("<unk>", "<s>", "</s>")])
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    folder.mkdir(exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>", **config}))
    return Tokenizer(folder)


def test_a_response_keeps_the_space_that_joins_it_to_the_prompt(tmp_path: Path) -> None:
    tokenizer = sentencepiece_like(tmp_path)
    stream = tokenizer.decode_stream([1, 3])
    assert stream.push(4) + stream.push(6) == " world!"


@pytest.mark.parametrize(
    ("config", "expected"), [({}, [1, 3]), ({"add_bos_token": False}, [3]), ({"add_bos_token": True}, [1, 3])]
)
def test_the_bos_setting_of_the_config_decides(tmp_path: Path, config: dict[str, object], expected: list[int]) -> None:
    tokenizer = sentencepiece_like(tmp_path, **config)
    assert tokenizer.encode("Hello", add_special_tokens=True) == expected
    assert tokenizer.encode("Hello", add_special_tokens=False) == [3]


def test_eos_ids_come_from_all_config_files(tmp_path: Path) -> None:
    shutil.copytree(FABLE, tmp_path / "model")
    (tmp_path / "model" / "generation_config.json").write_text('{"eos_token_id": [7, 9]}')
    assert Tokenizer(tmp_path / "model").eos_ids == {2, 7, 9}
    (tmp_path / "model" / "generation_config.json").unlink()
    assert Tokenizer(tmp_path / "model").eos_ids == {2}


def test_training_time_truncation_does_not_cut_prompts(tmp_path: Path) -> None:
    shutil.copytree(FABLE, tmp_path / "model")
    file = tmp_path / "model" / "tokenizer.json"
    content = json.loads(file.read_text())
    content["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    file.write_text(json.dumps(content))
    assert len(Tokenizer(tmp_path / "model").encode("a long text about many things", add_special_tokens=True)) > 4


def test_a_broken_tokenizer_is_named(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(DamagedModelError, match=r"tokenizer\.json"):
        Tokenizer(tmp_path)


TYPED = st.lists(
    st.sampled_from(
        ["<|im_end|>", "<|im_start|>", "<|endoftext|>", "<|im_", "end|>", " ", "\n", "fox", "é", "🙂", "<"]
    ),
    max_size=8,
).map("".join)


@settings(deadline=None)
@given(user=TYPED, system=TYPED)
def test_special_tokens_that_a_user_types_are_text(oracle, tokenizer: Tokenizer, user: str, system: str) -> None:
    """The template's own are themselves, and what lies between them is what transformers makes of plain text."""

    def plain(text: str) -> list[int]:
        return oracle(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]

    start, end = oracle.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    text, expected = "", []
    for role, content in (("system", system), ("user", user)):
        text += f"<|im_start|>{role}\n{tokenizer.as_text(content)}<|im_end|>\n"
        expected += [start, *plain(f"{role}\n{content}"), end, *plain("\n")]
    assert tokenizer.encode(text, add_special_tokens=False) == expected
    assert tokenizer.encode(tokenizer.as_text(user), add_special_tokens=False) == plain(user)
    assert tokenizer.shown(text) == f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n{user}<|im_end|>\n"


@pytest.fixture(scope="module")
def spaced(tmp_path_factory) -> Tokenizer:
    return sentencepiece_like(tmp_path_factory.mktemp("model"), add_bos_token=True, bos_token="<s>")


@settings(deadline=None)
@given(parts=st.lists(st.sampled_from(["</s>", "<s>", "Hello", " world", " ", "!"]), max_size=6))
def test_typed_special_tokens_never_become_special_tokens(spaced: Tokenizer, parts: list[str]) -> None:
    """Where the vocabulary has them as words too, and a text begins with a space of the tokenizer's."""
    ids = spaced.encode(f"<s>{spaced.as_text(''.join(parts))}</s>", add_special_tokens=False)
    bos, eos = spaced.token_id("<s>"), spaced.token_id("</s>")
    assert [id_ for id_ in ids if id_ in (bos, eos)] == [bos, eos]


def test_special_tokens_are_escaped_in_all_but_the_models_messages() -> None:
    tokenizer = Tokenizer(FABLE)
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "a<|im_end|>"}, {"type": "image"}]},
        {"role": "assistant", "content": "b<|im_end|>", "name": None},
        {"role": "tool", "content": "c<|im_end|>"},
    ]
    block, answer, tool = tokenizer.as_text_messages(messages)
    assert answer == messages[1]
    for content, original in ((block["content"][0]["text"], "a<|im_end|>"), (tool["content"], "c<|im_end|>")):
        assert "<|im_end|>" not in content
        assert tokenizer.shown(content) == original
    assert block["content"][1] == {"type": "image"}
    assert tokenizer.as_text("nothing <special>") == "nothing <special>"


def replace(text: str, content: str) -> dict[str, object]:
    return {"type": "Replace", "pattern": {"String": text}, "content": content}


BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
BOS = {"SpecialToken": {"id": "<|im_start|>", "type_id": 0}}
TEXT_A = {"Sequence": {"id": "A", "type_id": 0}}
HOSTILE = {
    "grows a thousandfold twice": {"normalizer": {"type": "Sequence", "normalizers": [replace("a", "a" * 1000)] * 2}},
    "grows one rare letter": {"normalizer": replace("\u16a0", "a" * 1_000_000)},
    "splits into bytes twelve times": {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [BYTES] * 12}},
    "adds many special tokens": {
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [BOS] * 100_000 + [TEXT_A],
            "pair": [TEXT_A, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<|im_start|>": {"id": "<|im_start|>", "ids": [1], "tokens": ["<|im_start|>"]}},
        }
    },
    "writes much": {"decoder": replace("a", "a" * 1_000_000)},
}


def with_parts(folder: Path, parts: dict[str, object]) -> Path:
    shutil.copytree(FABLE, folder, ignore=lambda _, names: [name for name in names if name.endswith("safetensors")])
    file = folder / "tokenizer.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **parts}))
    return folder


@pytest.mark.parametrize("name", HOSTILE)
def test_a_tokenizer_that_grows_a_text_without_measure_is_refused(tmp_path: Path, monkeypatch, name: str) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = with_parts(tmp_path / "model", HOSTILE[name])
    with pytest.raises(DamagedModelError, match="was rejected: on a short text, it "):
        Tokenizer(folder)
    assert not (tmp_path / "cache").exists()  # where harmless ones are remembered


def test_a_tokenizer_is_tried_once(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = with_parts(tmp_path / "model", {"normalizer": {"type": "NFKC"}})
    assert Tokenizer(folder).encode("\ufb01", add_special_tokens=False) == Tokenizer(FABLE).encode(
        "fi", add_special_tokens=False
    )
    (remembered,) = [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    assert remembered.name == hashlib.sha256((folder / "tokenizer.json").read_bytes()).hexdigest()
    # Another content is tried, unless it is known.
    bomb = with_parts(tmp_path / "bomb", HOSTILE["adds many special tokens"])
    with pytest.raises(DamagedModelError):
        Tokenizer(bomb)
    (remembered.parent / hashlib.sha256((bomb / "tokenizer.json").read_bytes()).hexdigest()).touch()
    assert len(Tokenizer(bomb).encode("a", add_special_tokens=True)) > 100_000


def test_the_built_in_tokenizer_needs_no_trial(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    Tokenizer(FABLE)
    assert not (tmp_path / "cache").exists()
