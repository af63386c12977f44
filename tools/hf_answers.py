"""What an exported model answers, by plain transformers: greedy decoding and log-probabilities.

Nothing of the trainer is used here, so that the export is judged as a stranger would use it.
"""

import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from tools.questions import Pair, Question

MAX_PIXELS = 50_000_000


def open_image(data: bytes) -> Image.Image:
    """Encoded bytes -> RGB picture; ValueError when damaged or larger than 50 megapixels."""
    try:
        picture = Image.open(io.BytesIO(data))
        if picture.width * picture.height > MAX_PIXELS:
            raise ValueError(f"{picture.width} x {picture.height} px is more than {MAX_PIXELS}")
        return picture.convert("RGB")
    except (OSError, SyntaxError) as error:
        raise ValueError(f"an evaluation picture cannot be read ({error})") from None


class ExportedModel:
    """An export directory, loaded with `AutoProcessor` and `AutoModelForImageTextToText`."""

    def __init__(self, directory: Path) -> None:
        from transformers import AutoModelForImageTextToText, AutoProcessor

        if not (directory / "config.json").is_file():
            raise ValueError(f"{directory} is no export; make it with python -m tools.hf_export")
        self.processor = AutoProcessor.from_pretrained(directory, local_files_only=True)
        self.model = AutoModelForImageTextToText.from_pretrained(
            directory, local_files_only=True, dtype="auto"
        ).eval()
        if torch.cuda.is_available():
            self.model.cuda()

    def without_tiling(self) -> "ExportedModel":
        """Switch tiling off in model and processor: base tile plus the same area once more."""
        side = self.model.config.vision_config.image_size
        self.model.config.image_grid_pinpoints = [[side, side]]
        self.processor.image_processor.image_grid_pinpoints = [[side, side]]
        return self

    def prompt(self, question: str, with_image: bool = True, answer: str | None = None) -> str:
        """The rendered chat: up to the answer, or with it."""
        content: list[dict[str, str]] = [{"type": "image"}] if with_image else []
        messages = [{"role": "user", "content": [*content, {"type": "text", "text": question}]}]
        if answer is not None:
            text = [{"type": "text", "text": answer}]
            messages.append({"role": "assistant", "content": text})
        rendered: str = self.processor.apply_chat_template(
            messages, add_generation_prompt=answer is None, tokenize=False
        )
        return rendered

    def inputs(self, prompts: Sequence[str], images: Sequence[bytes], side: str) -> dict[str, Any]:
        """Tensors of a batch, padded on `side` ("left" to generate, "right" to score)."""
        pictures = [open_image(data) for data in images]
        batch = self.processor(
            images=pictures or None,
            text=list(prompts),
            padding=True,
            padding_side=side,
            return_tensors="pt",
        )
        return {name: value.to(self.model.device) for name, value in batch.items()}

    @torch.inference_mode()
    def answers(
        self, questions: Sequence[Question], batch: int = 50, max_new_tokens: int = 48
    ) -> list[str]:
        """Greedy answers in the order of `questions`, special tokens and blank ends removed."""
        found = [""] * len(questions)
        for numbers in _batches([open_image(q.image).size for q in questions], batch):
            chosen = [questions[number] for number in numbers]
            inputs = self.inputs(
                [self.prompt(q.question) for q in chosen], [q.image for q in chosen], "left"
            )
            output = self.model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
            new = output[:, inputs["input_ids"].shape[1] :]
            texts = self.processor.batch_decode(new, skip_special_tokens=True)
            for number, text in zip(numbers, texts, strict=True):
                found[number] = text.strip()
        return found

    @torch.inference_mode()
    def log_probs(self, pairs: Sequence[Pair], batch: int = 16) -> Tensor:
        """Summed log-probabilities of the answers, float32 [pairs, 2] (chosen, rejected).

        An answer is what the template puts after the prompt, through its end token; it is
        tokenised apart from the prompt, as in training and in generation.
        """
        sums = torch.zeros(len(pairs), 2)
        sizes = [(0, 1) if p.image is None else open_image(p.image).size for p in pairs]
        for numbers in _batches(sizes, batch):
            sums[numbers] = self._score([pairs[number] for number in numbers])
        return sums

    def _score(self, pairs: Sequence[Pair]) -> Tensor:
        """Summed log-probabilities of the pairs' answers, [pairs, 2]; one forward pass."""
        prompts = [self.prompt(pair.question, pair.image is not None) for pair in pairs]
        images = [pair.image for pair in pairs if pair.image is not None]
        inputs = self.inputs(prompts, images, "right")
        # Both answers follow the same prompt and pictures: row 2n is chosen, 2n + 1 rejected.
        batch = {name: value.repeat_interleave(2, dim=0) for name, value in inputs.items()}
        lengths = batch["attention_mask"].sum(1).tolist()
        answers = [
            self._answer_ids(pair, text, prompt)
            for pair, prompt in zip(pairs, prompts, strict=True)
            for text in (pair.chosen, pair.rejected)
        ]
        whole = [
            torch.cat([ids[:length], answer])
            for ids, length, answer in zip(batch["input_ids"], lengths, answers, strict=True)
        ]
        pad = self.processor.tokenizer.pad_token_id
        batch["input_ids"] = torch.nn.utils.rnn.pad_sequence(whole, True, pad)
        ends = torch.tensor([len(ids) for ids in whole], device=self.model.device)
        columns = torch.arange(batch["input_ids"].shape[1], device=self.model.device)
        batch["attention_mask"] = (columns < ends[:, None]).long()
        logits = self.model(**batch).logits[:, :-1].float()
        following = batch["input_ids"][:, 1:, None]
        log_probs = logits.log_softmax(-1).gather(2, following)[..., 0]
        sums = [
            row[length - 1 : len(ids) - 1].sum()
            for row, length, ids in zip(log_probs, lengths, whole, strict=True)
        ]
        return torch.stack(sums).view(-1, 2).cpu()

    def _answer_ids(self, pair: Pair, answer: str, prompt: str) -> Tensor:
        rendered = self.prompt(pair.question, pair.image is not None, answer)
        end = self.processor.tokenizer.eos_token
        if not rendered.startswith(prompt) or end not in rendered[len(prompt) :]:
            raise ValueError(
                "the chat template does not put answer and end token after the prompt; correct "
                "chat_template.jinja"
            )
        text = rendered[len(prompt) :]
        text = text[: text.rindex(end) + len(end)]
        ids = self.processor.tokenizer(text, add_special_tokens=False)["input_ids"]
        return torch.tensor(ids, device=self.model.device)


def _batches(sizes: Sequence[tuple[int, int]], batch: int) -> Iterator[list[int]]:
    """Numbers of the items in batches of similar picture shape, to pad little."""
    order = sorted(range(len(sizes)), key=lambda n: (sizes[n][0] / max(sizes[n][1], 1), n))
    for begin in range(0, len(order), batch):
        yield order[begin : begin + batch]
