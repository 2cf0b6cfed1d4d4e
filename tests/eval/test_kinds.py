import pytest
import yaml

from lococo.eval.choice import TaskChoice

pytest.importorskip("lm_eval")

from lococo.eval.kinds import KINDS
from lococo.eval.tasks import check_name


def test_the_recipes_name_known_tasks(request):
    recipes = sorted((request.config.rootpath / "recipes").glob("eval-*.yaml"))
    assert len(recipes) == 5
    named = set()
    for recipe in recipes:
        named |= {TaskChoice.of(described).name for described in yaml.safe_load(recipe.read_text())["tasks"]}
    longbench = {name for name in named if name.startswith("longbench_")}
    assert len(longbench) == 21
    assert len({name for name in named if name.startswith("scrolls_")}) == 7
    assert named - longbench <= KINDS.keys()
    for name in longbench:
        check_name(name)
