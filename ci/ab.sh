#!/usr/bin/env bash
# ab.sh BEFORE NOW [ARGUMENT of `sglprof ab` ...]
# A pull request: two servers of sglprof.toml by turns on one machine. Sharper than a nightly
# baseline, since both versions have the same host, clocks and weather.
#
#   SGLPROF_RESULTS  of this comparison (default: perf-results)
#
# Exit status 1: NOW is surely slower. Too uncertain (3) is a warning and 0, so that noise stops
# nobody; 2 and more are faults.
set -euo pipefail
results=${SGLPROF_RESULTS:-perf-results}
mkdir -p "$results"
status=0
python3 -m pytest_sglprof ab "$@" --folder "$results/ab" | tee "$results/ab.txt" || status=$?
if [ -n "${GITHUB_STEP_SUMMARY:-}" ]; then
    # shellcheck disable=SC2016 # backquotes of Markdown
    { echo '```'; cat "$results/ab.txt"; echo '```'; } >>"$GITHUB_STEP_SUMMARY"
fi
if [ "$status" = 3 ]; then
    echo "::warning::the comparison is inconclusive, see ab.txt"
    status=0
fi
exit "$status"
