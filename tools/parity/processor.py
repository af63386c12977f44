"""The export's processor against the trainer's own tokens and tiles."""

from pathlib import Path
from typing import Any

import numpy as np

from data_shards.chat import ChatTokenizer
from models.anyres import AnyresGeometry
from tools.parity.cases import image_sizes
from tools.parity.finding import Finding, yes_or_no

# Both sides normalise the same bytes in float32, in another order of operations.
PIXELS = 2.5e-7


def check_counts(export: Path, geometry: AnyresGeometry) -> Finding:
    """Image tokens of every pinpoint, of sizes one pixel off it, and of many others."""
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(export, local_files_only=True)
    problems = []
    sizes = image_sizes(geometry)
    for height, width in sizes:
        (theirs,) = processor._get_num_multimodal_tokens([[height, width]])["num_image_tokens"]
        ours = geometry.n_tokens(height, width)
        if theirs != ours:
            problems.append(f"{width}x{height} px: {theirs} tokens, trained with {ours}")
    return yes_or_no("image tokens", problems, f"{len(sizes)} sizes count the same")


def check_chats(
    tokenizer: ChatTokenizer,
    bos: str | None,
    cases: dict[str, tuple[np.ndarray, Any]],
    version: str,
) -> Finding:
    """Token ids of each chat by every way of rendering it, and one BOS in each.

    Args:
        cases: name -> (the trainer's prompt ids, the other side's arrays).
        version: of the library that made those.
    """
    problems = []
    bos_id = None if bos is None else tokenizer.token_id(bos)
    for name, (ours, theirs) in cases.items():
        is_image = ours == tokenizer.image_token_id
        follows = np.concatenate([[False], is_image[:-1]])
        bare = ours[~(is_image & follows)]
        for way in ("processor", "string", "tokenizer", "server"):
            ids = theirs[f"ids_{way}"]
            # Without the processor an image is one token.
            expected = ours if way in ("processor", "string") else bare
            count = int((ids == bos_id).sum())
            if bos_id is not None and count != 1:
                problems.append(f"{name}, by {way}: {count} BOS tokens")
            elif not np.array_equal(ids, expected):
                problems.append(f"{name}, by {way}: other token ids than in training")
    return yes_or_no(
        "chats", problems, f"{len(cases)} chats, each in four ways, are as trained in {version}"
    )


def normalised(tiles_NCHW: np.ndarray) -> np.ndarray:
    """uint8 tiles as transformers normalises them: float32 in [-1, 1]."""
    scaled = (tiles_NCHW.astype(np.float64) * (1 / 255)).astype(np.float32)
    return (scaled - np.float32(0.5)) / np.float32(0.5)
