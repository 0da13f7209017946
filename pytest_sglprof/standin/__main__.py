"""`python -m pytest_sglprof.standin`: runs the stand-in until a signal ends it."""

from __future__ import annotations

import signal
import ssl
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import replace

from pytest_sglprof.standin.answers import find
from pytest_sglprof.standin.engine import RankGone, end_all
from pytest_sglprof.standin.front import Front, address_in_use, died_while_starting, start_failure
from pytest_sglprof.standin.http import Listener
from pytest_sglprof.standin.nodes import run_node
from pytest_sglprof.standin.options import log, parse, web, with_life_seed


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a stand-in; the exit status of the process."""
    words = list(sys.argv[1:] if argv is None else argv)
    given = parse(words)
    life = with_life_seed(words)
    options = replace(parse(life), launch_command=given.launch_command)
    log(
        f"stand-in of SGLang: no GPU, no model, {len(options.others)} other options ignored: "
        f"{' '.join(sorted(options.others)) or 'none'}"
    )
    if options.model.life_noise is not None:
        log(f"stand-in of SGLang: life {options.model.life_noise.seed}")
    if options.start_fault == "import":
        return start_failure(options)
    if options.node_rank:
        return run_node(options, life)
    front = Front(options, life)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, front.stop)
    sys.setswitchinterval(0.001)
    try:
        front.start_ranks()
    except OSError as error:
        log(f"the ranks of {options.nnodes} nodes did not meet: {error}")
        return 1
    except RankGone as gone:
        if front.stopping:
            end_all(front.ranks)
            return 0
        status = died_while_starting(gone)
        end_all(front.ranks)
        return status
    try:
        if options.start_fault == "port":
            raise OSError
        time.sleep(options.ready_delay / 2)
        if options.disaggregation == "prefill":
            front.rooms.listen(options.host, options.bootstrap_port)
        listener = Listener(front, find)
    except ssl.SSLError as error:
        end_all(front.ranks)
        web(f"{options.ssl_certfile} and {options.ssl_keyfile}: {error}", "ERROR")
        return 1
    except OSError:
        end_all(front.ranks)
        return address_in_use(options.host, options.port)
    address = f"{listener.scheme}://{options.host}:{listener.port}"
    web(f"Uvicorn running on {address} (Press CTRL+C to quit)")
    threading.Thread(target=listener.serve_forever, daemon=True).start()
    front.serve()
    return front.wait()


if __name__ == "__main__":
    sys.exit(main())
