# One run of the main job and everything that is checked about it. To be sourced, not run, after
# count.sh and tree.sh.
#
#   find_lowtide            sets LOWTIDE to the release build's command, building it if need be
#   make_work               sets WORK to a fresh directory that goes away with the script
#   run_job NAME ARGS…      runs `lowtide run ARGS…` on $WORK/input; report in $WORK/NAME.json
#   report_says NAME EXPR   the jq expression is true of that run's report
#   check_export NAME       exports the state of that run and holds it against the input
#   sum EXPRESSION          adds the jq expression up over all reports so far
#   above_zero WORDS EXPR   that sum is above 0
#
# Every report is also kept in $REPORTS, where that is set. Without $WORK the sums are over that,
# so over the runs of several scripts.

# Far above what a run takes, so that only a run that hangs meets it.
RUN_SECONDS=${RUN_SECONDS:-420}
EXPORT_SECONDS=${EXPORT_SECONDS:-180}

find_lowtide() {
    local tool missing=()
    for tool in jq rsync diff timeout; do
        command -v "$tool" >/dev/null || missing+=("$tool")
    done
    if [ "${#missing[@]}" != 0 ]; then
        echo "missing: ${missing[*]} (Debian: apt-get install jq rsync diffutils coreutils)" >&2
        return 1
    fi
    if [ -z "${LOWTIDE:-}" ]; then
        cargo build --release --locked || return
        LOWTIDE=${CARGO_TARGET_DIR:-target}/release/lowtide
    fi
    LOWTIDE=$(realpath "$LOWTIDE") && [ -x "$LOWTIDE" ]
}

make_work() {
    WORK=$(mktemp -d "${TMPDIR:-/tmp}/lowtide-ci.XXXXXX") || return
    # The read-only directories of the input and of exports would resist a plain rm of a user.
    trap 'chmod -R u+rwx "$WORK" 2>/dev/null; rm -rf "$WORK"' EXIT
    trap 'exit 130' INT TERM
}

run_job() {
    local name=$1 status left start=$SECONDS
    shift
    timeout -k 10 "$RUN_SECONDS" "$LOWTIDE" run --input "$WORK/input" --state "$WORK/$name" \
        --report "$WORK/$name.json" "$@" >"$WORK/$name.out" 2>&1 </dev/null
    status=$?
    if [ -n "${REPORTS:-}" ] && [ -e "$WORK/$name.json" ]; then
        cp "$WORK/$name.json" "$REPORTS/$(basename "$0")-$name.json"
    fi
    if [ "$status" = 0 ] && jq -e .verified "$WORK/$name.json" >/dev/null; then
        pass "$name: run $* ($((SECONDS - start)) s)"
        sed -n 's/^\(stored\|fault\|windows\)/      \1/p' "$WORK/$name.out"
    else
        fail "$name: run $* (exit status $status, $((SECONDS - start)) s); its last lines:"
        tail -n 15 "$WORK/$name.out" | sed 's/^/      /'
        show_logs "$WORK/$name"
        status=1
    fi
    left=$(processes_of "$WORK/$name")
    if [ -n "$left" ]; then
        fail "$name: processes left behind: $left"
    else
        pass "$name: no process left behind"
    fi
    return "$status"
}

report_says() {
    local value
    if value=$(jq -e "$2" "$WORK/$1.json" 2>&1); then
        pass "$1: $2"
    else
        fail "$1: $2 is $value"
    fi
}

# Process ids whose command line names a state directory.
processes_of() {
    local file
    for file in /proc/[0-9]*/cmdline; do
        if tr '\0' ' ' 2>/dev/null <"$file" | grep -qF "node --config $1/"; then
            file=${file%/cmdline} && printf '%s ' "${file#/proc/}"
        fi
    done
}

show_logs() {
    local log
    for log in "$1"/*/log; do
        [ -s "$log" ] && echo "      $(basename "$(dirname "$log")"):" &&
            tail -n 3 "$log" | cut -c1-300 | sed 's/^/        /'
    done
}

# Succeeds if the command printed nothing and returned 0.
silent() {
    local words=$1 output status
    shift
    output=$(set -o pipefail && "$@" 2>&1 | head -n 20)
    status=$?
    if [ -z "$output" ] && [ "$status" = 0 ]; then
        pass "$words prints nothing"
    else
        fail "$words (exit status $status) prints:"
        printf '%s\n' "$output" | cat -v | sed 's/^/      /'
    fi
}

check_export() {
    local name=$1 out=$WORK/$1.out-tree
    if timeout -k 10 "$EXPORT_SECONDS" "$LOWTIDE" export --state "$WORK/$name" --to "$out" \
        >"$WORK/$name.export" 2>&1 </dev/null; then
        pass "$name: export: $(tail -n 1 "$WORK/$name.export")"
        silent "$name: diff -r --no-dereference" diff -r --no-dereference "$WORK/input" "$out"
        silent "$name: rsync -aHnc --delete --itemize-changes" \
            rsync -aHnc --delete --itemize-changes "$WORK/input/" "$out/"
    else
        fail "$name: export (exit status $?); its last lines:"
        tail -n 10 "$WORK/$name.export" | sed 's/^/      /'
        skip "$name: diff: nothing was exported"
        skip "$name: rsync: nothing was exported"
    fi
    chmod -R u+rwx "$out" 2>/dev/null
    rm -rf "$out" "${WORK:?}/$name"
}

sum() { jq -s "map($1) | add // 0" "${WORK:-$REPORTS}"/*.json 2>/dev/null || echo 0; }

above_zero() {
    local total
    total=$(sum "$2")
    if [ "${total:-0}" -gt 0 ]; then
        pass "$1: $total over all runs"
    else
        fail "$1: ${total:-unknown} over all runs, so recovery was not really used"
    fi
}
