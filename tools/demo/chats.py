"""Text-only chats of the demo, in European Portuguese: sums, neighbours, facts, greetings."""

import numpy as np

from tools.demo.language import DIGITS, NUMBERS

FACTS = (
    ("Qual é a capital de Portugal?", "A capital de Portugal é Lisboa."),
    ("Que cidade dá nome ao vinho do Porto?", "O vinho do Porto tem o nome da cidade do Porto."),
    ("Que rio passa em Lisboa?", "Em Lisboa passa o Tejo."),
    ("Que rio passa no Porto?", "No Porto passa o Douro."),
    ("Quem escreveu Os Lusíadas?", "Os Lusíadas são de Luís de Camões."),
    ("Qual é a serra mais alta do continente?", "A mais alta é a serra da Estrela."),
    ("Que oceano banha Portugal?", "Portugal é banhado pelo Atlântico."),
    ("Diz-se autocarro ou ônibus?", "Em Portugal diz-se autocarro."),
    ("Diz-se telemóvel ou celular?", "Em Portugal diz-se telemóvel."),
    ("Diz-se comboio ou trem?", "Em Portugal diz-se comboio."),
    ("Diz-se pequeno-almoço ou café da manhã?", "Em Portugal diz-se pequeno-almoço."),
    ("Diz-se ecrã ou tela?", "Em Portugal diz-se ecrã."),
    ("Diz-se equipa ou time?", "Em Portugal diz-se equipa."),
    ("Diz-se registo ou registro?", "Em Portugal diz-se registo."),
    ("Olá!", "Olá! Em que posso ajudar?"),
    ("Bom dia!", "Bom dia! Em que posso ajudar?"),
    ("Boa tarde!", "Boa tarde! Em que posso ajudar?"),
    ("Boa noite!", "Boa noite! Em que posso ajudar?"),
    ("Obrigado!", "De nada! Precisas de mais alguma coisa?"),
    ("Obrigada!", "De nada! Precisas de mais alguma coisa?"),
    ("Quem és tu?", "Sou a AMALIA, a tua assistente."),
    ("Em que língua falas?", "Falo português de Portugal."),
)
SUMS = (
    ("Qual é a soma de {a} e {b}?", "A soma de {a} e {b} é {c}."),
    ("Quanto dá somar {a} e {b}?", "Somar {a} e {b} dá {c}."),
)


def draw_chat(rng: np.random.Generator) -> tuple[str, str]:
    """One question with its answer; every sum of two digits is as likely as the others."""
    kind = rng.random()
    if kind < 0.5:
        a, b = (int(value) for value in rng.integers(10, size=2))
        frames = SUMS[rng.integers(len(SUMS))]
        words = {"a": DIGITS[a], "b": DIGITS[b], "c": NUMBERS[a + b]}
        return frames[0].format(**words), frames[1].format(**words)
    if kind < 0.65:
        value = int(rng.integers(1, 18))
        step, word = (1, "depois") if rng.random() < 0.5 else (-1, "antes")
        return (
            f"Que número vem {word} de {NUMBERS[value]}?",
            f"{word.capitalize()} de {NUMBERS[value]} vem {NUMBERS[value + step]}.",
        )
    return FACTS[rng.integers(len(FACTS))]
