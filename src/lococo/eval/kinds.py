"""What is known of tasks: the score that counts, and where their documents are.

Where lm-evaluation-harness has a task, its prompts and metrics are used. SCROLLS is ours, since the harness fetches the
code of its metrics from the hub.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from lococo.eval import copies, ruler, scrolls
from lococo.eval.copies import Document

Read = Callable[[Path], list[Document]]


@dataclass(frozen=True)
class Kind:
    """What is known of a task.

    Attributes:
        metric: The score that counts.
        folder: Of its local copy; "" for none.
        read: Reads the copy.
        hub: Reads the hub's data set, for tasks of ours that have one; the harness's find theirs.
        ours: Whether the documents are those of `copies.question_of`.
        answer: Most tokens of an answer, of ours.
        long: Whether its documents may be longer than a window.
        stop: What ends an answer, of ours.
    """

    metric: str
    folder: str = ""
    read: Read | None = None
    hub: Callable[[], list[Document]] | None = None
    ours: bool = False
    answer: int = 32
    long: bool = False
    stop: tuple[str, ...] = ("\n",)


def _ours(metric: str, folder: str, read: Read | None, **more: Any) -> Kind:
    return Kind(metric, folder, read, ours=True, **more)


BABI = range(1, 21)

KINDS: dict[str, Kind] = {
    "hellaswag": Kind("acc_norm", "hellaswag", copies.hellaswag),
    "winogrande": Kind("acc", "winogrande", copies.winogrande),
    "race": Kind("acc", "race", copies.race),
    "triviaqa": Kind("exact_match", "triviaqa", copies.triviaqa),
    "logiqa2": Kind("acc_norm", "logiqa2", copies.logiqa2),
    "arc_easy": Kind("acc_norm", "arc_easy", copies.arc),
    "arc_challenge": Kind("acc_norm", "arc_challenge", copies.arc),
    "squad": _ours("f1", "squad", copies.squad),
    "hotpotqa": _ours("f1", "hotpotqa", copies.hotpotqa),
    "narrativeqa_summaries": _ours("f1", "narrativeqa_summaries", copies.squad),
    "qasper_yesno": _ours("acc", "qasper_yesno", copies.qasper_yesno, long=True),
    **{f"babi_qa{n}": _ours("acc", "babi", partial(copies.babi, number=n)) for n in BABI},
    "scrolls_qmsum": _ours("rouge", "qmsum", copies.qmsum, hub=scrolls.qmsum, answer=128, long=True),
    "scrolls_contractnli": _ours("acc_norm", "contract_nli", copies.contract_nli, hub=scrolls.contract_nli, long=True),
    "scrolls_quality": _ours("acc_norm", "", None, hub=scrolls.quality, long=True),
    "scrolls_qasper": _ours("f1", "", None, hub=scrolls.qasper, answer=64, long=True),
    "scrolls_narrativeqa": _ours("f1", "", None, hub=scrolls.narrativeqa, long=True),
    "scrolls_govreport": _ours("rouge", "", None, hub=scrolls.gov_report, answer=512, long=True),
    "scrolls_summscreenfd": _ours("rouge", "", None, hub=scrolls.summ_screen, answer=256, long=True),
    # Whatever is written counts, as in RULER: lists may stand on lines of their own.
    **{family: _ours("found", "", None, answer=tokens, stop=()) for family, tokens in ruler.ANSWER_TOKENS.items()},
}
