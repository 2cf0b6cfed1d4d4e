"""Figures for Prometheus."""

import threading

import httpx
from commands import WORDS
from prometheus_client.parser import text_string_to_metric_families
from servers import Running

CHAT = {"messages": [{"role": "user", "content": "Who?"}], "temperature": 0, "max_tokens": 12}


def figures(client: httpx.Client) -> dict[str, float]:
    families = text_string_to_metric_families(client.get("/metrics").text)
    return {
        sample.name + "".join(sorted(sample.labels.values())): sample.value
        for family in families
        for sample in family.samples
    }


def test_figures_count_what_was_done(client: httpx.Client, served: Running) -> None:
    before = figures(client)
    usage = client.post("/v1/chat/completions", json=CHAT | {"messages": [{"role": "user", "content": WORDS * 2}]})
    prompt = usage.json()["usage"]["prompt_tokens"]
    after = figures(client)
    more = {name: after[name] - before.get(name, 0) for name in after}
    assert more["lococo_prompt_tokens_total"] == prompt
    assert more["lococo_completion_tokens_total"] == 12
    assert more["lococo_steps_total"] == 11
    assert more["lococo_compressions_total"] == (prompt + 11 - 1 - 32) // 16
    assert more["lococo_requests_total/v1/chat/completions200"] == 1
    assert more["lococo_request_seconds_count/v1/chat/completions"] == 1
    assert after["lococo_batch_size"] == after["lococo_queue_length"] == after["lococo_kv_bytes"] == 0
    assert after["lococo_resident_bytes"] > 1 << 20
    assert more["lococo_conversations"] == 1


def test_an_index_in_use_holds_up_the_figures_and_nobody_else(client: httpx.Client, served: Running) -> None:
    said: list[int] = []
    with served.client() as other:
        waits = threading.Thread(target=lambda: said.append(other.get("/metrics").status_code))
        with served.state.store._lock:  # as while another process writes
            waits.start()
            waits.join(0.3)
            assert client.get("/health", timeout=5).status_code == 200
            assert said == []
        waits.join(10)
    assert said == [200]
