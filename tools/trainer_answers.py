"""What the trainer's own network answers: Megatron modules, our tokenizer, tiles and packing.

Compared with `tools.hf_answers` it shows that an export is the model that was trained. Decoding is
by repeated full forward passes, so this is for some dozens of questions.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data_shards import images
from data_shards.chat import ChatTokenizer, Encoded
from data_shards.collate import LoadedSample, collate
from models.anyres import AnyresGeometry
from pipeline.handoff import read_done
from tools.hf_answers import MAX_PIXELS
from tools.hf_export import default_tokenizer, model_of, precision_of
from tools.questions import Question
from tools.single_process import whole_model


class TrainerModel:
    """The network of a finished stage, tensor- and pipeline-parallel size 1."""

    def __init__(self, network: torch.nn.Module, stage: Path) -> None:
        self.network = network
        self.tokenizer = ChatTokenizer.from_directory(default_tokenizer(stage))
        self.geometry = AnyresGeometry.from_model(model_of(read_done(stage), stage))

    def prompt_ids(self, question: Question) -> np.ndarray:
        """int64 ids of the prompt, image tokens expanded; the layout that the demo trains on."""
        picture = images.decode(question.image, MAX_PIXELS)
        content = f"<image>\n{question.question}"
        return self.tokenizer.encode_prompt(
            [{"role": "user", "content": content}],
            [self.geometry.n_tokens(picture.height, picture.width)],
        )

    @torch.no_grad()
    def logits(self, questions: Sequence[Question], ids: Sequence[np.ndarray]) -> list[Tensor]:
        """float32 logits [tokens, vocabulary] of each row of `ids`, all rows in one pack."""
        from pipeline.batch import DeviceBatch

        samples = []
        for number, (question, row) in enumerate(zip(questions, ids, strict=True)):
            picture = images.decode(question.image, MAX_PIXELS)
            start = np.flatnonzero(row == self.tokenizer.image_token_id)[:1]
            document = Encoded(row, np.zeros(len(row), bool), start)
            size = (picture.height, picture.width)
            samples.append(LoadedSample((0, number), (document,), (size,), (question.image,)))
        packed = collate(
            [samples],
            self.geometry,
            sequence_length=sum(len(row) for row in ids),
            document_multiple=1,
            pad_id=self.tokenizer.pad_id,
            need_images=True,
        )
        device = next(self.network.parameters()).device
        inputs = DeviceBatch.from_packed(packed, device).model_inputs()
        inputs.pop("labels_T")
        logits_TV = self.network(**inputs).float().cpu()
        return list(logits_TV.split([len(row) for row in ids]))

    def answers(self, questions: Sequence[Question], max_new_tokens: int = 48) -> list[str]:
        """Greedy answers, special tokens and blank ends removed."""
        prompts = [self.prompt_ids(question) for question in questions]
        written: list[list[int]] = [[] for _ in questions]
        active = list(range(len(questions)))
        for _ in range(max_new_tokens):
            ids = [np.array([*prompts[n], *written[n]], np.int64) for n in active]
            logits = self.logits([questions[n] for n in active], ids)
            for number, row in zip(active, logits, strict=True):
                written[number].append(int(row[-1].argmax()))
            active = [n for n in active if written[n][-1] != self.tokenizer.end_id]
            if not active:
                break
        return [self.tokenizer.decode(row).strip() for row in written]


@contextmanager
def trainer_model(stage: Path) -> Iterator[TrainerModel]:
    """Load a finished stage's checkpoint in this process.

    Raises ValueError for an unfinished stage or a damaged checkpoint.
    """
    from pipeline.checkpoint import load_model

    done = read_done(stage)
    with whole_model(model_of(done, stage), precision_of(stage)) as network:
        load_model([network], stage / done.checkpoint)
        yield TrainerModel(network, stage)
