"""Language models that run here, decoders and encoder-decoders, as judges: what they would say next."""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from functools import cached_property
from typing import Any, Protocol, cast

import jinja2
import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import model_validator
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

from retrieval_kd.chat_model import ChatEndpoint, ChatModel
from retrieval_kd.files import fingerprint
from retrieval_kd.gather import batches
from retrieval_kd.prompts import Prompt, shorten
from retrieval_kd.tables import Positive, Precision, Table
from retrieval_kd.types import InputError
from retrieval_kd.usage import Usage
from retrieval_kd.weights import hash_weights, locate_model

LONGEST = 4096  # tokens of a prompt, where neither the recipe nor the tokenizer sets a lower limit
DATE = "26 Jul 2024"  # what Llama's template writes where nobody says; otherwise it writes today's
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class LanguageModel(Protocol):
    """Answers prompts: a LocalModel, or a ChatModel over HTTP."""

    usage: Usage
    at_once: int  # prompts that it works on together

    @property
    def identity(self) -> dict[str, Any]:
        """Everything that its answers depend on, other than the prompts."""
        ...

    def log_probabilities(self, prompts: Sequence[Prompt], answers: Sequence[str]) -> NDArray[np.float64]:
        """Log-probabilities (n, A) that each of A answers is the next token after each of n prompts, NaN for none."""
        ...

    def complete(self, prompts: Sequence[Prompt], max_tokens: int) -> list[str | None]:
        """The text that follows each prompt, greedily; None where there is none."""
        ...


class LanguageModelOptions(Table):
    """Which model, where it runs, and how much it reads."""

    model: str
    revision: str | None = None
    endpoint: ChatEndpoint | None = None  # absent: the model runs here
    max_length: Positive | None = None  # tokens of a prompt; documents are cut to fit. Absent: the tokenizer's, or 4096
    document_words: Positive | None = None  # words of a document that are read
    precision: Precision = "fp32"  # of the weights too
    batch_tokens: Positive = 8192  # padding included

    @model_validator(mode="after")
    def _here_or_there(self) -> LanguageModelOptions:
        here = {"revision", "max_length", "precision", "batch_tokens"} & self.model_fields_set
        if self.endpoint and here:
            raise ValueError(
                f"{sorted(here)[0]} is for a model that runs here, and this one is behind {self.endpoint.url}"
            )
        return self


def open_model(options: LanguageModelOptions) -> LanguageModel:
    """The model that the options name; nothing is loaded or asked yet."""
    if options.endpoint:
        return ChatModel(options.model, options.endpoint)
    return LocalModel(options)


class LocalModel:
    """A model of transformers. Prompts go through its chat template, without thinking, if it has one."""

    def __init__(self, options: LanguageModelOptions) -> None:
        self.options = options
        self.usage = Usage()
        self.at_once = 8

    @cached_property
    def identity(self) -> dict[str, Any]:
        """The model by its weights, and how it reads."""
        return {
            "model": self.options.model,
            "revision": self.options.revision,
            "weights": hash_weights(self._model),
            "chat_template": fingerprint(self._tokenizer.chat_template) if self._chats else None,
            "max_length": self._max_length,
            "precision": self.options.precision,
        }

    def log_probabilities(self, prompts: Sequence[Prompt], answers: Sequence[str]) -> NDArray[np.float64]:
        """Log-probabilities (n, A) that each of A answers, of one token each, comes next after each of n prompts.

        Prompts of similar length share a batch. A decoder's are padded on the right, which it never sees, and
        only the logits of each prompt's last token are computed.
        """
        columns = [self._token(answer) for answer in answers]
        encoded = [self._encode(prompt) for prompt in prompts]
        self.usage.requests += len(prompts)
        self.usage.input_tokens += sum(map(len, encoded))
        found = np.empty((len(prompts), len(answers)))
        with torch.inference_mode():
            for places in batches([len(ids) for ids in encoded], self.options.batch_tokens):
                logits = self._next_logits([encoded[place] for place in places])  # (b, V)
                found[places] = logits.float().log_softmax(-1)[:, columns].cpu().numpy()
        return found

    def complete(self, prompts: Sequence[Prompt], max_tokens: int) -> list[str | None]:
        """The text that follows each prompt, greedily, of at most `max_tokens` tokens."""
        encoded = [self._encode(prompt) for prompt in prompts]
        self.usage.requests += len(prompts)
        self.usage.input_tokens += sum(map(len, encoded))
        texts: list[str | None] = [None] * len(prompts)
        with torch.inference_mode():
            for places in batches([len(ids) + max_tokens for ids in encoded], self.options.batch_tokens):
                ids, mask = self._pad([encoded[place] for place in places], left=not self._two_sided)
                plain = {"do_sample": False, "num_beams": 1, "repetition_penalty": 1.0, "no_repeat_ngram_size": 0}
                unset = {"temperature": None, "top_p": None, "top_k": None}
                pad_id = self._pad_id
                made = self._model.generate(
                    ids, attention_mask=mask, max_new_tokens=max_tokens, pad_token_id=pad_id, **plain, **unset
                )
                new = made if self._two_sided else made[:, ids.shape[1] :]
                self.usage.output_tokens += int((new != pad_id).sum())
                decoded = self._tokenizer.batch_decode(new, skip_special_tokens=True)
                for place, text in zip(places, decoded, strict=True):
                    texts[place] = text
        return texts

    @cached_property
    def _folder(self) -> Any:
        return locate_model(self.options.model, self.options.revision)

    @cached_property
    def _model(self) -> Any:
        two_sided = AutoConfig.from_pretrained(self._folder).is_encoder_decoder
        kind: Any = AutoModelForSeq2SeqLM if two_sided else AutoModelForCausalLM
        model = kind.from_pretrained(self._folder, dtype=DTYPES[self.options.precision]).eval()
        return model.to("cuda" if torch.cuda.is_available() else "cpu")

    @cached_property
    def _tokenizer(self) -> Any:
        return AutoTokenizer.from_pretrained(self._folder)

    @cached_property
    def _max_length(self) -> int:
        return self.options.max_length or min(LONGEST, self._tokenizer.model_max_length)

    @property
    def _two_sided(self) -> bool:
        return bool(self._model.config.is_encoder_decoder)

    @property
    def _chats(self) -> bool:
        return self._tokenizer.chat_template is not None

    @property
    def _pad_id(self) -> int:
        known = (self._tokenizer.pad_token_id, self._tokenizer.eos_token_id)
        return next((token for token in known if token is not None), 0)

    def _token(self, answer: str) -> int:
        ids = self._tokenizer.encode(answer, add_special_tokens=False)
        if len(ids) != 1:
            raise InputError(
                f"the answer {answer!r} is {len(ids)} tokens of {self.options.model!r}, which has to say it in one; "
                "give other answers."
            )
        return int(ids[0])

    def _tokens(self, prompt: Prompt, documents: Sequence[str] | None = None) -> list[int]:
        text = prompt.text(documents)
        if not self._chats:
            if prompt.system:
                raise InputError(
                    f"{self.options.model!r} has no chat template, and so no place for a system message; put what it "
                    'says into the prompt, and give system = "".'
                )
            return list(self._tokenizer(text)["input_ids"])
        messages = [{"role": "system", "content": prompt.system}] if prompt.system else []
        messages.append({"role": "user", "content": text})
        try:
            chat = self._tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True, enable_thinking=False, date_string=DATE
            )
        except jinja2.TemplateError as error:
            raise InputError(
                f"the chat template of {self.options.model!r} refuses the prompt ({error}); if it knows no system "
                'message, put what it says into the prompt, and give system = "".'
            ) from error
        return list(self._tokenizer(chat, add_special_tokens=False)["input_ids"])

    def _encode(self, prompt: Prompt) -> list[int]:
        """Token ids of a prompt, its documents cut to an equal length where it would be too long."""
        ids = self._tokens(prompt)
        if len(ids) <= self._max_length:
            return ids
        bare = len(self._tokens(prompt, [""] * len(prompt.documents)))
        if bare >= self._max_length:
            raise InputError(
                f"a prompt takes {bare} tokens without its documents, and max_length is {self._max_length}; raise it: "
                f"{prompt.text()[:80]!r}."
            )
        ends = [self._ends(document) for document in prompt.documents]
        longest = shorten([len(end) for end in ends], self._max_length - bare)
        while True:
            cut = [
                document[: end[longest - 1] if longest else 0] if len(end) > longest else document
                for document, end in zip(prompt.documents, ends, strict=True)
            ]
            ids = self._tokens(prompt, cut)
            if len(ids) <= self._max_length:
                return ids
            over = len(ids) - self._max_length  # tokens that arise where documents meet the prompt
            longest = max(0, longest - math.ceil(over / sum(len(end) >= longest for end in ends)))

    def _ends(self, document: str) -> list[int]:
        """Where each token of a document ends, in characters."""
        tokens = self._tokenizer(document, add_special_tokens=False, return_offsets_mapping=True)
        return [end for _, end in tokens["offset_mapping"]]

    def _pad(self, batch: Sequence[list[int]], left: bool) -> tuple[Tensor, Tensor]:
        """Ids and mask (b, L)."""
        width = max(map(len, batch))
        ids = torch.full((len(batch), width), self._pad_id)
        mask = torch.zeros_like(ids)
        for row, tokens in enumerate(batch):
            inside = slice(width - len(tokens), width) if left else slice(len(tokens))
            ids[row, inside], mask[row, inside] = torch.tensor(tokens), 1
        return ids.to(self._model.device), mask.to(self._model.device)

    def _next_logits(self, batch: Sequence[list[int]]) -> Tensor:
        """Logits (b, V) of the token after each prompt."""
        ids, mask = self._pad(batch, left=False)
        if self._two_sided:
            start = torch.full((len(batch), 1), self._model.config.decoder_start_token_id, device=ids.device)
            output: Any = self._model(input_ids=ids, attention_mask=mask, decoder_input_ids=start)
            return cast(Tensor, output.logits[:, 0])
        last = mask.sum(1) - 1
        rows = torch.arange(len(batch), device=ids.device)
        if "logits_to_keep" not in inspect.signature(self._model.forward).parameters:
            output = self._model(input_ids=ids, attention_mask=mask, use_cache=False)
            return cast(Tensor, output.logits[rows, last])
        kept, place = torch.unique(last, return_inverse=True)
        output = self._model(input_ids=ids, attention_mask=mask, use_cache=False, logits_to_keep=kept)
        return cast(Tensor, output.logits[rows, place])
