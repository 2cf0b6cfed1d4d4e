import pytest
from commands import tokenizer_of

from lococo.documents import demo_text
from lococo.errors import ArgumentError, DocumentError
from lococo.eval import metrics, ruler


@pytest.fixture(scope="module")
def words():
    return tokenizer_of(demo_text()[:20_000])


@pytest.fixture(scope="module")
def haystack(words):
    return ruler.Haystack.of(words, [demo_text()], 20_000)


@pytest.mark.parametrize("family", ruler.FAMILIES)
@pytest.mark.parametrize("length", [1200, 3000])
def test_every_answer_is_in_a_prompt_of_the_length_asked_for(words, haystack, family, length):
    made = ruler.examples(family, words, haystack, length=length, count=3)
    assert len({example["prompt"] for example in made}) == 3
    for example in made:
        tokens = len(words(example["prompt"])["input_ids"])
        assert 0.6 * length < tokens <= length
        text, _, question = example["prompt"].rpartition("\nQuestion:")
        assert metrics.found(text, example["answers"]) == 1
        assert metrics.found(question, example["answers"]) == 0
        assert len(set(example["answers"])) == len(example["answers"])


def test_a_text_without_full_stops_fills_prompts_as_well(words):
    text = demo_text().replace(".", "").replace("!", "").replace("?", "")
    haystack = ruler.Haystack.of(words, [text], 20_000)
    for example in ruler.examples("ruler_niah_single", words, haystack, length=600, count=20):
        assert 600 - 2 * ruler.MOST_PER_SENTENCE < len(words(example["prompt"])["input_ids"]) <= 600


@pytest.mark.parametrize(
    ("family", "answers", "needles"),
    [
        ("ruler_niah_single", 1, 1),
        ("ruler_niah_multikey", 1, ruler.KEYS),
        ("ruler_niah_multivalue", ruler.VALUES, ruler.VALUES),
        ("ruler_niah_multiquery", ruler.KEYS, ruler.KEYS),
    ],
)
def test_as_many_numbers_are_hidden_and_asked_for_as_the_family_says(words, haystack, family, answers, needles):
    [example] = ruler.examples(family, words, haystack, length=2000, count=1)
    assert len(example["answers"]) == answers
    assert example["prompt"].count("One of the magic numbers of ") == needles


def test_every_family_says_how_long_its_answers_are():
    assert ruler.ANSWER_TOKENS.keys() == ruler.FAMILIES.keys()


def test_variables_are_assigned_before_they_are_used(words, haystack):
    [example] = ruler.examples("ruler_vt", words, haystack, length=2000, count=1)
    text = example["prompt"]
    chain = [text.index(f"VAR {name} = ") for name in example["answers"]]
    assert chain == sorted(chain)


@pytest.mark.parametrize("family", ["ruler_cwe", "ruler_fwe"])
def test_the_answers_are_the_commonest_words(words, haystack, family):
    from collections import Counter

    [example] = ruler.examples(family, words, haystack, length=3000, count=1)
    listed = example["prompt"].split("\n")[1].split()
    counted = Counter(word for word in listed if not word.endswith("."))
    assert {word for word, _ in counted.most_common(len(example["answers"]))} == set(example["answers"])


def test_the_same_seed_makes_the_same_examples(words, haystack):
    one, same, other = (
        ruler.examples("ruler_niah_single", words, haystack, length=900, count=2, seed=seed) for seed in (0, 0, 1)
    )
    assert one == same != other


def test_what_leaves_no_room_or_has_no_words_is_refused(words, haystack):
    for family in ("ruler_niah_single", "ruler_cwe", "ruler_fwe"):
        with pytest.raises(ArgumentError, match="raise the length"):
            ruler.examples(family, words, haystack, length=70, count=1)
    with pytest.raises(DocumentError, match="different words"):
        ruler.Haystack.of(words, ["one two three."], 100)
    short = ruler.Haystack.of(words, [" ".join(haystack.words[:40]) + "."], 100)
    with pytest.raises(DocumentError, match="give a longer one"):
        ruler.examples("ruler_niah_single", words, short, length=3000, count=1)


def test_questions_have_one_answer_however_short_the_text(words, haystack):
    from collections import Counter

    made = 0
    for length in range(80, 400, 10):
        try:
            [example] = ruler.examples("ruler_fwe", words, haystack, length=length, count=1)
        except ArgumentError:
            continue
        made += 1
        counted = Counter(example["prompt"].split("\n")[1].split()).most_common(ruler.FREQUENT + 1)
        assert {word for word, _ in counted[:-1]} == set(example["answers"])
        assert counted[-2][1] > counted[-1][1]
    assert made > 5
    few = ruler.Haystack.of(words, [" ".join(haystack.words[: ruler.COMMON]) + "."], 100)
    with pytest.raises(DocumentError, match="more than 10 different words, got 10"):
        ruler.examples("ruler_cwe", words, few, length=900, count=1)
