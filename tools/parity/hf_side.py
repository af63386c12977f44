"""What transformers makes of an export, alone in its process:

    python tools/parity/hf_side.py EXPORT CASES OUT [TOKENS]

CASES holds cases.json and pictures; OUT gets one .npz a case. Nothing of this project is imported,
so that any environment's transformers (4.57.6, 5.x) can be asked. Everything in float32, eager
attention, on the CPU or the first GPU.
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

KEPT = 32  # positions of the prompt's end whose whole logits are kept
TOP = 5


def paths_of_the_chat(processor: Any, messages: list[dict[str, Any]], images: list[Any]) -> Any:
    """Token ids by each way that readers take: the processor, lmms-eval's, vLLM's."""
    chat = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    content = messages[0]["content"]
    marks = "<image>\n" * sum(item["type"] == "image" for item in content)
    as_text = [{"role": "user", "content": marks + content[-1]["text"]}]
    tokenizer = processor.tokenizer
    string = tokenizer.apply_chat_template(as_text, add_generation_prompt=True, tokenize=False)
    whole = processor(images=images or None, text=chat, return_tensors="pt")
    return whole, {
        "processor": whole["input_ids"][0].tolist(),
        "string": processor(images=images or None, text=string)["input_ids"][0],
        "tokenizer": tokenizer(chat)["input_ids"],
        "server": tokenizer(chat, add_special_tokens=False)["input_ids"],
    }


def features_of(model: Any, batch: Any) -> torch.Tensor:
    """Packed image features of all pictures, [P, H]."""
    found = model.get_image_features(batch["pixel_values"], batch["image_sizes"])
    parts = getattr(found, "pooler_output", found)  # 5.x returns an object
    return torch.cat([part.reshape(-1, part.shape[-1]) for part in parts])


@torch.inference_mode()
def answer(processor: Any, model: Any, case: dict[str, Any], folder: Path, tokens: int) -> Any:
    """Arrays of one case."""
    images = [Image.open(folder / name).convert("RGB") for name in case["pictures"]]
    content = [{"type": "image"} for _ in images] + [{"type": "text", "text": case["text"]}]
    batch, ids = paths_of_the_chat(processor, [{"role": "user", "content": content}], images)
    batch = {name: value.to(model.device) for name, value in batch.items()}
    out: dict[str, Any] = {f"ids_{name}": np.array(row, np.int64) for name, row in ids.items()}
    if images:
        out["pixels"] = batch["pixel_values"].float().cpu().numpy()
        out["features"] = features_of(model, batch).float().cpu().numpy()
    # As many tokens in any case: until then the end tokens are held back.
    written = model.generate(**batch, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)
    ends = model.generation_config.eos_token_id
    out["ends"] = np.array([] if ends is None else ends, np.int64).reshape(-1)
    prompt = batch["input_ids"].shape[1]
    batch["input_ids"] = written
    batch["attention_mask"] = torch.ones_like(written)
    logits = model(**batch).logits[0].float()
    out["ids"] = written[0].cpu().numpy()
    out["prompt"] = np.array(prompt)
    out["top"] = logits.topk(TOP).indices.cpu().numpy()
    first = max(prompt - KEPT, 0)
    out["first"] = np.array(first)
    out["logits"] = logits[first:].cpu().numpy()
    return out


def main(arguments: list[str]) -> int:
    """Command line; see the module's docstring."""
    from transformers import AutoModelForImageTextToText, AutoProcessor, __version__

    export, folder, target = (Path(word) for word in arguments[:3])
    tokens = int(arguments[3]) if len(arguments) > 3 else 64
    processor = AutoProcessor.from_pretrained(export, local_files_only=True)
    model = AutoModelForImageTextToText.from_pretrained(
        export, local_files_only=True, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    if torch.cuda.is_available():
        model.cuda()
    for case in json.loads((folder / "cases.json").read_text(encoding="utf-8")):
        np.savez(target / f"{case['name']}.npz", **answer(processor, model, case, folder, tokens))
        print(f"transformers {__version__}: {case['name']}", flush=True)
    (target / "version.txt").write_text(__version__, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
