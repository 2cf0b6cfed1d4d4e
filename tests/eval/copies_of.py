"""Small made-up copies of benchmarks, laid out as real ones are."""

import json


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def save(folder, rows=6):
    """Write a copy of every benchmark that can be read, with so many rows."""
    number = range(rows)
    write(
        folder / "hellaswag/validation.jsonl",
        [
            {"ctx_a": f"A dog {i}.", "ctx_b": "he", "activity_label": "Dogs", "endings": list("abcd"), "label": i % 4}
            for i in number
        ],
    )
    write(
        folder / "winogrande/validation.jsonl",
        [{"sentence": f"{i} fox ate _ .", "option1": "dog", "option2": "zebra", "answer": "1"} for i in number],
    )
    for name in ("arc_easy", "arc_challenge"):
        rows_of = [{"question": f"How {i}?", "choices": ["lazy", "quick", "brown"], "gold": i % 3} for i in number]
        write(folder / name / "test.jsonl", rows_of)
    write(
        folder / "triviaqa/validation.jsonl",
        [{"question": f"Who {i}", "answer": "fox", "aliases": ["fox", "dog"]} for i in number],
    )
    texts = [{"doc_id": i, "text": "The quick brown fox jumps over the lazy dog. " * (4 - i)} for i in range(2)]
    asked = [{"doc_id": i % 2, "question": f"Who jumps {i}?", "hypothesis": f"Dog {i} jumps."} for i in number]
    for name, answered in {
        "squad": {"answers": ["fox"]},
        "narrativeqa_summaries": {"answers": ["the fox", "a fox"]},
        "qasper_yesno": {"answer": "Yes"},
        "qmsum": {"answer": "A fox jumps over a dog."},
        "contract_nli": {"answer": "NotMentioned"},
    }.items():
        write(folder / name / "val_docs.jsonl", texts)
        write(folder / name / "val_questions_6.jsonl", [row | answered for row in asked])
    paragraphs = [{"title": "Fox", "text": "It jumps."}, {"title": "Dog", "text": "It is lazy."}]
    questions = [{"question": f"Who {i}?", "answer": "fox", "paragraphs": paragraphs} for i in number]
    write(folder / "hotpotqa/dev.jsonl", questions)
    story = "1 John went home.\n2 Where is John?\thome\t1\n3 Mary went out.\n4 Where is Mary?\tout\t3\n"
    (folder / "babi").mkdir()
    (folder / "babi/qa1_facts_test.txt").write_text(story * rows)
