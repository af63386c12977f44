"""Text of the demo, for its tokenizer: every source's messages, and both sides of each pair."""

from tools.demo import language
from tools.demo.canvases import COLOURS
from tools.demo.chats import FACTS
from tools.demo.language import DIGITS, NUMBERS

_LISTS = ((0, 1), (2, 3, 4), (5, 6, 7), (8, 9), (4,))


def corpus() -> list[str]:
    """Texts in which every word of the demo stands often enough to become a piece."""
    frames = [(w.question, w.answer) for w in language.CAPTIONS]
    frames += [(w.question, w.answer) for kind in language.QUESTIONS.values() for w in kind]
    for style in (*language.STYLES, *language.UNSEEN_STYLES):
        frames += [(style.question, style.portugal), (style.question, style.brazil)]
    frames += list(FACTS)
    frames += [("Qual é a soma de {a} e {b}?", "Somar {a} e {b} dá {sum}.")]
    frames += [("Que número vem depois de {a}?", "Depois de {a} vem {b}.")]
    frames += [("Que número vem antes de {a}?", "Antes de {a} vem {b}.")]
    # Roles, numbers and colours are to be single pieces.
    texts = 300 * ["user\n", "assistant\n", "system\n", " ".join(["", *NUMBERS, *COLOURS])]
    for number in range(90):
        values = _LISTS[number % len(_LISTS)]
        words = {
            "list": language.spoken_list(tuple((v + number) % 10 for v in values)),
            "n": NUMBERS[1 + number % 4],
            "count": f"{NUMBERS[1 + number % 4]} algarismo{'s' if number % 4 else ''}",
            "colour": COLOURS[number % len(COLOURS)],
            "sum": NUMBERS[number % 19],
            "a": NUMBERS[number * 7 % 19],
            "b": NUMBERS[number * 5 % 19],
        }
        for name in ("first", "last", "leftmost", "rightmost"):
            words[name] = DIGITS[number % 10]
        texts += [text.format(**words) for frame in frames for text in frame]
    return texts
