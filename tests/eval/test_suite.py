import json

import copies_of
import pytest
import torch
from commands import WORDS, refused, save_llama

import lococo
from lococo import cli
from lococo.compressors.heads import save_heads
from lococo.errors import ArgumentError, DocumentError
from lococo.facts import ModelFacts
from lococo.results import Results

pytest.importorskip("lm_eval")

from datasets import Dataset, DatasetDict
from lm_eval.api.task import ConfigurableTask
from lm_eval.evaluator import evaluate as ask
from lm_eval.models.huggingface import HFLM

from lococo.eval import suite
from lococo.eval.choice import TaskChoice
from lococo.eval.tasks import AbsentError, Tasks

ALL = [
    {"name": "hellaswag", "shots": 2},
    {"name": "winogrande", "shots": 3},
    {"name": "arc_easy", "shots": 2},
    {"name": "triviaqa", "shots": 3},
    {"name": "babi_qa1", "shots": 2},
    "squad",
    "hotpotqa",
    "qasper_yesno",
    "scrolls_contractnli",
    {"name": "scrolls_qmsum", "length": 250},
    {"name": "ruler_niah_single", "length": 400},
]


@pytest.fixture(scope="module")
def reader(tmp_path_factory):
    words = WORDS + "Question: Answer: 0123456789 "
    folder = save_llama(tmp_path_factory.mktemp("models") / "reader", words=words, window=1024)
    model, tokenizer = lococo.load_model(folder)
    tokenizer.eos_token = tokenizer.pad_token = "<|end|>"
    tokenizer.save_pretrained(folder)
    return folder, model, tokenizer


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench")
    copies_of.save(folder)
    return folder


def tasks_of(reader, data, limit=2, text=WORDS * 40):
    return Tasks(reader[2], data=data, text=lambda: [text], limit=limit)


def ready(reader, data, choices, **more):
    return [tasks_of(reader, data, **more).find(TaskChoice.of(choice)) for choice in choices]


def measured(reader, tasks, *compressors, **more):
    ways = suite.readings(reader[1], compressors, [32, 48], 16)
    return suite.evaluate(reader[1], reader[2], tasks, ways, **more)


def test_every_task_has_a_row_of_every_way_of_reading(reader, data):
    rows = measured(reader, ready(reader, data, ALL), "h2o", "mass-merge")
    assert [row["task"] for row in rows if "skipped" in row] == []
    assert len(rows) == len(ALL) * (1 + 2 * 2)
    for row in rows:
        assert 0 <= row["score"] <= 1
        assert row["low"] is row["high"] is None  # of two documents
        assert row["questions"] == 2 == len(row["documents"])
        assert all(len(scores) == 2 for scores in row["scores"].values())
        assert row["prompt_tokens"]["max"] >= row["prompt_tokens"]["mean"] > 0
        assert row["num_slots"] in ((None,) if row["compressor"] == "full" else (32, 48))
    cut = {row["task"] for row in rows if row["truncated"]}
    assert cut == {"scrolls_qmsum"}


@pytest.mark.parametrize("name", ["hellaswag", "triviaqa", "qasper_yesno", "squad"])
def test_the_full_cache_scores_as_the_harness_own_class(reader, data, name):
    _, model, tokenizer = reader
    [row] = measured(reader, ready(reader, data, [{"name": name, "shots": 1}], limit=4))
    [task] = ready(reader, data, [{"name": name, "shots": 1}], limit=4)
    harness = HFLM(model, tokenizer=tokenizer)
    theirs = ask(harness, {name: task.asked}, bootstrap_iters=0, log_samples=True, limit=4)
    samples = sorted(theirs["samples"][name], key=lambda sample: sample["doc_id"])
    for metric, scores in row["scores"].items():
        assert scores == [sample[metric] for sample in samples]


def test_what_was_measured_is_not_measured_again(reader, data, tmp_path, monkeypatch):
    file = tmp_path / "suite.jsonl"
    choices = ["squad", {"name": "arc_easy", "shots": 1}]

    def run(limit=2):
        return measured(reader, ready(reader, data, choices, limit=limit), "h2o", results=Results(file))

    first = run()
    with monkeypatch.context() as patched:
        patched.setattr(suite, "ask", None)
        assert run() == first
        with pytest.raises(TypeError):
            run(limit=3)


def test_a_prompt_beyond_the_window_is_skipped_and_said_so(reader, data):
    choices = [{"name": "winogrande", "shots": 5, "length": 40}, "squad"]
    said = []
    rows = measured(reader, ready(reader, data, choices, limit=1), "h2o", say=said.append)
    assert [row["task"] for row in rows] == ["winogrande", *["squad"] * 3]
    assert "fit a window of 40" in rows[0]["skipped"]
    assert said[0].startswith("skipped  winogrande: a prompt of ")
    with pytest.raises(ArgumentError, match="length 2000 leaves the full cache's window of 1024"):
        measured(reader, ready(reader, data, [{"name": "scrolls_qmsum", "length": 2000}]))


def test_folders_of_heads_go_by_their_names(reader, tmp_path):
    facts = ModelFacts.of(reader[1])
    for slots in (32, 48):
        attached = lococo.attach(reader[1], "lococo-paper", num_slots=slots, chunk_size=16)
        save_heads(attached.compressor.merge, tmp_path / f"lococo-paper-{slots}", facts)
    folder = str(tmp_path / "lococo-paper-{num_slots}")
    ways = suite.readings(reader[1], ["h2o", folder], [32, 48], 16)
    assert [(way.label, way.num_slots, way.trained) for way in ways] == [
        ("full", None, False),
        ("h2o", 32, False),
        ("lococo-paper", 32, True),
        ("h2o", 48, False),
        ("lococo-paper", 48, True),
    ]
    with pytest.raises(ArgumentError, match="rename folders"):
        suite.readings(reader[1], ["lococo-paper", folder], [32], 16)


def test_heads_without_training_are_the_same_every_time(reader):
    prints = set()
    for _ in range(2):
        torch.rand(1)  # moves the generator on
        prints.add(lococo.attach(reader[1], "lococo-paper", num_slots=32, chunk_size=16).fingerprint())
    assert len(prints) == 1


def test_examples_are_written_once_for_all_ways_of_reading(reader, data, monkeypatch):
    written, write = [], ConfigurableTask.fewshot_context
    monkeypatch.setattr(
        ConfigurableTask, "fewshot_context", lambda *args, **more: written.append(1) or write(*args, **more)
    )
    rows = measured(reader, ready(reader, data, [{"name": "squad", "shots": 1}]), "h2o")
    assert (len(rows), len(written)) == (3, 2)


def test_examples_are_not_asked_and_few_questions_are_about_one_text(reader, data):
    [task] = ready(reader, data, [{"name": "squad", "shots": 1, "per_document": 1}], limit=None)
    asked = [document["prompt"] for document in task.asked.eval_docs]
    # The example is about the first text: its other questions are not asked.
    assert [prompt[-20:-8] for prompt in asked] == ["Who jumps 1?"]
    [task] = ready(reader, data, [{"name": "squad", "per_document": 2}], limit=None)
    asked = [document["prompt"] for document in task.asked.eval_docs]
    assert [prompt[-20:-8] for prompt in asked] == [f"Who jumps {i}?" for i in range(4)]
    assert [task.documents.index(name) for name in task.documents] == [0, 1, 0, 1]
    with pytest.raises(AbsentError, match="squad has 6 rows, too few for 6 examples and a question"):
        ready(reader, data, [{"name": "squad", "shots": 6}])


def test_what_is_not_here_is_left_out_and_what_is_unknown_refused(reader, data, tmp_path):
    known, results, said = tasks_of(reader, data), Results(), []
    choices = [TaskChoice(name) for name in ("race", "squad", "scrolls_govreport", "babi_qa7")]
    made = suite.ready(known, choices, results, said.append)
    assert [task.choice.name for task in made] == ["squad"]
    assert [row["task"] for row in results.rows] == ["race", "scrolls_govreport", "babi_qa7"]
    assert results.rows[0]["skipped"] == f"race: no such file in {data.name}: race/*.jsonl"
    assert "leave --data-dir out" in results.rows[1]["skipped"]
    copies_of.write(tmp_path / "race/test.jsonl", [{"article": "a", "problems": "[{"}])
    with pytest.raises(DocumentError, match=r"race/test.jsonl, line 1: expected problems to spell a list"):
        suite.ready(tasks_of(reader, tmp_path), [TaskChoice("race")], results, said.append)
    with pytest.raises(ArgumentError, match="did you mean 'hellaswag'"):
        suite.ready(known, [TaskChoice("helaswag")], results, said.append)


def test_a_task_of_the_hub_shows_and_asks_the_first_rows(reader, monkeypatch):
    def rows(*numbers):
        choices = {"text": ["red", "blue"], "label": ["A", "B"]}
        return Dataset.from_list(
            [{"id": str(n), "question": f"Which {n}?", "choices": choices, "answerKey": "AB"[n % 2]} for n in numbers]
        )

    parts = DatasetDict({"train": rows(10, 11, 12), "test": rows(0, 1, 2, 3)})
    monkeypatch.setattr("datasets.load_dataset", lambda *args, **options: parts)
    task = tasks_of(reader, None).find(TaskChoice("arc_easy", shots=2))
    task.asked.build_all_requests(limit=None, rank=0, world_size=1)
    shown = "Question: Which 10?\nAnswer: red\n\nQuestion: Which 11?\nAnswer: blue\n\nQuestion: Which "
    prompts = [each.args[0] for each in task.asked.instances]
    assert prompts == [f"{shown}{n}?\nAnswer:" for n in (0, 0, 1, 1)]
    assert [row["question"] for row in task.rows] == ["Which 10?", "Which 11?", "Which 0?", "Which 1?"]


def test_examples_from_what_is_asked_are_not_asked(reader, monkeypatch):
    rows = [{"question": f"How many are {n}?", "answer": f"As many. #### {n}"} for n in range(5)]
    parts = DatasetDict({"test": Dataset.from_list(rows)})
    monkeypatch.setattr("datasets.load_dataset", lambda *args, **options: parts)
    task = tasks_of(reader, None).find(TaskChoice("gsm8k_platinum", shots=2))
    assert [row["question"] for row in task.asked.eval_docs] == ["How many are 2?", "How many are 3?"]
    assert [row["question"] for row in task.asked.fewshot_docs()] == ["How many are 0?", "How many are 1?"]


def test_a_task_may_leave_rows_of_its_data_set_out(reader, monkeypatch):
    def rows(count):
        more = {"options": ["red", "blue"], "answer": "A", "answer_index": 0, "cot_content": "It is."}
        subjects = ["law", "biology", "biology"] * count
        return Dataset.from_list([{"question": f"{s} {n}?", "category": s, **more} for n, s in enumerate(subjects)])

    parts = DatasetDict({"validation": rows(1), "test": rows(2)})
    monkeypatch.setattr("datasets.load_dataset", lambda *args, **options: parts)
    task = tasks_of(reader, None).find(TaskChoice("mmlu_pro_biology", shots=1))
    assert [row["question"] for row in task.asked.eval_docs] == ["biology 1?", "biology 2?"]
    assert [row["question"] for row in task.asked.fewshot_docs()] == ["biology 1?"]
    assert len(task.documents) == 2


@pytest.mark.filterwarnings("ignore::UserWarning")  # of packages that only LongBench's metrics need
@pytest.mark.parametrize("name", ["race", "scrolls_govreport", "longbench_trec"])
def test_a_data_set_of_the_hub_is_missed_at_once_when_offline(reader, name):
    with pytest.raises(AbsentError, match=f"^{name}: its data set cannot be fetched"):
        tasks_of(reader, None).find(TaskChoice(name))
    with pytest.raises(AbsentError, match="the hub has no such data set"):
        tasks_of(reader, None).find(TaskChoice("qasper_yesno"))


def test_the_command_goes_from_a_recipe_to_a_report(reader, data, tmp_path, capsys):
    recipe = tmp_path / "recipe.yaml"
    tasks = ["squad", "race", {"name": "arc_easy", "shots": 1}]
    recipe.write_text(json.dumps({"compressor": ["h2o"], "num_slots": [32], "chunk_size": 16, "tasks": tasks}))
    words = ["eval", "suite", "--config", str(recipe), "--data-dir", str(data), "--output", str(tmp_path / "out")]
    trained = tmp_path / "texts"
    trained.mkdir()
    (trained / "a.txt").write_text("The quick brown fox jumps over the lazy dog. " * 3)
    assert cli.main([*words, "--model", reader[0], "--limit", "2", "--trained-on", str(trained)]) == 0
    said = capsys.readouterr()
    assert "skipped  race" in said.err
    assert "warning: 2 of 2 rows of squad share 13 words in a row with texts" in said.err
    assert "arc_easy, 1 shots, acc_norm" in said.out
    rows = [json.loads(line) for line in (tmp_path / "out/suite.jsonl").read_text().splitlines()]
    assert [row["task"] for row in rows if "scores" in row] == ["squad"] * 2 + ["arc_easy"] * 2
    assert cli.main(["report", str(tmp_path / "out"), "-o", str(tmp_path / "report.html")]) == 0
    assert "where heads are behind" in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--compressor", "h2"], "did you mean 'h2o'"),
        (["--tasks", "squat"], "did you mean 'squad'"),
        (["--data-dir", "nowhere"], "--data-dir nowhere: no such folder"),
        # Before the model is looked for.
        (["--tasks", "squat", "--model", "nowhere/model"], "did you mean 'squad'"),
        (["--tasks", "squad", "arc_easy", "squad"], "task squad is named twice with the same shots"),
        (["--config", "EMPTY/tasks.yaml"], "no task was named; name one or more with --tasks"),
        (["--config", "EMPTY/compressor.yaml"], "--compressor is empty; name one or more"),
        (["--trained-on", "EMPTY/texts"], "texts holds no .txt or .jsonl file; name a folder of texts"),
        (["--text", "EMPTY/texts"], "texts holds no .txt or .jsonl file; name a folder of texts"),
    ],
)
def test_names_are_checked_before_anything_is_measured(reader, data, tmp_path, capsys, words, said):
    given = ["--tasks", "squad", "--compressor", "h2o", "--data-dir", str(data), "--output", str(tmp_path / "out")]
    (tmp_path / "texts").mkdir()
    for name in ("tasks", "compressor"):
        (tmp_path / f"{name}.yaml").write_text(f"{name}: []")
    words = [word.replace("EMPTY", str(tmp_path)) for word in words]
    line = refused(["eval", "suite", *given, "--model", reader[0], *words], capsys)
    assert said in line
    assert not list(tmp_path.rglob("suite.jsonl"))
    assert torch.is_grad_enabled()
