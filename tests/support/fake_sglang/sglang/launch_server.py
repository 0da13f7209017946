"""A server of SGLang's shape for tests of what starts and ends one: a second to ready.

Environment: FAKE_MODE = "" | "never" (never ready) | "chatty" (never ready, log moves) |
"die" (traceback while starting) | "deaf" (ignores SIGTERM) | "hang_stop" (/stop_profile
never answers). FAKE_SHARED = name of shared memory of each rank.
FAKE_REPORT = file that gets what the server and a spawned child see.
"""

import argparse
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

MODE = os.environ.get("FAKE_MODE", "")
SLEEP = "import time, signal\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\ntime.sleep(600)"
SHARE = """
import mmap, os
stream = open(f"/dev/shm/sgl_shm_mq_{os.getpid()}_{os.environ['FAKE_SHARED']}", "w+b")
stream.truncate(4096)
kept = mmap.mmap(stream.fileno(), 4096)
"""
RANK = SHARE * ("FAKE_SHARED" in os.environ) + SLEEP


def say(text):
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


class Handler(BaseHTTPRequestHandler):
    key = ""
    sizes: ClassVar[dict] = {}

    def do_GET(self):
        if self.path == "/ready":
            return self.answer(503 if MODE in ("never", "chatty") else 200, {})
        if self.path == "/server_info":
            if self.key and self.headers.get("Authorization") != f"Bearer {self.key}":
                return self.answer(401, {"error": "Unauthorized"})
            return self.answer(200, {**self.sizes, "api_key": self.key})
        return self.answer(404, {})

    def do_POST(self):
        if self.path == "/stop_profile" and MODE == "hang_stop":
            time.sleep(600)
        say(f"POST {self.path}")
        return self.answer(200, {})

    def answer(self, status, body):
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args):
        pass


def child(queue):
    queue.put({"token": os.environ.get("HF_TOKEN"), "block": block(), "argv": sys.argv})


def block():
    """The environment block that this process was started with."""
    return Path("/proc/self/environ").read_bytes().decode().split("\0")


def report(args):
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=child, args=(queue,))
    process.start()
    seen = queue.get(timeout=30)
    process.join()
    Path(os.environ["FAKE_REPORT"]).write_text(
        json.dumps(
            {
                "argv": sys.argv,
                "token": os.environ.get("HF_TOKEN"),
                "block": block(),
                "cmdline": Path("/proc/self/cmdline").read_bytes().decode().split("\0"),
                "child": seen,
                "tmpdir": os.environ["TMPDIR"],
            }
        )
    )


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--host")
    parser.add_argument("--port", type=int)
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--api-key", default="")
    parser.add_argument("--model-path")
    parser.add_argument("--nccl-port")
    parser.add_argument("--watchdog-timeout")
    parser.add_argument("--device", default="cuda")
    args = parser.parse_args()
    say(f"server_args={vars(args)}")
    if MODE == "die":
        raise RuntimeError("not enough memory for the fake model")
    if MODE == "deaf":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    ranks = [
        subprocess.Popen(
            [f"sglang::scheduler_TP{rank}", "-S", "-c", RANK], executable=sys.executable
        )
        for rank in range(args.tp)
    ]
    if os.environ.get("FAKE_REPORT"):
        report(args)
    Handler.key = args.api_key
    Handler.sizes = {"tp_size": args.tp, "device": args.device, "version": "0.0-fake"}
    server = ThreadingHTTPServer((args.host, args.port), Handler)
    server.daemon_threads = True
    if MODE != "deaf":
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    if MODE == "chatty":
        threading.Thread(target=chat, daemon=True).start()
    say("The server is fired up and ready to roll!")
    try:
        server.serve_forever()
    finally:
        for rank in ranks:
            rank.kill()


def chat():
    while True:
        say("still loading")
        time.sleep(0.05)


if __name__ == "__main__":
    main()
