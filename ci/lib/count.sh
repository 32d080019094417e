# Counts what a script in ci/ checked. To be sourced, not run.
#
#   pass WORDS   one check held
#   fail WORDS   one check did not hold
#   skip WORDS   one check could not be made
#   finish       prints the line "N passed, N failed, N skipped" and exits; 0 only if nothing
#                failed and nothing was skipped, because an unmade check proves nothing

passed=0 failed=0 skipped=0

pass() { passed=$((passed + 1)); echo "ok    $*"; }
fail() { failed=$((failed + 1)); echo "FAIL  $*"; }
skip() { skipped=$((skipped + 1)); echo "skip  $*"; }

# check WORDS -- COMMAND…: the command's exit status decides; its output is shown.
check() {
    local words=() status start=$SECONDS
    while [ "$1" != -- ]; do words+=("$1"); shift; done
    shift
    "$@"
    status=$?
    if [ "$status" = 0 ]; then
        pass "${words[*]} ($((SECONDS - start)) s)"
    else
        fail "${words[*]} (exit status $status, $((SECONDS - start)) s)"
    fi
    return "$status"
}

finish() {
    echo "$passed passed, $failed failed, $skipped skipped"
    [ "$failed" = 0 ] && [ "$skipped" = 0 ] && [ "$passed" -gt 0 ]
    exit
}
