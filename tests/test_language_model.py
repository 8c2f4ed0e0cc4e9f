"""Language models that run here give the numbers of a plain call of the model, one prompt at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_lm import save_tiny_lm, tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

from retrieval_kd.language_model import LanguageModelOptions, LocalModel
from retrieval_kd.prompts import Prompt, fill_template
from retrieval_kd.types import InputError

TEMPLATE = "<Query>: {query}\n<Document>: {document}"
DOCUMENTS = ["a list", "sort the list in place", "", "x" * 90, "naïve café 列表", "read a file " * 7]
PROMPTS = [fill_template(TEMPLATE, {"query": "sort"}, {"document": [text]}, "Say yes or no.") for text in DOCUMENTS]
PLAIN = [Prompt("", prompt.pieces, prompt.documents) for prompt in PROMPTS]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    save_tiny_lm(folder / "llama")
    save_tiny_lm(folder / "llama-other", seed=1)
    save_tiny_lm(folder / "qwen3", "qwen3")
    save_tiny_lm(folder / "base", chat=False)
    save_tiny_lm(folder / "t5", "t5", chat=False)
    return {path.name: path for path in folder.iterdir()}


def open_local(folder: Path, **options: Any) -> LocalModel:
    return LocalModel(LanguageModelOptions(model=str(folder), **options))


def chat(prompt: Prompt) -> str:
    """What Qwen3-Reranker's authors put around a prompt, byte for byte."""
    return (
        f"<|im_start|>system\n{prompt.system}<|im_end|>\n<|im_start|>user\n{prompt.text()}<|im_end|>\n"
        "<|im_start|>assistant\n<think>\n\n</think>\n\n"
    )


def plain_logits(folder: Path, text: str) -> torch.Tensor:
    """Logits (V,) of the next token, from one call of the model with one text."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with torch.inference_mode():
        if "t5" in folder.name:
            model: Any = AutoModelForSeq2SeqLM.from_pretrained(folder, dtype=torch.float32).eval()
            ids = tokenizer(text, return_tensors="pt").input_ids
            assert ids[0, -1] == tokenizer.eos_token_id
            return model(input_ids=ids, decoder_input_ids=torch.zeros((1, 1), dtype=torch.long)).logits[0, 0]
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        ids = tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids
        return model(input_ids=ids).logits[0, -1]


@pytest.mark.parametrize("batch_tokens", [1, 400, 8192])
@pytest.mark.parametrize("kind", ["llama", "qwen3", "base", "t5"])
def test_log_probabilities(kind: str, batch_tokens: int, models: dict[str, Path]) -> None:
    prompts = PROMPTS if kind in ("llama", "qwen3") else PLAIN
    answers = ["true", "false"] if kind == "t5" else ["yes", "no", "A"]
    tokenizer = AutoTokenizer.from_pretrained(models[kind])
    ids = tokenizer.convert_tokens_to_ids(answers)
    assert None not in ids
    assert tokenizer.unk_token_id not in ids
    got = open_local(models[kind], batch_tokens=batch_tokens).log_probabilities(prompts, answers)
    texts = [chat(prompt) if prompt.system else prompt.text() for prompt in prompts]
    want = [plain_logits(models[kind], text).log_softmax(-1)[ids].numpy() for text in texts]
    np.testing.assert_allclose(got, want, atol=1e-4)
    assert np.std(got[:, 0] - got[:, 1]) > 0.01


@pytest.mark.parametrize("kind", ["llama", "base", "t5"])
def test_completions(kind: str, models: dict[str, Path]) -> None:
    """Greedy, batched with padding: as token by token, from the plain call."""
    prompts = PROMPTS[:4] if kind == "llama" else PLAIN[:4]
    model = open_local(models[kind])
    got = model.complete(prompts, 5)
    tokenizer: Any = AutoTokenizer.from_pretrained(models[kind])
    for prompt, text in zip(prompts, got, strict=True):
        asked = chat(prompt) if prompt.system else prompt.text()
        want: list[int] = []
        if kind == "t5":
            plain: Any = AutoModelForSeq2SeqLM.from_pretrained(models[kind], dtype=torch.float32).eval()
            ids = tokenizer(asked, return_tensors="pt").input_ids
            while len(want) < 5 and want[-1:] != [1]:
                with torch.inference_mode():
                    logits = plain(input_ids=ids, decoder_input_ids=torch.tensor([[0, *want]])).logits
                want.append(int(logits[0, -1].argmax()))
        else:
            plain = AutoModelForCausalLM.from_pretrained(models[kind], dtype=torch.float32).eval()
            ids = tokenizer(asked, add_special_tokens=False).input_ids
            while len(want) < 5 and want[-1:] != [1]:
                with torch.inference_mode():
                    want.append(int(plain(input_ids=torch.tensor([[*ids, *want]])).logits[0, -1].argmax()))
        assert text == tokenizer.decode(want, skip_special_tokens=True)
    assert 0 < model.usage.output_tokens <= 20


def test_a_chat_template_has_its_own_special_tokens(tmp_path: Path) -> None:
    folder = save_tiny_lm(tmp_path)
    tokenizer = tiny_tokenizer(end=True)
    tokenizer.save_pretrained(folder)
    assert tokenizer("a").input_ids[-1] == tokenizer.eos_token_id
    assert open_local(folder)._encode(PROMPTS[0]) == tokenizer(chat(PROMPTS[0])).input_ids[:-1]


def test_prompts_do_not_change_from_day_to_day(tmp_path: Path) -> None:
    """Llama's template writes the date, which would be another prompt, and another score, tomorrow."""
    folder = save_tiny_lm(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = (
        "{% if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"
        "{{ date_string }} {{ messages[-1].content }}"
    )
    tokenizer.save_pretrained(folder)
    model = open_local(folder)
    assert model._tokenizer.decode(model._encode(PLAIN[0])) == f"26 Jul 2024 {PLAIN[0].text()}"


def test_tokens_are_counted(models: dict[str, Path]) -> None:
    model = open_local(models["base"])
    model.log_probabilities(PLAIN[:3], ["yes"])
    tokenizer = AutoTokenizer.from_pretrained(models["base"])
    assert model.usage.input_tokens == sum(len(tokenizer(prompt.text()).input_ids) for prompt in PLAIN[:3])
    assert model.usage.requests == 3


@pytest.mark.parametrize("limit", [150, 131])
def test_only_documents_are_cut(limit: int, models: dict[str, Path]) -> None:
    """Prefix and suffix stay; the document loses what is too long, and nothing more."""
    model = open_local(models["llama"], max_length=limit)
    ids = model._encode(PROMPTS[3])
    bare = model._tokens(PROMPTS[3], [""])
    assert len(ids) == limit
    text = model._tokenizer.decode(ids)
    assert text == chat(Prompt(PROMPTS[3].system, PROMPTS[3].pieces, ("x" * (limit - len(bare)),)))
    assert model._encode(PROMPTS[0]) == model._tokens(PROMPTS[0])


def test_bytes_of_one_character_stay_together(models: dict[str, Path]) -> None:
    """列 is three tokens: a cut within it takes it away or leaves it whole, and never the prompt's end."""
    model = open_local(models["base"])
    prompt = fill_template("{query} {document} end", {"query": "q"}, {"document": ["列" * 9]})
    bare = len(model._tokens(prompt, [""]))
    for limit in range(bare + 1, bare + 10):
        model = open_local(models["base"], max_length=limit)
        ids = model._encode(prompt)
        assert len(ids) <= limit
        assert model._tokenizer.decode(ids) == f"q {'列' * ((limit - bare) // 3)} end"


def test_several_documents_share_what_there_is(models: dict[str, Path]) -> None:
    prompt = fill_template("{query}|{documents}", {"query": "q"}, {"documents": ["a" * 50, "b" * 4, "c" * 30]})
    bare = len(open_local(models["base"])._tokens(prompt, [""] * 3))
    model = open_local(models["base"], max_length=bare + 24)
    assert model._tokenizer.decode(model._encode(prompt)) == prompt.text(["a" * 10, "b" * 4, "c" * 10])


def test_a_prompt_that_does_not_fit(models: dict[str, Path]) -> None:
    with pytest.raises(InputError, match="tokens without its documents, and max_length is 20; raise it"):
        open_local(models["llama"], max_length=20).log_probabilities(PROMPTS[:1], ["yes"])


def test_answers_are_one_token(models: dict[str, Path]) -> None:
    with pytest.raises(InputError, match="the answer 'maybe' is 5 tokens"):
        open_local(models["llama"]).log_probabilities(PROMPTS[:1], ["yes", "maybe"])


def test_no_place_for_a_system_message(models: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r'no chat template.*give system = ""'):
        open_local(models["base"]).log_probabilities(PROMPTS[:1], ["yes"])
    strict = save_tiny_lm(tmp_path / "strict")
    tokenizer = AutoTokenizer.from_pretrained(strict)
    tokenizer.chat_template = "{{ raise_exception('no system role') }}"
    tokenizer.save_pretrained(strict)
    with pytest.raises(InputError, match="refuses the prompt"):
        open_local(strict).log_probabilities(PROMPTS[:1], ["yes"])


def test_identity(models: dict[str, Path], tmp_path: Path) -> None:
    """Weights, template, length and precision count; batches do not."""
    one = open_local(models["llama"]).identity
    assert one["max_length"] == 2048  # the tokenizer's
    assert open_local(models["llama"], batch_tokens=7).identity == one
    assert open_local(models["llama-other"]).identity["weights"] != one["weights"]
    assert open_local(models["llama"], precision="bf16").identity["weights"] != one["weights"]
    assert open_local(models["llama"], max_length=9).identity["max_length"] == 9
    other = save_tiny_lm(tmp_path / "llama")
    tokenizer = AutoTokenizer.from_pretrained(other)
    tokenizer.chat_template += " "
    tokenizer.save_pretrained(other)
    assert open_local(other).identity["chat_template"] != one["chat_template"]
    assert open_local(other).identity["weights"] == one["weights"]


def test_options_of_a_model_elsewhere() -> None:
    with pytest.raises(
        ValueError, match=r"max_length is for a model that runs here, and this one is behind http://h/v1"
    ):
        LanguageModelOptions(model="m", endpoint={"url": "http://h/v1/"}, max_length=5)  # type: ignore[arg-type]
