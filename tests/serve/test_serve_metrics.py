"""`/metrics`: names that public dashboards read, and numbers that agree with what clients counted."""

from __future__ import annotations

import httpx
from prometheus_client.parser import text_string_to_metric_families
from serving import Start, metric

NAMES = {
    "gauge": ["num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "cache_config_info"],
    "counter": [
        *["num_preemptions", "prompt_tokens", "generation_tokens", "prefix_cache_queries", "prefix_cache_hits"],
        *["request_success", "spec_decode_num_draft_tokens", "spec_decode_num_accepted_tokens"],
        *["admission_rejections", "prompt_tokens_cached"],
    ],
    "histogram": [
        *["time_to_first_token_seconds", "inter_token_latency_seconds", "request_time_per_output_token_seconds"],
        *["e2e_request_latency_seconds", "request_queue_time_seconds", "request_prefill_time_seconds"],
        *["request_decode_time_seconds", "request_inference_time_seconds", "request_prompt_tokens"],
        *["request_generation_tokens", "iteration_tokens_total", "request_params_n", "request_params_max_tokens"],
    ],
}


def test_names_types_and_labels(client: httpx.Client) -> None:
    client.post("/v1/completions", json={"prompt": "Hello", "max_tokens": 2})
    answer = client.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    families = {family.name: family for family in text_string_to_metric_families(answer.text)}
    for kind, names in NAMES.items():
        for name in names:
            family = families[f"vllm:{name}"]
            assert family.type == kind, name
            for sample in family.samples:
                assert sample.labels["model_name"] == "tiny"
                assert sample.labels["engine"] == "0"
    (info,) = families["vllm:cache_config_info"].samples
    assert (info.labels["block_size"], info.labels["num_gpu_blocks"]) == ("16", "256")
    first_bounds = [
        float(s.labels["le"]) for s in families["vllm:inter_token_latency_seconds"].samples if "le" in s.labels
    ]
    assert first_bounds[0] < 0.0025


def test_labels_stay_bounded(client: httpx.Client) -> None:
    def series() -> int:
        return len(client.get("/metrics").text.splitlines())

    client.post("/v1/completions", json={"prompt": "Hello", "max_tokens": 2, "user": "first"})
    before = series()
    for number in range(20):
        body = {"prompt": f"prompt {number}", "max_tokens": 2, "user": f"user {number}", "cache_salt": f"{number}"}
        client.post("/v1/completions", json=body, headers={"x-request-id": f"id-{number}"})
    assert series() <= before + 2  # at most one more finish reason


def test_numbers_agree_with_the_client(start: Start) -> None:
    server = start().wait_ready()
    with server.client() as client:
        for _ in range(3):
            client.post("/v1/completions", json={"prompt": [70, 71, 72], "max_tokens": 5, "n": 2})
        assert metric(client, "request_success_total") == 6
        assert metric(client, "time_to_first_token_seconds_count") == 6
        assert metric(client, "request_generation_tokens_sum") == 30
        assert metric(client, "inter_token_latency_seconds_count") == 24
        assert metric(client, "request_prompt_tokens_sum") == 9
        assert metric(client, "request_params_n_sum") == 6
        parts = metric(client, "request_prefill_time_seconds_sum") + metric(client, "request_decode_time_seconds_sum")
        assert abs(parts - metric(client, "request_inference_time_seconds_sum")) < 1e-6
        whole = parts + metric(client, "request_queue_time_seconds_sum")
        assert abs(whole - metric(client, "e2e_request_latency_seconds_sum")) < 1e-6
