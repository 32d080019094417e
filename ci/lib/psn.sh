# Looks in captures for what goes wrong with sequence numbers. To be sourced, not run; needs LOWTIDE and jq.
#
#   contradictions FILE ADDRESS…   under how many numbers one of these has sent two requests of different
#                                  opcodes to one queue pair (RC)
#   acknowledged_reads FILE ADDRESS   how many READs of this one are acknowledged before they are answered, or
#                                  instead

contradictions() {
    local file=$1
    shift
    "$LOWTIDE" dissect --json "$file" 2>/dev/null |
        jq -r 'select(.opcode) | select(.opcode <= 12 or .opcode >= 19 and .opcode < 32) |
            select([.source | sub(":[0-9]+$"; "") | gsub("[][]"; "")] | inside($ARGS.positional)) |
            "\(.source) \(.qpn) \(.psn) \(.opcode)"' --args "$@" |
        sort -u | cut -d" " -f1-3 | uniq -d | wc -l
}

acknowledged_reads() {
    "$LOWTIDE" dissect --json "$1" 2>/dev/null | jq -s --arg asker "$2:" 'reduce .[] as $packet ({};
        ($packet.psn | tostring) as $psn |
        if $packet.opcode == 12 and ($packet.source | startswith($asker)) then .[$psn] //= "asked"
        elif .[$psn] != "asked" or ($packet.source | startswith($asker)) then .
        elif $packet.opcode == 17 and $packet.aeth.syndrome < 32 then .[$psn] = "acknowledged"
        elif $packet.opcode >= 13 and $packet.opcode <= 16 then .[$psn] = "answered"
        else . end) | [.[] | select(. == "acknowledged")] | length'
}
