"""Stage 3 equals TRL's DPOTrainer: same tiny LLaVA-NeXT, same pictures, same pairs.

Both sides start from files: the pairs' pictures and chats go through our tokenizer, tiles, packing,
Megatron model and objective on one side, through transformers' processor and model and TRL's
collator and trainer on the other. float32 on the CPU; log-probabilities agree within 1e-4 (sums of
up to 40 of them), the loss within 1e-5, every gradient within 3e-5 of its tensor's largest entry.
"""

import io
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from conf.compose import compose
from conf.schema import ModelConfig, PrecisionConfig
from data_shards.chat import ChatTokenizer
from data_shards.collate import LoadedSample, collate
from models.anyres import AnyresGeometry
from models.hf_state import from_hf
from tests.tools.small_backbones import OVERRIDES, write_backbones
from tools.hf_config import llava_config
from tools.hf_import import fresh_connector
from tools.processor_files import special_ids, write_processor, write_tokenizer

pytestmark = pytest.mark.slow
BETA = 0.3
# TRL scores everything after the prompt, we stop at the end token: a template that writes nothing
# after it makes the two the same.
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if not loop.first %}{{ '\\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' }}{% if message['content'] is string %}"
    "{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<image>\\n' }}{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}{{ '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '\\n<|im_start|>assistant\\n' }}{% endif %}"
)


@dataclass(frozen=True)
class Pair:
    sizes: tuple[tuple[int, int], ...]  # (width, height) of the pictures
    question: str
    chosen: str
    rejected: str


PAIRS = (
    Pair(((50, 33),), "O que estás a ver?", "Estou a ver sete e três.", "Estou vendo sete."),
    Pair(((200, 31),), "Que algarismos vês?", "Vejo dois.", "Vejo quatro, um e nove."),
    Pair(((20, 90), (64, 64)), "E nestas duas?", "Está um cinco.", "Um cinco está na tela."),
    Pair(((33, 70),), "Qual é o último?", "O último é o zero.", "É o seis."),
)


def pictures(pair: Pair) -> list[Image.Image]:
    draw = np.random.default_rng(len(pair.question))
    return [
        Image.fromarray(draw.integers(0, 256, (height, width, 3), np.uint8))
        for width, height in pair.sizes
    ]


@pytest.fixture(scope="module")
def model() -> ModelConfig:
    return compose(OVERRIDES).model


@dataclass(frozen=True)
class Files:
    """Two exports: the reference, and a policy that has moved away from it."""

    reference: Path
    policy: Path
    tokenizer: Path


@pytest.fixture(scope="module")
def files(model: ModelConfig, tmp_path_factory: pytest.TempPathFactory) -> Files:
    import json

    from models.hf_state import connector_table, to_hf
    from tests.tools.weights import read_weights, write_weights

    root = tmp_path_factory.mktemp("dpo")
    vision, language, tokenizer = write_backbones(root)
    (tokenizer / "chat_template.jinja").write_text(TEMPLATE)
    fresh = fresh_connector(model, seed=1)
    whole = {entry.hf[0]: fresh[entry.megatron] for entry in connector_table(model)}
    whole |= {f"vision_tower.{name}": tensor for name, tensor in read_weights(vision).items()}
    whole |= {f"language_model.{name}": tensor for name, tensor in read_weights(language).items()}
    # A vocabulary that grows, and a pooling head that is left out, come back as exports have them.
    reference = to_hf(from_hf(whole, model), model)
    draw = torch.Generator().manual_seed(5)
    policy = {
        name: tensor + 0.06 * torch.randn(tensor.shape, generator=draw)
        for name, tensor in reference.items()
    }
    for name, tensors in (("reference", reference), ("policy", policy)):
        out = root / name
        out.mkdir()
        write_weights(tensors, out)
        write_tokenizer(tokenizer, out, model.text.max_positions)
        write_processor(model, out)
        config = llava_config(model, special_ids(tokenizer), "float32")
        (out / "config.json").write_text(json.dumps(config))
    return Files(root / "reference", root / "policy", tokenizer)


@dataclass(frozen=True)
class Result:
    """What a DPO step computes, gradients under Megatron's names."""

    loss: float
    reference: Tensor  # [pairs, 2] (chosen, rejected)
    gradients: dict[str, Tensor]
    rewards: Tensor  # mean chosen and rejected reward, margin, accuracy


def trl_result(files: Files, policy: Path, model: ModelConfig, out: Path) -> Result:
    """The same through TRL."""
    from datasets import Dataset
    from transformers import AutoModelForImageTextToText, AutoProcessor
    from trl import DPOConfig, DPOTrainer

    def turn(role: str, text: str) -> list[dict[str, str]]:
        return [{"role": role, "content": text}]

    data = Dataset.from_dict(
        {
            "images": [pictures(pair) for pair in PAIRS],
            "prompt": [turn("user", pair.question) for pair in PAIRS],
            "chosen": [turn("assistant", pair.chosen) for pair in PAIRS],
            "rejected": [turn("assistant", pair.rejected) for pair in PAIRS],
        }
    )
    trainer = DPOTrainer(
        model=AutoModelForImageTextToText.from_pretrained(policy, dtype=torch.float32),
        ref_model=AutoModelForImageTextToText.from_pretrained(files.reference, dtype=torch.float32),
        args=DPOConfig(
            output_dir=str(out),
            beta=BETA,
            max_length=None,
            per_device_train_batch_size=len(PAIRS),
            gradient_checkpointing=False,
            bf16=False,
            use_cpu=True,
            report_to=[],
        ),
        train_dataset=data,
        processing_class=AutoProcessor.from_pretrained(files.reference),
    )
    batch = trainer.data_collator([trainer.train_dataset[n] for n in range(len(PAIRS))])
    chosen, rejected = trainer.compute_ref_log_probs(trainer.ref_model, batch)
    trainer.model.train()  # no dropout in these models
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    gradients = {
        name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        for name, parameter in trainer.model.named_parameters()
    }
    logged = trainer._metrics["train"]
    names = ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies")
    return Result(
        loss=float(loss.detach()),
        reference=torch.stack([chosen, rejected], dim=1).detach(),
        # The adapter only moves rows, so it maps gradients as it maps weights.
        gradients=from_hf(gradients, model),
        rewards=torch.tensor([logged[name][-1] for name in names]),
    )


def our_result(files: Files, policy: Path, model: ModelConfig, multiple: int) -> Result:
    """The same through our tokenizer, tiles, packing, model and objective."""
    from models.llava_next import MODULES
    from pipeline.batch import DeviceBatch
    from pipeline.objectives.preference import PreferenceObjective, ReferenceObjective
    from tests.tools.weights import read_weights
    from tools.single_process import fill, whole_model

    tokenizer = ChatTokenizer.from_directory(files.tokenizer)
    geometry = AnyresGeometry.from_model(model)
    samples = []
    for number, pair in enumerate(PAIRS):
        images = pictures(pair)
        hw = tuple((image.height, image.width) for image in images)
        data = []
        for image in images:
            buffer = io.BytesIO()
            image.save(buffer, "PNG")
            data.append(buffer.getvalue())
        content = [{"type": "image"}] * len(images) + [{"type": "text", "text": pair.question}]
        documents = tokenizer.encode_preference(
            [{"role": "user", "content": content}],
            pair.chosen,
            pair.rejected,
            [geometry.n_tokens(*size) for size in hw],
        )
        samples.append(LoadedSample((0, number), documents, hw, tuple(data)))
    packed = collate(
        [samples[:3], samples[3:]],
        geometry,
        sequence_length=1024,
        document_multiple=multiple,
        pad_id=tokenizer.pad_id,
        need_images=True,
    )
    batch = DeviceBatch.from_packed(packed, torch.device("cpu"))
    with whole_model(model, PrecisionConfig()) as network:
        fill(network, from_hf(read_weights(files.reference), model))
        with torch.no_grad():
            losses_T = network(**batch.model_inputs())
        report = ReferenceObjective().loss(batch, losses_T)[2]
        reference = report["log_probs"].clone()
        known = {(0, n): (row[0].item(), row[1].item()) for n, row in enumerate(reference)}
        fill(network, from_hf(read_weights(policy), model))
        network.freeze(MODULES)
        network.train()
        total, count, values = PreferenceObjective(BETA, known).loss(
            batch, network(**batch.model_inputs())
        )
        assert int(count) == len(PAIRS)
        (total / count).backward()
        gradients = {
            name: torch.zeros_like(p) if p.grad is None else p.grad.clone()
            for name, p in network.named_parameters()
        }
    names = ("chosen_reward", "rejected_reward", "margin", "accuracy")
    return Result(
        loss=float(total.detach() / count),
        reference=reference,
        gradients=gradients,
        rewards=torch.stack([values[name] for name in names]) / len(PAIRS),
    )


@pytest.fixture(scope="module")
def theirs(files: Files, model: ModelConfig, tmp_path_factory: pytest.TempPathFactory) -> Result:
    return trl_result(files, files.policy, model, tmp_path_factory.mktemp("trl"))


@pytest.mark.parametrize("multiple", [1, 8])
def test_loss_and_gradients_equal_trl(
    files: Files, model: ModelConfig, theirs: Result, multiple: int
) -> None:
    ours = our_result(files, files.policy, model, multiple)
    torch.testing.assert_close(ours.reference, theirs.reference, atol=1e-4, rtol=0)
    assert ours.loss == pytest.approx(theirs.loss, abs=1e-5)
    assert abs(ours.loss - math.log(2)) > 0.01, "the policy has moved, so the loss says something"
    torch.testing.assert_close(ours.rewards, theirs.rewards, atol=1e-4, rtol=0)
    assert set(ours.gradients) == set(theirs.gradients)
    moved = 0
    for name, gradient in theirs.gradients.items():
        largest = gradient.abs().max().item()
        difference = (ours.gradients[name] - gradient).abs().max().item()
        assert difference <= 3e-5 * largest + 1e-8, (name, difference, largest)
        moved += largest > 0
    unused = [name for name in ours.gradients if "unused_layers" in name or "post_layer" in name]
    assert moved == len(ours.gradients) - len(unused)


def test_a_policy_equal_to_its_reference_has_loss_ln_2(files: Files, model: ModelConfig) -> None:
    ours = our_result(files, files.reference, model, multiple=4)
    assert ours.loss == pytest.approx(math.log(2), abs=1e-7)
    assert ours.rewards[:3].abs().max() == 0


@pytest.mark.parametrize("beta", [0.05, 0.1, 2.0])
def test_the_loss_of_given_log_probabilities(beta: float) -> None:
    """-log sigmoid(beta * difference of log-ratios), by hand in float64."""
    from pipeline.objectives.preference import dpo_loss

    draw = torch.Generator().manual_seed(0)
    log_probs = -30 * torch.rand(4, 16, generator=draw)
    loss_B, chosen_B, rejected_B = dpo_loss(*log_probs, beta)
    policy_c, policy_r, ref_c, ref_r = log_probs.double()
    margin = beta * ((policy_c - ref_c) - (policy_r - ref_r))
    torch.testing.assert_close(
        loss_B.double(), torch.log1p(torch.exp(-margin)), atol=1e-5, rtol=1e-5
    )
    torch.testing.assert_close((chosen_B - rejected_B).double(), margin, atol=1e-5, rtol=1e-5)
