"""State-dict adapter between `LlavaNext` (Megatron-core) and Hugging Face, one table both ways.

HF names are those that transformers 4.57.6 writes to disk for
`LlavaNextForConditionalGeneration` (its `modeling_llava_next.py`, `modeling_siglip.py`,
`modeling_llama.py`); the in-memory names of 4.57.6 and 5.x (`model.language_model...`,
`lm_head.weight`) are understood on input. Megatron names are those of
`LlavaNext.named_parameters()` at tensor- and pipeline-parallel size 1.

Layout of the joined tensors (Megatron-core `SelfAttention`, `MLP`):

* `linear_qkv` rows, for every query group in turn: its query heads, its key head, its value head;
* `linear_fc1` of a gated MLP: the gate rows, then the up rows.
"""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from conf.schema.model import ModelConfig

log = logging.getLogger(__name__)

# The local layer names are the table's; Transformer Engine fuses the norms into the linears.
FUSED_NORMS = {
    ".input_layernorm.weight": ".self_attention.linear_qkv.layer_norm_weight",
    ".input_layernorm.bias": ".self_attention.linear_qkv.layer_norm_bias",
    ".pre_mlp_layernorm.weight": ".mlp.linear_fc1.layer_norm_weight",
    ".pre_mlp_layernorm.bias": ".mlp.linear_fc1.layer_norm_bias",
}
VISION, TEXT = "vision_tower.", "language_model."
VOCABULARY_TABLES = (
    "language_model.model.embed_tokens.weight",
    "language_model.lm_head.weight",
)
Shape = tuple[int, ...]
Rename = Callable[[str], str]


@dataclass(frozen=True)
class Entry:
    """One Megatron tensor and the HF tensors it is made of, with their shapes."""

    megatron: str
    hf: tuple[str, ...]
    shapes: tuple[Shape, ...]
    query_groups: int = 0  # > 0: q, k, v interleaved per query group; 0: rows laid end to end

    @property
    def shape(self) -> Shape:
        """Shape of the Megatron tensor."""
        return (sum(shape[0] for shape in self.shapes), *self.shapes[0][1:])

    def join(self, parts: list[Tensor]) -> Tensor:
        """HF tensors -> Megatron tensor."""
        if len(parts) == 1:
            return parts[0]
        if not self.query_groups:
            return torch.cat(parts)
        groups = [part.reshape(self.query_groups, -1, *part.shape[1:]) for part in parts]
        return torch.cat(groups, dim=1).reshape(self.shape)

    def split(self, tensor: Tensor) -> list[Tensor]:
        """Megatron tensor -> HF tensors (contiguous copies where rows move)."""
        rows = [shape[0] for shape in self.shapes]
        if not self.query_groups:
            return list(tensor.split(rows))
        grouped = tensor.reshape(self.query_groups, -1, *tensor.shape[1:])
        parts = grouped.split([row // self.query_groups for row in rows], dim=1)
        return [
            part.reshape(shape).contiguous() for part, shape in zip(parts, self.shapes, strict=True)
        ]


def vision_table(model: ModelConfig) -> Iterator[Entry]:
    """SigLIP encoder; the layers past `feature_layer` and the last norm are carried along."""
    vision = model.vision
    hidden, inner, patch = vision.hidden_size, vision.intermediate_size, vision.patch_size
    ours, theirs = VISION, "vision_tower.vision_model."
    conv = (hidden, 3, patch, patch)
    for kind, shape in (("weight", conv), ("bias", (hidden,))):
        name = f"embeddings.patch_embedding.{kind}"
        yield Entry(f"{ours}patch_embedding.{kind}", (theirs + name,), (shape,))
    yield Entry(
        f"{ours}position_embedding",
        (f"{theirs}embeddings.position_embedding.weight",),
        ((vision.grid**2, hidden),),
    )
    for layer in range(vision.layers):
        if layer < vision.layers_used:
            a = f"{ours}encoder.layers.{layer}."
        else:
            a = f"{ours}unused_layers.{layer - vision.layers_used}."
        b = f"{theirs}encoder.layers.{layer}."
        for kind in ("weight", "bias"):
            matrix = kind == "weight"
            square = (hidden, hidden) if matrix else (hidden,)
            up = (inner, hidden) if matrix else (inner,)
            down = (hidden, inner) if matrix else (hidden,)
            qkv = tuple(f"{b}self_attn.{part}_proj.{kind}" for part in "qkv")
            yield Entry(f"{a}input_layernorm.{kind}", (f"{b}layer_norm1.{kind}",), ((hidden,),))
            yield Entry(f"{a}self_attention.linear_qkv.{kind}", qkv, (square,) * 3, vision.heads)
            yield Entry(
                f"{a}self_attention.linear_proj.{kind}",
                (f"{b}self_attn.out_proj.{kind}",),
                (square,),
            )
            yield Entry(f"{a}pre_mlp_layernorm.{kind}", (f"{b}layer_norm2.{kind}",), ((hidden,),))
            yield Entry(f"{a}mlp.linear_fc1.{kind}", (f"{b}mlp.fc1.{kind}",), (up,))
            yield Entry(f"{a}mlp.linear_fc2.{kind}", (f"{b}mlp.fc2.{kind}",), (down,))
    for kind in ("weight", "bias"):
        yield Entry(
            f"{ours}post_layernorm.{kind}", (f"{theirs}post_layernorm.{kind}",), ((hidden,),)
        )


def connector_table(model: ModelConfig) -> Iterator[Entry]:
    """`multi_modal_projector` and `image_newline`."""
    wide, hidden = model.text.hidden_size, model.vision.hidden_size
    for number, columns in ((1, hidden), (2, wide)):
        a, b = f"connector.linear_fc{number}.", f"multi_modal_projector.linear_{number}."
        yield Entry(f"{a}weight", (f"{b}weight",), ((wide, columns),))
        if model.connector.bias:
            yield Entry(f"{a}bias", (f"{b}bias",), ((wide,),))
    yield Entry("image_newline", ("image_newline",), ((wide,),))


def text_table(model: ModelConfig) -> Iterator[Entry]:
    """Llama decoder."""
    text = model.text
    hidden, inner = text.hidden_size, text.intermediate_size
    query, key = (text.heads * text.head_dim, hidden), (text.kv_heads * text.head_dim, hidden)
    vocabulary = (text.vocab_size, hidden)
    ours, theirs = TEXT, "language_model.model."
    embed, head = VOCABULARY_TABLES
    yield Entry(f"{ours}embedding.word_embeddings.weight", (embed,), (vocabulary,))
    for layer in range(text.layers):
        a, b = f"{ours}decoder.layers.{layer}.", f"{theirs}layers.{layer}."
        qkv = tuple(f"{b}self_attn.{part}_proj.weight" for part in "qkv")
        gate_up = (f"{b}mlp.gate_proj.weight", f"{b}mlp.up_proj.weight")
        yield Entry(f"{a}input_layernorm.weight", (f"{b}input_layernorm.weight",), ((hidden,),))
        yield Entry(f"{a}self_attention.linear_qkv.weight", qkv, (query, key, key), text.kv_heads)
        yield Entry(
            f"{a}self_attention.linear_proj.weight",
            (f"{b}self_attn.o_proj.weight",),
            (query[::-1],),
        )
        yield Entry(
            f"{a}pre_mlp_layernorm.weight", (f"{b}post_attention_layernorm.weight",), ((hidden,),)
        )
        yield Entry(f"{a}mlp.linear_fc1.weight", gate_up, ((inner, hidden),) * 2)
        yield Entry(f"{a}mlp.linear_fc2.weight", (f"{b}mlp.down_proj.weight",), ((hidden, inner),))
    yield Entry(f"{ours}decoder.final_layernorm.weight", (f"{theirs}norm.weight",), ((hidden,),))
    yield Entry(f"{ours}output_layer.weight", (head,), (vocabulary,))


def table(model: ModelConfig) -> Iterator[Entry]:
    """Every tensor of the network."""
    yield from vision_table(model)
    yield from connector_table(model)
    yield from text_table(model)


def to_hf(state: Mapping[str, Tensor], model: ModelConfig) -> dict[str, Tensor]:
    """Unsharded Megatron parameters -> HF tensors under their on-disk (4.57.6) names.

    The vocabulary tables keep all `model.text.vocab_size` rows, padding rows included, so that
    the way back is bit-exact. Dtypes are kept; tensors may share memory with `state`.
    Raises ValueError for a missing, unexpected or mis-shaped tensor.
    """
    unfused = {fused: name for name, fused in FUSED_NORMS.items()}
    state = {
        replace_suffix(name, unfused): tensor
        for name, tensor in state.items()
        if not name.endswith("_extra_state")
    }
    out: dict[str, Tensor] = {}
    entries = list(table(model))
    shapes = shapes_of(state)
    _refuse_unexpected(shapes, (entry.megatron for entry in entries), "Megatron")
    for entry in entries:
        _check_shape(shapes, entry.megatron, entry.shape, model.name)
        out.update(zip(entry.hf, entry.split(state[entry.megatron]), strict=True))
    return out


def from_hf(
    state: Mapping[str, Tensor], model: ModelConfig, fused_norms: bool = False
) -> dict[str, Tensor]:
    """HF `LlavaNextForConditionalGeneration` tensors -> Megatron parameters.

    `fused_norms` names the norms as Transformer Engine layers do.
    Raises ValueError as `match_llava`.
    """
    return _joined(state, match_llava(shapes_of(state), model), fused_norms)


@dataclass(frozen=True)
class Match:
    """A Megatron tensor and the tensors of a checkpoint, by their names there, that make it up."""

    entry: Entry
    theirs: tuple[str, ...]


def match_llava(shapes: Mapping[str, Shape], model: ModelConfig) -> list[Match]:
    """A `LlavaNextForConditionalGeneration` checkpoint against the table.

    A pooling head (`vision_model.head.*`), which LLaVA-NeXT never uses, is left out with a note in
    the log; so are SigLIP's text half and buffers. Output layers that are tied to the embedding
    take its rows, and are trained apart from it then. Vocabulary tables may have fewer rows than
    `model.text.vocab_size` (`grow_vocabulary`).
    Raises ValueError for a missing, unexpected or mis-shaped tensor.
    """
    return _match(shapes, list(table(model)), on_disk_name, model)


def match_vision(shapes: Mapping[str, Shape], model: ModelConfig) -> list[Match]:
    """As `match_llava`, of a `SiglipVisionModel` or the vision half of a `SiglipModel`."""
    text_half = [name for name in shapes if name.startswith(("text_model.", "logit_"))]
    if text_half:
        log.info("left out: %d tensors of SigLIP's text half", len(text_half))

    def rename(name: str) -> str:
        bare = name.removeprefix("vision_tower.").removeprefix("vision_model.")
        return f"vision_tower.vision_model.{bare}"

    vision = {name: shape for name, shape in shapes.items() if name not in text_half}
    return _match(vision, list(vision_table(model)), rename, model)


def match_text(shapes: Mapping[str, Shape], model: ModelConfig) -> list[Match]:
    """As `match_llava`, of a `LlamaForCausalLM`."""

    def rename(name: str) -> str:
        return f"language_model.{name}"

    return _match(shapes, list(text_table(model)), rename, model)


def shapes_of(state: Mapping[str, Tensor]) -> dict[str, Shape]:
    """Shapes of tensors in memory."""
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def _joined(
    state: Mapping[str, Tensor], matches: Iterable[Match], fused_norms: bool
) -> dict[str, Tensor]:
    out = {}
    for found in matches:
        parts = [
            grow_vocabulary(state[theirs], shape, name)
            for theirs, name, shape in zip(
                found.theirs, found.entry.hf, found.entry.shapes, strict=True
            )
        ]
        name = found.entry.megatron
        out[replace_suffix(name, FUSED_NORMS) if fused_norms else name] = found.entry.join(parts)
    return out


def _match(
    shapes: Mapping[str, Shape], entries: list[Entry], rename: Rename, model: ModelConfig
) -> list[Match]:
    known: dict[str, str] = {}  # on-disk name -> name in the checkpoint
    heads = 0
    for name in shapes:
        new = rename(name)
        if new.startswith("vision_tower.vision_model.head."):
            heads += 1
        elif new.endswith((".rotary_emb.inv_freq", ".embeddings.position_ids")):
            pass  # buffers that old releases of transformers wrote
        elif new in known:
            raise ValueError(f"tensor {new} is there twice (again as {name}); remove one of them")
        else:
            known[new] = name
    if heads:
        log.info(
            "left out: SigLIP's pooling head (%d tensors); LLaVA-NeXT has no use for it", heads
        )
    table_shapes = {new: shapes[name] for new, name in known.items()}
    _refuse_unexpected(table_shapes, (n for entry in entries for n in entry.hf), "Hugging Face")
    embedding, head = VOCABULARY_TABLES
    if head not in known and embedding in known:
        log.info("the output layer is tied to the embedding: it begins with the same rows")
        known[head] = known[embedding]
        table_shapes[head] = table_shapes[embedding]
    matches = []
    for entry in entries:
        for name, shape in zip(entry.hf, entry.shapes, strict=True):
            if name in VOCABULARY_TABLES and name in table_shapes:
                _check_growth(table_shapes[name], shape, name)
                if table_shapes[name][0] < shape[0] and table_shapes[name][1:] == shape[1:]:
                    continue
            _check_shape(table_shapes, name, shape, model.name)
        matches.append(Match(entry, tuple(known[name] for name in entry.hf)))
    return matches


def _check_growth(rows: Shape, shape: Shape, name: str) -> None:
    if rows[:1] == (0,):
        raise ValueError(
            f"tensor {name} has no rows, so none to grow from; get the checkpoint again"
        )
    if len(rows) == 2 and rows[1] == shape[1] and rows[0] > shape[0]:
        raise ValueError(
            f"tensor {name} has {rows[0]} rows, more than the {shape[0]} of the "
            f"configuration; set model.text.vocab_size={rows[0]} or more"
        )


def grow_vocabulary(rows: Tensor, shape: Shape, name: str) -> Tensor:
    """[v, hidden] -> [vocab_size, hidden]: every new row is the mean of the old ones, so that a new
    token begins as an average one."""
    if name not in VOCABULARY_TABLES or rows.shape[0] == shape[0]:
        return rows
    log.info("%s grows from %d to %d rows (mean row)", name, rows.shape[0], shape[0])
    new = mean_row([rows]).expand(shape[0] - rows.shape[0], -1)
    return torch.cat([rows, new.to(rows.dtype)])


def mean_row(blocks: Iterable[Tensor]) -> Tensor:
    """Mean of all rows of the blocks, [1, hidden] in float64; how they are cut does not matter to
    any dtype that weights have."""
    total, count = torch.zeros(1, dtype=torch.float64), 0
    for block in blocks:
        total = total + block.double().sum(dim=0, keepdim=True)
        count += len(block)
    return total / count


def new_style_name(name: str) -> str:
    """An on-disk name of 4.57.6 as the model in memory has it, and as 5.x may write it."""
    if name == "language_model.lm_head.weight":
        return "lm_head.weight"
    if name.startswith("language_model.model."):
        return name.replace("language_model.model.", "model.language_model.", 1)
    return f"model.{name}"


def on_disk_name(name: str) -> str:
    """The name on disk in 4.57.6 of a tensor under any of the names that it goes by."""
    if name == "lm_head.weight":
        return "language_model.lm_head.weight"
    if not name.startswith("model."):
        return name
    name = name.removeprefix("model.")
    if name.startswith("language_model.") and not name.startswith("language_model.model."):
        return name.replace("language_model.", "language_model.model.", 1)
    if name.startswith("vision_tower.") and not name.startswith("vision_tower.vision_model."):
        return name.replace("vision_tower.", "vision_tower.vision_model.", 1)
    return name


def replace_suffix(name: str, suffixes: Mapping[str, str]) -> str:
    """`name` with the first of the suffixes that it ends with replaced."""
    for old, new in suffixes.items():
        if name.endswith(old):
            return name.removesuffix(old) + new
    return name


def _check_shape(shapes: Mapping[str, Shape], name: str, shape: Shape, model: str) -> None:
    if name not in shapes:
        raise ValueError(
            f"tensor {name} is missing; model={model} expects it with shape {list(shape)}: "
            "give the complete checkpoint, or correct the model configuration (layers, bias)"
        )
    if shapes[name] != shape:
        raise ValueError(
            f"tensor {name} has shape {list(shapes[name])}, but model={model} expects "
            f"{list(shape)}; change the model configuration to the checkpoint's sizes"
        )


def _refuse_unexpected(shapes: Mapping[str, Shape], names: Iterable[str], side: str) -> None:
    unexpected = sorted(set(shapes) - set(names))
    if unexpected:
        first = unexpected[0]
        more = f" and {len(unexpected) - 1} more" if len(unexpected) > 1 else ""
        raise ValueError(
            f"unexpected {side} tensor {first} {list(shapes[first])}{more}: the checkpoint "
            "is of another architecture or has more layers; change the model configuration"
        )
