"""The measuring itself, and one measurement: translations of common programs, where the machine has
them, by people who know nothing of the rules (docs/data/variety.md has larger sets)."""

import gettext
from pathlib import Path

import pytest
from scipy.stats import binomtest

from data_shards.language import guess_language, is_foreign
from data_shards.variety_rules.evaluate import evaluate, interval, main, table

LOCALES = Path("/usr/share/locale")


def _translations(locale: str) -> dict[tuple[str, str], str]:
    """(program, English) -> translation."""
    found: dict[tuple[str, str], str] = {}
    for path in sorted((LOCALES / locale / "LC_MESSAGES").glob("*.mo")):
        if path.name.startswith("iso_"):  # names of countries and languages
            continue
        with open(path, "rb") as file:
            catalogue = gettext.GNUTranslations(file)._catalog  # type: ignore[attr-defined]
        for english, text in catalogue.items():
            if isinstance(english, str) and english and isinstance(text, str):
                found[path.name, english] = text
    return found


def test_labels_of_programs_translated_twice() -> None:
    portugal, brazil = _translations("pt"), _translations("pt_BR")
    both = sorted(key for key in portugal.keys() & brazil.keys() if portugal[key] != brazil[key])
    both = [key for key in both if min(len(portugal[key]), len(brazil[key])) > 40][::10]
    if len(both) < 300:
        pytest.skip(f"{LOCALES} has {len(both)} texts in pt and pt_BR; Debian's packages have more")
    pairs = [("pt-PT", portugal[key]) for key in both] + [("pt-BR", brazil[key]) for key in both]
    outcomes = evaluate(pairs)
    print(table(outcomes))
    for outcome in outcomes:
        # Measured on all of them: 33 % and 14 % decided, 0.7 % and 3.4 % of these wrong.
        assert outcome.right > 0.1 * outcome.texts
        assert outcome.wrong < 0.08 * (outcome.right + outcome.wrong)
        assert outcome.got["other"] < 0.02 * outcome.texts


def test_counts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "set.tsv"
    file.write_text("pt-PT\tO autocarro.\npt-PT\tO ônibus.\npt-PT\tO gato.\npt-BR\tO trem.\n")
    assert main([str(file)]) == 0
    first, second = capsys.readouterr().out.splitlines()[2:]
    assert first.startswith("| pt-PT | 3 | 33.3 % | 33.3 % | 33.3 % | 0.0 % | 50.0 % (9.5 to 90.5)")
    assert second.startswith("| pt-BR | 1 | 0.0 % | 100.0 % | 0.0 % | 0.0 % | 100.0 %")
    file.write_text("pt-PT O autocarro.\n")
    assert main([str(file)]) == 1 and "line 1 has no tab" in capsys.readouterr().err
    file.write_text("pt\tO autocarro.\n")
    assert main([str(file)]) == 1 and "'pt' is neither" in capsys.readouterr().err


def test_interval_is_wilson_s() -> None:
    for part, whole in ((8, 10), (0, 5), (371, 378)):
        expected = binomtest(part, whole).proportion_ci(method="wilson")
        assert interval(part, whole) == pytest.approx((expected.low, expected.high), abs=1e-6)
    assert interval(0, 0) == (0.0, 1.0)


def test_signs_of_formats_are_no_french() -> None:
    text = 'Instalar pacote "%s" para disponibilizar comando "%d"? %s: %s'
    assert not is_foreign(guess_language(text))
