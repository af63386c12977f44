"""Rules find their own examples and leave the other variety's alone; labels follow from points.

How often the labels are right is measured on texts that nobody here wrote: docs/data/variety.md.
"""

import pytest

from data_shards.variety import LABELS, MAX_CHARACTERS, WORD, Matcher, classify
from data_shards.variety_rules.load import PT_BR, PT_PT, Rule, categories, rules
from tools.demo.language import STYLES


def _hits(matcher: Matcher, text: str) -> dict[str, int]:
    text = text.lower()
    return matcher.hits(text, WORD.findall(text))


def test_rules_find_their_own_examples_and_not_the_other_variety_s() -> None:
    matcher, wrong = Matcher(rules()), []
    for rule in rules():
        assert rule.hits and rule.misses and rule.points in (1, 2) and rule.category in categories()
        assert rule.variety in (PT_PT, PT_BR)
        wrong += [
            (rule.id, "misses", text) for text in rule.hits if rule.id not in _hits(matcher, text)
        ]
        wrong += [
            (rule.id, "hits", text) for text in rule.misses if rule.id in _hits(matcher, text)
        ]
    assert not wrong


def test_there_are_rules_of_both_varieties_in_hundreds() -> None:
    count = {
        variety: sum(rule.variety == variety for rule in rules()) for variety in (PT_PT, PT_BR)
    }
    assert min(count.values()) > 200, count


def test_examples_of_one_variety_never_get_the_other_s_label() -> None:
    other = {PT_PT: PT_BR, PT_BR: PT_PT}
    wrong = [
        (rule.id, t)
        for rule in rules()
        for t in rule.hits
        if classify(t).label == other[rule.variety]
    ]
    assert not wrong


def test_a_form_of_two_rules_is_refused() -> None:
    rule = Rule("one", PT_PT, 2, "food", forms=("sumo",))
    with pytest.raises(ValueError, match="sumo stands in one and in two"):
        Matcher((rule, Rule("two", PT_BR, 2, "food", forms=("sumo",))))


@pytest.mark.parametrize(
    ("label", "language", "text"),
    [
        ("pt-PT", "pt", "O autocarro está a chegar à paragem."),
        ("pt-PT", "pt", "De facto, é um problema económico."),
        ("pt-BR", "pt", "O ônibus está chegando no ponto."),
        ("pt-BR", "pt", "É um fenômeno econômico."),
        ("pt-BR", "pt", "Ônibus"),
        ("undecided", "pt", "O gato dorme na cadeira da sala."),
        ("undecided", "pt", "Três."),
        ("undecided", "undecided", "Excel."),
        ("undecided", "none", "7"),
        ("undecided", "none", ""),
        ("undecided", "none", "x = [a + b for a, b in zip(xs[1:], ys)]; y[0] = {}"),
        ("undecided", "pt", "O autocarro, a que no Brasil chamam ônibus, é grande."),
        ("other", "en", "The cat is sleeping on the chair in the room."),
        ("other", "es", "El gato está en la silla; el fenómeno económico no quiere comer más."),
        ("other", "fr", "Le chat dort sur la chaise dans le salon, où il est très bien."),
        ("other", "other", "Кошка спит на стуле в комнате."),
    ],
)
def test_label(label: str, language: str, text: str) -> None:
    verdict = classify(text)
    assert (verdict.label, verdict.language) == (label, language) and label in LABELS


def test_styles_of_the_demo_are_never_taken_for_the_other() -> None:
    for style in STYLES:
        assert classify(style.portugal).label != PT_BR and classify(style.brazil).label != PT_PT


def test_a_verdict_names_its_rules_and_one_habit_does_not_decide() -> None:
    verdict = classify(
        "Isto faz-se, diz-se, escreve-se e lê-se na mesma casa, desde a manhã até ali."
    )
    assert verdict.hits == {"verbo-pronome": 4} and (verdict.pt_pt, verdict.label) == (
        1,
        "undecided",
    )
    verdict = classify("Os autocarros e o autocarro: o AUTOCARRO.")
    assert verdict.hits == {"autocarro": 3} and verdict.pt_pt == 6 and verdict.pt_br == 0


def test_a_variety_needs_twice_the_other_s_points() -> None:
    mixed = "O autocarro, o comboio e o camião; o ônibus e o trem."
    verdict = classify(mixed)
    assert (verdict.pt_pt, verdict.pt_br, verdict.label) == (6, 4, "undecided")
    verdict = classify(f"{mixed} A casa de banho.")
    assert (verdict.pt_pt, verdict.pt_br, verdict.label) == (8, 4, "pt-PT")


def test_decomposed_accents_count_as_composed_ones() -> None:
    assert classify("O o\u0302nibus para aqui.") == classify("O ônibus para aqui.")


def test_long_texts_take_bounded_time() -> None:
    assert classify("a " * 5_000_000 + " autocarro").hits == {}
    hostile = (
        "estou a " * MAX_CHARACTERS,
        "é" * MAX_CHARACTERS,
        "-se" * MAX_CHARACTERS,
        "a-" * MAX_CHARACTERS,
    )
    assert all(classify(text).label in LABELS for text in hostile)
