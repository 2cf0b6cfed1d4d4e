from io import StringIO

import pytest
from rich.console import Console

from lococo.train.progress import final_table


@pytest.mark.parametrize(
    ("objective", "apart", "title"),
    [
        ("distillation", True, "loss on held-out text, nats per token"),
        ("attention", True, "loss on held-out text, share of attention's energy"),
        ("next-token", False, "loss on the text that was trained on, nats per token"),
    ],
)
def test_the_final_table_says_what_was_measured_on_what(objective, apart, title):
    recipe = {"objective": objective}
    losses = {"held_out_before": {"24": 0.5, "40": 0.0}, "held_out": {"24": 0.25, "40": 0.1}}
    said = StringIO()
    Console(file=said, width=100).print(final_table({"recipe": recipe, "held_out_was_kept_apart": apart, **losses}))
    assert title in " ".join(said.getvalue().split())
    assert "0.5000" in said.getvalue()
    assert "-50%" in said.getvalue()
