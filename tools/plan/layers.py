"""Seconds of one micro-batch in a decoder layer, the vision tower, the connector and the head.

Every time is of one rank. A product of M tokens, K inputs and N outputs is done again for the
gradient of its input ([M, N] x [N, K]) and of its weight ([N, M] x [M, K]).
"""

from dataclasses import dataclass

from tools.plan.communication import (
    HIDDEN_COST,
    all_reduce_seconds,
    context_group,
    exposed,
    ring_seconds,
    tensor_group,
)
from tools.plan.efficiency import attention_seconds, product_seconds, stream_seconds
from tools.plan.job import Job

ELEMENT = 2  # bytes of a BF16 activation
# Bytes that eager PyTorch moves beside fused kernels, counted for norms (34 per element, not 4),
# rotary embedding (20, not 4) and SwiGLU (10, not 6) at Llama's widths.
UNFUSED = 3.0
# Bytes moved to make FP8 copies of one BF16 element: read for the maximum (tensorwise only), read,
# written twice (by rows and by columns, which Hopper's products need).
QUANTISE = {"tensorwise": 6, "delayed": 4, "blockwise": 4}
# Blockwise products scale partial sums outside the tensor cores. NVIDIA's figures are near 0.85.
BLOCKWISE = 0.85
LOGIT_TRAFFIC = 30  # bytes moved per logit by the softmax cross entropy and its gradient


@dataclass(frozen=True)
class Seconds:
    """Where the time of some work goes."""

    products: float = 0.0
    attention: float = 0.0
    traffic: float = 0.0  # element-wise kernels
    tensor: float = 0.0  # tensor-parallel communication that is seen
    context: float = 0.0  # context-parallel communication that is seen

    @property
    def total(self) -> float:
        return self.products + self.attention + self.traffic + self.tensor + self.context

    def __add__(self, other: "Seconds") -> "Seconds":
        return Seconds(
            self.products + other.products,
            self.attention + other.attention,
            self.traffic + other.traffic,
            self.tensor + other.tensor,
            self.context + other.context,
        )

    def __mul__(self, factor: float) -> "Seconds":
        return Seconds(
            self.products * factor,
            self.attention * factor,
            self.traffic * factor,
            self.tensor * factor,
            self.context * factor,
        )


Shape = tuple[float, float, float]  # M, N, K of a forward product


def attention_shapes(job: Job) -> list[Shape]:
    """Products of a decoder layer's attention block."""
    text, tensor, m = job.model.text, job.parallel.tensor, job.local_tokens
    width, pair = text.heads * text.head_dim, 2 * text.kv_heads * text.head_dim
    return [(m, (width + pair) / tensor, text.hidden_size), (m, text.hidden_size, width / tensor)]


def mlp_shapes(job: Job) -> list[Shape]:
    """Products of a decoder layer's MLP."""
    text, tensor, m = job.model.text, job.parallel.tensor, job.local_tokens
    wide = text.intermediate_size / tensor
    up = 2 * wide if job.software.gated else wide
    return [(m, up, text.hidden_size), (m, text.hidden_size, wide)]


def _forward(job: Job, shapes: list[Shape], fp8: bool) -> float:
    return sum(product_seconds(job.gpu, m, n, k, fp8) for m, n, k in shapes) / _recipe(job, fp8)


def _backward(job: Job, shapes: list[Shape], fp8: bool, weights: bool) -> float:
    seconds = sum(product_seconds(job.gpu, m, k, n, fp8) for m, n, k in shapes)
    if weights:
        seconds += sum(product_seconds(job.gpu, n, k, m, fp8) for m, n, k in shapes)
    return seconds / _recipe(job, fp8)


def _recipe(job: Job, fp8: bool) -> float:
    return BLOCKWISE if fp8 and job.precision.fp8_recipe == "blockwise" else 1.0


def _split(job: Job) -> int:
    """Ranks that share what sequence parallelism shares."""
    return job.parallel.tensor if job.parallel.sequence_parallel else 1


def _traffic(job: Job, fp8: bool) -> tuple[float, float]:
    """Bytes that a decoder layer's element-wise kernels move, forward and backward."""
    text, tensor, m = job.model.text, job.parallel.tensor, job.local_tokens
    width, pair = text.heads * text.head_dim, 2 * text.kv_heads * text.head_dim
    rotary, wide = (width + pair) / tensor, text.intermediate_size / tensor
    shared = 10 * text.hidden_size / _split(job)  # two norms and two residual sums
    forward = shared + 2 * rotary + (3 if job.software.gated else 2) * wide
    backward = shared + 2 * rotary + (5 if job.software.gated else 3) * wide
    scale = ELEMENT * m * (1.0 if job.software.fused else UNFUSED)
    more = [0.0, 0.0]
    if fp8 and job.precision.fp8_recipe:
        per_element = QUANTISE[job.precision.fp8_recipe] * m
        up = (2 if job.software.gated else 1) * wide
        more[0] = per_element * (2 * text.hidden_size + width / tensor + wide)
        more[1] = per_element * (rotary + 2 * text.hidden_size + up)
    return scale * forward + more[0], scale * backward + more[1]


def _tensor(
    job: Job, width: float, tokens: float, sequence: bool, weights: bool
) -> tuple[float, float]:
    """Communication of two pairs of split products, forward and backward, as it is seen."""
    ranks, gpu, size = tensor_group(job), job.gpu, ELEMENT * tokens * width
    if ranks.size == 1:
        return 0.0, 0.0
    ring = ring_seconds(gpu, ranks, size)
    # With sequence parallelism each pair gathers before and scatters after; backward it gathers
    # the gradient, and beside the products of the weights gathers the input and scatters.
    forward, backward, beside = (4.0, 2.0, 4.0) if sequence else (4.0, 0.0, 4.0)
    if not weights:
        backward, beside = (4.0, 0.0)  # nothing to hide behind, and no input to gather
    if job.software.tensor_overlap:
        shown = 1 / ranks.size + HIDDEN_COST
        return shown * forward * ring, shown * (backward + beside) * ring
    return forward * ring, (backward + HIDDEN_COST * beside) * ring


def _context(job: Job, attention: float, backward: bool) -> float:
    """Keys and values round the ring of context-parallel ranks, beside the attention itself."""
    ranks = context_group(job)
    if ranks.size == 1:
        return 0.0
    text = job.model.text
    keys = 2 * text.kv_heads * text.head_dim / job.parallel.tensor * job.local_tokens * ELEMENT
    seconds = (ranks.size - 1) * (
        keys * (2 if backward else 1) / ranks.bandwidth(job.gpu) + ranks.latency()
    )
    # Each round's output (backward: gradients) is merged with those before, in FP32.
    width = text.heads * text.head_dim + (2 * text.kv_heads * text.head_dim if backward else 0)
    merged = 12 * job.local_tokens * width / job.parallel.tensor * ranks.size
    return exposed(seconds, attention) + stream_seconds(job.gpu, merged)


@dataclass(frozen=True)
class Layer:
    """A decoder layer's micro-batch: forward, backward, and what recomputation would repeat."""

    forward: Seconds
    backward: Seconds
    core: Seconds  # the attention itself
    mlp: Seconds  # MLP with its norm
    norms: Seconds


def decoder_layer(job: Job, fp8: bool) -> Layer:
    """One decoder layer; `fp8` unless it is one of those that stay in BF16."""
    text, gpu, parallel = job.model.text, job.gpu, job.parallel
    first, second = attention_shapes(job), mlp_shapes(job)
    flops = 4.0 * text.heads * text.head_dim * job.row.pairs / parallel.tensor / parallel.context
    length = job.row.document / parallel.context
    scale = job.row.imbalance if parallel.data > 1 else 1.0
    attend = [
        scale * attention_seconds(gpu, flops, length, job.software.flash, back, text.head_dim)
        for back in (False, True)
    ]
    moved = [stream_seconds(gpu, size) for size in _traffic(job, fp8)]
    tensor = _tensor(
        job, text.hidden_size, job.local_tokens, parallel.sequence_parallel, job.learns_language
    )
    context = [_context(job, attend[0], False), _context(job, attend[1], True)]
    mlp = _forward(job, second, fp8)
    norm = stream_seconds(gpu, 4 * text.hidden_size / _split(job) * ELEMENT * job.local_tokens)
    forward = Seconds(_forward(job, first, fp8) + mlp, attend[0], moved[0], tensor[0], context[0])
    backward = Seconds(
        _backward(job, first + second, fp8, job.learns_language),
        attend[1],
        moved[1],
        tensor[1],
        context[1],
    )
    return Layer(
        forward=forward,
        backward=backward if job.gradients_pass else Seconds(),
        core=Seconds(attention=attend[0], context=context[0]),
        mlp=Seconds(products=mlp, traffic=0.6 * moved[0], tensor=tensor[0] / 2),
        norms=Seconds(traffic=norm),
    )


def recomputed(job: Job, layer: Layer, layers: int) -> Seconds:
    """What `layers` decoder layers of one micro-batch compute a second time."""
    parallel, share = job.parallel, job.software.recomputed
    if share is not None:
        one = layer.forward
        products, attention, traffic = share
        return (
            Seconds(one.products * products, one.attention * attention, one.traffic * traffic)
            * layers
        )
    if parallel.recompute == "full":
        again = (
            layers
            if parallel.recompute_layers is None
            else min(layers, parallel.recompute_layers * parallel.virtual_pipeline)
        )
        return layer.forward * again
    if parallel.recompute == "selective":
        parts = {"core_attn": layer.core, "mlp": layer.mlp, "layernorm": layer.norms}
        again_parts = Seconds()
        for name in parallel.recompute_modules:
            again_parts += parts.get(name, Seconds())
        return again_parts * layers
    return Seconds()


def head(job: Job) -> tuple[Seconds, Seconds]:
    """Projection to the vocabulary and loss of one micro-batch, forward and backward."""
    text, tensor = job.model.text, job.parallel.tensor
    tokens = job.row.targets if job.software.chunked_loss else job.row.tokens
    tokens /= job.parallel.context
    shape: list[Shape] = [(tokens, text.vocab_size / tensor, text.hidden_size)]
    moved = stream_seconds(job.gpu, LOGIT_TRAFFIC * tokens * text.vocab_size / tensor)
    once = _forward(job, shape, False)
    again = once if job.parallel.loss_chunk else 0.0  # the backward pass computes logits anew
    gather = ring_seconds(job.gpu, tensor_group(job), ELEMENT * job.local_tokens * text.hidden_size)
    back = _backward(job, shape, False, job.learns_language) if job.gradients_pass else 0.0
    return (
        Seconds(products=once, traffic=moved / 2, tensor=gather),
        Seconds(products=back + again, traffic=moved / 2, tensor=gather),
    )


def vision(job: Job) -> tuple[Seconds, Seconds, Seconds]:
    """Tower, connector and token embedding of one micro-batch: forward, backward, recomputed.

    Where the decoder recomputes anything, the tower does so with whole layers.
    """
    text, model, tensor, gpu = job.model.text, job.model.vision, job.parallel.tensor, job.gpu
    table = ELEMENT * job.local_tokens * text.hidden_size
    reduce = all_reduce_seconds(gpu, tensor_group(job), table)
    embed = Seconds(traffic=stream_seconds(gpu, 3 * table), tensor=reduce)
    if not job.has_vision:
        return embed, embed if job.learns_language else Seconds(), Seconds()
    scale = job.row.imbalance if job.parallel.data > 1 else 1.0
    patches = max(1, job.tiles_here) * model.grid**2
    hidden, wide = model.hidden_size, model.intermediate_size / tensor
    shapes: list[Shape] = [
        (patches, 3 * hidden / tensor, hidden),
        (patches, hidden, hidden / tensor),
        (patches, wide, hidden),
        (patches, hidden, wide),
    ]
    flops = 4.0 * patches * model.grid**2 * hidden / tensor
    size = hidden // model.heads
    attend = [
        attention_seconds(gpu, flops, model.grid**2, job.software.flash, back, size)
        for back in (False, True)
    ]
    moved = stream_seconds(gpu, ELEMENT * patches * (12 * hidden + 3 * wide))
    comm = _tensor(job, hidden, patches, False, "vision" in job.trained)
    number = model.layers_used
    first: list[Shape] = [(patches, hidden, 3 * model.patch_size**2)]
    join: list[Shape] = [
        (patches, text.hidden_size / tensor, hidden),
        (patches, text.hidden_size, text.hidden_size / tensor),
    ]
    joined = all_reduce_seconds(gpu, tensor_group(job), ELEMENT * patches * text.hidden_size)
    pixels = stream_seconds(gpu, 24 * patches * 3 * model.patch_size**2)
    tower = Seconds(_forward(job, shapes, False), attend[0], moved, comm[0]) * number
    ahead = tower + Seconds(
        products=_forward(job, first + join, False), traffic=pixels, tensor=joined
    )
    back = again = Seconds()
    if "vision" in job.trained:
        again = tower if job.parallel.recompute != "none" else again
        back += (
            Seconds(_backward(job, shapes, False, True), attend[1], 1.5 * moved, comm[1]) * number
        )
    if job.trained & {"vision", "connector"}:
        back += Seconds(products=_backward(job, join, False, "connector" in job.trained))
    embedded = embed if job.gradients_pass else Seconds()
    return embed + ahead * scale, embedded + back * scale, again * scale
