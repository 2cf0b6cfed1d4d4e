import sysconfig

from lococo.train.run import standard_library


def test_the_standard_library_may_lie_in_any_folder(tmp_path, monkeypatch):
    folder = tmp_path / "test" / "site-packages" / "python3"
    for name in ("a.py", "b.py", "test/c.py", "site-packages/d.py", "pydoc_data/topics.py"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("text = 1\n")
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(folder))
    corpus, held_out = standard_library(None)
    found = {d.file.name for part in (corpus, held_out) for all_of in part.domains.values() for d in all_of}
    assert found == {"a.py", "b.py", "topics.py"}
