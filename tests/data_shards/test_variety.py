"""The rules find what they name. These sentences were written with the rules in view, so they say
nothing about accuracy on other text."""

import pytest

from data_shards.variety import LABELS, classify


@pytest.mark.parametrize(
    ("label", "text"),
    [
        ("pt-PT", "O autocarro está a chegar à paragem."),
        ("pt-PT", "Guarda o ficheiro e olha para o ecrã do telemóvel."),
        ("pt-PT", "De facto, é um problema económico."),
        ("pt-BR", "O ônibus está chegando no ponto."),
        ("pt-BR", "Você pode baixar no celular, na tela inicial."),
        ("pt-BR", "É um fenômeno econômico."),
        ("undecided", "O gato dorme na cadeira da sala."),
        ("undecided", "Três."),
        ("undecided", "7"),
        ("undecided", ""),
        ("undecided", "O ecrã, a que no Brasil chamam tela do celular, é grande."),
        ("other", "The cat is sleeping on the chair in the room."),
        ("other", "El gato está en la silla y no quiere comer más."),
        ("other", "Le chat dort sur la chaise dans le salon."),
    ],
)
def test_label(label: str, text: str) -> None:
    assert classify(text).label == label and label in LABELS


def test_long_texts_take_bounded_time() -> None:
    assert classify("a" * 5_000_000 + " autocarro").label == "undecided"
    assert classify("estou a " * 100_000).label in LABELS


def test_swapping_the_varieties_swaps_the_label() -> None:
    pairs = [
        ("autocarro", "ônibus"),
        ("comboio", "trem"),
        ("telemóvel", "celular"),
        ("golo", "gol"),
    ]
    for portuguese, brazilian in pairs:
        for word, label in ((portuguese, "pt-PT"), (brazilian, "pt-BR")):
            assert classify(f"Na imagem há um {word} azul.").label == label
