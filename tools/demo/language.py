"""What the demo says about a picture, in European Portuguese.

Every question fixes the wording of its answer, so that an answer is right when it is equal to the
one expected, letter by letter. The article `um` is avoided but where it counts a digit.
"""

from dataclasses import dataclass

from tools.demo.canvases import Scene

NUMBERS = (
    "zero um dois três quatro cinco seis sete oito nove dez onze doze treze catorze quinze "
    "dezasseis dezassete dezoito"
).split()
DIGITS = tuple(NUMBERS[:10])
KINDS = ("read", "count", "end", "bg", "sum")
PROMPT_IMAGE = "<image>\n"  # a picture always stands before its first question


def spoken_list(values: tuple[int, ...]) -> str:
    """`sete`, `sete e três`, `sete, três e oito`."""
    words = [DIGITS[value] for value in values]
    if len(words) == 1:
        return words[0]
    return ", ".join(words[:-1]) + " e " + words[-1]


@dataclass(frozen=True)
class Wording:
    """A question and its answer's frame; `name` tells wordings apart in data and reports."""

    name: str
    question: str
    answer: str


CAPTIONS = (
    Wording("caption_colour_first", "Descreve a imagem.", "Fundo {colour}. Lê-se {list}."),
    Wording("caption_shows", "O que mostra a imagem?", "A imagem mostra {list} em fundo {colour}."),
    Wording("caption_count", "Faz a legenda.", "Fundo {colour} com {count}: {list}."),
    Wording("caption_see", "Descreve o que vês.", "Vejo {list} sobre fundo {colour}."),
)

QUESTIONS: dict[str, tuple[Wording, ...]] = {
    "read": (
        Wording("read_see", "Que algarismos vês na imagem?", "Vejo {list}."),
        Wording("read_written", "O que está escrito?", "Está escrito {list}."),
        Wording("read_order", "Diz os algarismos por ordem.", "Por ordem: {list}."),
        Wording("read_aloud", "Lê a imagem em voz alta.", "Lê-se {list}."),
    ),
    "count": (
        Wording("count_there", "Quantos algarismos há na imagem?", "Há {count}."),
        Wording("count_can", "Quantos algarismos consegues contar?", "Consigo contar {n}."),
        Wording("count_number", "Qual é o número de algarismos?", "O número é {n}."),
    ),
    "end": (
        Wording("end_first", "Qual é o primeiro algarismo?", "O primeiro é o {first}."),
        Wording("end_last", "Qual é o último algarismo?", "O último é o {last}."),
        Wording(
            "end_left", "Qual é o algarismo mais à esquerda?", "Mais à esquerda está o {leftmost}."
        ),
        Wording(
            "end_right", "Qual é o algarismo mais à direita?", "Mais à direita está o {rightmost}."
        ),
    ),
    "bg": (
        Wording("bg_which", "De que cor é o fundo?", "O fundo é {colour}."),
        Wording("bg_colour", "Qual é a cor do fundo?", "A cor do fundo é o {colour}."),
    ),
    "sum": (
        Wording("sum_sum", "Qual é a soma dos algarismos?", "A soma de {first} e {last} é {sum}."),
        Wording("sum_give", "Quanto dá somar os algarismos?", "Somar {first} e {last} dá {sum}."),
    ),
}


def outermost(scene: Scene, side: int) -> int | None:
    """Value of the digit furthest left (`side` -1) or right (1), if a single one is."""
    columns = [side * digit.column for digit in scene.digits]
    if len(columns) < 2 or columns.count(max(columns)) > 1:
        return None
    return scene.digits[columns.index(max(columns))].value


def applies(wording: Wording, scene: Scene) -> bool:
    """Whether the question has one answer on this picture. Sums are of two digits, and `first`,
    `last` and the like are asked of two digits or more."""
    if wording.name.startswith("sum"):
        return len(scene.digits) == 2
    if wording.name == "end_left":
        return outermost(scene, -1) is not None
    if wording.name == "end_right":
        return outermost(scene, 1) is not None
    return not wording.name.startswith("end") or len(scene.digits) > 1


def answer(wording: Wording, scene: Scene) -> str:
    """The one right answer; `applies` must hold."""
    values = scene.values
    n = len(values)
    fields = {
        "list": spoken_list(values),
        "n": NUMBERS[n],
        "count": f"{NUMBERS[n]} algarismo{'s' if n > 1 else ''}",
        "first": DIGITS[values[0]],
        "last": DIGITS[values[-1]],
        "colour": scene.colour,
    }
    if "most}" in wording.answer:
        left, right = outermost(scene, -1), outermost(scene, 1)
        fields["leftmost"] = DIGITS[left] if left is not None else ""
        fields["rightmost"] = DIGITS[right] if right is not None else ""
    if "{sum}" in wording.answer:
        fields["sum"] = NUMBERS[values[0] + values[-1]]
    return wording.answer.format(**fields)


@dataclass(frozen=True)
class StylePair:
    """One thing said as in Portugal and as in Brazil."""

    name: str
    question: str
    portugal: str
    brazil: str

    def answers(self, scene: Scene) -> tuple[str, str]:
        """(pt-PT, pt-BR), equal in content."""
        frames = (Wording(self.name, "", self.portugal), Wording(self.name, "", self.brazil))
        return answer(frames[0], scene), answer(frames[1], scene)


STYLES = (
    StylePair(
        "style_gerund_see", "O que estás a ver?", "Estou a ver {list}.", "Estou vendo {list}."
    ),
    StylePair("style_screen", "O que há no ecrã?", "No ecrã há {list}.", "Na tela tem {list}."),
    StylePair(
        "style_tell", "Podes dizer-me o que lês?", "Vou dizer-te: {list}.", "Vou te dizer: {list}."
    ),
    StylePair("style_reads", "O que se lê aqui?", "Aqui lê-se {list}.", "Aqui se lê {list}."),
    StylePair(
        "style_record", "Regista o que vês.", "Fica o registo: {list}.", "Fica o registro: {list}."
    ),
    StylePair(
        "style_team",
        "O que escreveu a equipa?",
        "A equipa escreveu {list}.",
        "O time escreveu {list}.",
    ),
    StylePair(
        "style_gerund_read", "O que estás a ler?", "Estou a ler {list}.", "Estou lendo {list}."
    ),
    StylePair(
        "style_phone",
        "O que aparece no telemóvel?",
        "No telemóvel aparece {list}.",
        "No celular aparece {list}.",
    ),
)
# Never in stages 1 to 3: whether the preference goes further than the wordings it was taught.
UNSEEN_STYLES = (
    StylePair(
        "unseen_gerund",
        "O que estás a contar?",
        "Estou a contar {count}.",
        "Estou contando {count}.",
    ),
    StylePair(
        "unseen_bus",
        "O que está escrito no autocarro?",
        "No autocarro está {list}.",
        "No ônibus está {list}.",
    ),
)
