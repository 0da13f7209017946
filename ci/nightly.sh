#!/usr/bin/env bash
# nightly.sh [PYTEST-ARGUMENT ...]       (default: tests/perf)
# One night: the tests with profile windows are compared with the accepted server lives, and
# everything that people want to see in the morning is in one folder, also after a failure.
#
#   SGLPROF_STATE    carried from night to night: baselines/ and history/  (default: perf-state)
#   SGLPROF_RESULTS  of this night: junit.xml, nights.csv, nights.html, runs with traces and page
#                    (default: perf-results)
#   SGLPROF_ACCEPT   all (default): lives that passed become the next nights' baseline; new: only
#                    those of keys without one; none: compare only, as in a pull request
#
# The exit status is that of pytest.
set -euo pipefail
state=${SGLPROF_STATE:-perf-state}
results=${SGLPROF_RESULTS:-perf-results}
accept=${SGLPROF_ACCEPT:-all}
[ $# -gt 0 ] || set -- tests/perf
unset SGLPROF_ACCEPT # the option below says it, where there is one

mkdir -p "$state/baselines" "$state/history" "$results"
runs=$results/runs
mkdir -p "$runs/history"
cp -R "$state/history/." "$runs/history/"

options=(--sglprof --sglprof-output "$runs" --sglprof-baselines "$state/baselines")
[ "$accept" = none ] || options+=(--sglprof-accept "$accept")
status=0
python3 -m pytest "${options[@]}" --junitxml "$results/junit.xml" "$@" || status=$?

cp -R "$runs/history/." "$state/history/"
# Charts and table of all nights; a night without any server life has none, which is no failure.
python3 -m pytest_sglprof history "$runs" --baselines "$state/baselines" \
    --page "$results/nights.html" || true
python3 -m pytest_sglprof history "$runs" --baselines "$state/baselines" \
    --format csv -o "$results/nights.csv" || true
rm -f "$runs/latest" # uploads would follow this link, and hold the run twice
exit "$status"
