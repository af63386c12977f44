"""The demo's questions and answers: right by construction, worked out again from the cells."""

import numpy as np
import pytest

from tools.demo import language
from tools.demo.canvases import draw_scene
from tools.demo.language import CAPTIONS, QUESTIONS, STYLES, UNSEEN_STYLES, answer, applies
from tools.demo.pairs import invent, style_pair, truth_pair
from tools.demo.questions import draw_questions, scene_for_questions

WORDS = "zero um dois três quatro cinco seis sete oito nove".split()
SUMS = WORDS + "dez onze doze treze catorze quinze dezasseis dezassete dezoito".split()


def cells_of(scene):
    """{(row, column): word}, from the scan labels rather than from the scene's own values."""
    from tools.demo.canvases import load_scans

    labels = load_scans()[scene.split].labels
    return {(d.row, d.column): WORDS[labels[d.scan]] for d in scene.digits}


def expected(name, scene):
    """The right answer to a wording, worked out without the code under test; None: not asked."""
    cells = cells_of(scene)
    words = [cells[place] for place in sorted(cells)]
    listed = ", ".join(words[:-1]) + " e " + words[-1] if len(words) > 1 else words[0]
    n = WORDS[len(words)]
    columns = sorted(column for _, column in cells)
    if name.startswith("sum"):
        if len(words) != 2:
            return None
        a, b = words
        total = SUMS[WORDS.index(a) + WORDS.index(b)]
        return (
            f"A soma de {a} e {b} é {total}."
            if name == "sum_sum"
            else f"Somar {a} e {b} dá {total}."
        )
    if name.startswith("end"):
        if len(words) < 2:
            return None
        if name == "end_first":
            return f"O primeiro é o {words[0]}."
        if name == "end_last":
            return f"O último é o {words[-1]}."
        edge = columns[0] if name == "end_left" else columns[-1]
        if columns.count(edge) > 1:
            return None
        word = next(word for (_, column), word in cells.items() if column == edge)
        side = "esquerda" if name == "end_left" else "direita"
        return f"Mais à {side} está o {word}."
    return {
        "read_see": f"Vejo {listed}.",
        "read_written": f"Está escrito {listed}.",
        "read_order": f"Por ordem: {listed}.",
        "read_aloud": f"Lê-se {listed}.",
        "count_there": f"Há {n} algarismo." if n == "um" else f"Há {n} algarismos.",
        "count_can": f"Consigo contar {n}.",
        "count_number": f"O número é {n}.",
        "bg_which": f"O fundo é {scene.colour}.",
        "bg_colour": f"A cor do fundo é o {scene.colour}.",
        "caption_colour_first": f"Fundo {scene.colour}. Lê-se {listed}.",
        "caption_shows": f"A imagem mostra {listed} em fundo {scene.colour}.",
        "caption_count": f"Fundo {scene.colour} com {n} algarismo{'s' * (n != 'um')}: {listed}.",
        "caption_see": f"Vejo {listed} sobre fundo {scene.colour}.",
    }[name]


def test_every_answer_is_right_and_every_wording_is_met():
    rng = np.random.default_rng(3)
    wordings = [*CAPTIONS, *(wording for kind in QUESTIONS.values() for wording in kind)]
    met = set()
    for _ in range(400):
        scene = draw_scene(rng, "train")
        for wording in wordings:
            right = expected(wording.name, scene)
            assert applies(wording, scene) == (right is not None), (wording.name, scene)
            if right is not None:
                assert answer(wording, scene) == right
                met.add(wording.name)
    assert met == {wording.name for wording in wordings}


def test_question_decides_wording():
    questions = [w.question for kind in QUESTIONS.values() for w in kind]
    questions += [w.question for w in (*CAPTIONS, *STYLES, *UNSEEN_STYLES)]
    assert len(set(questions)) == len(questions)


def test_drawn_questions_apply_and_do_not_repeat():
    rng = np.random.default_rng(4)
    kinds = []
    for _ in range(300):
        scene = scene_for_questions(rng, "train")
        drawn = draw_questions(rng, scene, 4)
        assert len(drawn) == 4 and len({wording.name for _, wording in drawn}) == 4
        assert all(applies(wording, scene) for _, wording in drawn)
        assert all(wording in QUESTIONS[kind] for kind, wording in drawn)
        kinds += [kind for kind, _ in drawn]
    assert set(kinds) == set(QUESTIONS)


def test_sums_are_of_two_digits():
    rng = np.random.default_rng(5)
    for _ in range(200):
        scene = draw_scene(rng, "train")
        assert all(applies(w, scene) == (len(scene.digits) == 2) for w in QUESTIONS["sum"])


BRAZIL = {
    "style_gerund_see": ("Estou a ver", "Estou vendo"),
    "style_screen": ("No ecrã há", "Na tela tem"),
    "style_tell": ("Vou dizer-te", "Vou te dizer"),
    "style_reads": ("lê-se", "se lê"),
    "style_record": ("registo", "registro"),
    "style_team": ("A equipa", "O time"),
    "style_gerund_read": ("Estou a ler", "Estou lendo"),
    "style_phone": ("No telemóvel", "No celular"),
    "unseen_gerund": ("Estou a contar", "Estou contando"),
    "unseen_bus": ("No autocarro", "No ônibus"),
}


@pytest.mark.parametrize("pair", [*STYLES, *UNSEEN_STYLES], ids=lambda pair: pair.name)
def test_style_pairs_differ_in_wording_only(pair):
    rng = np.random.default_rng(6)
    portugal, brazil = BRAZIL[pair.name]
    for _ in range(20):
        scene = draw_scene(rng, "train")
        chosen, rejected = pair.answers(scene)
        assert chosen != rejected
        assert chosen.replace(portugal, brazil) == rejected
        for word in WORDS:  # the same digits, the same number of times
            assert chosen.replace(",", "").replace(".", "").split().count(word) == (
                rejected.replace(",", "").replace(".", "").split().count(word)
            )


def test_unseen_styles_are_in_no_training_pair():
    rng = np.random.default_rng(7)
    questions = {style_pair(rng, "train", STYLES)[1] for _ in range(300)}
    assert questions == {pair.question for pair in STYLES}
    assert not questions & {pair.question for pair in UNSEEN_STYLES}


def test_truth_pairs_prefer_the_right_answer():
    rng = np.random.default_rng(8)
    by_question = {w.question: w for kind in QUESTIONS.values() for w in kind}
    kinds = set()
    for _ in range(400):
        scene, question, chosen, rejected = truth_pair(rng, "train")
        wording = by_question[question]
        assert chosen == expected(wording.name, scene) != rejected
        frame = wording.answer.split("{")[0]
        assert rejected.startswith(frame) and rejected.endswith(".") and "  " not in rejected
        kinds.add(wording.name.split("_")[0])
    assert kinds == set(language.KINDS)


def test_invention_changes_one_thing():
    rng = np.random.default_rng(9)
    for _ in range(300):
        scene = draw_scene(rng, "train")
        other = invent(rng, scene)
        changes = (
            (scene.colour != other.colour)
            + abs(len(scene.digits) - len(other.digits))
            + sum(a != b for a, b in zip(scene.values, other.values, strict=False))
            * (len(scene.digits) == len(other.digits))
        )
        assert changes == 1
        assert len(other.digits) <= 4
