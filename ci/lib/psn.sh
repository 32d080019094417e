# Looks in captures for senders that contradict themselves. To be sourced, not run; needs LOWTIDE and jq.
#
#   contradictions FILE ADDRESS…   under how many numbers one of these has sent two requests of different
#                                  opcodes to one queue pair (RC)

contradictions() {
    local file=$1
    shift
    "$LOWTIDE" dissect --json "$file" 2>/dev/null |
        jq -r 'select(.opcode) | select(.opcode <= 12 or .opcode >= 19 and .opcode < 32) |
            select([.source | sub(":[0-9]+$"; "") | gsub("[][]"; "")] | inside($ARGS.positional)) |
            "\(.source) \(.qpn) \(.psn) \(.opcode)"' --args "$@" |
        sort -u | cut -d" " -f1-3 | uniq -d | wc -l
}
