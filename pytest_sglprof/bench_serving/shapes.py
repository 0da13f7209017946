"""Loads that are equal or unequal on purpose, as keywords of `bench_serving`."""

from __future__ import annotations

from typing import Any


def balanced_load(
    *, concurrency: int = 32, requests: int = 256, input_len: int = 256, output_len: int = 256
) -> dict[str, Any]:
    """Requests of one length: the server's own balancing gives each DP rank as many.

    concurrency: in flight, over all ranks. input_len, output_len: tokens.
    """
    return {
        "num_prompts": requests,
        "max_concurrency": concurrency,
        "random_input_len": input_len,
        "random_output_len": output_len,
        "random_range_ratio": 1.0,
    }


def one_rank_load(rank: int = 0, *, field: str = "routed_dp_rank", **shape: int) -> dict[str, Any]:
    """All requests to one DP rank. shape: keywords of `balanced_load`.

    field: how the request names the rank; servers before 0.5.23 know `data_parallel_rank`.
    """
    return {**balanced_load(**shape), "extra_request_body": {field: rank}}


def uneven_load(**shape: int) -> dict[str, Any]:
    """Lengths evenly spread from 1 to the full one: ranks get as many requests in turn, and
    different work. The driver shuffles what it sends, so long and short ones alternate by
    chance only. shape: keywords of `balanced_load`.
    """
    return {**balanced_load(**shape), "random_range_ratio": 0.0}


def routing_key_load(
    *, groups: int = 16, requests: int = 256, concurrency: int = 32, skew: float = 1.5
) -> dict[str, Any]:
    """Requests of few users, most from one, each with its user as routing key.

    For a server behind SGLang's router, which sends a key always to the same rank; needs
    SGLang's own load driver. skew: exponent of the Zipf distribution of users, above 0.
    """
    return {
        "dataset_name": "generated-shared-prefix",
        "num_prompts": requests,
        "max_concurrency": concurrency,
        "gsp_num_groups": groups,
        "gsp_prompts_per_group": max(1, requests // groups),
        "gsp_group_distribution": "zipf",
        "gsp_zipf_alpha": skew,
        "gsp_send_routing_key": True,
    }
