"""What vLLM's own code makes of an export, alone in its process and without a GPU:

    python tools/parity/vllm_side.py EXPORT FOLDER

FOLDER holds spec.json and, for each chat, NAME.ids.npy; it gets vllm.json and NAME.vllm.npz.
Nothing of this project is imported. vLLM's classes for configuration, chat, pictures, weights and
network are the ones that `vllm serve` uses, in their PyTorch form; only attention itself, which
vLLM has compiled for its devices, is PyTorch's here. So batching, the cache of keys and values,
quantised and compiled kernels are not tried.
"""

import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

# Pictures resized by Pillow, as in training; vLLM's default is torchvision.
AS_TRAINED = {"backend": "pil"}


def declare_torchvision_operators() -> None:
    """Let torchvision's Python code be imported where its compiled operators do not fit this torch.

    vLLM imports it for its image classes; resizing, all that an export needs of it, is plain torch.
    """
    try:
        import torchvision
    except RuntimeError:
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _kept.append(library)  # its operators live as long as it does
        import torchvision  # noqa: F401


_kept: list[Any] = []


def engine_arguments(export: Path, dtype: str, **processor: Any) -> Any:
    """As `vllm serve EXPORT --dtype DTYPE` has them, less what needs compiled kernels.

    `processor` is what `--mm-processor-kwargs` would give.
    """
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.models import registry

    # In this process: another one would lack the operators declared above.
    registry._run_in_subprocess = lambda function: function()
    return EngineArgs(
        model=str(export),
        dtype=dtype,
        enforce_eager=True,
        compilation_config={"custom_ops": ["none"]},
        mm_processor_kwargs=processor or None,
        mm_processor_cache_gb=0,
        mm_hasher_algorithm="sha256",
    )


def engine_configuration(export: Path, **processor: Any) -> Any:
    """For one model: vLLM's layers enter their names in it."""
    return engine_arguments(export, "float32", **processor).create_engine_config()


def configuration(export: Path) -> dict[str, Any]:
    """What vLLM takes the export for, `--dtype auto`."""
    model = engine_arguments(export, "auto").create_model_config()
    kind, name = model.registry.resolve_model_cls(model.architectures, model)
    text = model.hf_text_config
    return {
        "architecture": name,
        "class": f"{kind.__module__}.{kind.__qualname__}",
        "multimodal": model.is_multimodal_model,
        "max_model_len": model.max_model_len,
        "dtype": str(model.dtype).removeprefix("torch."),
        "vocabulary": model.get_vocab_size(),
        "rope": {name: value for name, value in text.rope_parameters.items() if value is not None},
    }


def image_tokens(model: Any, sizes: list[list[int]]) -> dict[str, Any]:
    """Image tokens of each (height, width), and of the picture for which vLLM keeps room."""
    from vllm.multimodal import MULTIMODAL_REGISTRY

    info = MULTIMODAL_REGISTRY.create_processor(model).info
    counts = [info.get_num_image_tokens(image_height=h, image_width=w) for h, w in sizes]
    return {"counts": counts, "most": info.get_max_image_tokens()}


class Chats:
    """Requests as vLLM's server reads, renders, tokenises and expands them."""

    def __init__(self, config: Any) -> None:
        from vllm.renderers import renderer_from_config

        self.model = config.model_config
        self.renderer = renderer_from_config(config)

    def content_format(self) -> str:
        """How vLLM hands a message's parts to the template, found by reading the template."""
        from vllm.renderers.hf import resolve_chat_template_content_format

        found = resolve_chat_template_content_format(
            None, None, "auto", self.renderer.get_tokenizer(), model_config=self.model
        )
        return str(found)

    def read(self, body: dict[str, Any]) -> tuple[list[int], Any]:
        """Token ids with every image expanded, and the pictures' tensors (None without any)."""
        from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest

        request = ChatCompletionRequest(**body)
        _, (prompt,) = self.renderer.render_chat(
            [request.messages],
            request.build_chat_params(None, "auto"),
            request.build_tok_params(self.model),
        )
        pictures = prompt.get("mm_kwargs")
        return prompt["prompt_token_ids"], pictures.get_data() if pictures else None


def start_single_process(config: Any, folder: str) -> None:
    """The process groups, each of one rank, that vLLM's layers look for."""
    from vllm.config import set_current_vllm_config
    from vllm.distributed import ensure_model_parallel_initialized, init_distributed_environment

    with set_current_vllm_config(config):
        init_distributed_environment(1, 0, f"file://{folder}/ranks", 0, "gloo")
        ensure_model_parallel_initialized(1, 1)


def build(config: Any, device: str) -> Any:
    """vLLM's model with its own layers, weights not filled."""
    from vllm.model_executor.model_loader.utils import initialize_model
    from vllm.utils.torch_utils import set_default_torch_dtype

    with set_default_torch_dtype(config.model_config.dtype), torch.device(device):
        return initialize_model(vllm_config=config)


def stored(export: Path) -> Iterator[tuple[str, Any]]:
    """(name, tensor opened but not read) of every safetensors file."""
    from safetensors import safe_open

    for path in sorted(export.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # it is no mapping
                yield name, file.get_slice(name)


def where_weights_land(model: Any, export: Path) -> dict[str, Any]:
    """Each tensor through vLLM's own loader, by shape alone: no memory is filled.

    Returns left_out (names that it drops), refused (name -> message), unfilled (parameter -> the
    numbers that it has, those that came).
    """
    came: dict[str, int] = {}
    left_out, refused = [], {}
    for name, tensor in stored(export):
        empty = torch.empty(tensor.get_shape(), device="meta")
        try:
            landed = model.load_weights([(name, empty)])
        except Exception as error:  # whatever vLLM's loader finds wrong
            refused[name] = f"{type(error).__name__}: {error}".splitlines()[0]
            continue
        if not landed:
            left_out.append(name)
        for parameter in landed:
            came[parameter] = came.get(parameter, 0) + empty.numel()
    unfilled = {
        name: [wanted, came.get(name, 0)]
        for name, wanted in wanted_numbers(model).items()
        if came.get(name, 0) != wanted
    }
    return {"left_out": left_out, "refused": refused, "unfilled": unfilled}


def wanted_numbers(model: Any) -> dict[str, int]:
    """Numbers of each parameter, rows that vLLM adds to fill up a vocabulary not counted."""
    from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

    wanted = {name: parameter.numel() for name, parameter in model.named_parameters()}
    for name, module in model.named_modules():
        if isinstance(module, VocabParallelEmbedding):
            rows = module.weight.shape[0]
            wanted[f"{name}.weight"] = module.weight.numel() // rows * module.org_vocab_size
    return wanted


def attend(layer: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any) -> Any:
    """Causal attention over one whole sequence, [T, heads * size] each."""

    def heads(tensor: torch.Tensor) -> torch.Tensor:
        """[1, heads, T, size]"""
        return tensor.view(len(tensor), -1, layer.head_size).transpose(0, 1)[None]

    out = torch.nn.functional.scaled_dot_product_attention(
        heads(query),
        heads(key),
        heads(value),
        is_causal=True,
        scale=layer.impl.scale,
        enable_gqa=True,
    )
    return out[0].transpose(0, 1).reshape(len(query), -1)


@torch.inference_mode()
def run_network(model: Any, config: Any, ids: np.ndarray, pictures: Any) -> dict[str, np.ndarray]:
    """Features of the pictures, [P, H], and logits of every position, [T, V]."""
    from vllm.forward_context import set_forward_context

    ids_T = torch.from_numpy(ids)
    features: list[torch.Tensor] = []
    if pictures is not None:
        features = list(model.embed_multimodal(**pictures))
    marks = ids_T == config.model_config.hf_config.image_token_index
    with set_forward_context(None, config):
        embedded = model.embed_input_ids(ids_T, features or None, is_multimodal=marks)
        hidden = model(None, torch.arange(len(ids_T)), inputs_embeds=embedded)
        logits = model.compute_logits(hidden)
    out = {"logits": logits.float().numpy()}
    if features:
        out["features"] = torch.cat(features).float().numpy()
    return out


def tiles(pictures: Any) -> np.ndarray:
    """Tiles of all pictures, laid end to end, [N, 3, side, side]."""
    return torch.cat(list(pictures["pixel_values"])).float().numpy()


def filled(config: Any, export: Path) -> Any:
    """vLLM's model in memory, with the export's weights and plain attention."""
    from vllm.model_executor.layers.attention import Attention
    from vllm.model_executor.model_loader.utils import process_weights_after_loading

    model = build(config, "cpu")
    model.load_weights((name, tensor[:]) for name, tensor in stored(export))
    process_weights_after_loading(model, config.model_config, torch.device("cpu"))
    Attention.forward = attend
    return model.eval()


def answer(spec: dict[str, Any], export: Path, folder: Path, report: dict[str, Any]) -> None:
    """Everything, each part by itself: what fails is told, and the next is tried."""

    def attempt(part: str, function: Callable[[], Any]) -> Any:
        try:
            return function()
        except Exception as error:  # the finding of this whole script
            report["errors"][part] = f"{type(error).__name__}: {error}"[:600]
            return None

    report["config"] = attempt("config", lambda: configuration(export))
    if report["config"] is None:
        return
    config = attempt("engine", lambda: engine_configuration(export, **AS_TRAINED))
    if config is None:
        return
    report["tokens"] = attempt("tokens", lambda: image_tokens(config.model_config, spec["sizes"]))
    chats = attempt("chats", lambda: Chats(config))
    default = attempt("default chats", lambda: Chats(engine_configuration(export)))
    report["content_format"] = chats and attempt("format", chats.content_format)
    with tempfile.TemporaryDirectory(prefix="vllm-ranks-") as ranks:
        attempt("ranks", lambda: start_single_process(config, ranks))
        # First: vLLM keeps its tables of rotary angles for the next model, which is an empty one.
        model = attempt("network", lambda: filled(config, export)) if spec["network"] else None
        report["weights"] = attempt(
            "weights",
            lambda: where_weights_land(build(engine_configuration(export), "meta"), export),
        )
        for name, body in spec["requests"].items() if chats and default else ():
            ids = np.load(folder / f"{name}.ids.npy")
            arrays = attempt(name, partial(chat, chats, default, body, model, config, ids))
            if arrays:
                np.savez(folder / f"{name}.vllm.npz", **arrays)
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def chat(
    chats: Chats, default: Chats, body: dict[str, Any], model: Any, config: Any, ids: np.ndarray
) -> dict[str, np.ndarray]:
    """Arrays of one request; the network reads `ids`, a prompt and its answer."""
    prompt, pictures = chats.read(body)
    arrays = {"ids": np.array(prompt, np.int64)}
    if pictures is not None:
        arrays["pixels"] = tiles(pictures)
        arrays["default_pixels"] = tiles(default.read(body)[1])
    if model is not None:
        arrays |= run_network(model, config, ids, pictures)
    return arrays


def main(arguments: list[str]) -> int:
    """Command line; see the module's docstring."""
    export, folder = (Path(word).resolve() for word in arguments)
    os.environ.update(
        VLLM_TARGET_DEVICE="cpu",
        VLLM_LOGGING_LEVEL="ERROR",
        VLLM_CACHE_ROOT=str(folder / "cache"),
        VLLM_NO_USAGE_STATS="1",
    )
    versions = {name: version(name) for name in ("vllm", "transformers")}
    declare_torchvision_operators()
    report: dict[str, Any] = {**versions, "torch": torch.__version__, "errors": {}}
    spec = json.loads((folder / "spec.json").read_text(encoding="utf-8"))
    answer(spec, export, folder, report)
    (folder / "vllm.json").write_text(json.dumps(report), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
