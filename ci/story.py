"""The story of a running server, for real: from an uneven load to the page that explains it.

    eval "$(python3 ci/real_env.py)"
    python -m ci.story [--seed N] [--write docs/walkthrough.md]

Starts a real SGLang of two ranks with DP attention under a real `nsys profile --start-later`, as
docs/running-server.md says, and sends it requests. Which rank gets more of them, how many more, and
when, is drawn at random. From then on only `sglprof` is used, and each answer is checked against
what was drawn. Takes about four minutes. The exit status is 1 where an answer is wrong.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from pytest_sglprof._server.client import url_to
from tests.support.dp_attention import ARGS, MODEL, RANKS
from tests.support.real_env import CPU_ARGUMENTS, RealSglang, real_nsys, real_sglang

READY_S = 400.0
CLIENTS = 20  # that send requests, each one after the other
EVEN = {0: CLIENTS // 2, 1: CLIENTS // 2}
# A CPU server runs few requests, and what one rank has beyond twice that of the other is explained
# by no law: so the load is less uneven than it would have to be by default.
RULE = ("--factor", "1.15", "--min-running", "4", "--min-gap", "2")
COLUMNS = 100
SESSION = "serving"


@dataclass
class Load:
    """Requests to DP ranks, from `CLIENTS` clients. clients: how many send to each rank."""

    url: str
    clients: dict[int, int] = field(default_factory=lambda: dict(EVEN))
    over: threading.Event = field(default_factory=threading.Event)
    failures: list[str] = field(default_factory=list)

    def _client(self, number: int) -> None:
        with httpx.Client(base_url=self.url, timeout=120, trust_env=False) as http:
            while not self.over.is_set():
                place = 7 * number % CLIENTS  # so that each rank gets short and long requests
                rank = 0 if place < self.clients[0] else 1
                # Each client's requests have a length of their own: equal ones come in waves.
                sampling = {"max_new_tokens": 90 + 7 * number, "ignore_eos": True}
                prompt = [10 + (7 * number + at) % 900 for at in range(24 + 4 * number)]
                body = {"input_ids": prompt, "routed_dp_rank": rank, "sampling_params": sampling}
                try:
                    http.post("/generate", json=body).raise_for_status()
                except httpx.HTTPError as error:
                    if not self.over.is_set():
                        self.failures.append(repr(error))
                    return

    @contextlib.contextmanager
    def becomes(self, clients: dict[int, int], *, after: float) -> Iterator[None]:
        """Gives the clients to other ranks so many seconds after the block began."""
        change = threading.Timer(after, lambda: setattr(self, "clients", clients))
        change.start()
        try:
            yield
        finally:
            change.join()

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Sends requests during the block."""
        threads = [threading.Thread(target=self._client, args=(n,)) for n in range(CLIENTS)]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            self.over.set()
            with contextlib.suppress(httpx.HTTPError):
                body = {"rid": "", "abort_all": True}
                httpx.post(f"{self.url}/abort_request", json=body, timeout=30, trust_env=False)
            for thread in threads:
                thread.join()


@dataclass
class Story:
    """The commands of the story and their output, and where an answer was not right."""

    folder: Path
    environment: dict[str, str]
    parts: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)

    def tell(self, text: str) -> None:
        """Adds a paragraph."""
        self.parts.append(f"{text}\n")
        print(f"\n{text}", flush=True)

    def sglprof(self, *words: str, expected: tuple[int, ...], limit: float = 240.0) -> str:
        """Runs a command, adds it with its output, and returns the output."""
        command = f"$ sglprof {shlex.join(words)}"
        print(command, flush=True)
        ran = subprocess.run(
            [sys.executable, "-m", "pytest_sglprof", *words],
            cwd=self.folder,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=limit,
            check=False,
        )
        output = ran.stdout.replace(f"{self.folder}/", "").rstrip()
        print(output, flush=True)
        self.parts.append(f"```console\n{command}\n{output}\n```\n")
        if ran.returncode not in expected:
            self.wrong.append(f"{command}: exit status {ran.returncode}, not one of {expected}")
        return output

    def must_say(self, output: str, pattern: str, meaning: str) -> None:
        """Notes that an answer lacks what it must say."""
        if not re.search(pattern, output):
            self.wrong.append(f"{meaning}: no {pattern!r} in\n{output}")

    def factor(self, output: str, drawn: float) -> None:
        """Notes a λ of the load that is far from the one that was drawn."""
        factors = [float(text) for text in re.findall(r"λ (\d+\.\d+)", output)]
        if not factors or abs(max(factors) - drawn) > 0.35:
            self.wrong.append(f"λ was {drawn:.2f} by the requests that were sent: {factors}")


HEAD = """# From an uneven load to the page

A running server, one of whose ranks falls behind now and then: what to type, and what is answered.
The server is a real SGLang with DP attention on two ranks of a CPU, under a real nsys. This page
was written by `python -m ci.story`, which draws at random which rank gets more requests, how many
more and when, and checks that the answers name them. On a CPU two ranks slow each other down, so
the figures of kernels mean little here.
"""


def run(story: Story, load: Load, rng: random.Random) -> None:
    """The commands, and what the load does meanwhile."""
    busy = rng.randrange(RANKS)
    more = rng.choice((12, 13))
    uneven = {busy: more, 1 - busy: CLIENTS - more}
    print(f"drawn: DP{busy} gets {more} of {CLIENTS} requests", flush=True)
    name, ratio = f"DP{busy}", more / (CLIENTS / 2)

    story.tell("What is there, and is anything wrong with its load?")
    story.sglprof("status", load.url, expected=(0,))
    with load.becomes(uneven, after=rng.uniform(4, 8)):
        seen = story.sglprof("watch", load.url, "--for", "20", *RULE, expected=(0,))
    story.must_say(seen, rf"{name} has|DP{1 - busy} is starved", "watch names the rank")
    story.factor(seen, ratio)

    story.tell("A window at the moment when it begins. The load is even again, and then is not:")
    load.clients = dict(EVEN)
    time.sleep(15)  # what the busy rank still runs comes to its end
    with load.becomes(uneven, after=rng.uniform(4, 8)):
        words = ("--when", "onset", "--for", "60", "--steps", "60", *RULE, "-o", "onset")
        seen = story.sglprof("record", load.url, *words, expected=(0, 1, 3))
    story.must_say(seen, f"confirms it: {name} had most to do", "the trace names the rank")
    story.must_say(seen, r"load \(.*\) explains", "the load is kept apart from the speed")

    story.tell("The same load under nsys:")
    words = ("--backend", "nsys", "--seconds", "3", "-o", "nsys")
    seen = story.sglprof("record", load.url, *words, expected=(0, 1, 3))
    story.must_say(seen, "load not known: no batch is recorded", "nsys does not know the load")
    for folder in ("onset", "nsys"):
        if not (story.folder / folder / "report.html").is_file():
            story.wrong.append(f"{folder} has no page")


@contextlib.contextmanager
def running_server(folder: Path, sglang: RealSglang, nsys: str) -> Iterator[str]:
    """The URL of a server that was started by hand, and ends with the block."""
    # SGLang also takes ports above its own: below those that the system hands out.
    port = random.randrange(20_000, 29_000, 100)
    command = [
        *(nsys, "profile", "--start-later=true", f"--session-new={SESSION}"),
        *(f"--output={folder / 'first'}", "--trace=nvtx", "--sample=none", "--cpuctxsw=none"),
        *("--trace-fork-before-exec=true", "--force-overwrite=true"),
        *(sglang.python, "-m", "sglang.launch_server", "--model-path", sglang.model(MODEL)),
        *("--host", "127.0.0.1", "--port", str(port), *CPU_ARGUMENTS, *ARGS),
        *("--max-running-requests", str(RANKS * CLIENTS)),  # nobody waits, whoever gets most
    ]
    environment = {
        **os.environ,
        **sglang.environment(RANKS),
        "SGLANG_ENABLE_NVTX_SCHEDULER": "1",
        "SGLANG_LOG_MS": "1",
        "PYTHONUNBUFFERED": "1",
    }
    url = url_to("http", "127.0.0.1", port)
    log = folder / "server.log"
    with log.open("wb") as output:
        server = subprocess.Popen(
            command, env=environment, stdout=output, stderr=output, start_new_session=True
        )
        try:
            _wait_until_ready(url, server, log)
            yield url
        finally:
            ending = [nsys, "shutdown", "--kill=sigterm", f"--session={SESSION}"]
            subprocess.run(ending, capture_output=True, timeout=60, check=False)
            try:
                server.wait(60)
            except subprocess.TimeoutExpired:
                os.killpg(server.pid, signal.SIGKILL)
                raise


def _wait_until_ready(url: str, server: subprocess.Popen[bytes], log: Path) -> None:
    over = time.monotonic() + READY_S
    while time.monotonic() < over and server.poll() is None:
        with contextlib.suppress(httpx.HTTPError):
            if httpx.get(f"{url}/health_generate", timeout=30, trust_env=False).is_success:
                return
        time.sleep(1)
    raise SystemExit(f"the server did not start:\n{log.read_text()[-3000:]}")


def main() -> int:
    """Runs the story; 1 where an answer was not right."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=random.randrange(2**32))
    parser.add_argument("--write", type=Path, metavar="FILE", help="the page of the docs")
    args = parser.parse_args()
    print(f"seed {args.seed}", flush=True)
    with tempfile.TemporaryDirectory(prefix="story-") as name:
        folder = Path(name)
        environment = {k: v for k, v in os.environ.items() if not k.startswith("SGLPROF_")}
        environment |= {"COLUMNS": str(COLUMNS), "SGLPROF_NSYS": real_nsys()}
        story = Story(folder, environment)
        with running_server(folder, real_sglang(), real_nsys()) as url:
            load = Load(url)
            with load.running():
                run(story, load, random.Random(args.seed))
            story.wrong += load.failures
    for problem in story.wrong:
        print(f"WRONG: {problem}")
    if args.write and not story.wrong:
        text = "\n".join((HEAD, *story.parts)).replace(str(Path.home()), "~")
        args.write.write_text(text, encoding="utf-8")
    return 1 if story.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
