"""The table of docs/scaling.md against the plans that it shows."""

from benchmarks import scaling


def test_the_table_is_what_the_plans_say():
    text = scaling.DOCUMENT.read_text()
    assert text.count(scaling.START) == text.count(scaling.END) == 1
    shown = text.split(scaling.START)[1].split(scaling.END)[0]
    assert shown.strip() == scaling.table().strip()
    models = len(scaling.MODELS) * len(scaling.DEVICES)
    assert len(shown.strip().splitlines()) == 2 + models
