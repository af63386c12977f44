"""Languages of texts that were written before this project: articles 1 of the Universal Declaration
of Human Rights (United Nations), and what is no language."""

import pytest

from data_shards.language import LABELS, guess_language, is_foreign

ARTICLES = {
    "pt": "Todos os seres humanos nascem livres e iguais em dignidade e em direitos. Dotados de "
    "razão e de consciência, devem agir uns para com os outros em espírito de fraternidade.",
    "en": "All human beings are born free and equal in dignity and rights. They are endowed with "
    "reason and conscience and should act towards one another in a spirit of brotherhood.",
    "es": "Todos los seres humanos nacen libres e iguales en dignidad y derechos y, dotados como "
    "están de razón y conciencia, deben comportarse fraternalmente los unos con los otros.",
    "fr": "Tous les êtres humains naissent libres et égaux en dignité et en droits. Ils sont doués "
    "de raison et de conscience et doivent agir les uns envers les autres dans un esprit de "
    "fraternité.",
    "de": "Alle Menschen sind frei und gleich an Würde und Rechten geboren. Sie sind mit Vernunft "
    "und Gewissen begabt und sollen einander im Geist der Brüderlichkeit begegnen.",
    "it": "Tutti gli esseri umani nascono liberi ed eguali in dignità e diritti. Essi sono dotati "
    "di ragione e di coscienza e devono agire gli uni verso gli altri in spirito di "
    "fratellanza.",
    "other": "Все люди рождаются свободными и равными в своем достоинстве и правах.",
}  # fmt: skip


@pytest.mark.parametrize("language", ARTICLES)
def test_the_declaration(language: str) -> None:
    assert guess_language(ARTICLES[language]) == language
    assert is_foreign(language) == (language != "pt")


def test_finnish_is_other() -> None:
    finnish = (
        "Kaikki ihmiset syntyvät vapaina ja tasavertaisina arvoltaan ja oikeuksiltaan. Heille on "
        "annettu järki ja omatunto, ja heidän on toimittava toisiaan kohtaan veljeyden hengessä."
    )
    assert guess_language(finnish) in ("other", "undecided")


@pytest.mark.parametrize(
    "text", ["", " \n", "42", "3.14 + 2 = 5.14", "$\\frac{x^2}{y_1} = z$", "¿?"]
)
def test_nothing_to_read(text: str) -> None:
    assert guess_language(text) == "none"


def test_a_word_alone_is_not_called_foreign() -> None:
    for word in ("Rui", "Paris", "sim", "no", "Excel"):
        assert not is_foreign(guess_language(word)) and guess_language(word) in LABELS
