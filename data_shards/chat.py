"""Messages to token ids and a target mask, with `tokenizers` and Jinja only.

The rendered text is that of transformers' `apply_chat_template`. Each answer is tokenised apart
from the prompt before it, because that is how generation meets it: the prompt is tokenised, then
the model writes. A literal special token inside a text ("<s>" in a page of HTML) never becomes a
control token: it is broken up by a noncharacter, whose own tokens are then taken out.
"""

import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tokenizers import Encoding, Tokenizer

from conf.schema.model import ModelConfig
from data_shards.chat_template import ChatTemplate
from data_shards.sample import DEFUSE, IMAGE_MARK
from data_shards.tokenizer_files import (
    TokenizerError,
    one_line,
    read_config,
    read_template,
    special_tokens,
)

# transformers' LlavaNextProcessor would turn this literal into an image token.
_PROCESSOR_PLACEHOLDER = "<placeholder>"
Message = Mapping[str, Any]
# Loader and builder have threads and processes of their own; the library's would fight them.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@dataclass(frozen=True)
class Encoded:
    """One tokenised document of n tokens.

    Attributes:
        ids: int64 [n]; image placeholders expanded.
        targets: bool [n]; True on tokens that are trained on (answers, end token included).
        image_starts: int64 [images]; position of the first token of each image.
    """

    ids: np.ndarray
    targets: np.ndarray
    image_starts: np.ndarray

    @property
    def n_targets(self) -> int:
        """Tokens that are trained on."""
        return int(self.targets.sum())


class Count(NamedTuple):
    """Lengths of one tokenised document."""

    tokens: int  # image placeholders expanded
    targets: int  # tokens that are trained on


class ChatTokenizer:
    """A `tokenizer.json` and its chat template. Thread-safe."""

    def __init__(
        self, tokenizer: Tokenizer, template: ChatTemplate, special: dict[str, str], where: str
    ):
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        self._template = template
        self._special = special
        self._where = where
        for name in ("eos_token", "image_token"):
            if special.get(name) is None or tokenizer.token_to_id(special[name]) is None:
                raise TokenizerError(
                    f"{where}: {name} is {special.get(name)!r}, which tokenizer.json does not "
                    "have; add it and name it in tokenizer_config.json"
                )
        self.end = special["eos_token"]  # ends every answer
        self.end_id: int = tokenizer.token_to_id(self.end)
        self.image_token_id: int = tokenizer.token_to_id(special["image_token"])
        pad = tokenizer.token_to_id(special["pad_token"]) if "pad_token" in special else None
        self.pad_id: int = self.end_id if pad is None else pad
        self.n_tokens: int = tokenizer.get_vocab_size()
        if special["image_token"] != IMAGE_MARK:
            raise TokenizerError(
                f"{where}: image_token is {special['image_token']!r}; only {IMAGE_MARK} is known"
            )
        self._prefix = self._automatic_prefix()
        control = {
            token.content
            for token in tokenizer.get_added_tokens_decoder().values()
            if token.special
        }
        control |= {IMAGE_MARK, _PROCESSOR_PLACEHOLDER, *special.values()}
        # Longest first, so that no alternative hides a longer one.
        ordered = sorted(control, key=lambda text: (-len(text), text))
        self._control = re.compile("|".join(re.escape(text) for text in ordered if text))
        known = [tokenizer.token_to_id(text) for text in ordered if text]
        self._is_control = np.zeros(tokenizer.get_vocab_size(), bool)
        self._is_control[[token for token in known if token is not None]] = True

    @classmethod
    def from_directory(cls, directory: str | Path) -> "ChatTokenizer":
        """Read tokenizer.json, tokenizer_config.json and the chat template.

        Raises:
            TokenizerError: a file is missing, damaged, or lacks what training needs.
        """
        directory = Path(directory)
        config = read_config(directory)
        path = directory / "tokenizer.json"
        try:
            tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the Rust side raises bare Exception
            raise TokenizerError(
                f"{path} cannot be read ({one_line(error)}); point data.tokenizer at a directory "
                "with a Hugging Face fast tokenizer"
            ) from None
        special = special_tokens(config)
        return cls(
            tokenizer,
            ChatTemplate(read_template(directory, config), special),
            special,
            str(directory),
        )

    def digest(self) -> str:
        """SHA-256 (hex) of all that decides token ids: vocabulary, merges, template, specials."""
        content = json.loads(self._tokenizer.to_str())
        for setting in ("truncation", "padding"):
            content.pop(setting, None)
        everything = [content, self._template.source, self._special]
        text = json.dumps(everything, sort_keys=True, ensure_ascii=False)
        return hashlib.sha256(text.encode()).hexdigest()

    def require_model(self, model: ModelConfig) -> None:
        """TokenizerError if the model's embedding table does not fit this tokenizer."""
        if model.image_token_id != self.image_token_id:
            raise TokenizerError(
                f"{self._where}: {IMAGE_MARK} has id {self.image_token_id}, but "
                f"model.image_token_id={model.image_token_id}; set it to {self.image_token_id}"
            )
        if self.n_tokens > model.text.vocab_size:
            raise TokenizerError(
                f"{self._where} has {self.n_tokens} tokens, but model.text.vocab_size="
                f"{model.text.vocab_size}; enlarge it or use the model's own tokenizer"
            )

    def encode(self, messages: Sequence[Message], image_tokens: Sequence[int] = ()) -> Encoded:
        """A conversation that ends with an answer; every answer is a target.

        Args:
            messages: checked messages (`data_shards.sample`).
            image_tokens: tokens of each image, in order.

        Raises:
            TokenizerError: the template does not render turns as a growing prefix, or does not
                end answers with the tokenizer's eos_token.
        """
        return self._assemble(self._parts(messages), image_tokens)

    def encode_preference(
        self,
        messages: Sequence[Message],
        chosen: str,
        rejected: str,
        image_tokens: Sequence[int] = (),
    ) -> tuple[Encoded, Encoded]:
        """(chosen, rejected): the same prompt, never a target, then the one or the other answer."""
        one, other = self._pair(messages, chosen, rejected)
        return self._assemble(one, image_tokens), self._assemble(other, image_tokens)

    def count(self, messages: Sequence[Message], image_tokens: Sequence[int] = ()) -> Count:
        """Lengths of what `encode` gives, a third faster than that."""
        return self._count(self._parts(messages), image_tokens)

    def count_preference(
        self,
        messages: Sequence[Message],
        chosen: str,
        rejected: str,
        image_tokens: Sequence[int] = (),
    ) -> tuple[Count, Count]:
        """Lengths of what `encode_preference` gives."""
        one, other = self._pair(messages, chosen, rejected)
        return self._count(one, image_tokens), self._count(other, image_tokens)

    def encode_prompt(
        self, messages: Sequence[Message], image_tokens: Sequence[int] = ()
    ) -> np.ndarray:
        """int64 ids of a conversation that ends with a question, ready for generation."""
        parts = [(text, False) for text, _ in self._parts(messages, prompt=True)]
        return self._assemble(parts, image_tokens).ids

    def rendered(
        self, messages: Sequence[Message], answer: str | None = None
    ) -> list[tuple[str, bool]]:
        """What the model reads, for people: (text, is trained on), images as "<image>".

        Args:
            answer: of a preference pair, after messages that end with a question.
        """
        parts = self._parts(messages, prompt=answer is not None)
        if answer is not None:
            last = self._parts([*messages, {"role": "assistant", "content": answer}])[-1]
            parts = [*((text, False) for text, _ in parts), last]
        return [(text.replace(DEFUSE, ""), trained) for text, trained in parts]

    def decode(self, ids: Sequence[int] | np.ndarray, skip_special_tokens: bool = True) -> str:
        """Text of token ids."""
        plain = [int(token) for token in ids]
        return str(self._tokenizer.decode(plain, skip_special_tokens=skip_special_tokens))

    def token_id(self, text: str) -> int | None:
        """Id of a token, None where there is no such token."""
        found: int | None = self._tokenizer.token_to_id(text)
        return found

    def _automatic_prefix(self) -> list[int]:
        """What the tokenizer's post-processor puts before a text: nothing, or BOS."""
        prefix = list(self._tokenizer.encode("", add_special_tokens=True).ids)
        bos = self._special.get("bos_token")
        if prefix and (bos is None or prefix != [self._tokenizer.token_to_id(bos)]):
            raise TokenizerError(
                f"{self._where}: the post-processor of tokenizer.json adds tokens {prefix}; only "
                "BOS before the text is supported, best written by the chat template"
            )
        return prefix

    def _parts(self, messages: Sequence[Message], prompt: bool = False) -> list[tuple[str, bool]]:
        """The rendered conversation cut into (text, is answer); `prompt` asks for a last prompt."""
        safe = [self._defuse_message(message) for message in messages]
        parts: list[tuple[str, bool]] = []
        done = ""
        for number, message in enumerate(safe):
            if message["role"] != "assistant":
                continue
            before = self._template.render(safe[:number], add_generation_prompt=True)
            whole = self._template.render(safe[: number + 1], add_generation_prompt=False)
            end = whole.rfind(self.end) + len(self.end)
            if not before.startswith(done) or not whole.startswith(before):
                raise TokenizerError(
                    f"{self._where}: the chat template rewrites earlier turns, so answers cannot "
                    "be told from prompts; use a template whose text only grows with each message"
                )
            if end <= len(before):
                raise TokenizerError(
                    f"{self._where}: the chat template does not end answers with eos_token "
                    f"{self.end!r}; set eos_token in tokenizer_config.json to the token it writes"
                )
            parts += [(before[len(done) :], False), (whole[len(before) : end], True)]
            done = whole[:end]
        if prompt:
            last = self._template.render(safe, add_generation_prompt=True)
            if not last.startswith(done):
                raise TokenizerError(f"{self._where}: the chat template rewrites earlier turns")
            parts.append((last[len(done) :], False))
        return parts

    def _pair(
        self, messages: Sequence[Message], chosen: str, rejected: str
    ) -> tuple[list[tuple[str, bool]], list[tuple[str, bool]]]:
        """Parts of the two documents of a preference pair."""
        prompt = [(text, False) for text, _ in self._parts(messages, prompt=True)]
        documents = []
        for answer in (chosen, rejected):
            whole = [*messages, {"role": "assistant", "content": answer}]
            documents.append([*prompt, self._parts(whole)[-1]])
        return documents[0], documents[1]

    def _defuse_message(self, message: Message) -> dict[str, Any]:
        content = message["content"]
        if isinstance(content, str):
            marks = message["role"] == "user"  # there, "<image>" is a placeholder
            return {"role": message["role"], "content": self._defuse(content, marks)}
        items = [
            item if item["type"] == "image" else {**item, "text": self._defuse(item["text"], False)}
            for item in content
        ]
        return {"role": message["role"], "content": items}

    def _defuse(self, text: str, keep_image_marks: bool) -> str:
        def broken(match: re.Match[str]) -> str:
            token = match.group()
            if keep_image_marks and token == IMAGE_MARK:
                return token
            return token[0] + DEFUSE + token[1:]

        return self._control.sub(broken, text)

    def _prefix_of(self, parts: Sequence[tuple[str, bool]]) -> list[int]:
        """What the tokenizer puts before a document, unless the template has written it."""
        bos = self._special.get("bos_token")
        return [] if parts and bos and parts[0][0].startswith(bos) else self._prefix

    def _count(self, parts: Sequence[tuple[str, bool]], image_tokens: Sequence[int]) -> Count:
        texts = [text for text, _ in parts]
        ids: list[list[int]] = []
        if not any(DEFUSE in text for text in texts):
            # Without offsets, which are a good part of the work.
            found = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
            ids = [encoding.ids for encoding in found]
            for text, part in zip(texts, ids, strict=True):
                self._refuse_made_control(text, part)
        marks = [part.count(self.image_token_id) for part in ids]
        if not ids or any(n for n, (_, is_answer) in zip(marks, parts, strict=True) if is_answer):
            encoded = self._assemble(parts, image_tokens)
            return Count(len(encoded.ids), encoded.n_targets)
        self._check_marks(sum(marks), image_tokens)
        lengths = [len(part) for part in ids]
        extra = len(self._prefix_of(parts)) + sum(image_tokens) - len(image_tokens)
        targets = sum(n for n, (_, is_answer) in zip(lengths, parts, strict=True) if is_answer)
        return Count(sum(lengths) + extra, targets)

    def _check_marks(self, marks: int, image_tokens: Sequence[int]) -> None:
        if marks != len(image_tokens):
            raise TokenizerError(
                f"{self._where}: the rendered conversation has {marks} {IMAGE_MARK} tokens "
                f"for {len(image_tokens)} images; the chat template must write one for each image"
            )

    def _assemble(self, parts: Sequence[tuple[str, bool]], image_tokens: Sequence[int]) -> Encoded:
        pieces = [np.array(self._prefix_of(parts), np.int64)]
        flags = [np.zeros(len(pieces[0]), bool)]
        # One call for all texts: it lets other threads run, which `encode` does not (tokenizers
        # 0.22).
        encodings = self._tokenizer.encode_batch(
            [text for text, _ in parts], add_special_tokens=False
        )
        for (text, is_answer), encoding in zip(parts, encodings, strict=True):
            ids = self._ids(text, encoding)
            pieces.append(ids)
            flags.append(np.full(len(ids), is_answer))
        ids, targets = np.concatenate(pieces), np.concatenate(flags)
        marks = np.flatnonzero(ids == self.image_token_id)
        self._check_marks(len(marks), image_tokens)
        repeats = np.ones(len(ids), np.int64)
        repeats[marks] = np.asarray(image_tokens, np.int64)
        starts = (np.cumsum(repeats) - repeats)[marks]
        return Encoded(np.repeat(ids, repeats), np.repeat(targets, repeats), starts)

    def _refuse_made_control(self, text: str, ids: Sequence[int] | np.ndarray) -> None:
        """Normalisation may turn other characters into those of a control token (NFKC: U+FF1C to
        "<"): then there are more of them than the text, as it was defused, says."""
        n_control = int(self._is_control[np.asarray(ids, np.int64)].sum())
        if n_control and n_control > len(self._control.findall(text)):
            raise TokenizerError(
                f"{self._where}: the tokenizer's normalisation turns a part of the text into a "
                "control token"
            )

    def _ids(self, text: str, encoding: Encoding) -> np.ndarray:
        ids = np.array(encoding.ids, np.int64)
        self._refuse_made_control(text, ids)
        if DEFUSE not in text:
            return ids
        keep = np.ones(len(ids), bool)
        for number, (start, stop) in enumerate(encoding.offsets):
            covered = text[start:stop]
            if covered and not covered.strip(DEFUSE):
                keep[number] = False
            elif DEFUSE in covered:
                raise TokenizerError(
                    f"{self._where}: a token joins U+FDD0 to the text {covered!r}; the tokenizer "
                    "was trained on noncharacters, use another"
                )
        return ids[keep]
