"""Builds the network from Transformer Engine's layers without a GPU, and writes down what it is.

`python -m tests.models.te_probe FOLDER` writes FOLDER/report.json. A process of its own, as it
tells torch that there is a Hopper GPU: Transformer Engine refuses to build a layer without one,
but needs it only to run the layer. Nothing here runs one.
"""

import json
import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

RECIPES = ("tensorwise", "blockwise", "delayed")


def pretend_hopper() -> None:
    """After `enable_cpu_backend`, which would do nothing where there is a GPU."""
    cuda: Any = torch.cuda
    cuda.is_available = lambda: True
    cuda.get_device_capability = lambda *args: (9, 0)
    cuda.get_device_name = lambda *args: "NVIDIA H100"
    cuda.device_count = lambda: 1
    properties = mock.Mock(major=9, minor=0, multi_processor_count=132)
    cuda.get_device_properties = lambda *args: properties


@contextmanager
def placed(device: str) -> Iterator[None]:
    """Parameters are made there; `meta` ones, and those made of them, get no numbers."""

    def unchanged(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return tensor

    with ExitStack() as stack:
        where = torch.device(device)
        stack.enter_context(mock.patch.object(torch.cuda, "current_device", lambda: where))
        if device == "meta":
            stack.enter_context(mock.patch.object(torch.nn.init, "normal_", unchanged))
        yield


@contextmanager
def gpu_of(capability: tuple[int, int]) -> Iterator[None]:
    """Transformer Engine finds a GPU of this compute capability."""
    from transformer_engine.pytorch import quantization

    cached = (quantization.check_fp8_support, quantization.check_fp8_block_scaling_support)
    state = quantization.FP8GlobalStateManager
    with (
        mock.patch.object(quantization, "get_device_compute_capability", lambda: capability),
        mock.patch.object(state, "fp8_available", None),
        mock.patch.object(state, "fp8_block_scaling_available", None),
    ):
        for check in cached:
            check.cache_clear()
        try:
            yield
        finally:
            for check in cached:
                check.cache_clear()


def build(model: Any, precision: Any, te: bool, device: str = "cpu", parallel: Any = None) -> Any:
    """This rank's part of the network, of Transformer Engine's layers or of local ones."""
    from conf.schema import ParallelConfig
    from models import layer_specs
    from models.build import build_chunks

    with placed(device), mock.patch.object(layer_specs, "uses_transformer_engine", lambda: te):
        (network,) = build_chunks(model, parallel or ParallelConfig(), precision)
        return network


def metadata() -> dict[str, Any]:
    from megatron.core import parallel_state

    return {
        "distrib_optim_sharding_type": "fully_reshardable",
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
    }


def tensors(network: Any) -> dict[str, list]:
    """What a checkpoint of it holds, without the extra state: name -> [shape, dtype]."""
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories

    from models import extra_state

    state = network.sharded_state_dict(metadata=metadata())
    extra_state.leave_out(state)
    apply_factories(state)
    found: dict[str, list] = {}

    def walk(value: Any) -> None:
        if isinstance(value, dict):
            value = list(value.values())
        if isinstance(value, list):
            for one in value:
                walk(one)
            return
        assert isinstance(value, ShardedTensor), value
        parts = found.setdefault(value.key, [list(value.global_shape), str(value.dtype), []])
        parts[2].append(list(value.global_offset))

    walk(state)
    return found


def save(network: Any, directory: Path, needed: bool = False) -> None:
    from megatron.core import dist_checkpointing

    from models import extra_state

    state = network.sharded_state_dict(metadata=metadata())
    if not needed:
        extra_state.leave_out(state)
    directory.mkdir()
    dist_checkpointing.save({"model": state}, str(directory))


def load(network: Any, directory: Path, needed: bool = False) -> None:
    from megatron.core import dist_checkpointing

    from models import extra_state

    state = network.sharded_state_dict(metadata=metadata())
    if not needed:
        extra_state.leave_out(state)
    loaded = dist_checkpointing.load({"model": state}, str(directory))["model"]
    extra_state.fill_in(network, loaded)
    network.load_state_dict(loaded)


def local_name(name: str) -> str:
    """Transformer Engine's name of a parameter -> the local layers'."""
    from models.hf_state import FUSED_NORMS

    for local, fused in FUSED_NORMS.items():
        name = name.replace(fused, local)
    return name


def values(network: Any) -> dict[str, torch.Tensor]:
    return {local_name(name): p.detach() for name, p in network.named_parameters()}


def equal(one: Any, other: Any) -> bool:
    left, right = values(one), values(other)
    return left.keys() == right.keys() and all(
        torch.equal(left[name], right[name]) for name in left
    )


def real_shapes(layers: int) -> Any:
    """amalia_vl_9b with few layers; the other sizes are the real ones."""
    from conf.schema import ModelConfig, TextConfig, VisionConfig

    return ModelConfig(
        name="amalia_vl_9b",
        vision=VisionConfig(1152, 4304, 4, 16, image_size=384, patch_size=16),
        text=TextConfig(4096, 12288, layers, 32, 8, 128, 128064, 32768, 1e-5, 1e4),
        image_token_id=128000,
        max_tiles=12,
    )


def scopes(network: Any) -> list[str]:
    """For each layer, the recipe in whose scope Megatron runs it, with its formats."""
    from megatron.core.fp8_utils import get_fp8_context, get_fp8_recipe
    from transformer_engine.pytorch.quantization import FP8GlobalStateManager

    config, found = network.config, []
    for layer in network.language_model.decoder.layers:
        number = -1 if config.fp8_recipe == "delayed" else layer.layer_number - 1
        scope = get_fp8_context(config, number)
        if isinstance(scope, nullcontext):
            found.append("bf16")
            continue
        with scope:
            assert FP8GlobalStateManager.is_fp8_enabled()
            recipe = FP8GlobalStateManager.get_fp8_recipe()
        assert type(recipe) is type(get_fp8_recipe(config))
        words = [type(recipe).__name__, recipe.fp8_format.name]
        if recipe.delayed():
            words += [str(recipe.amax_history_len), recipe.amax_compute_algo]
        found.append(" ".join(words))
    return found


def attention(network: Any) -> dict[str, Any]:
    """What Transformer Engine's attention is called with: packed rows, and tiles."""
    import transformer_engine.pytorch as te
    from megatron.core.packed_seq_params import PackedSeqParams
    from megatron.core.transformer.enums import AttnMaskType

    calls = {}
    cu_seqlens = torch.tensor([0, 3, 8], dtype=torch.int32)
    packed = PackedSeqParams("thd", cu_seqlens, cu_seqlens, max_seqlen_q=5, max_seqlen_kv=5)
    parts = {
        "decoder": (network.language_model.decoder.layers[0], packed),
        "vision": (network.vision_tower.encoder.layers[0], None),
    }
    for name, (layer, params) in parts.items():
        core = layer.self_attention.core_attention
        with mock.patch.object(te.DotProductAttention, "forward") as forward:
            q = torch.zeros(8, 4, 8)
            mask: AttnMaskType = layer.self_attention.attn_mask_type
            core(q, q, q, None, mask, packed_seq_params=params)
        given = forward.call_args.kwargs
        calls[name] = {
            "mask": given["attn_mask_type"],
            "format": given.get("qkv_format", core.qkv_format),
            "head_dim": core.hidden_size_per_attention_head_k,
            "built_with": core.attn_mask_type,
            "type": type(core).__name__,
        }
    return calls


def accepted(rows: int, columns: int, blockwise: bool) -> bool:
    """Whether Transformer Engine's own assertions let this input of a linear layer pass."""
    import transformer_engine_torch as tex
    from transformer_engine.pytorch.tensor.float8_blockwise_tensor import Float8BlockQuantizer
    from transformer_engine.pytorch.utils import assert_dim_for_all_gather, assert_dim_for_fp8_exec

    shaped = torch.empty(rows, 1, columns, device="meta")
    try:
        assert_dim_for_fp8_exec(shaped, torch.empty(columns, rows, device="meta"))
        if blockwise:
            quantizer = Float8BlockQuantizer(
                tex.DType.kFloat8E4M3, rowwise=True, columnwise=True, block_scaling_dim=1
            )
            assert_dim_for_all_gather(shaped, True, quantizer)
    except AssertionError:
        return False
    return True


def amax_of(network: Any) -> torch.Tensor:
    layers = network.language_model.decoder.layers
    return torch.stack(
        [layer.mlp.linear_fc1.fp8_meta["scaling_fwd"].amax_history for layer in layers]
    )


def with_history(network: Any) -> Any:
    """As after a step with `delayed`: each layer has maxima of its own."""
    from megatron.core.fp8_utils import get_fp8_context

    config, draw = network.config, torch.Generator().manual_seed(7)
    with get_fp8_context(config):
        for layer in network.language_model.decoder.layers:
            for linear in (
                layer.self_attention.linear_qkv,
                layer.self_attention.linear_proj,
                layer.mlp.linear_fc1,
                layer.mlp.linear_fc2,
            ):
                linear.init_fp8_metadata(num_gemms=1)
                for way in ("scaling_fwd", "scaling_bwd"):
                    state = linear.fp8_meta[way]
                    state.amax_history.uniform_(0.5, 2.0, generator=draw)
                    state.scale.uniform_(0.5, 2.0, generator=draw)
    return network


def report(folder: Path) -> dict[str, Any]:
    from conf.schema import PrecisionConfig
    from conf.schema.errors import ConfigError
    from models import fp8
    from models.layer_specs import fuse_gradient_accumulation
    from tests.models.tiny import tiny_model

    bf16 = PrecisionConfig(params="bf16")
    found: dict[str, Any] = {"torch": torch.__version__}
    small, local = build(tiny_model(), bf16, te=True), build(tiny_model(), bf16, te=False)
    found["kinds"] = sorted(
        {type(m).__name__ for m in small.modules() if type(m).__module__.startswith("megatron")}
    )
    norm = small.language_model.decoder.final_layernorm
    found["final_norm"] = f"{type(norm).__module__.split('.')[0]} {type(norm).__name__}"
    found["fusions"] = {
        name: {
            field: getattr(config, field)
            for field in ("apply_rope_fusion", "bias_activation_fusion")
        }
        for name, config in (("decoder", small.config), ("vision", small.vision_tower.config))
    }
    found["tiny"] = {"te": tensors(small), "local": tensors(local)}
    found["attention"] = attention(small)
    # The same numbers both ways, through files.
    for parameter in local.parameters():
        torch.nn.init.normal_(parameter)
    save(local, folder / "local")
    load(small, folder / "local")
    found["local_into_te"] = equal(local, small)
    for parameter in small.parameters():
        torch.nn.init.normal_(parameter)
    save(small, folder / "te")
    load(local, folder / "te")
    found["te_into_local"] = equal(local, small)

    # Each recipe, at the real sizes.
    real = real_shapes(layers=4)
    tower = build(real, bf16, te=True, device="meta").vision_tower.encoder.layers[0]
    core = tower.self_attention.core_attention
    found["attention"]["vision_head_dim"] = core.hidden_size_per_attention_head_k
    found["real"] = {"local": tensors(build(real, bf16, te=False, device="meta"))}
    found["scopes"], found["in_fp8"] = {}, {}
    for recipe in (None, *RECIPES):
        precision = PrecisionConfig(params="bf16", fp8_recipe=recipe)
        network = build(real, precision, te=True, device="meta")
        found["real"][str(recipe)] = tensors(network)
        assert network.vision_tower.config.fp8 is None and network.connector.config.fp8 is None
        if recipe:
            found["scopes"][recipe] = scopes(network)
    precision = PrecisionConfig(
        params="bf16", fp8_recipe="tensorwise", fp8_first_layers_bf16=1, fp8_last_layers_bf16=2
    )
    network = build(real, precision, te=True, device="meta")
    found["scopes"]["ends"] = scopes(network)
    found["in_fp8"] = fp8.in_fp8(network.language_model.decoder)
    fuse_gradient_accumulation(network.language_model.decoder)
    found["fused"] = {
        name: sorted(
            {
                m.fuse_wgrad_accumulation
                for m in part.modules()
                if hasattr(m, "fp8_meta") and hasattr(m, "fuse_wgrad_accumulation")
            }
        )
        for name, part in (("decoder", network.language_model), ("vision", network.vision_tower))
    }

    # What must not pass for FP8.
    found["refused"] = {}
    plain = PrecisionConfig(params="bf16", fp8_recipe="tensorwise")
    try:
        build(real, plain, te=False, device="meta")
    except ConfigError as error:
        found["refused"]["local layers"] = str(error)
    try:
        with mock.patch.object(fp8, "get_fp8_context", lambda *args: nullcontext()):
            build(real, plain, te=True, device="meta")
    except ConfigError as error:
        found["refused"]["no scope"] = str(error)
    for recipe, capability in (("tensorwise", (8, 0)), ("blockwise", (8, 9))):
        try:
            with gpu_of(capability):
                fp8.fp8_settings(PrecisionConfig(params="bf16", fp8_recipe=recipe))
        except ConfigError as error:
            found["refused"][f"{recipe} on {capability}"] = str(error)

    # The history of `delayed` comes back when a run resumes, and only then.
    delayed = PrecisionConfig(params="bf16", fp8_recipe="delayed")
    first = with_history(build(tiny_model(), delayed, te=True))
    save(first, folder / "delayed", needed=True)
    second = build(tiny_model(), delayed, te=True)
    load(second, folder / "delayed", needed=True)
    found["history"] = bool(torch.equal(amax_of(first), amax_of(second)))
    third = build(tiny_model(), delayed, te=True)
    load(third, folder / "delayed")  # a predecessor's
    found["history_of_predecessor"] = any(
        "scaling_fwd" in layer.mlp.linear_fc1.fp8_meta
        for layer in third.language_model.decoder.layers
    )
    fourth = build(tiny_model(), bf16, te=False)
    load(fourth, folder / "delayed")
    found["delayed_into_local"] = equal(first, fourth)

    found["rule"] = [
        [rows, columns, blockwise, accepted(rows, columns, blockwise)]
        for rows in (8, 15, 16, 64, 128, 192, 1024, 729)
        for columns in (16, 72, 128, 4096)
        for blockwise in (False, True)
    ]
    return found


@contextmanager
def rank_of(parallel: Any, rank: int) -> Iterator[None]:
    """Megatron's groups as that rank of a job sees them; the others do not exist."""
    from megatron.core import parallel_state, tensor_parallel
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=parallel.world_size)
    parallel_state.initialize_model_parallel(
        parallel.tensor,
        parallel.pipeline,
        context_parallel_size=parallel.context,
        create_gloo_process_groups=False,
    )
    tensor_parallel.model_parallel_cuda_manual_seed(1, force_reset_rng=True)
    with mock.patch.object(torch.cuda, "Stream", mock.Mock()):
        yield
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


def summed_over_tensor_ranks(network: Any) -> list[str]:
    """Parameters whose gradients `finalize_model_grads` adds up, by the local layers' names."""
    marked = {id(p) for p in network.parameters() if getattr(p, "sequence_parallel", False)}
    named = network.named_parameters()
    return sorted(local_name(name) for name, p in named if id(p) in marked)


def split_over_ranks() -> dict[str, list]:
    """What both kinds of layers would save on some ranks of larger jobs."""
    from conf.schema import ParallelConfig, PrecisionConfig
    from tests.models.tiny import tiny_model

    bf16, found = PrecisionConfig(params="bf16"), {}
    fp8 = PrecisionConfig(params="bf16", fp8_recipe="blockwise")
    for rank, parallel in (
        (1, ParallelConfig(4, tensor=4, sequence_parallel=True)),
        (6, ParallelConfig(8, tensor=2, pipeline=2, context=2, sequence_parallel=True)),
    ):
        with rank_of(parallel, rank):
            found[f"{rank} of {parallel.world_size}"] = [
                tensors(build(real_shapes(4), precision, te, "meta", parallel))
                for te, precision in ((True, fp8), (False, bf16))
            ]
    # Not on `meta`: Transformer Engine marks its norms when it gives them numbers.
    parallel = ParallelConfig(2, tensor=2, sequence_parallel=True)
    with rank_of(parallel, 1):
        found["marks"] = [
            summed_over_tensor_ranks(build(tiny_model(), bf16, te, parallel=parallel))
            for te in (True, False)
        ]
    return found


def main() -> None:
    from megatron.core import parallel_state, tensor_parallel

    from models.cpu_backend import enable_cpu_backend

    folder = Path(sys.argv[1])
    assert not torch.cuda.is_available(), "run it with CUDA_VISIBLE_DEVICES="
    enable_cpu_backend()
    pretend_hopper()
    import transformer_engine

    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    found = {"transformer_engine": transformer_engine.__version__, **report(folder)}
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()
    found["ranks"] = split_over_ranks()
    (folder / "report.json").write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
