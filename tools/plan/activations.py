"""Bytes of activations that one micro-batch leaves on a rank for its backward pass.

Per token of the rank, in BF16, for Transformer Engine's layers on packed rows: what each module's
forward pass saves (transformer_engine 2.11, pytorch/module/*.py and attention; megatron-core
0.16.1, fusions/fused_bias_swiglu.py). Nothing the size of the attention matrix is kept: flash
attention computes it again.
"""

from tools.plan.job import Job
from tools.plan.weights import stage_parts

ELEMENT = 2
STATISTIC = 4  # FP32 mean or deviation of a norm
SOFTMAX = 4  # FP32 log-sum-exp of each head and token


def decoder_layer_token(job: Job, fp8: bool) -> float:
    """Bytes for one token, nothing recomputed."""
    return sum(decoder_layer_token_parts(job, fp8).values())


def decoder_layer_token_parts(job: Job, fp8: bool) -> dict[str, float]:
    """Bytes for one token by what keeps them; the names serve recomputation below."""
    text, tensor = job.model.text, job.parallel.tensor
    shared = tensor if job.parallel.sequence_parallel else 1
    hidden = text.hidden_size / shared
    width, pair = text.heads * text.head_dim / tensor, 2 * text.kv_heads * text.head_dim / tensor
    wide = text.intermediate_size / tensor
    up = 2 * wide if job.software.gated else wide
    # A linear layer keeps its input only where its weights learn; in FP8 that is a copy of one
    # byte, beside what others keep in BF16.
    keep = (1 if fp8 else ELEMENT) if job.learns_language else 0
    return {
        "inputs": 2 * ELEMENT * hidden,  # of the two norms: the residual stream
        # Of the two products after them, and what the norms divided by.
        "norms": 2 * (keep * hidden + STATISTIC / shared),
        "attention": ELEMENT * (2 * width + pair) + SOFTMAX * text.heads / tensor,
        "projection": 1.0 * width if fp8 and keep else 0.0,  # in BF16 attention's output serves
        "mlp": ELEMENT * up + keep * wide,
    }


def kept_layer(job: Job, fp8: bool) -> float:
    """Bytes of one layer's micro-batch under `parallel.recompute`, where it is recomputed."""
    parts, tokens = decoder_layer_token_parts(job, fp8), job.local_tokens
    parallel = job.parallel
    if parallel.recompute == "full":
        return tokens * parts["inputs"] / 2
    kept = dict(parts)
    if parallel.recompute == "selective":
        modules = set(parallel.recompute_modules)
        if "core_attn" in modules:  # its inputs and, for the projection, its output stay
            kept["attention"] -= SOFTMAX * job.model.text.heads / job.parallel.tensor
        if "layernorm" in modules:
            kept["norms"] = 0.0
        if "mlp" in modules:  # from the norm's input on, which stays
            kept["mlp"] = 0.0
            kept["norms"] /= 2
    return tokens * sum(kept.values())


def whole_layer(job: Job, fp8: bool) -> float:
    """Bytes of one layer's micro-batch while its backward pass runs."""
    return job.local_tokens * decoder_layer_token(job, fp8)


def layers_in_flight(job: Job, stage: int) -> float:
    """Decoder layers' micro-batches that a stage holds at most.

    One forward, one backward: stage s of p begins with p - s micro-batches. Interleaved: each
    chunk's micro-batches are counted (Narayanan et al. 2021, megatron's `num_warmup_microbatches`).
    """
    parallel, count = job.parallel, job.micro_batches
    layers, chunks = job.stage_layers(stage), parallel.virtual_pipeline
    pipeline = parallel.pipeline
    if chunks == 1:
        return layers * min(pipeline - stage, count)
    most = 2 * (pipeline - stage - 1) + (chunks - 1) * pipeline + 1
    return layers / chunks * min(most, count * chunks)


def decoder(job: Job, stage: int, fp8_share: float) -> float:
    """Bytes of all decoder layers of a stage at the fullest moment."""
    if not job.gradients_pass:
        return 2 * whole_layer(job, False) / max(1, job.parallel.pipeline)  # nothing is kept
    kept = _mixed(job, kept_layer, fp8_share)
    whole = _mixed(job, whole_layer, fp8_share)
    held = layers_in_flight(job, stage)
    parallel = job.parallel
    if parallel.recompute == "full" and parallel.recompute_layers is not None:
        layers = job.stage_layers(stage)
        again = min(layers, parallel.recompute_layers * parallel.virtual_pipeline) / max(layers, 1)
        return held * (again * kept + (1 - again) * whole) + (whole - kept)
    return held * kept + (whole - kept if parallel.recompute != "none" else 0.0)


def _mixed(job: Job, size: object, fp8_share: float) -> float:
    function = size if callable(size) else kept_layer
    plain = function(job, False)
    return plain if not fp8_share else (1 - fp8_share) * plain + fp8_share * function(job, True)


def working(job: Job) -> float:
    """Bytes that one layer's kernels need while they run: gathered inputs, gradients."""
    text, tensor, tokens = job.model.text, job.parallel.tensor, job.local_tokens
    gathered = 2 * ELEMENT * tokens * text.hidden_size  # of sequence parallelism, or gradients
    up = (2 if job.software.gated else 1) * text.intermediate_size / tensor
    return gathered + 2 * ELEMENT * tokens * up


def logits(job: Job) -> float:
    """Bytes of logits, softmax and their gradients on the last stage, and of the output weight's
    gradient before it is added up (models/vocabulary_loss.py)."""
    text, tensor, parallel = job.model.text, job.parallel.tensor, job.parallel
    tokens = job.local_tokens  # in the fullest row nearly every token has a target
    chunk = min(tokens, parallel.loss_chunk) if parallel.loss_chunk else tokens
    per_logit = 6 if parallel.loss_chunk else 8
    hidden = 3 * ELEMENT * tokens * text.hidden_size
    table = text.vocab_size * text.hidden_size / tensor
    return (
        chunk * text.vocab_size / tensor * per_logit
        + hidden
        + (job.bytes_per_weight * table if job.learns_language else 0.0)
    )


def encoder_layer_patch(job: Job) -> float:
    """Bytes of one patch in one vision layer that trains: inputs and outputs of both norms (and
    their statistics), queries, keys, values and output of the attention, MLP before and after the
    GELU."""
    model, tensor = job.model.vision, job.parallel.tensor
    hidden, wide = model.hidden_size, model.intermediate_size / tensor
    kept = ELEMENT * (4 * hidden + 4 * hidden / tensor + 2 * wide)
    return kept + 4 * STATISTIC + SOFTMAX * model.heads / tensor


def vision(job: Job) -> float:
    """Bytes of tower, connector and token embedding on the first stage."""
    if not job.has_vision:
        return ELEMENT * job.local_tokens * job.model.text.hidden_size
    model, tensor = job.model.vision, job.parallel.tensor
    width = job.model.text.hidden_size
    share = -(-max(1, round(job.row.most_tiles)) // job.parallel.context)
    patches = share * model.grid**2
    hidden = model.hidden_size
    layer = encoder_layer_patch(job)
    pixels = 11 * share * 3 * model.image_size**2  # uint8 -> int32 -> FP32 -> BF16
    learns = "vision" in job.trained
    full = job.parallel.recompute != "none" and learns  # models/transformer_configs.py
    layers = model.layers_used if learns else 2
    tower = patches * (layers * ELEMENT * hidden + layer if full else layers * layer)
    connector = ELEMENT * patches * (hidden + 2 * width / tensor + 2 * width)
    whole = max(1, round(job.row.most_tiles)) * model.grid**2  # context ranks gather all
    table = ELEMENT * whole * width
    embedded = 3 * ELEMENT * job.local_tokens * width
    pipeline = job.parallel.pipeline  # interleaved, the first chunk starts 2p - 1 of them
    most = pipeline if job.parallel.virtual_pipeline == 1 else 2 * pipeline - 1
    in_flight = min(most, job.micro_batches)
    kept = tower + connector + table if job.trained & {"vision", "connector"} else 0.0
    passing = 0.0 if kept else tower + connector + table
    return pixels + embedded + kept * in_flight + passing


def largest_gradient(job: Job, stage: int) -> float:
    """Bytes of the largest weight gradient before it is added to the main buffer."""
    text, tensor = job.model.text, job.parallel.tensor
    if not job.learns_language:
        return 0.0
    names = {part.name for part in stage_parts(job, stage)}
    table = text.vocab_size * text.hidden_size / tensor if "embedding" in names else 0.0
    up = 2 * text.intermediate_size * text.hidden_size / tensor
    return job.bytes_per_weight * max(table, up)
