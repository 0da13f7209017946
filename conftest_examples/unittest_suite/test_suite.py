"""A suite in the style of SGLang's own: `unittest.TestCase`, one class for each server."""

import unittest

import httpx
import pytest

LOAD = {"num_prompts": 64, "max_concurrency": 8, "random_input_len": 64, "random_output_len": 128}


class CustomTestCase(unittest.TestCase):
    """What the classes share. `self.sglang_server` is there from setUp on."""

    def generate(self, text, max_new_tokens=8):
        parameters = {"max_new_tokens": max_new_tokens, "temperature": 0}
        answer = httpx.post(
            f"{self.base_url}/generate",
            json={"text": text, "sampling_params": parameters},
            timeout=60,
        )
        self.assertEqual(answer.status_code, 200)
        return answer.json()


@pytest.mark.sglang_server
class TestTwoRanks(CustomTestCase):
    def setUp(self):
        self.base_url = self.sglang_server.url

    def test_generate(self):
        for length in (1, 8):
            with self.subTest(length=length):
                answer = self.generate("The capital of France is", length)
                self.assertLessEqual(answer["meta_info"]["completion_tokens"], length)

    @pytest.mark.profile_window(num_steps=100, slowdown=1.2)
    def test_ranks_are_balanced(self):
        load = self.bench_serving(**LOAD)
        self.assertEqual(load.completed, LOAD["num_prompts"])

    def test_a_window_by_hand(self):
        with self.profile_window("whole load") as window:
            self.bench_serving(**LOAD)
        window.check("slowdown", 1.2)


@pytest.mark.sglang_server("one_rank")
class TestOneRank(CustomTestCase):
    def setUp(self):
        self.base_url = self.sglang_server.url

    def test_generate(self):
        self.assertIn("text", self.generate("The capital of France is"))
