# Waiting for what nobody tells of. To be sourced; also inside the guest.
#
#   wait_for COMMAND…          until it succeeds, 10 s at most
#   listens PORT [COMMAND…]    whether a TCP port is listened on, in the namespace that COMMAND enters

wait_for() {
    local tries
    for tries in {1..200}; do
        "$@" && return
        sleep 0.05
    done
    echo "never came: $*"
    return 1
}

# Not with ss: it makes the kernel load a module, and a guest hung in that once.
listens() {
    local port
    port=$(printf %04X "$1")
    shift
    "$@" grep -qs ":$port [0-9A-F]*:0000 0A" /proc/net/tcp /proc/net/tcp6
}
