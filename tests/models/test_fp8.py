"""FP8's settings, its refusals on this machine, and what it relies on in a batch without images."""

from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F

from conf.schema import ModelConfig, ParallelConfig, PrecisionConfig
from conf.schema.errors import ConfigError
from models import fp8
from tests.distributed import megatron, run_ranks
from tests.models.tiny import documents, micro_batch, tiny_model

RECIPES = ("tensorwise", "blockwise", "delayed")


def precision(recipe: str | None, **more: Any) -> PrecisionConfig:
    return PrecisionConfig(params="bf16", fp8_recipe=recipe, **more)


def settings(asked: PrecisionConfig) -> dict[str, Any]:
    """As on a machine that has FP8."""
    with mock.patch.object(fp8, "_require"):
        return fp8.fp8_settings(asked)


def test_settings_of_each_recipe() -> None:
    assert fp8.fp8_settings(precision(None)) == {}
    assert settings(precision("tensorwise")) == {"fp8": "hybrid", "fp8_recipe": "tensorwise"}
    assert settings(precision("blockwise"))["fp8"] == "e4m3"
    delayed = settings(precision("delayed"))
    assert (delayed["fp8_amax_history_len"], delayed["fp8_amax_compute_algo"]) == (1024, "max")
    ends = settings(precision("tensorwise", fp8_first_layers_bf16=2, fp8_last_layers_bf16=1))
    assert ends["first_last_layers_bf16"]
    assert (ends["num_layers_at_start_in_bf16"], ends["num_layers_at_end_in_bf16"]) == (2, 1)


def test_fp8_weights_are_told_to_ddp() -> None:
    plain, stored = precision("blockwise"), precision("blockwise", fp8_params=True)
    assert fp8.ddp_settings(plain) == {}
    assert settings(stored)["fp8_param"] and "fp8_param" not in settings(plain)
    assert fp8.ddp_settings(stored) == {"fp8_param_gather": True}


@pytest.mark.skipif(torch.cuda.is_available(), reason="FP8 may run here")
@pytest.mark.parametrize("recipe", RECIPES)
def test_refused_without_a_gpu(recipe: str) -> None:
    with pytest.raises(ConfigError, match=rf"{recipe} needs a GPU .*fp8_recipe=null"):
        fp8.fp8_settings(precision(recipe))


def test_refused_without_transformer_engine() -> None:
    with (
        mock.patch.object(torch.cuda, "is_available", lambda: True),
        mock.patch.dict("sys.modules", {"transformer_engine.pytorch": None}),
        pytest.raises(ConfigError, match=r"does not import .*\[gpu\] extra"),
    ):
        fp8.fp8_settings(precision("tensorwise"))


def local_layers_worker(model: ModelConfig) -> str:
    from models.build import build_model

    with megatron(ParallelConfig()), mock.patch.object(fp8, "_require"):
        try:
            build_model(
                model,
                ParallelConfig(),
                precision("tensorwise"),
                pre_process=True,
                post_process=True,
            )
        except ConfigError as error:
            return str(error)
    return ""


@pytest.mark.skipif(torch.cuda.is_available(), reason="its layers are Transformer Engine's")
def test_local_layers_do_not_pass_for_fp8() -> None:
    """Megatron-core builds and trains them in BF16 without a word."""
    (message,) = run_ranks(1, local_layers_worker, tiny_model())
    assert "layer 1 would train in BF16 although precision.fp8_recipe=tensorwise" in message


def visited_worker(
    model: ModelConfig, batches: list[dict], trained: set[str]
) -> list[tuple[set[str], set[str]]]:
    """Modules of the language model whose forward and backward passes ran, for each batch."""
    from models.build import build_model
    from tests.parity.layouts import NOT_INPUTS

    found = []
    with megatron(ParallelConfig()):
        network = build_model(
            model, ParallelConfig(), PrecisionConfig(), pre_process=True, post_process=True
        )
        network.freeze(trained)
        forward: set[str] = set()
        backward: set[str] = set()
        for name, part in network.language_model.decoder.named_modules():
            if not list(part.children()):
                part.register_forward_hook(lambda *_, name=name: forward.add(name))
                part.register_full_backward_hook(lambda *_, name=name: backward.add(name))
        for batch in batches:
            forward.clear()
            backward.clear()
            inputs = {name: value for name, value in batch.items() if name not in NOT_INPUTS}
            network(**inputs).sum().backward()
            found.append((set(forward), set(backward)))
    return found


@pytest.mark.parametrize("trained", [{"connector"}, {"vision", "connector", "language"}])
def test_a_batch_without_images_runs_every_layer(trained: set[str]) -> None:
    """`delayed` reduces its maxima over all ranks after each pass, forward and backward.

    A rank whose text-only batch left out a layer, or the decoder's backward pass while the
    language model is frozen, would leave the others waiting for ever.
    """
    model = tiny_model()
    with_images, text_only = documents(model)[0], documents(model)[1]
    batches = [micro_batch(model, [[one]], 320) for one in (with_images, text_only)]
    assert len(batches[0]["image_positions_P"]) and not len(batches[1]["image_positions_P"])
    (((forward, backward), without),) = run_ranks(1, visited_worker, model, batches, trained)
    linears = {name for name in forward if "linear" in name}
    assert len(linears) == 4 * model.text.layers and linears <= backward
    assert without == (forward, backward)


def test_megatrons_fused_bias_gelu_is_siglips() -> None:
    """The tanh approximation, with sqrt(2 / pi) cut to 8 digits: equal to 1e-6."""
    from megatron.core.fusions.fused_bias_gelu import bias_gelu_impl

    draw = torch.Generator().manual_seed(3)
    x = (3 * torch.randn(64, 32, generator=draw)).requires_grad_()
    bias = torch.randn(32, generator=draw)
    weight = torch.randn(64, 32, generator=draw)
    with torch.compiler.set_stance("force_eager"):
        fused = bias_gelu_impl(x, bias.expand_as(x))
        (mine,) = torch.autograd.grad((fused * weight).sum(), x)
    exact = F.gelu(x + bias, approximate="tanh")
    (theirs,) = torch.autograd.grad((exact * weight).sum(), x)
    assert (fused - exact).abs().max() < 1e-6
    assert (mine - theirs).abs().max() < 1e-5
    assert (fused - F.gelu(x + bias)).abs().max() > 1e-4  # not the exact one
