import importlib
import subprocess
import sys

import lococo
from lococo import errors


def test_every_public_name_is_there():
    for name in lococo.__all__:
        assert getattr(lococo, name) is not None
    assert sorted(lococo.__all__) == sorted(lococo._HOMES)


def test_no_submodule_takes_the_place_of_a_public_name():
    for name in lococo.__all__:
        importlib.import_module(f"lococo.{lococo._HOMES[name]}")
        assert not isinstance(getattr(lococo, name), type(sys))


def test_importing_the_package_does_not_import_torch():
    subprocess.run([sys.executable, "-c", "import sys, lococo; assert 'torch' not in sys.modules"], check=True)


def test_the_exception_tree_is_the_one_drawn():
    drawn = [line.split("── ")[1].split()[0] for line in errors.__doc__.splitlines() if "── " in line]
    defined = [name for name, value in vars(errors).items() if isinstance(value, type) and name != "LococoError"]
    assert sorted(drawn) == sorted(defined)
    assert all(issubclass(getattr(errors, name), errors.LococoError) for name in defined)
